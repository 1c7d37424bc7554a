"""Training steps on the same batches as mmsegmentation, from the same weights."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from danet.config import TrainConfig
from danet.interop import mmseg
from danet.interop.convert import convert
from danet.model import DANet, DANetOutput
from danet.training.build import build_optimizer
from danet.training.loss import loss_divisor, segmentation_losses
from danet.training.schedule import learning_rate

from .conftest import normalized, street, street_pictures

pytestmark = pytest.mark.slow

STEPS, SIDE = 50, 65


@pytest.fixture(scope="module")
def batches() -> dict[str, Tensor]:
    """In each batch noise with blocks of random labels, some ignored, and a street."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(STEPS, 3, SIDE, SIDE, generator=generator)
    blocks = torch.randint(0, 21, (STEPS, 5, 5), generator=generator)
    ids = blocks.repeat_interleave(13, 1).repeat_interleave(13, 2)
    ids = ids.where(ids < 19, 255).to(torch.uint8)
    images, labels = [], []
    for step in range(STEPS):
        image, label = street(*street_pictures()[-1], index=step)
        images.append(torch.stack([noise[step], normalized(image)[:, ::4, ::4][:, :SIDE, :SIDE]]))
        labels.append(torch.stack([ids[step], label[::4, ::4][:SIDE, :SIDE]]))
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def in_our_names(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return mmseg.translate(named, {}).state


def train(model: DANet, batches: dict[str, Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """Every step's loss, and the first step's gradients."""
    config = TrainConfig(steps=len(batches["images"]))
    optimizer = build_optimizer(model, config)
    losses, gradients = [], {}
    for step, (images, labels) in enumerate(zip(batches["images"], batches["labels"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        divisor = loss_divisor(labels, config)
        loss = segmentation_losses(model(images), labels, divisor, model.upsample, config)["loss"]
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def test_hard_examples_and_class_weights(peer: Callable[..., str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 19, 60, 70, generator=generator)
    labels = torch.randint(0, 19, (2, 60, 70), generator=generator, dtype=torch.uint8)
    labels[:, :7] = 255
    class_weights = torch.rand(19, generator=generator) + 0.5
    tensors = {"logits": logits, "labels": labels, "class_weights": class_weights}
    save_file(tensors, tmp_path / "in.safetensors")
    peer("losses", "--tensors", tmp_path / "in.safetensors", "--out", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")

    def ours(labels: Tensor, **settings: Any) -> float:
        config = TrainConfig(**settings)
        output = DANetOutput(logits, None, None, None)
        divisor = loss_divisor(labels, config)
        same_size = lambda logits, _: logits  # noqa: E731
        return segmentation_losses(output, labels, divisor, same_size, config)["loss"].item()

    labelled = labels.where(labels != 255, 0)
    losses = {
        "plain": ours(labels),
        "weighted": ours(labelled, class_weights=class_weights.tolist(), loss_divisor="valid"),
        "hard/few": ours(labels, hard_example_threshold=0.02, hard_example_min_kept=10),
        "hard/many": ours(labels, hard_example_threshold=0.3, hard_example_min_kept=3000),
    }
    for name, loss in losses.items():
        print(f"{name}: {abs(loss / theirs[name].item() - 1):.1e}")
        assert loss == pytest.approx(theirs[name].item(), rel=1e-6), name
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)
def test_losses_gradients_and_weights(
    dtype: torch.dtype,
    tolerance: float,
    batches: dict[str, Tensor],
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    """In float64 all steps agree; in float32 the first does, and rounding grows from there.

    With DANET_RECORD all 50 are taken, and the losses written to that folder.
    """
    files = [tmp_path / name for name in ("batches.safetensors", "w.pth", "out.safetensors")]
    if "DANET_RECORD" not in os.environ:
        taken = 2 if dtype == torch.float32 else 3
        batches = {name: tensor[:taken].clone() for name, tensor in batches.items()}
    batches = {**batches, "images": batches["images"].to(dtype)}
    save_file(batches, files[0])
    peer("train", "--batches", files[0], "--checkpoint", files[1], "--out", files[2])
    theirs = load_file(files[2])
    model = convert(files[1]).train().to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    losses, gradients = train(model, batches)

    first = in_our_names(theirs, "gradient/")
    assert first.keys() == gradients.keys()
    for name, gradient in first.items():
        if name != "head.position_branch.attention.key.bias":  # cancels in the softmax: rounding
            assert relative(gradients[name], gradient) < tolerance, name
    expected = theirs["losses"].tolist()
    differences = [abs(ours / t - 1) for ours, t in zip(losses, expected, strict=True)]
    last = in_our_names(theirs, "last/")
    state = model.state_dict()
    if folder := os.environ.get("DANET_RECORD"):
        name = f"parity_losses_{str(dtype).removeprefix('torch.')}.csv"
        rows = (f"{t:.17g},{ours:.17g}" for t, ours in zip(expected, losses, strict=True))
        (Path(folder) / name).write_text("\n".join(["mmsegmentation,danet", *rows, ""]))
    drift = max(relative(state[n].double(), last[n].double()) for n in last if last[n].ndim > 1)
    print(
        f"{dtype}: first loss {differences[0]:.1e}, largest of {len(losses)} {max(differences):.1e}"
    )
    print(f"{dtype}: last weights {drift:.1e}")
    assert differences[0] < tolerance
    if dtype == torch.float64:
        assert max(differences) < 1e-6
        assert drift < 1e-6
