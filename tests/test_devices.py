from pathlib import Path

import pytest
import torch

import danet
from danet import devices
from danet.cli.options import own_device
from danet.devices import choose_device, is_out_of_memory, memory_limit, uses_bfloat16
from danet.errors import OutOfMemory, UserError
from danet.kernels import cpu
from danet.processes import Share
from networks import tiny_danet


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "processor", "fast"),
    [
        (True, True, "vendor_id: GenuineIntel", True),
        (False, True, "vendor_id: GenuineIntel", False),
        (False, True, "vendor_id: AuthenticAMD", True),
        (False, False, "vendor_id: AuthenticAMD", False),
    ],
)
def test_bfloat16_is_chosen_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path, amx, avx512_bf16, processor, fast
) -> None:
    (tmp_path / "cpuinfo").write_text(processor)
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(cpu, "is_intel", cpu.is_intel.__wrapped__)
    assert uses_bfloat16("auto", torch.device("cpu")) == fast
    assert uses_bfloat16("bf16", torch.device("cpu"))
    assert not uses_bfloat16("fp32", torch.device("cpu"))


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_without_onednns_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, supported: bool
) -> None:
    for name in ("onednn_has_bfloat16", "multiplies_bfloat16_fast"):
        monkeypatch.setattr(f"danet.devices.{name}", lambda: supported)
    model = tiny_danet()
    for precision in ("auto", "fp32"):
        danet.Predictor(model, "cpu", precision)
    assert not recwarn
    danet.Predictor(model, "cpu", "bf16")
    said = [str(warning.message) for warning in recwarn]
    assert ["use precision auto" in line for line in said] == [True] * (not supported)


def test_a_device_may_have_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu:0").type == "cpu"
    with pytest.raises(UserError, match="use cuda or cuda:0 to cuda:1"):
        choose_device("cuda:2")


def test_each_process_on_a_machine_gets_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    names = ("auto", "cuda", "cuda:1", "cpu")
    for gpus, expected in ((2, ("cuda:1", "cuda:1", "cuda:1", "cpu")), (0, names)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert tuple(own_device(name, Share(3, 4)) for name in names) == expected
        assert tuple(own_device(name, Share(0, 1)) for name in names) == names


@pytest.mark.parametrize("name", ["cpu:foo", "cpu:", "cpu:-1", "cpu:1", "cpu:0:0"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"device {name}: no such device.*use cpu or cpu:0"):
        choose_device(name)


def test_without_onednn_a_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danet.devices.multiplies_bfloat16_fast", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not uses_bfloat16("auto", torch.device("cpu"))


def test_a_torch_that_cannot_tell_its_instructions_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not cpu.has_amx()


@pytest.mark.parametrize("limited", [True, False])
def test_onednn_without_room_for_its_code_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    resource = pytest.importorskip("resource")
    limit = 2**33 if limited else resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert is_out_of_memory(RuntimeError("could not create a primitive")) == limited
    assert is_out_of_memory(RuntimeError("can't allocate memory: you tried to allocate 8 bytes"))
    for told in (
        "MPS backend out of memory (MPS allocated: 8 GB)",
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(told))
        assert not is_out_of_memory(ValueError(told))
    of_onnx = type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi.state"})
    assert is_out_of_memory(of_onnx("Failed to allocate memory for requested buffer of size 8"))
    assert not is_out_of_memory(of_onnx("Invalid input name"))
    assert not is_out_of_memory(OutOfMemory("training: out of memory in the validation"))
    unsupported = "could not create a primitive descriptor for the matmul primitive"
    assert not is_out_of_memory(RuntimeError(unsupported))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, []),
        ("0::/\n", {"memory.max": "max"}, []),
        ("0::/\n", {"memory.max": "700"}, [700]),
        (
            "0::/user.slice/job:1\n",
            {"user.slice/memory.max": "500", "user.slice/job:1/memory.max": "max"},
            [500],
        ),
        (
            "5:cpu,cpuacct:/a\n4:hugetlb,memory:/a/b\n",
            {"memory/a/b/memory.limit_in_bytes": "300", "memory/memory.limit_in_bytes": "900"},
            [300, 900],
        ),
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "900"}, [900]),
        ("0::/../../outside\n", {"memory.max": "700"}, [700]),
    ],
)
def test_limits_of_containers_and_of_groups_around_them(
    groups: str,
    files: dict[str, str],
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": groups, **texts}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n" * (name in texts))
    assert devices._container_limits(tmp_path) == expected
    monkeypatch.setattr(devices, "_container_limits", lambda: expected)
    if expected:
        assert memory_limit(torch.device("cpu")) == min(expected)


def test_without_groups_nothing_limits_a_container(tmp_path: Path) -> None:
    assert devices._container_limits(tmp_path) == []
