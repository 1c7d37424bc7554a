import contextlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import danet
from danet.cli import app
from danet.data import dataset_spec
from danet.errors import UserError
from danet.heads import DualAttentionHead
from danet.interop import mmseg
from danet.interop.convert import convert
from danet.recipes import load_recipe

CLASSES = 11

# From the authors' names to ours, as the table of head keys in the facts has them, by hand.
AUTHORS = (
    (r"^backbone\.body\.", "pretrained."),
    (r"^head\.position_branch\.reduce\.", "head.conv5a."),
    (r"^head\.position_branch\.attention\.(query|key|value)\.", r"head.sa.\1_conv."),
    (r"^head\.position_branch\.attention\.residual_weight$", "head.sa.gamma"),
    (r"^head\.position_branch\.refine\.", "head.conv51."),
    (r"^head\.position_classifier\.", "head.conv6."),
    (r"^head\.channel_branch\.reduce\.", "head.conv5c."),
    (r"^head\.channel_branch\.attention\.residual_weight$", "head.sc.gamma"),
    (r"^head\.channel_branch\.refine\.", "head.conv52."),
    (r"^head\.channel_classifier\.", "head.conv7."),
    (r"^head\.fused_classifier\.", "head.conv8."),
)


def build(backbone: str = "resnet50s", **options: object) -> danet.DANet:
    torch.manual_seed(0)
    settings = {"auxiliary": False, "multi_grid": (4, 8, 16), "align_corners": True}
    return danet.DANet(
        CLASSES,
        backbone,
        pretrained_backbone=False,
        head_channels=16,
        key_channels=4,
        **{**settings, **options},
    ).eval()


def authors_state(model: danet.DANet) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        renamed = name
        for pattern, theirs in AUTHORS:
            renamed = re.sub(pattern, theirs, renamed)
        state[renamed] = tensor
    state["pretrained.fc.weight"] = torch.zeros(1000, 2048)
    return state


def saved(tmp_path: Path, content: object, **options: object) -> Path:
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("backbone", ["resnet50", "resnet50s", "resnet50c"])
def test_the_authors_checkpoint_with_any_stem(backbone: str, tmp_path: Path) -> None:
    model = build(backbone)
    path = saved(tmp_path, {"epoch": 3, "state_dict": authors_state(model)})
    converted = convert(path, dataset_spec("camvid"))
    assert converted.config.backbone == backbone
    assert converted.config.multi_grid == (4, 8, 16)
    assert converted.config.align_corners
    assert converted.metadata.classes == dataset_spec("camvid").classes
    assert converted.metadata.test == load_recipe("cityscapes_r101_authors").test
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(converted(images).fused, model(images).fused)


def test_a_dilated_resnet_d_is_refused(tmp_path: Path) -> None:
    """timm's averages 2x2 pixels in the dilated stages' shortcuts, where mmsegmentation's does not:
    its c3 was seen to differ by a tenth."""
    message = "its resnet50d at output stride 8 cannot be converted"
    with pytest.raises(UserError, match=message):
        convert(saved(tmp_path, authors_state(build("resnet50d"))), dataset_spec("camvid"))
    model = build("resnet50d", output_stride=32, multi_grid=None, align_corners=False)
    with pytest.raises(UserError, match=message):
        convert(saved(tmp_path, mmseg_state(model)))
    config = "model = dict(backbone=dict(type='ResNetV1d'))"
    content = {"meta": {"cfg": config}, "state_dict": mmseg_state(model)}
    assert convert(saved(tmp_path, content)).config == model.config


@pytest.mark.parametrize("how", ["legacy", "bare", "ddp", "safetensors", "no counters"])
def test_however_it_was_saved(how: str, tmp_path: Path) -> None:
    state = authors_state(build())
    if how == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    elif how == "legacy":
        path = saved(tmp_path, {"state_dict": state}, _use_new_zipfile_serialization=False)
    elif how == "ddp":
        path = saved(tmp_path, {"state_dict": {f"module.{n}": t for n, t in state.items()}})
    elif how == "no counters":
        old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
        path = saved(tmp_path, {"state_dict": old})
    else:
        path = saved(tmp_path, state)
    assert convert(path, dataset_spec("camvid")).config.backbone == "resnet50s"


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = authors_state(build())
    state["head.extra.weight"] = torch.zeros(1)
    del state["head.conv51.0.weight"]
    state["head.conv8.1.weight"] = torch.zeros(CLASSES, 7, 1, 1)
    with pytest.raises(UserError) as caught:
        convert(saved(tmp_path, state), dataset_spec("camvid"))
    message = str(caught.value)
    assert "3 keys do not fit" in message
    assert "head.extra.weight is not known" in message
    assert "position_branch.refine.0.weight is missing" in message
    assert f"is {CLASSES}x7x1x1, not {CLASSES}x16x1x1" in message


