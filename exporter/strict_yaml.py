"""YAML from outside, parsed strictly: plain values only, no duplicate keys, no anchors, bounded size.

PyYAML because transformers brings it anyway; its safe loader reads standard tags only.
"""

from __future__ import annotations

from collections.abc import Hashable

import yaml

from runtime import strict_json


def parse(data: bytes, *, max_bytes: int) -> object:
    """The value of `data`, or a ValueError that says in one line what is wrong with it."""
    strict_json.check_size(data, max_bytes=max_bytes, max_values=strict_json.MAX_VALUES)
    try:
        return yaml.load(data, _Loader)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """The safe loader, which alone would keep the last of two equal keys and unfold aliases of aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("holds an alias; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise ValueError(f"has the key {str(key)[:80]!a} twice")
        return super().construct_mapping(node, deep=deep)
