"""FSDP2: every process keeps a share of the weights, their gradients and the optimizer's state."""

from typing import Any, TypeVar

import torch
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from timm.models._features import FeatureHookNet
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from danet.model import DANet

T = TypeVar("T")


def sharding_strategy(processes: int) -> ModelParallelStrategy:
    """Shards over all processes, one backbone block at a time."""
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(model: DANet, mesh: DeviceMesh) -> DANet:
    processes = mesh["data_parallel"]
    model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    # Gradients of features that are read inside a block do not pass its output, where FSDP2 waits.
    if not isinstance(model.backbone.body, FeatureHookNet):
        for block in model.backbone.blocks():
            fully_shard(block, mesh=processes)
    fully_shard(model, mesh=processes)
    return model


def gathered(tree: T) -> T:
    """The same with whole tensors on the CPU in place of shares; every process must ask for it."""
    whole: T = tree_map_only(DTensor, lambda share: share.full_tensor().cpu(), tree)
    return whole


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state of whole tensors, of which sharded parameters get their shares.

    The optimizer keeps its own settings (weight decay, momentum, learning rate factors, whether
    its kernels are fused): they are the recipe's, and the state's may be of another recipe.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    parameters = [p for group in own for p in group["params"]]

    def share_of(index: int, value: Any) -> Any:
        parameter = parameters[index]
        if not (isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()):
            return value
        if isinstance(parameter, DTensor):
            moved = value.to(parameter.device)
            return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
        # In the parameter's memory format, which torch's fused kernels take for granted.
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    shares = {
        index: {name: share_of(index, value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    groups = [
        {**settings, "params": numbers["params"]}
        for settings, numbers in zip(own, saved, strict=True)
    ]
    optimizer.load_state_dict({"state": shares, "param_groups": groups})
