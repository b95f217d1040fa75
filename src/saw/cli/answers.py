"""What the commands of one group share: the shape of an answer, and how a group adds a command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Protocol

from saw.errors import ConfigError

Answer = tuple[dict[str, Any], str, int]
"""What ``--json`` prints, what people read, and the exit code."""


class Run(Protocol):
    """A command: parsed options in, answer out; refusals are raised as :class:`saw.errors.SawError`."""

    __doc__: str | None

    def __call__(self, options: argparse.Namespace, /) -> Answer:
        """Do it."""
        ...


class Add(Protocol):
    """Add a command with ``--json`` to a group and return its parser, for the command's own arguments."""

    def __call__(self, name: str, run: Run, text: str, group: Any = None) -> argparse.ArgumentParser:
        """Add it; ``group`` is a sub-group of commands such as ``keys``."""
        ...


def read_file(path: str) -> bytes:
    """Read a file that a person named; raises :class:`saw.errors.ConfigError` with the reason."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="check the path") from error
