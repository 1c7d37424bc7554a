import functools
import itertools
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import danet
from danet.choices import ExportFormat
from danet.cli import app
from danet.config import TestConfig
from danet.data.scenes import render
from danet.data.transforms import fitted_size
from danet.errors import ExportDiffers, UserError
from danet.export import SUFFIXES, Agreement, calibration_pictures, compare, export, load
from danet.export.files import Engine
from danet.export.graph import WholePicture, _fitted, attend_by_equal_widths
from danet.model_folder import Metadata
from danet.palette import default_palette

FORMATS: tuple[ExportFormat, ...] = ("onnx", "torch", "openvino")


def network(scale: tuple[int, int] | None = None, **options: object) -> danet.DANet:
    torch.manual_seed(1)
    metadata = Metadata(
        classes=("sky", "Straße", "car", "tree"),
        palette=default_palette(4),
        test=TestConfig(scale=scale),
    )
    settings = {"head_channels": 24, "key_channels": 8, **options}
    model = danet.DANet(
        4, "test_resnet", pretrained_backbone=False, metadata=metadata, **settings
    ).eval()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.state_dict().items():
        if name.endswith("residual_weight"):
            tensor.fill_(0.7)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def expected_logits(model: danet.DANet, images: Tensor) -> Tensor:
    """What the file has to compute, by the plain network."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (model.metadata.mean, model.metadata.std)
    )
    pixels = (images * 255 - mean) / std
    scale = model.metadata.test.scale
    height, width = images.shape[-2:]
    if scale is not None:
        fitted = fitted_size((width, height), scale)
        pixels = F.interpolate(pixels, size=fitted[::-1], mode="bilinear")
    with torch.no_grad():
        logits = model.upsample(model(pixels).fused, pixels.shape[-2:])
    return logits if scale is None else model.upsample(logits, (height, width))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ExportFormat], Path]:
    """The file of the plain network in a format."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def file_of(file_format: ExportFormat) -> Path:
        path = folder / file_format / f"m{SUFFIXES[file_format]}"
        path.parent.mkdir(exist_ok=True)
        assert export(network(), str(path), file_format).difference < 1e-4
        return path

    return file_of


