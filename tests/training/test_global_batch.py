import copy

import pytest
import torch
from torch import nn

from danet.training.global_batch import see_global_batch


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (4, 3)),
        (nn.BatchNorm1d(3), (4, 3, 5)),
        (nn.BatchNorm2d(3), (4, 3, 5, 2)),
        (nn.BatchNorm3d(3), (4, 3, 5, 2, 2)),
    ],
)
def test_in_evaluation_every_batch_norm_is_as_before(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    features = torch.randn(shape)
    norm(features)
    shared = nn.Sequential(copy.deepcopy(norm))
    see_global_batch(shared, torch.device("cpu"), rank=0, processes=2)
    assert type(shared[0]) is not type(norm)
    assert torch.equal(shared.eval()(features), norm.eval()(features))
