"""The built-in recipes, and how recipes are found, extended and overridden."""

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from pydantic import BaseModel, ValidationError

from danet.config import RunConfig
from danet.errors import UserError
from danet.strict_yaml import parse_yaml
from danet.validation_errors import validation_message


def recipe_names() -> tuple[str, ...]:
    """The built-in recipes to train by; bases that others extend begin with an underscore."""
    return tuple(name for name in _built_in() if not name.startswith("_"))


def _built_in() -> tuple[str, ...]:
    folder = resources.files(__name__)
    return tuple(sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml")))


class RecipeHeader(NamedTuple):
    """The title and scores in the comments at the top of a built-in recipe."""

    title: str
    published: str
    measured: str


def recipe_header(name: str) -> RecipeHeader:
    """Reads the header of a built-in recipe."""
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    facts = dict(line.split(": ", 1) for line in comments[1:] if ": " in line)
    return RecipeHeader(comments[0], facts["published"].strip(), facts["measured"].strip())


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolves a recipe.

    Args:
        recipe: a built-in name, or the path of a YAML file. `extends: NAME` in it names the
            recipe (built-in, or a path relative to the file) that it changes.
        overrides: `section.key=value`, the value as YAML, but a path as it stands.

    Raises:
        UserError: no such recipe, no YAML, an unknown key or a value out of range.
    """
    layers = _read(str(recipe), Path(), seen={})
    for override in overrides:
        section, name, value = parse_override(override)
        layers.append(_Layer(f"--set {override}", {section: {name: value}}))
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = _merge(tree, layer.changes)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        place = [str(part) for part in error.errors()[0]["loc"]]
        setting = [layer for layer in layers if layer.sets(*[*place, "", ""][:2])]
        where = setting[-1].where if setting else f"recipe {recipe}"
        raise UserError(f"{where}: {validation_message(error, RunConfig)}") from error


def parse_override(override: str) -> tuple[str, str, Any]:
    """Section, key and value of `section.key=value`.

    Raises:
        UserError: it is written otherwise, or the value is not YAML.
    """
    key, equals, value = override.partition("=")
    if not equals or key.count(".") != 1:
        raise UserError(f"--set {override}: write SECTION.KEY=VALUE, such as train.steps=100")
    section, name = key.split(".")
    if _is_path(section, name):
        return section, name, None if value in ("", "null") else value
    return section, name, parse_yaml(value, f"--set {override}")


class _Layer(NamedTuple):
    """Settings that go over those before them, and where they are written."""

    where: str
    changes: dict[str, Any]

    def sets(self, section: str, key: str) -> bool:
        settings = self.changes.get(section)
        return isinstance(settings, Mapping) and key in settings


def _is_path(section: str, name: str) -> bool:
    """Whether a setting is a path, whose text may be anything."""
    fields = RunConfig.model_fields
    if section not in fields:
        return False
    known = cast(type[BaseModel], fields[section].annotation).model_fields
    return name in known and Path in get_args(known[name].annotation)


def _read(recipe: str, folder: Path, seen: Mapping[Path | str, str]) -> list[_Layer]:
    """The recipe and all that it extends, which come first.

    Args:
        seen: the recipes that extend this one, by what tells them apart.
    """
    identity: Path | str = recipe
    if recipe in _built_in():
        where = recipe
        text = resources.files(__name__).joinpath(f"{recipe}.yaml").read_text("utf-8")
    else:
        path = folder / recipe
        where = str(path)
        try:
            identity = path.resolve()
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            close = difflib.get_close_matches(recipe, recipe_names(), n=1)
            hint = f"did you mean {close[0]}?" if close else "see danet recipes"
            asked = "".join(f"recipe {one}: extends " for one in [*seen.values()][-1:])
            asked += recipe if seen else f"recipe {recipe}"
            raise UserError(f"{asked}: no such recipe or file; {hint}") from error
        except (OSError, ValueError) as error:  # no UTF-8, or a name that no file can have
            raise UserError(f"recipe {recipe}: cannot be read as text ({error})") from error
        folder = path.parent
    if identity in seen:
        raise UserError(f"recipe {where}: extends itself through {' -> '.join(seen.values())}")
    tree = parse_yaml(text, f"recipe {where}") or {}
    if not isinstance(tree, dict):
        raise UserError(f"recipe {where}: must be sections of keys, not {type(tree).__name__}")
    base = tree.pop("extends", None)
    # A section with nothing but comments in it is None.
    changes: dict[str, Any] = {key: {} if value is None else value for key, value in tree.items()}
    layer = _Layer(f"recipe {where}", changes)
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise UserError(f"recipe {where}: extends: must be one name or path, not {base}")
    return [*_read(base, folder, {**seen, identity: where}), layer]


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged
