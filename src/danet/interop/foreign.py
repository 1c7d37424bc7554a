"""Reading checkpoints of strangers: tensors and plain values, nothing executed."""

import ast
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from danet.errors import UserError, explaining_lookup, why_not_read

_NO_LITERAL = (ValueError, TypeError, SyntaxError, RecursionError)
"""Raised by `ast.literal_eval` on expressions that are no literals."""


class Inert:
    """Stands for an object of a class that is not torch's; keeps nothing and runs nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def __setstate__(self, state: object) -> None:
        del state

    def __setitem__(self, key: object, value: object) -> None:
        del key, value

    def append(self, item: object) -> None:
        """Pickle builds lists with it."""

    def extend(self, items: object) -> None:
        """Pickle builds lists with it."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a torch or safetensors checkpoint.

    Torch files are read with `weights_only`: pickled objects of other classes (loggers, configs)
    become `Inert`, without their classes being imported or built.

    Raises:
        UserError: missing, damaged, or not a dictionary.
    """
    with explaining_lookup(path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a checkpoint (.pth, .safetensors)")
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with safe_globals(_stand_ins(path)):
                content = torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader, its unpickler and safetensors raise many types on damaged or foreign files.
    except Exception as error:
        reason = why_not_read(error)
        raise UserError(f"{path}: damaged, or not a checkpoint of tensors ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def _stand_ins(path: Path) -> list[Any]:
    """An inert class under the name of every class that the file asks for and torch refuses."""
    if not zipfile.is_zipfile(path):
        return []  # the format before torch 1.6; checkpoints of that time hold plain values
    return [
        (type(name.rpartition(".")[2], (Inert,), {}), name)
        for name in get_unsafe_globals_in_checkpoint(path)
    ]


def state_dict_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, under `state_dict` or by themselves, without DDP's prefix.

    Raises:
        UserError: a tensor is not stored value by value.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        return {}
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        # With strides of 0 a few bytes can pass for any size, which a network would be built with.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"the checkpoint's {name} claims more values than the file holds")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def literal_config(text: str) -> dict[str, Any]:
    """The assignments of a config file written in Python, as far as they are literals.

    `dict(...)` calls become dictionaries; nothing is executed, and what is no literal is left out.
    """
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    config = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            config[statement.targets[0].id] = _literal(statement.value)
    return config


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        is_dict = isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args
        return {k.arg: _literal(k.value) for k in node.keywords if k.arg} if is_dict else None
    if isinstance(node, ast.Dict):
        return _dictionary(node)
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except _NO_LITERAL:
        return None


def _dictionary(node: ast.Dict) -> dict[Any, Any]:
    entries = {}
    for key, value in zip(node.keys, node.values, strict=True):
        # What is no literal cannot be a key, nor can a list; such an entry is left out.
        with suppress(*_NO_LITERAL):
            if key is not None:
                entries[ast.literal_eval(key)] = _literal(value)
    return entries
