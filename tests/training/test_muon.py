import copy

import numpy as np
import pytest
import torch
from timm.optim.muon import Muon

from danet.config import TrainConfig
from danet.training import build
from danet.training.muon import Float32Muon
from networks import tiny_danet


def orthogonalized(gradient: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps in float64, with the coefficients of Jordan et al., 2024."""
    x = gradient / np.linalg.norm(gradient)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(12, 40), (8, 3, 3, 3)])
def test_a_step_is_orthogonalized_in_float32(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    parameter.grad = torch.randn(shape)
    rows, columns = shape[0], parameter[0].numel()
    step = orthogonalized(parameter.grad.double().numpy().reshape(rows, columns))
    scale = 0.2 * max(rows, columns) ** 0.5  # of AdamW's root mean square (arXiv 2502.16982)
    expected = parameter.detach().double().numpy() - 0.01 * scale * step.reshape(shape)
    rounded = copy.deepcopy(parameter)
    rounded.grad = parameter.grad.clone()
    for kind, trained in ((Float32Muon, parameter), (Muon, rounded)):
        kind([trained], lr=0.01, ns_coefficients="original").step()
    torch.testing.assert_close(parameter.detach(), torch.from_numpy(expected).float())
    assert not torch.allclose(rounded, parameter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fast", "kind"), [(True, Muon), (False, Float32Muon)])
def test_it_is_taken_where_bfloat16_is_slow(
    fast: bool, kind: type[Muon], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "uses_bfloat16", lambda precision, device: fast)
    assert type(build.build_optimizer(tiny_danet(), TrainConfig(optimizer="muon"))) is kind
