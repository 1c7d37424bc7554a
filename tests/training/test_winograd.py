import copy
from collections import Counter

import pytest
import torch
from torch import nn

import danet
from danet import winograd
from danet.bench.cost import estimate_peak_bytes
from danet.bench.workload import Workload
from danet.config import RunConfig
from danet.training import winograd as winograd_in_training
from danet.training.winograd import use_winograd
from networks import tiny_danet


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Counter[torch.dtype]:
    """Lets narrow convolutions and small features take Winograd's way, and counts those that do."""
    counts: Counter[torch.dtype] = Counter()
    plain = winograd.convolve

    def counted(
        features: torch.Tensor, weight: torch.Tensor, tiled: winograd.TiledConvolution
    ) -> torch.Tensor:
        counts[features.dtype] += 1
        return plain(features, weight, tiled)

    monkeypatch.setattr(winograd, "convolve", counted)
    monkeypatch.setattr("danet.winograd.layer._MIN_CHANNELS", {torch.float32: 8, torch.bfloat16: 8})
    monkeypatch.setattr("danet.winograd.layer.has_amx", lambda: False)
    monkeypatch.setattr(
        winograd_in_training, "_OVERHEADS", {torch.float32: (0, 0.0), torch.bfloat16: (0, 0.0)}
    )
    return counts


def gradients(model: danet.DANet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    model.zero_grad()
    sum(logits.square().mean() for logits in model(images) if logits is not None).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def smooth(model: nn.Module) -> nn.Module:
    """With softplus in place of ReLU, whose gradient a rounding can turn."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    return model


def test_a_step_has_the_same_gradients(taken: Counter[torch.dtype]) -> None:
    images = torch.randn(2, 3, 72, 56)
    plain = smooth(tiny_danet().train())
    assert not any("relu" in str(module).lower() for module in plain.modules())
    fast = copy.deepcopy(plain)
    use_winograd(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    expected = gradients(plain, images)
    assert not taken
    found = gradients(fast, images)
    assert taken[torch.float32] >= 5  # at least the heads'
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-7, name


def test_a_copy_has_its_own_weights(taken: Counter[torch.dtype]) -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    use_winograd(layer)
    changed = copy.deepcopy(layer)
    nn.init.zeros_(changed.weight)
    features = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(changed(features)[0, :, 0, 0], layer.bias)
        assert not torch.equal(layer(features)[0, :, 0, 0], layer.bias)
    assert taken[torch.float32] == 2


def test_autocast_computes_in_its_dtype_and_keeps_the_weights(
    taken: Counter[torch.dtype],
) -> None:
    layer = nn.Conv2d(16, 8, 3, padding=2, dilation=2)
    direct = copy.deepcopy(layer)
    use_winograd(layer)
    features = torch.randn(2, 16, 12, 10).relu()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(features)
    assert output.dtype == torch.bfloat16
    assert taken == {torch.bfloat16: 1}
    output.float().square().sum().backward()
    direct(features).square().sum().backward()
    for ours, expected in zip(layer.parameters(), direct.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - expected.grad).norm() < 0.02 * expected.grad.norm()


@pytest.mark.parametrize("case", ["few pixels", "small phases", "float64", "AMX"])
def test_other_passes_go_the_direct_way(
    case: str, taken: Counter[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    features = torch.randn(2, 8, 10, 10)
    if case == "few pixels":
        monkeypatch.setattr(winograd_in_training, "_OVERHEADS", {torch.float32: (200, 0.0)})
    elif case == "small phases":  # 2 x 64 tiles of 4 x 4 pixels
        layer = nn.Conv2d(8, 8, 3, padding=8, dilation=8)
        monkeypatch.setattr(winograd_in_training, "_OVERHEADS", {torch.float32: (0, 2.0)})
    elif case == "float64":
        layer, features = layer.double(), features.double()
    else:
        monkeypatch.setattr("danet.winograd.layer.has_amx", lambda: True)
    use_winograd(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "AMX"):
        assert layer(features).isfinite().all()
    assert not taken


def test_its_memory_is_estimated(taken: Counter[torch.dtype]) -> None:
    """On tensors without data."""
    model = {"backbone": "test_resnet", "head_channels": 16, "key_channels": 4}
    config = RunConfig.model_validate({"model": model})
    job = Workload(config, (64, 48), 2, "training")
    assert estimate_peak_bytes(job, "cpu", bfloat16=False) > 0
    assert taken[torch.float32] >= 5
