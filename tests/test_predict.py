import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import danet
from danet.config import TestConfig
from danet.data.scenes import render
from danet.errors import UserError
from danet.inputs import find_inputs, output_stems
from danet.model_folder import Metadata
from danet.palette import default_palette
from danet.segmentation import write_segmentation
from networks import tiny_danet
from pictures import noise


@pytest.fixture(scope="module")
def predictor() -> danet.Predictor:
    model = tiny_danet()
    return danet.Predictor(model, device="cpu")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1", "I", "I;16", "LA"])
def test_every_mode_is_segmented_at_its_own_size(predictor: danet.Predictor, mode: str) -> None:
    grey = noise(mode="L")
    image = grey.convert(mode) if mode in ("LA", "I") else noise(mode=mode.partition(";")[0])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    expected = predictor((grey if mode in ("LA", "I", "I;16") else image).convert("RGB"))
    segmentation = predictor(image)
    assert segmentation.classes.shape == (37, 50)
    assert segmentation.classes.dtype == np.uint8
    np.testing.assert_array_equal(segmentation.classes, expected.classes)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 2)])
def test_tiny_pictures(predictor: danet.Predictor, size: tuple[int, int]) -> None:
    assert predictor(noise(*size)).classes.shape == size[::-1]


@pytest.mark.parametrize("size", [(1, 40), (2, 40), (3, 70), (8, 90), (9, 40), (40, 1)])
def test_narrow_pictures_in_bfloat16(size: tuple[int, int]) -> None:
    """New tensors start as NaN here, which nothing may leave there or read."""
    image = noise(*size)
    expected = danet.Predictor(tiny_danet(), device="cpu", precision="fp32")
    rounded = danet.Predictor(tiny_danet(), device="cpu", precision="bf16")
    torch.use_deterministic_algorithms(True)
    try:
        found, exact = (each(image, probabilities=True) for each in (rounded, expected))
    finally:
        torch.use_deterministic_algorithms(False)
    np.testing.assert_allclose(found.probabilities, exact.probabilities, atol=0.05)


def test_path_array_and_picture_give_the_same(predictor: danet.Predictor, tmp_path: Path) -> None:
    image = noise()
    image.save(tmp_path / "a.png")
    expected = predictor(image).classes
    np.testing.assert_array_equal(predictor(np.asarray(image)).classes, expected)
    np.testing.assert_array_equal(predictor(tmp_path / "a.png").classes, expected)
    np.testing.assert_array_equal(predictor(str(tmp_path / "a.png")).classes, expected)


def test_exif_orientation_of_a_picture_in_memory(predictor: danet.Predictor) -> None:
    image = noise()
    image.getexif()[0x0112] = 6
    segmentation = predictor(image)
    assert segmentation.classes.shape == (50, 37)
    assert segmentation.overlay(image).size == (37, 50)


def test_probabilities_when_asked_for_at_once_or_later(predictor: danet.Predictor) -> None:
    segmentation = predictor(noise(), probabilities=True)
    np.testing.assert_array_equal(predictor(noise()).probabilities, segmentation.probabilities)
    assert segmentation.probabilities.shape == (5, 37, 50)
    np.testing.assert_allclose(segmentation.probabilities.sum(0), 1, rtol=1e-4)
    np.testing.assert_array_equal(segmentation.probabilities.argmax(0), segmentation.classes)


def test_a_result_keeps_its_picture(predictor: danet.Predictor) -> None:
    image = noise()
    image.getexif()[0x0112] = 6
    segmentation = predictor(image)
    assert segmentation.overlay() == segmentation.overlay(image)
    with pytest.raises(UserError, match="was not kept"):
        predictor.segment_batch(np.array(noise())[None])[0].overlay()


def test_overlay_blends_the_class_colours() -> None:
    classes = np.array([[0, 1]], np.uint8)
    segmentation = danet.Segmentation(classes, ("a", "b"), ((0, 0, 0), (200, 100, 0)))
    overlay = segmentation.overlay(Image.new("RGB", (2, 1), (100, 100, 100)), opacity=0.5)
    assert overlay.getpixel((0, 0)) == (50, 50, 50)
    assert overlay.getpixel((1, 0)) == (150, 100, 50)
    with pytest.raises(UserError, match="3x3 but its classes are 2x1"):
        segmentation.overlay(Image.new("RGB", (3, 3)))
    for opacity in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"opacity must be in 0\.\.1"):
            segmentation.overlay(Image.new("RGB", (2, 1)), opacity)


def test_masks_are_palette_images(tmp_path: Path) -> None:
    classes = np.array([[0, 1, 2]], np.uint8)
    segmentation = danet.Segmentation(classes, ("a", "b", "c"), default_palette(3))
    write_segmentation(segmentation, None, tmp_path / "new", "x")
    mask = Image.open(tmp_path / "new/x.png")
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), classes)
    assert mask.convert("RGB").getpixel((2, 0)) == default_palette(3)[2]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)]
)
def test_arrays_must_be_rgb_pictures(predictor: danet.Predictor, image: np.ndarray) -> None:
    with pytest.raises(UserError, match="H W 3 uint8"):
        predictor(image)


