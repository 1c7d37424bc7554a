import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
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


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_two_processes_with_one_batch_learn_what_one_learns_of_it_twice(
    kind: type[nn.BatchNorm2d], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over both are then twice one's; so are gradients, of which the average is taken."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.mul_(2))
    torch.manual_seed(0)
    alone = kind(3)
    nn.init.uniform_(alone.weight)
    nn.init.uniform_(alone.bias)
    shared = nn.Sequential(copy.deepcopy(alone))
    see_global_batch(shared, torch.device("cpu"), rank=0, processes=2)
    ours = torch.randn(2, 3, 3, 2) / 10 + 5
    theirs = ours.repeat(2, 1, 1, 1)
    ours.requires_grad_()
    theirs.requires_grad_()
    output, expected = shared(ours), alone(theirs)
    torch.testing.assert_close(output, expected[:2], rtol=1e-4, atol=1e-4)
    output.square().sum().mul(2).backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, 2 * theirs.grad[:2], rtol=1e-3, atol=1e-2)
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(shared[0].get_buffer(name), buffer, msg=name)


def test_dropout_takes_each_process_its_part_of_one_draw() -> None:
    parts = []
    for rank in range(2):
        layer = nn.Sequential(nn.Dropout2d(0.25)).train()
        see_global_batch(layer, torch.device("cpu"), rank, processes=2).manual_seed(3)
        parts.append(layer(torch.full((50, 40, 1, 1), 3.0)))
    assert not torch.equal(*parts)
    values, counts = torch.cat(parts).unique(return_counts=True)
    assert values.tolist() == [0, 4]
    assert counts[0] / counts.sum() == pytest.approx(0.25, abs=0.03)
    whole = nn.Sequential(nn.Dropout2d(0.25)).train()
    see_global_batch(whole, torch.device("cpu"), rank=0, processes=1).manual_seed(3)
    assert torch.equal(whole(torch.full((100, 40, 1, 1), 3.0)), torch.cat(parts))
