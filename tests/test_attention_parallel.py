"""Position attention under the wrappers that large training runs use."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import danet
from danet.kernels.cpu import onednn_keeps_float32
from danet.kernels.precision import fast_exact_float32
from danet.processes import end_process

PROCESSES = 2


def attention() -> nn.Module:
    torch.manual_seed(0)
    module = danet.PositionAttention(16)
    nn.init.constant_(module.residual_weight, 0.7)
    return module


def features() -> Tensor:
    return torch.randn(PROCESSES, 16, 9, 7, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    module(inputs).square().sum().backward()
    return [
        p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()
    ]


def run_process(rank: int, wrapper: str, rendezvous: str, out: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES
    )
    module = attention()
    wrapped = DistributedDataParallel(module) if wrapper == "ddp" else fully_shard(module)
    found = gradients(wrapped, features()[rank : rank + 1])
    if rank == 0:
        torch.save(found, out)
    dist.barrier()  # or one may leave while the other still talks to it
    end_process(0)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_processes_share_the_work(wrapper: str, tmp_path: Path) -> None:
    """Both average the gradients of the processes' losses."""
    out = tmp_path / "gradients.pt"
    mp.spawn(run_process, (wrapper, str(tmp_path / "rendezvous"), str(out)), nprocs=PROCESSES)
    together = torch.load(out, weights_only=True)
    for ours, alone in zip(together, gradients(attention(), features()), strict=True):
        torch.testing.assert_close(ours * PROCESSES, alone, rtol=1e-4, atol=1e-5)


def test_checkpointed_gives_the_same_gradients() -> None:
    module = attention()
    inputs = features().requires_grad_()
    plain = gradients(module, inputs)
    again = attention()
    checkpoint(again, inputs, use_reentrant=False).square().sum().backward()
    for ours, parameter in zip(plain, again.parameters(), strict=True):
        assert torch.equal(ours, parameter.grad)


def test_called_twice_in_one_graph() -> None:
    module = attention()
    inputs = features()
    module(module(inputs)).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_the_global_precision_setting_is_left_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    danet.functional.position_attention(*(torch.randn(1, 4, 9) for _ in range(3)))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError), fast_exact_float32(torch.device("cpu")):
        raise RuntimeError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_threads_share_the_global_precision_setting() -> None:
    def setting() -> str:
        return torch.backends.mkldnn.matmul.fp32_precision

    before, cpu = setting(), torch.device("cpu")
    first, second = fast_exact_float32(cpu), fast_exact_float32(cpu)
    first.__enter__()
    during = setting()
    assert (during != before) == onednn_keeps_float32()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting() == during
    second.__exit__(None, None, None)
    assert setting() == before


def test_the_global_precision_setting_stays_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all operators share, and what this one's own is, are the user's as before."""
    setting = torch.backends.mkldnn
    monkeypatch.setattr(setting, "fp32_precision", "bf16")
    with fast_exact_float32(torch.device("cpu")):
        pass
    setting.fp32_precision = "ieee"
    assert setting.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_float32_stays_exact_on_arm(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_exact_float32(torch.device("cpu")):
        assert torch.backends.mkldnn.matmul.fp32_precision == before