@pytest.mark.parametrize(
    "image", [None, b"bytes", np.zeros((0, 0, 3), np.uint8), Image.new("RGB", (0, 3))]
)
def test_what_is_no_picture(predictor: danet.Predictor, image: object) -> None:
    with pytest.raises(UserError, match="H W 3 uint8"):
        predictor(image)


def test_damaged_exif_of_a_picture_in_memory(predictor: danet.Predictor, tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png", exif=b"garbage!!")
    for image in (Image.open(tmp_path / "a.png"), tmp_path / "a.png"):
        with pytest.raises(UserError, match="cannot convert RGB to RGB"):
            predictor(image)


def test_probabilities_are_of_the_upright_picture(predictor: danet.Predictor) -> None:
    image = noise()
    image.getexif()[0x0112] = 6  # lies on its side
    scores = predictor.probabilities(image)
    assert scores.shape == (5, 50, 37)
    np.testing.assert_array_equal(scores, predictor(image, probabilities=True).probabilities)


def test_torchs_default_device_is_not_the_predictors(predictor: danet.Predictor) -> None:
    """In a notebook it may be a GPU, and the predictor's not."""
    expected = predictor(noise(), probabilities=True)
    explained = danet.explain(predictor, noise(), (20, 10))
    with torch.device("meta"):
        found = predictor(noise(), probabilities=True)
        again = danet.explain(predictor, noise(), (20, 10))
    np.testing.assert_array_equal(found.classes, expected.classes)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    np.testing.assert_array_equal(again.attention, explained.attention)


def test_unknown_precision() -> None:
    with pytest.raises(UserError, match="auto, fp32 or bf16"):
        danet.Predictor(tiny_danet(), device="cpu", precision="fp16")


def test_floating_pictures_are_refused(predictor: danet.Predictor) -> None:
    with pytest.raises(UserError, match="8 or 16 bit"):
        predictor(Image.new("F", (3, 3)))


def test_normalisation_comes_from_the_model() -> None:
    torch.manual_seed(0)
    options = {"pretrained_backbone": False, "head_channels": 16, "key_channels": 4}
    plain = danet.DANet(5, "test_resnet", **options)
    shifted = danet.DANet(
        5,
        "test_resnet",
        **options,
        metadata=Metadata.placeholder(5).model_copy(update={"mean": (0.0, 0.0, 0.0)}),
    )
    shifted.load_state_dict(plain.state_dict())
    first, second = (
        danet.Predictor(model, "cpu")(noise(), probabilities=True).probabilities
        for model in (plain, shifted)
    )
    assert np.abs(first - second).max() > 1e-4


class TestInputs:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("a.png", "b.JPG", "sub/a.png", "notes.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    def names(self, *inputs: str) -> tuple[list[str], list[str]]:
        found, problems = find_inputs(inputs)
        return [one.path.name for one in found], problems

    def test_folders_with_their_subfolders(self, folder: Path) -> None:
        assert self.names(str(folder)) == (["a.png", "b.JPG", "a.png"], [])

    def test_hidden_files_are_none_and_links_to_nothing_are_told_of(self, folder: Path) -> None:
        (folder / "._a.png").touch()
        (folder / "gone.png").symlink_to("nowhere")
        assert self.names(str(folder)) == (["a.png", "b.JPG", "gone.png", "a.png"], [])

    def test_globs_and_files(self, folder: Path) -> None:
        assert self.names(f"{folder}/*.png", f"{folder}/b.JPG") == (["a.png", "b.JPG"], [])

    def test_the_same_file_twice_is_one(self, folder: Path) -> None:
        assert self.names(f"{folder}/a.png", f"{folder}/*.png")[0] == ["a.png"]

    def test_a_name_with_brackets_is_no_glob(self, folder: Path) -> None:
        (folder / "x[1].png").touch()
        assert self.names(f"{folder}/x[1].png") == (["x[1].png"], [])

    @pytest.mark.parametrize(
        ("name", "message"), [("*.gif", "nothing matches"), ("c.png", "no such file")]
    )
    def test_what_is_not_there(self, folder: Path, name: str, message: str) -> None:
        paths, problems = self.names(f"{folder}/{name}")
        assert not paths
        assert message in problems[0]

    def test_a_folder_without_pictures(self, tmp_path: Path) -> None:
        assert "no pictures" in self.names(str(tmp_path))[1][0]

    def test_stems_are_unique(self) -> None:
        paths = [Path("x/a.png"), Path("y/a.png"), Path("y/b.png"), Path("y/b.c.png")]
        stems = output_stems(paths)
        assert len(set(stems.values())) == 4
        assert stems[paths[2]] == "b"

    @given(st.lists(st.text("ab_./", min_size=1, max_size=6), unique=True, max_size=12))
    def test_stems_of_any_paths_are_unique(self, names: list[str]) -> None:
        paths = list({Path(f"{name}.png") for name in names})
        assert len(set(output_stems(paths).values())) == len(paths)


def test_a_device_that_is_not_there() -> None:
    model = danet.DANet(2, "test_resnet", pretrained_backbone=False, head_channels=8)
    with pytest.raises(UserError, match="device 'tpu' is unknown"):
        danet.Predictor(model, device="tpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_dtype(dtype: torch.dtype) -> None:
    predictor = danet.Predictor(tiny_danet().to(dtype), "cpu", precision="fp32")
    assert predictor(noise()).classes.shape == (37, 50)


def test_batches_must_be_of_rgb_pictures(predictor: danet.Predictor) -> None:
    assert predictor.segment_batch(np.zeros((0, 30, 50, 3), np.uint8)) == []
    for wrong in (np.zeros((1, 30, 50, 3), np.float32), np.zeros((30, 50, 3), np.uint8)):
        with pytest.raises(UserError, match="P H W 3 uint8"):
            predictor.segment_batch(wrong)
    with pytest.raises(UserError, match="must have pixels"):
        predictor.segment_batch(np.zeros((1, 0, 5, 3), np.uint8))


def test_read_only_arrays_are_taken_without_a_warning(predictor: danet.Predictor) -> None:
    pictures = np.array(noise())[None]
    expected = predictor.segment_batch(pictures)[0].classes
    pictures.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predictor.segment_batch(pictures)[0].classes
    np.testing.assert_array_equal(found, expected)


def test_a_result_is_pickled_without_the_network(predictor: danet.Predictor) -> None:
    found = predictor(noise())
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.classes, found.classes)
    assert again.probabilities is None
    scored = predictor(noise(), probabilities=True)
    again = pickle.loads(pickle.dumps(scored))
    expected = scored.probabilities
    np.testing.assert_array_equal(again.probabilities, expected)
    assert len(pickle.dumps(found)) < 20_000
    assert found != predictor(noise())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_result_still_has_probabilities(
    copied: Callable[[danet.Segmentation], danet.Segmentation], predictor: danet.Predictor
) -> None:
    found = predictor(noise())
    again = copied(found)
    assert again.score is found.score
    assert (again.classes is found.classes) == (copied is copy.copy)
    np.testing.assert_array_equal(again.probabilities, found.probabilities)
    assert "probabilities" in vars(copied(found))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("config", {"channel_affinity": "paper"}),
        ("config", {"align_corners": True}),
        ("metadata", {"mean": (1.0, 2.0, 3.0)}),
        ("metadata", {"palette": default_palette(6)[1:]}),
        ("metadata", {"test": TestConfig(flip=True)}),
    ],
)
def test_fingerprints_tell_models_of_the_same_weights_apart(
    part: str, changes: dict[str, object]
) -> None:
    """Their results differ, so a rerun must not pass over them."""
    plain, changed = tiny_danet(), tiny_danet()
    setattr(changed, part, getattr(plain, part).model_copy(update=changes))
    prints = {danet.Predictor(model, "cpu").fingerprint() for model in (plain, plain, changed)}
    assert len(prints) == 2