def check_any_batch_and_size(model: danet.DANet, path: Path, file_format: ExportFormat) -> None:
    run = load(path, file_format).run
    for batch, height, width in [(1, 33, 200), (3, 120, 64), (2, 71, 45), (1, 32, 600)]:
        images = torch.rand(batch, 3, height, width)
        expected = expected_logits(model, images)
        found = run(images.numpy())
        assert found.shape == (batch, 4, height, width)
        np.testing.assert_allclose(
            found, expected.numpy(), atol=1e-4 * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("file_format", FORMATS)
def test_any_batch_and_size_gives_the_models_logits(
    file_format: ExportFormat, exported: Callable[[ExportFormat], Path]
) -> None:
    check_any_batch_and_size(network(), exported(file_format), file_format)


FITTED = ((150, 100), {"align_corners": True})
ONLY_CHANNEL = (None, {"position": False, "channel_affinity": "paper"})
ONLY_POSITION = (None, {"output_stride": 16, "channel": False})


@pytest.mark.parametrize(
    ("file_format", "scale", "options"),
    [
        ("onnx", *FITTED),
        *(
            pytest.param(file_format, *case, marks=pytest.mark.slow)
            for file_format, case in [
                ("torch", FITTED),
                ("openvino", FITTED),
                ("openvino", (None, {"channel_affinity": "paper"})),
                *itertools.product(["onnx", "torch"], [ONLY_CHANNEL, ONLY_POSITION]),
            ]
        ),
    ],
)
def test_other_networks_are_exported_as_well(
    file_format: ExportFormat,
    scale: tuple[int, int] | None,
    options: dict[str, object],
    tmp_path: Path,
) -> None:
    model = network(scale, **options)
    path = tmp_path / f"model{SUFFIXES[file_format]}"
    assert export(model, path, file_format).difference < 1e-4
    check_any_batch_and_size(model, path, file_format)


@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    bounds=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
)
def test_whole_numbers_fit_a_size_as_fractions_do(
    size: tuple[int, int], bounds: tuple[int, int]
) -> None:
    scale = min(Fraction(max(bounds), max(size)), Fraction(min(bounds), min(size)))
    assert _fitted(size, bounds) == tuple(
        max(1, math.floor(side * scale + Fraction(1, 2))) for side in size
    )


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50c", "convnext_atto", "vit_tiny_patch16_224"])
def test_other_backbones_as_onnx(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = danet.DANet(4, backbone, pretrained_backbone=False, head_channels=32).eval()
    export(model, tmp_path / "model.onnx", "onnx")
    images = torch.rand(1, 3, 70, 90)
    expected = expected_logits(model, images)
    found = load(tmp_path / "model.onnx", "onnx").run(images.numpy())
    np.testing.assert_allclose(
        found, expected.numpy(), atol=1e-3 * float(expected.abs().max()), rtol=0
    )


def test_a_photo_gets_the_predictors_classes(exported: Callable[[ExportFormat], Path]) -> None:
    image = render(2, 7)[0]
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    found = load(exported("onnx"), "onnx").run(pixels).argmax(1)[0]
    expected = danet.Predictor(network(), device="cpu", precision="fp32")(image).classes
    assert (found == expected).mean() > 0.9999


@pytest.mark.parametrize(("keys", "channels"), [(40, 24), (1, 3), (130, 20)])
def test_attention_by_equal_widths_is_exact(keys: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 37, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 8, keys, generator=generator, dtype=torch.float64)
    value = torch.randn(2, channels, keys, generator=generator, dtype=torch.float64)
    weights = (query.transpose(1, 2) @ key).softmax(-1)
    expected = value @ weights.transpose(1, 2)
    torch.testing.assert_close(attend_by_equal_widths(query, key, value), expected)


def test_files_are_compared_by_their_worst_picture_and_by_all_pixels() -> None:
    """By hand: of two pictures of two pixels, one is off by 3 of 4, and has another class."""
    expected = torch.tensor([[4.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    found = [expected.clone(), expected.clone()]
    found[0][0, 0, 0, 1] = 3
    found[1][0, 1, 0, 0] = 1

    def compared(*logits: Tensor) -> Agreement:
        left = iter(logits)
        engine = Engine(lambda _: next(left).numpy(), None)
        return compare(lambda _: expected, engine, [torch.zeros(1, 3, 1, 2) for _ in logits])

    assert compared(*found) == (3 / 4, 3 / 4)
    with pytest.raises(ExportDiffers, match=r"gives logits \(1, 2, 1, 1\)"):
        compared(expected[..., :1])
    with pytest.raises(ExportDiffers, match="not finite"):
        compared(expected.log())


def test_calibration_pictures_are_few_and_not_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("a", (2048, 512)), ("b", (31, 400)), ("c", (64, 48)), ("d", (64, 48))):
        Image.new("RGB", size, (255, 51, 0)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr("danet.export.CALIBRATION_PICTURES", 3)
    pictures = calibration_pictures([str(tmp_path)])
    assert [tuple(picture.shape) for picture in pictures] == [(3, 256, 1024), (3, 48, 64)]
    for picture in pictures:
        torch.testing.assert_close(picture[:, 5, 7], torch.tensor([1, 0.2, 0]))
    with pytest.raises(UserError, match="no picture of at least 32 pixels a side"):
        calibration_pictures([str(tmp_path / "b.png")])
    with pytest.raises(UserError, match="absent"):
        calibration_pictures([str(tmp_path / "c.png"), str(tmp_path / "absent.png")])


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_that_computes_something_else_is_not_kept(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = WholePicture.forward

    def off_while_traced(self: WholePicture, images: Tensor) -> Tensor:
        logits = real(self, images)
        return logits + 1 if torch.compiler.is_exporting() else logits

    monkeypatch.setattr(WholePicture, "forward", off_while_traced)
    with pytest.raises(ExportDiffers, match="nothing was written"):
        export(network(), tmp_path / f"m{SUFFIXES[file_format]}", file_format)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_engine_cannot_run_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As happens with ONNX Runtime and operators of some backbones."""

    def fail(_images: object) -> None:
        raise RuntimeError("Non-zero status code")

    monkeypatch.setattr("danet.export.load", lambda *_: Engine(fail, None))
    with pytest.raises(ExportDiffers, match=r"does not run \(Non-zero status code\)"):
        export(network(), tmp_path / "model.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_torch_program_runs_without_this_package(
    exported: Callable[[ExportFormat], Path], tmp_path: Path
) -> None:
    images = torch.rand(1, 3, 50, 60)
    logits = expected_logits(network(), images)
    torch.save({"images": images, "logits": logits}, tmp_path / "io.pt")
    script = f"""
        import sys, json, torch
        extra = {{"metadata.json": ""}}
        program = torch.export.load({str(exported("torch"))!r}, extra_files=extra)
        assert "danet" not in sys.modules
        assert json.loads(extra["metadata.json"])["classes"][1] == "Straße"
        saved = torch.load({str(tmp_path / "io.pt")!r})
        torch.testing.assert_close(
            program.module()(saved["images"]), saved["logits"], atol=1e-4, rtol=1e-4
        )
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_class_names_are_in_the_files(exported: Callable[[ExportFormat], Path]) -> None:
    import openvino

    properties = {p.key: p.value for p in onnx.load(exported("onnx")).metadata_props}
    assert json.loads(properties["danet"])["classes"] == ["sky", "Straße", "car", "tree"]
    read = openvino.Core().read_model(exported("openvino"))
    assert json.loads(read.get_rt_info(["danet"]).value)["palette"][2] == [0, 128, 0]


@pytest.mark.parametrize(
    ("file_format", "expected"),
    [("onnx", ["m.onnx"]), ("openvino", ["m.bin", "m.xml"]), ("torch", ["m.pt2"])],
)
def test_nothing_but_the_files_is_left(
    file_format: ExportFormat, expected: list[str], exported: Callable[[ExportFormat], Path]
) -> None:
    folder = exported(file_format).parent
    assert sorted(path.name for path in folder.iterdir()) == expected


@pytest.mark.parametrize("file_format", ["onnx", "openvino"])
def test_eight_bits_agree_with_the_model(
    file_format: ExportFormat, exported: Callable[[ExportFormat], Path], tmp_path: Path
) -> None:
    model = network()
    pictures = [
        torch.from_numpy(np.array(render(2, index)[0].resize((160, 120)))).permute(2, 0, 1) / 255
        for index in range(4)
    ]
    path = tmp_path / f"m{SUFFIXES[file_format]}"
    agreement = export(model, path, file_format, pictures)
    assert 1e-6 < agreement.difference < 0.2
    assert agreement.same_class > 0.8
    if file_format == "onnx":
        assert path.stat().st_size < 0.6 * exported("onnx").stat().st_size
        loops = [n for n in onnx.load(path).graph.node if n.op_type == "Loop"]
        assert len(loops) == 1


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_large_picture_stays_in_bounded_memory(
    file_format: ExportFormat, exported: Callable[[ExportFormat], Path]
) -> None:
    """1024x2048 is 32,768 positions: all scores at once would be 4.3 GB, twice with softmax."""
    path = exported(file_format)
    script = f"""
        from pathlib import Path
        import numpy as np
        from danet.bench.measure import resident_bytes
        from danet.export import load
        run = load(Path({str(path)!r}), {file_format!r}).run
        assert run(np.zeros((1, 3, 1024, 2048), np.float32)).shape == (1, 4, 1024, 2048)
        print(resident_bytes("VmHWM") / 2**30)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True
    )
    assert float(done.stdout) < 3


def test_export_writes_a_file_or_says_why_not(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path / "model")
    Image.new("RGB", (80, 60), (90, 120, 200)).save(tmp_path / "a.png")
    (tmp_path / "own.bin").touch()
    run = CliRunner()

    def invoke(*arguments: str) -> object:
        return run.invoke(app, ["export", str(tmp_path / "model"), *arguments])

    done = invoke("--format", "onnx", "--out", str(tmp_path / "m.onnx"))
    assert done.exit_code == 0, done.output
    assert "same class as the model on 100.00% of pixels" in done.output
    for arguments, message in [
        (("--format", "onnx", "--out", "m.pt2"), "files end in .onnx"),
        (("--format", "onnx", "--out", "m.onnx", "--int8"), "--calibration INPUT"),
        (
            ("--format", "openvino", "--out", str(tmp_path / "own.xml")),
            "own.bin: would be overwritten",
        ),
        (("--format", "onnx", "--out", "m.onnx", "--calibration", "x"), "--int8 goes with"),
        (
            ("--format", "torch", "--out", "m.pt2", "--int8", "--calibration", "ABSENT"),
            "no such file",
        ),
    ]:
        failed = invoke(*arguments)
        assert isinstance(failed.exception, UserError), failed.output
        assert message in str(failed.exception)


@pytest.mark.parametrize(
    "pictures",
    [
        [],
        [torch.rand(1, 3, 64, 64)],
        [torch.zeros(3, 64, 64, dtype=torch.uint8)],
        [255 * torch.rand(3, 64, 64)],
        [torch.rand(3, 0, 8)],
    ],
    ids=["none", "batch", "uint8", "to 255", "no pixels"],
)
def test_pictures_of_another_form_are_refused(pictures: list[torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="calibration: "):
        export(network(), tmp_path / "m.onnx", "onnx", pictures)
    assert not list(tmp_path.iterdir())


def test_a_predictors_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export the network or folder that the Predictor"):
        export(danet.Predictor(network()).model, tmp_path / "m.onnx", "onnx")


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use onnx, torch, openvino"):
        export(network(), tmp_path / "m.tflite", "tflite")  # type: ignore[arg-type]


def test_an_older_torch_is_told_to_be_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    with pytest.raises(UserError, match=r"needs PyTorch 2.13, and this is 2.11.0\+cu130"):
        export(network(), tmp_path / "m.pt2", "torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_backbone_whose_maps_are_resized_as_a_torch_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = danet.DANet(4, "test_vit", pretrained_backbone=False, head_channels=16, key_channels=4)
    assert export(model.eval(), tmp_path / "model.pt2", "torch").difference < 1e-4
