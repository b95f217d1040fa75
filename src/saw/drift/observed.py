"""What callback ``drift`` wrote down of one check run, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from saw import jsontext
from saw.errors import SawError

Name = Annotated[str, msgspec.Meta(max_length=256)]


class DriftError(SawError):
    """A look for drift cannot be done, or cannot be read."""

    code = "drift_failed"


class Changed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One place that a task would change. ``place`` is empty when the module tells none, or may not (``hidden``).

    ``applied``: the task takes no notice of check mode, so it was changed.
    """

    host: Name
    play: Name
    role: Name
    task: Name
    module: Name
    place: Name
    hidden: bool
    applied: bool


class Lost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A host at a task behind which nothing of it was looked at."""

    host: Name
    play: Name
    role: Name
    task: Name
    module: Name
    reason: Literal["unreachable", "failed"]


class Blind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task whose module cannot be asked in check mode."""

    host: Name
    play: Name
    role: Name
    task: Name
    module: Name


class Play(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A play: whether it began, its hosts, and those of them that answered."""

    name: Name
    began: bool
    hosts: tuple[Name, ...]
    seen: tuple[Name, ...]


class Observed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run of one playbook."""

    schema: Literal[1]
    playbook: Name
    plays: tuple[Play, ...]
    changed: tuple[Changed, ...]
    lost: tuple[Lost, ...]
    blind: tuple[Blind, ...]


def read_observed(path: Path) -> Observed | None:
    """Return what was written to ``path``, None when the run did not come to its end; raises :class:`DriftError`."""
    try:
        return jsontext.decode(path.read_bytes(), kind=Observed)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise DriftError(
            f"what callback drift wrote cannot be read: {error}",
            cure="let the collection and the Python package be of one version",
        ) from error


__all__ = ["Blind", "Changed", "DriftError", "Lost", "Observed", "Play", "read_observed"]
