"""The whole network, converted from the peer's own checkpoint, against the peer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from danet.interop.convert import convert

from .conftest import normalized, street, street_pictures

pytestmark = pytest.mark.slow


STRIDE_16 = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}
STRIDE_32 = {"strides": None, "dilations": None, "contract_dilation": None}


@pytest.mark.parametrize(
    ("depth", "backbone", "expected"),
    [
        (50, {}, ("resnet50c", 8, None)),
        (101, {}, ("resnet101c", 8, None)),
        (50, {"multi_grid": (1, 2, 4)}, ("resnet50c", 8, (1, 2, 4))),
        (50, STRIDE_16, ("resnet50c", 16, None)),
        (
            50,
            {**STRIDE_16, "multi_grid": (1, 2, 4), "contract_dilation": False},
            ("resnet50c", 16, (1, 2, 4)),
        ),
        (50, {**STRIDE_16, "contract_dilation": None}, ("resnet50c", 16, (2, 2, 2))),
        (50, {**STRIDE_32, "type": "ResNet"}, ("resnet50", 32, None)),
        (50, {**STRIDE_32, "type": "ResNetV1d"}, ("resnet50d", 32, None)),
    ],
)
def test_converted_weights_give_the_peers_logits(
    depth: int,
    backbone: dict[str, object],
    expected: tuple[str, int, tuple[int, ...] | None],
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 97, 161, generator=generator)
    streets = [normalized(street(*name)[0])[:, 100:197, 200:361] for name in street_pictures()]
    images = torch.stack([noise, *streets])
    images_file, checkpoint, logits_file = (
        tmp_path / name for name in ("images.safetensors", "peer.pth", "logits.safetensors")
    )
    save_file({"images": images}, images_file)
    peer(
        *("model", "--depth", depth, "--backbone", json.dumps(backbone), "--images", images_file),
        *("--checkpoint", checkpoint, "--out", logits_file),
    )
    model = convert(checkpoint)
    config = model.config
    assert (config.backbone, config.output_stride, config.multi_grid) == expected
    assert len(model.metadata.classes) == 19
    assert model.metadata.classes[0] == "road"
    assert model.metadata.palette[0] == (128, 64, 128)
    with torch.no_grad():
        ours = model(images)._asdict()
    for name, peers in load_file(logits_file).items():
        errors = (ours[name] - peers).abs().amax((1, 2, 3)) / peers.abs().amax((1, 2, 3))
        print(f"resnet{depth} {backbone} {name}: {errors.max():.1e}")
        assert errors.max() < 1e-5, (name, errors)
