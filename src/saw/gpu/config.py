"""Configuration of the look at a GPU, ``/etc/saw/gpu.json``; every path is absolute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from saw.files import load_json

DEFAULT_CONFIG = Path("/etc/saw/gpu.json")
Place = Annotated[str, msgspec.Meta(pattern=r"^/[^\n\x00]*\Z")]


class GpuConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/etc/saw/gpu.json``. ``certificate`` is that of the owner's key for modules; the rest are places of the host."""

    certificate: Place
    state_dir: Place = "/var/lib/saw/gpu"
    sys_dir: Place = "/sys"
    nvidia_smi: Place = "/usr/bin/nvidia-smi"
    workspace: Place = "/run/saw/workspace.json"
    syslog: str = "/dev/log"
    spool_limit: Annotated[int, msgspec.Meta(ge=1, le=10**7)] = 200

    @property
    def state(self) -> Path:
        """What survives a restart: the last look and the findings that wait."""
        return Path(self.state_dir)


def read_config(path: Path | str = DEFAULT_CONFIG) -> GpuConfig:
    """Read the configuration; raises :class:`saw.errors.ConfigError` that names file, field and cure."""
    return load_json(path, GpuConfig)
