"""Which tools the agent was handed, as the broker says it: asked for, kept over a reboot, and laid where mediators read it.

The mediators of servers over stdio have no network. What was told last counts until its own end; a workspace that was never told
anything has no tool over stdio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from saw.errors import SawError
from saw.files import write_atomic, write_private
from saw.policy.handed_tools import HandedInvalid, HandedTools, read_handed
from saw.runtime.policyd_config import PolicydConfig

NAME = "tools.json"


class Broker(Protocol):
    """Whoever is asked."""

    def handed_tools(self) -> HandedTools:
        """Return what the agent was handed; raise :class:`SawError` when nobody says."""
        ...


class ToolFile:
    """``/run/saw/policy/tools.json`` and its copy that survives a reboot; ``log`` gets a line for each new reason of failing."""

    def __init__(self, config: PolicydConfig, broker: Broker, log: Callable[[str], None]) -> None:
        self._run = config.run / "policy" / NAME
        self._kept = config.state / NAME
        self._broker = broker
        self._log = log
        self._failed = ""
        self._seq: int | None = None

    @property
    def told(self) -> bool:
        """Whether anything was ever told."""
        return self._run.exists()

    @property
    def known(self) -> bool:
        """Whether the last answer is laid down; if not, the broker is to be asked again soon."""
        return self.told and not self._failed

    def restore(self) -> None:
        """Lay down again what was told before the reboot."""
        try:
            if not self._run.exists() and self._kept.exists():
                write_atomic(self._run, msgspec.json.encode(read_handed(self._kept.read_bytes())))
        except (HandedInvalid, OSError) as error:
            self._log(f"the tools that were handed out are not known any more: {error}")

    def look(self, seq: int) -> None:
        """Ask, and lay down what is new. Without an answer what was told stays.

        ``seq`` is the broker's number of the last change of this workspace: under the same one nothing is new.
        """
        if seq == self._seq and self.told:
            return
        try:
            raw = msgspec.json.encode(self._broker.handed_tools())
            for path, write in ((self._run, write_atomic), (self._kept, write_private)):
                if not path.exists() or path.read_bytes() != raw:
                    write(path, raw)
        except (SawError, OSError) as error:
            if str(error) != self._failed:
                self._log(f"the tools that were handed out are not known anew: {error}")
            self._failed = str(error)
        else:
            self._failed, self._seq = "", seq
