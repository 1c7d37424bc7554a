"""Parameters, operations and memory of a network, worked out without running it."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from danet.bench.workload import Workload
from danet.config import RunConfig
from danet.devices import choose_device, memory_limit, uses_bfloat16
from danet.training.probe import TooFewValues

_MIB = 2**20
_CPU_HEAP_FACTOR = {"prediction": 1.1, "training": 1.2}
_CPU_RUNTIME_BYTES = {"prediction": 96 * _MIB, "training": 48 * _MIB}
_CPU_WEIGHT_COPIES = {"prediction": 1, "training": 4}
"""Memory that libraries take on a CPU besides the tensors: gaps between blocks of the heap, their
own code and, at the largest convolution, its weight in other layouts and a gradient per thread.
Fitted, see docs/performance.md."""

_STATE_COPIES = {"sgd": 1, "adamw": 2, "muon": 1}
"""Tensors that each optimizer keeps per parameter."""

_CPU_PROCESS_BYTES = 700 * _MIB
"""Held by Python and the libraries before any work is done; added where a whole process must fit.
Not part of a GPU's memory."""

_SAFE_SHARE = 0.85
"""The share of the memory limit that a recommended setting may need by estimate."""

LARGEST_BATCH = 4096
"""End of the search for the largest batch: estimates of training take time for every picture."""

_PARTS = ("backbone", "head.position_branch", "head.channel_branch", "head", "auxiliary_head")


class PartCost(NamedTuple):
    """Cost of one part of the network in the forward pass of one picture.

    Attributes:
        operations: floating point, two for a multiply-add.
    """

    name: str
    parameters: int
    operations: int


def cost_by_part(workload: Workload) -> list[PartCost]:
    """The parts in the order of computation; "head" is the head without its branches."""
    width, height = workload.size
    # Some networks look at data while they are built.
    model = workload.build_model().eval().to("meta")
    images = torch.empty(1, 3, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    by_module = {
        name.partition(".")[2]: sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
    }
    costs = []
    for part in _PARTS:
        children = [other for other in _PARTS if other.startswith(f"{part}.")]
        parameters = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if name.startswith(f"{part}.")
            and not any(name.startswith(f"{child}.") for child in children)
        )
        operations = by_module.get(part, 0) - sum(by_module.get(child, 0) for child in children)
        if parameters or operations:
            costs.append(PartCost(part, parameters, operations))
    return costs


def estimate_peak_bytes(workload: Workload, device: str, *, bfloat16: bool) -> int:
    """The memory that the workload will need, weights included, to about 15 %.

    The work is done on tensors without data, counting which storages are alive at each operation.
    The optimizer's state is made by hand: its step may look at data.
    """
    model = workload.build_model()  # some networks look at data meanwhile
    with FakeTensorMode() as without_data, _LiveBytes() as live:
        _drop_data(model, without_data)
        runner = workload.prepare(
            torch.device("cpu"), bfloat16=bfloat16, to_labels=False, runs_on=device, model=model
        )
        live.add([*runner.model.parameters(), *runner.model.buffers(), runner.images])
        parameters = list(runner.model.parameters())
        copies = _STATE_COPIES[workload.config.train.optimizer] if runner.update else 0
        state = [torch.empty_like(parameter) for parameter in parameters * copies]
        runner.compute()
        del state
    peak: int = live.peak
    if torch.device(device).type != "cpu":
        return peak
    # Of what oneDNN convolves with; Winograd's weights, of three dimensions, it only multiplies.
    largest = max(parameter.nbytes for parameter in parameters if parameter.ndim == 4)
    return (
        int(_CPU_HEAP_FACTOR[workload.mode] * peak)
        + _CPU_RUNTIME_BYTES[workload.mode]
        + _CPU_WEIGHT_COPIES[workload.mode] * largest
    )


def _drop_data(model: nn.Module, without_data: FakeTensorMode) -> None:
    """Puts tensors without data in the place of parameters and buffers."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = without_data.from_tensor(parameter)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, without_data.from_tensor(buffer))


class BatchLimit(NamedTuple):
    """The largest batch that fits, and the memory that batches need.

    Attributes:
        batch: the largest up to `LARGEST_BATCH`, 0 where not even one fits.
        first_bytes: memory of a batch of one.
        further_bytes: memory of one more picture than `batch`.
        given_bytes: memory of the workload's own batch.
    """

    batch: int
    first_bytes: int
    further_bytes: int
    given_bytes: int


def process_bytes(device: str) -> int:
    """About how much of the device's memory a process holds before any work is done."""
    return _CPU_PROCESS_BYTES if torch.device(device).type == "cpu" else 0


def largest_batch(workload: Workload, device: str, *, bfloat16: bool, limit: int) -> BatchLimit:
    """Largest batch of the workload that fits in a process of `limit` bytes.

    Searches until one batch fits by estimate and the next one does not. Small batches may peak
    while the network is prepared, so their memory does not extrapolate to large ones.
    """
    room = limit - process_bytes(device)

    def need(batch: int) -> int:
        try:
            return estimate_peak_bytes(workload._replace(batch=batch), device, bfloat16=bfloat16)
        except TooFewValues:
            if batch > 1:
                raise
            return need(2)  # One picture cannot be trained on by itself.

    needs = {batch: need(batch) for batch in (1, 2)}
    steps_between = 0
    while True:
        fits = max((batch for batch in needs if needs[batch] <= room), default=0)
        # The two batches next to the answer as far as it is known.
        lower = max(batch for batch in sorted(needs)[:-1] if batch <= max(fits, 1))
        upper = min(batch for batch in needs if batch > lower)
        further = max(needs[upper] - needs[lower], 1) / (upper - lower)
        if fits + 1 in needs or fits == LARGEST_BATCH:
            given = needs.get(workload.batch) or need(workload.batch)
            return BatchLimit(fits, needs[1], int(further), given)
        guess = fits + int((room - needs[fits]) / further)
        most = min(8 * fits, LARGEST_BATCH)
        if upper > fits:
            most = upper - 1
            steps_between += 1
            if steps_between > 3 and steps_between % 2 == 0:  # Lines may creep up to a bend.
                guess = (fits + upper) // 2
        guess = min(max(guess, fits + 1), most)
        needs[guess] = need(guess)


def advise_after_running_out(config: RunConfig, processes: int) -> str:
    """Advice which setting to change so that training fits the memory, by the estimate."""
    settings = config.train
    device = choose_device(settings.device)
    bfloat16 = uses_bfloat16(settings.precision, device)
    limit = memory_limit(device)
    width, height = config.data.crop_size
    whole = settings.batch_size // processes

    def needed(accumulate: int, config: RunConfig = config) -> int:
        workload = Workload(config, config.data.crop_size, whole // accumulate, "training")
        return process_bytes(str(device)) + estimate_peak_bytes(
            workload, str(device), bfloat16=bfloat16
        )

    now = settings.accumulate
    found = f"{whole // now} crops of {width}x{height} need about {_gib(needed(now))} by estimate"
    found += f", and {_gib(limit)} may be filled"
    for accumulate in [n for n in range(now + 1, whole + 1) if whole % n == 0]:
        try:
            fits = needed(accumulate)
        except TooFewValues:
            break
        if fits <= limit * _SAFE_SHARE:
            return f"{found}; set train.accumulate={accumulate}, which needs about {_gib(fits)}"
    return (
        f"{found}; lower data.crop_size, or set train.activation_checkpointing=true; "
        "danet bench --train --estimate says what fits"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def add(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            identity = storage._cdata
            if identity not in self._known:
                self._known.add(identity)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, identity, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.add([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
        return output
