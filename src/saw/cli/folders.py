"""New folders, written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from saw.errors import ConfigError
from saw.files import write_atomic


def write_new_folder(path: str, files: Mapping[str, bytes]) -> None:
    """Make the folder ``path`` with ``files``; raise :class:`saw.errors.ConfigError` if anything is there already.

    The files are written beside it first, so that a crash leaves no half folder of that name.
    """
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{path} exists already", cure="name a folder that does not exist yet")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", cure="check the path") from error
    try:
        for name, content in files.items():
            write_atomic(temporary / name, content)
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", cure="name a folder that does not exist yet"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