def test_classes_must_fit_and_have_numbers_for_names(tmp_path: Path) -> None:
    path = saved(tmp_path, authors_state(build()))
    assert convert(path).metadata.classes[::10] == ("class 0", "class 10")
    other = danet.data.DatasetSpec("other", ("a", "b"))
    with pytest.raises(UserError, match="has 11 classes, but 2 are named"):
        convert(path, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv.weight": torch.zeros(1)}, "not a DANet of"),
        ({"state_dict": 5}, "not a DANet of"),
        ([1, 2], "holds a list"),
        ({"head.sa.gamma": torch.zeros(1)}, "0 blocks in the third stage"),
        ({"decode_head.pam.gamma.scale": torch.zeros(())}, "0 blocks in the third stage"),
    ],
)
def test_other_files_are_named(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        convert(saved(tmp_path, content))


def mmseg_state(model: danet.DANet) -> dict[str, Tensor]:
    """The weights under mmsegmentation's names, by the converter's own table."""
    state = {}
    for name, tensor in model.state_dict().items():
        theirs, ours = next(pair for pair in mmseg._PREFIXES.items() if name.startswith(pair[1]))
        state[theirs + name.removeprefix(ours)] = tensor
    return state


def test_mmsegmentations_network_is_dilated_as_its_config_says(tmp_path: Path) -> None:
    model = build("resnet50c", output_stride=16, multi_grid=(1, 2, 4))
    config = """model = dict(backbone=dict(type='ResNetV1c', strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2), multi_grid=(1, 2, 4)), decode_head=dict(align_corners=True))"""
    path = saved(tmp_path, {"meta": {"cfg": config}, "state_dict": mmseg_state(model)})
    converted = convert(path)
    assert converted.config == model.config
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(converted(images).fused, model(images).fused)


def test_mmsegmentations_residual_weights_are_plain_numbers(tmp_path: Path) -> None:
    state = mmseg_state(build("resnet50c", multi_grid=None))
    state["decode_head.pam.gamma.scale"] = torch.tensor(0.75)
    state["decode_head.cam.gamma.scale"] = torch.tensor(0.5)
    head = convert(saved(tmp_path, {"state_dict": state})).head
    assert head.position_branch.attention.residual_weight.tolist() == [0.75]
    assert head.channel_branch.attention.residual_weight.tolist() == [0.5]


def test_classes_are_those_that_are_asked_for_or_its_own(tmp_path: Path) -> None:
    own = [f"own {index}" for index in range(CLASSES)]
    state = mmseg_state(build("resnet50c", multi_grid=None))
    path = saved(tmp_path, {"meta": {"CLASSES": own}, "state_dict": state})
    camvid = dataset_spec("camvid")
    for spec, classes, name in ((None, tuple(own), None), (camvid, camvid.classes, "camvid")):
        metadata = convert(path, spec).metadata
        assert (metadata.classes, metadata.dataset) == (classes, name)


@pytest.mark.parametrize(
    "values", [torch.zeros(()).expand(16, 2048, 3, 3), torch.zeros(16, 2048, 3, 3).to_sparse()]
)
def test_values_that_the_file_does_not_hold_are_refused(values: Tensor, tmp_path: Path) -> None:
    state = {**authors_state(build()), "head.conv5a.0.weight": values}
    with pytest.raises(UserError, match=r"conv5a\.0\.weight claims more values than the file"):
        convert(saved(tmp_path, state))


SLIDE = "model = dict(test_cfg=dict(mode='slide', crop_size={}, stride=(9, 9)))"
NORMALIZED = "img_norm_cfg = dict(mean={}, std={})"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SLIDE.format((8, 8)), "(test: stride must not exceed window"),
        (SLIDE.format((70_000, 10)), "(test.window.1: Input should be less than or equal to"),
        ("test_pipeline = [dict(type='Resize', scale=(0, 512))]", "(test.scale.1: Input should"),
        (NORMALIZED.format([1e999, 2, 3], [1, 1, 1]), "(mean.0: Input should be"),
        (NORMALIZED.format([10**400, 2, 3], [1, 1, 1]), "(mean.0: Input should be"),
        (NORMALIZED.format([1, 2, 3], [1, 0, 1]), "(std.1: Input should be greater than 0"),
    ],
)
def test_metadata_out_of_range_is_named(config: str, message: str, tmp_path: Path) -> None:
    model = build("resnet50c", multi_grid=None)
    meta = {"CLASSES": dataset_spec("camvid").classes, "config": config.replace("inf", "1e999")}
    path = saved(tmp_path, {"meta": meta, "state_dict": mmseg_state(model)})
    with pytest.raises(
        UserError, match=re.escape(f"{path}: its metadata cannot be used {message}")
    ):
        convert(path)


