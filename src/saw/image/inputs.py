"""The digest of everything that goes into a golden image, and the words for what changed since the last build."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

ROOTS = (
    "packer",
    "playbooks/workspace_converge.yml",
    "plugins",
    "pyproject.toml",
    "roles/attestation_agent",
    "roles/egress",
    "roles/image_hygiene",
    "roles/policy_agent",
    "roles/sandbox",
    "roles/saw_runtime",
    "roles/ssh_access",
    "src/saw",
    "uv.lock",
)
IGNORED = {"__pycache__", "node_modules", "molecule", "tests", "README.md"}
INCLUDED = {"src/saw/lab/__init__.py", "src/saw/lab/engagement.py"}
"""What the image does run out of the excluded packages below."""
EXCLUDED_PACKAGES = ("src/saw/lab/", "src/saw/broker/", "src/saw/gateway/", "src/saw/vm/")
"""Parts of the distribution that no program of the workspace image runs; changing them does not rebuild the image."""


class Inputs(msgspec.Struct, frozen=True):
    """Digest over all inputs, and each file's own (paths relative to the repository)."""

    digest: str
    files: dict[str, str]

    def changed_since(self, older: Inputs) -> list[str]:
        """Return the paths that were added, changed or removed."""
        names = self.files.keys() | older.files.keys()
        return sorted(name for name in names if self.files.get(name) != older.files.get(name))


def collect(repository: Path) -> Inputs:
    """Read all inputs below ``repository``."""
    files: dict[str, str] = {}
    for root in ROOTS:
        top = repository / root
        candidates = [top] if top.is_file() else sorted(top.rglob("*"))
        for path in candidates:
            relative = path.relative_to(repository)
            name = str(relative)
            excluded = name.startswith(EXCLUDED_PACKAGES) and name not in INCLUDED
            if not path.is_file() or IGNORED.intersection(relative.parts) or excluded:
                continue
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    total = hashlib.sha256("".join(f"{name}\0{files[name]}\n" for name in sorted(files)).encode()).hexdigest()
    return Inputs(total, files)
