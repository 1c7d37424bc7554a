"""The whole network, converted from the peer's own checkpoint, against the peer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from danet.interop.convert import convert

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("depth", [50, 101])
def test_converted_weights_give_the_peers_logits(
    depth: int, peer: Callable[..., str], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 97, 161, generator=generator)
    images_file, checkpoint, logits_file = (
        tmp_path / name for name in ("images.safetensors", "peer.pth", "logits.safetensors")
    )
    save_file({"images": images}, images_file)
    peer(
        *("model", "--depth", depth, "--images", images_file),
        *("--checkpoint", checkpoint, "--out", logits_file),
    )
    model = convert(checkpoint)
    assert model.config.backbone == f"resnet{depth}c"
    assert len(model.metadata.classes) == 19
    assert model.metadata.classes[0] == "road"
    assert model.metadata.palette[0] == (128, 64, 128)
    with torch.no_grad():
        ours = model(images)._asdict()
    for name, peers in load_file(logits_file).items():
        error = (ours[name] - peers).abs().max() / peers.abs().max()
        assert error < 1e-5, (name, error)
