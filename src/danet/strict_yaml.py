"""YAML from strangers: plain data only, and no key twice."""

from typing import Any

import yaml

from danet.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML without aliases, through which a short file can ask for endless memory."""

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
            raise yaml.YAMLError(f"{twice} is there twice, from line {node.start_mark.line + 1} on")
        return mapping


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