def test_fingerprints_tell_protocols_apart() -> None:
    model = tiny_danet()
    prints = {
        danet.Predictor(model, "cpu", test=test).fingerprint()
        for test in (None, TestConfig(ratios=(0.5, 1.0)))
    }
    assert len(prints) == 2


def test_a_predictors_network_is_not_saved(predictor: danet.Predictor, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="save the network or folder that the Predictor was made from"
    ):
        predictor.model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_predictors_network_is_not_for_another_one(predictor: danet.Predictor) -> None:
    with pytest.raises(UserError, match="is a Predictor's network"):
        danet.Predictor(predictor.model)


def test_a_device_of_torch_and_a_network_that_is_none() -> None:
    model = tiny_danet()
    assert danet.Predictor(model, device=torch.device("cpu")).device == torch.device("cpu")
    with pytest.raises(UserError, match=r"not OptimizedModule; .* compile_graph=True"):
        danet.Predictor(torch.compile(model))


def test_arrays_in_reversed_order_and_their_overlay() -> None:
    predictor = danet.Predictor(tiny_danet(), device="cpu", precision="fp32")
    frames = np.asarray(render(2, 7)[0].resize((64, 48)))[None]
    (found,) = predictor.segment_batch(frames[..., ::-1])
    expected = predictor(frames[0, ..., ::-1])
    assert np.array_equal(found.classes, expected.classes)
    assert found.overlay(frames[0]).size == (64, 48)
    with pytest.raises(UserError, match=r"one array P H W 3 .* not list"):
        predictor.segment_batch([frames[0], frames[0]])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone.body.layer3.0.conv1.weight", float("nan")),
        ("head.fused_classifier.1.bias", float("inf")),
        ("backbone.body.layer2.0.bn1.running_var", -1.0),
    ],
)
def test_damaged_weights_are_refused(name: str, value: float, precision: str) -> None:
    model = tiny_danet()
    model.state_dict()[name].flatten()[0] = value
    with pytest.raises(UserError, match=r"weights are not finite \(.*they are damaged"):
        danet.Predictor(model, device="cpu", precision=precision)
