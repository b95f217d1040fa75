"""Small YAML files that people write (floors, waivers): read strictly, with an error that names file, reason and cure.

Policies have a loader of their own, which also keeps the place of every value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from saw.errors import ConfigError

T = TypeVar("T")


class _Strict(yaml.SafeLoader):
    """YAML without aliases and without a key that comes twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not taken here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} comes twice")
        return super().construct_mapping(node, deep)


def read_strict_yaml(path: Path | str, wanted: type[T], what: str, page: str) -> T:
    """Read ``path`` as ``wanted``; raises :class:`ConfigError` that says it is no ``what`` and names the docs ``page``."""
    path = Path(path)
    try:
        return msgspec.convert(yaml.load(path.read_bytes(), Loader=_Strict), wanted)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="name a readable file") from error
    except (yaml.YAMLError, msgspec.ValidationError, ValueError, TypeError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{path} is no {what}: {words}", cure=f"correct the named field ({page})") from error
