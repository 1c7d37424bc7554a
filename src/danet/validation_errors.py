"""Pydantic's findings in settings, as one line that a user can act on."""

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def validation_message(error: ValidationError, schema: type[BaseModel]) -> str:
    """Pydantic's findings as one line, with the nearest known name for an unknown key."""
    findings: dict[str, list[str]] = {}
    for detail in error.errors():
        message = detail["msg"].removeprefix("Value error, ")
        path, model = _find(schema, detail["loc"])
        if detail["type"] == "extra_forbidden" and model is not None:
            known = list(model.model_fields)
            close = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            message = f"unknown key; {hint}"
        elif detail["type"] == "model_type":
            message = "must be a mapping of keys to values"
        elif detail["type"] == "missing" and path[-1].isdecimal():
            path, message = path[:-1], "has too few values"
        elif detail["type"] == "path_type":
            message = "give a file's path"
        elif detail["type"] == "tuple_type":
            message = "write a list in brackets, such as [1, 2]"
        said = findings.setdefault(".".join(path), [])
        if message not in said:
            said.append(message)
    return "; ".join(
        ": ".join(filter(None, (path, ", or ".join(said)))) for path, said in findings.items()
    )


def _find(
    schema: type[BaseModel], location: Sequence[int | str]
) -> tuple[list[str], type[BaseModel] | None]:
    """The path to an invalid setting, without pydantic's names of union members, and its model."""
    path: list[str] = []
    model: type[BaseModel] | None = schema
    annotation: Any = schema
    for part in location:
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            model = _model_in(annotation)
        elif isinstance(part, str) and get_origin(annotation) in (Union, UnionType):
            continue
        path.append(str(part))
    return path, model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's value is, or that its items are."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
