"""Where the register of an installation is, kept beside its keys: a broker never begins an empty one in place of a full one.

The file ``register.json`` of the state directory says ``sqlite`` or ``postgresql``. It is written once the register is there, so
whoever drops the setting ``database``, or loses ``broker.db``, is refused by name instead of being served an empty register
with the old authorities: without workspaces, revocations and audit chains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from saw.broker.config import BrokerConfig
from saw.errors import ConfigError
from saw.files import load_json, write_private

Kind = Literal["sqlite", "postgresql"]


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    register: Kind


def register_file(config: BrokerConfig) -> Path:
    """Return the path of the file that says where the register is."""
    return config.state / "register.json"


def known_kind(config: BrokerConfig) -> Kind | None:
    """Return where the register is known to be; an installation of before this file has a ``broker.db``, or nothing yet.

    Raise :class:`ConfigError` when the file is there and cannot be read.
    """
    if register_file(config).exists():
        return load_json(register_file(config), _Known).register
    return "sqlite" if config.postgresql is None and config.database.exists() else None


def remember_kind(config: BrokerConfig) -> None:
    """Note that the register is where the configuration says."""
    kind: Kind = "sqlite" if config.postgresql is None else "postgresql"
    if not register_file(config).exists() or known_kind(config) != kind:
        write_private(register_file(config), msgspec.json.encode(_Known(kind)))


def require_register(config: BrokerConfig) -> None:
    """Raise :class:`ConfigError` when the register of this installation is known and the configuration would begin another.

    A register that moves to PostgreSQL is looked at by :func:`require_copied`, which needs the database.
    """
    if config.postgresql is not None:
        return
    known = known_kind(config)
    anew = f"to begin with an empty register on purpose, remove {register_file(config)} and {config.database}"
    if known == "postgresql":
        raise ConfigError(
            "the configuration names no database, and the register of this installation is in PostgreSQL",
            cure=f"name it again: the setting database, broker_database with the role; {anew}",
        )
    if known == "sqlite" and not config.database.exists():
        raise ConfigError(
            f"{config.database} is gone; it was the register of this installation",
            cure=f"bring it back from a backup; {anew}",
        )


def require_copied(config: BrokerConfig) -> None:
    """Raise :class:`ConfigError` when a database of PostgreSQL that is nobody's yet would take the place of a full file."""
    if known_kind(config) != "postgresql" and config.database.exists():
        raise ConfigError(
            f"the database is empty, and the register of this installation is in {config.database}",
            cure="saw broker database copy takes it over; to begin with an empty register on purpose, "
            f"move {config.database} and {register_file(config)} away",
        )
