"""The digest of everything that goes into a golden image, and the words for what changed since the last build."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from saw.image.edr import NONE, ImageEdr
from saw.image.variant import CPU, VARIANTS, Variant

ROOTS = (
    "packer",
    "playbooks/workspace_converge.yml",
    "plugins",
    "pyproject.toml",
    "roles/attestation_agent",
    "roles/baseline",
    "roles/edr",
    "roles/egress",
    "roles/image_hygiene",
    "roles/patching",
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
PACKAGES = "packages"
"""Name of the input that is the digest of the package set (saw.image.packages)."""
EXCLUDED_PACKAGES = ("src/saw/lab/", "src/saw/broker/", "src/saw/gateway/", "src/saw/vm/")
"""Parts of the distribution that no program of the workspace image runs; changing them does not rebuild the image."""


class Inputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """Digest over all inputs, each file's own (paths relative to the repository), and the options that were chosen."""

    digest: str
    files: dict[str, str]
    options: dict[str, str] = {}

    def given(self, name: str, digest: str) -> Inputs:
        """Return these inputs with one more, by a name that is no path (SHA-256)."""
        files = {**self.files, name: digest}
        return Inputs(_digest(files, self.options), files, self.options)

    def changed_since(self, older: Inputs) -> list[str]:
        """Return the paths that were added, changed or removed."""
        names = self.files.keys() | older.files.keys()
        return sorted(name for name in names if self.files.get(name) != older.files.get(name))


def collect(
    repository: Path, variant: Variant = CPU, given: dict[str, str] | None = None, edr: ImageEdr = NONE,
    more: dict[str, str] | None = None,
) -> Inputs:  # fmt: skip
    """Read all inputs of ``variant`` below ``repository``, and those of the endpoint detection that was chosen; ``given`` are
    others, by a name that is no path (name → SHA-256). ``more`` are further options.

    What goes into images of another variant alone is left out.
    """
    files: dict[str, str] = dict(given or {})
    others = tuple(path for other in VARIANTS.values() if other != variant for path in other.only)
    for root in (*ROOTS, *variant.only):
        top = repository / root
        candidates = [top] if top.is_file() else sorted(top.rglob("*"))
        for path in candidates:
            relative = path.relative_to(repository)
            name = str(relative)
            excluded = (name.startswith(EXCLUDED_PACKAGES) and name not in INCLUDED) or name in others
            if not path.is_file() or IGNORED.intersection(relative.parts) or excluded:
                continue
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    files |= {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in edr.files().items()}
    options = {**edr.options, **(more or {})}
    return Inputs(_digest(files, options), files, options)


def _digest(files: dict[str, str], options: dict[str, str]) -> str:
    listed = "".join(f"{name}\0{files[name]}\n" for name in sorted(files))
    listed += "".join(f"{name}={value}\n" for name, value in sorted(options.items()))
    return hashlib.sha256(listed.encode()).hexdigest()