@pytest.mark.parametrize("classes", [0, 256])
def test_more_classes_than_masks_can_hold(classes: int, tmp_path: Path) -> None:
    state = mmseg_state(build("resnet50c", multi_grid=None))
    state["decode_head.conv_seg.weight"] = torch.zeros(classes, 16, 1, 1)
    meta = {"CLASSES": [f"class {index}" for index in range(classes)]}
    with pytest.raises(UserError, match=f"has {classes} classes; only networks of 1 to 255"):
        convert(saved(tmp_path, {"meta": meta, "state_dict": state}))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head.conv8.1.weight", (), "is a number"),
        ("head.conv5a.0.weight", (0, 2048, 3, 3), "head_channels: Input should be greater"),
        ("head.sa.query_conv.weight", (65_537, 1), "key_channels: Input should be less"),
        ("head.sa.gamma", (2,), "residual_weight is 2, not 1"),
        ("pretrained.conv1.0.weight", (), "a ResNet stem of 0 channels"),
    ],
)
def test_weights_of_any_shape_are_named(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    state = {**authors_state(build()), name: torch.zeros(shape)}
    with pytest.raises(UserError, match=message):
        convert(saved(tmp_path, state), dataset_spec("camvid"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((1,), float("nan")), "residual_weight holds nan or infinite numbers"),
        (torch.full((1,), float("inf")), "residual_weight holds nan or infinite numbers"),
        (torch.ones(1, dtype=torch.int64), "residual_weight holds int64, not floating point"),
        (torch.ones(1, dtype=torch.complex64), "residual_weight holds complex64, not floating"),
    ],
)
def test_weights_that_are_no_real_numbers_are_named(
    values: Tensor, message: str, tmp_path: Path
) -> None:
    state = {**authors_state(build()), "head.sa.gamma": values}
    with pytest.raises(UserError, match=message):
        convert(saved(tmp_path, state), dataset_spec("camvid"))


def test_half_precision_is_taken(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in authors_state(build()).items()}
    model = convert(saved(tmp_path, state), dataset_spec("camvid"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_one_tensor_may_not_ask_for_any_amount_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*sizes: int, **settings: object) -> DualAttentionHead:
        head = DualAttentionHead(*sizes, **settings)
        assert all(parameter.is_meta for parameter in head.parameters())
        return head

    state = {**authors_state(build()), "head.conv5a.0.weight": torch.zeros(4096, 1)}
    path = saved(tmp_path, state)
    monkeypatch.setattr("danet.model.DualAttentionHead", without_memory)
    with pytest.raises(UserError, match="keys do not fit"):
        convert(path, dataset_spec("camvid"))


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_damaged_files_are_named(content: bytes | None, tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        convert(path)
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "nowhere.pth")


class Trap:
    """Pickled, it asks for a file to be made when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_checkpoint_is_executed(new_format: bool, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    content = {"meta": Trap(sprung), "state_dict": authors_state(build())}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=new_format)
    with contextlib.suppress(UserError):
        convert(path, dataset_spec("camvid"))
    assert not sprung.exists()


def test_foreign_objects_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    """As mmengine's message hub: an object of a class that need not even be importable."""
    path = saved(tmp_path, {"hub": ForeignLog([1.0]), "state_dict": authors_state(build())})
    model = convert(path, dataset_spec("camvid"))
    assert model.config.backbone == "resnet50s"
    assert ForeignLog.built == 1


class ForeignLog:
    built = 0

    def __init__(self, values: list[float]) -> None:
        type(self).built += 1
        self.values = values


def test_a_run_is_not_written_into(tmp_path: Path) -> None:
    path = saved(tmp_path, authors_state(build()))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").touch()
    command = ["convert", str(path), "--data", "camvid", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    assert "holds a run" in str(done.exception)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_classes_can_be_those_of_a_folder(tmp_path: Path) -> None:
    path = saved(tmp_path, authors_state(build()))
    names = [f"thing {index}" for index in range(dataset_spec("camvid").num_classes)]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    command = ["convert", str(path), "--out", str(tmp_path / "model"), "--root", str(tmp_path)]
    refused = CliRunner().invoke(app, command)
    assert str(refused.exception).startswith("--root goes with --data")
    refused = CliRunner().invoke(app, [*command, "--data", "camvid"])
    assert str(refused.exception).startswith("--root goes with --data folder")
    done = CliRunner().invoke(app, [*command, "--data", "folder"], catch_exceptions=False)
    assert done.exit_code == 0
    assert list(danet.DANet.from_pretrained(tmp_path / "model").metadata.classes) == names
