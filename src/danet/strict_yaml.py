"""YAML from strangers: plain data only, and no key twice."""

import re
from typing import Any

import yaml

from danet.errors import UserError

_INT = "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """YAML without aliases, through which a short file can ask for endless memory.

    Numbers are decimal or say their base: YAML 1.1 would take 010 for 8 and 1:30 for 90.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _INT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """YAML allows no key twice, but PyYAML would keep the last in silence."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{twice} appears twice in the mapping that begins on line {line}")
        return mapping


_Loader.add_implicit_resolver(
    _INT,
    re.compile(r"[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Reads a document.

    Args:
        where: what the error says was read.

    Raises:
        UserError: not valid YAML, an alias in it, or a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        summary = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML ({summary})") from error
