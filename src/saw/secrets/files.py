"""The provider ``files``: each secret a plain file (0600) in a private folder (0700)."""

from __future__ import annotations

from pathlib import Path

from saw.secrets.folder import Folder
from saw.secrets.store import check_name, check_value


class FileStore:
    """Secrets as plain files; whoever reads the disk, or a backup of it, has them."""

    kind = "files"

    def __init__(self, root: Path) -> None:
        self.folder = Folder(root)
        self.place = str(root)

    def read(self, name: str) -> bytes:
        """Return a secret."""
        return self.folder.read(check_name(name))

    def write(self, name: str, value: bytes, *, new: bool = False) -> None:
        """Store a secret."""
        self.folder.write(check_name(name), check_value(name, value), new=new)

    def remove(self, name: str) -> None:
        """Remove a secret."""
        self.folder.remove(check_name(name))

    def names(self) -> list[str]:
        """Return the names of what lies in the folder, be it secret or not."""
        return self.folder.names()

    def close(self) -> None:
        """Nothing is held."""
