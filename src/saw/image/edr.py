"""Which endpoint detection a golden image carries: an input of its build, so that images that differ in it are different images.

Chosen by ``make image EDR=embedded`` or the environment variables below; nothing chosen means none. What is chosen is read
strictly here, before anything is built: in an image there is neither a way to an archive nor a secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from saw.errors import ConfigError
from saw.strict_yaml import read_strict_yaml

PROVIDERS = ("none", "embedded", "vendor_package")
VARIABLE = "SAW_IMAGE_EDR"
"""Environment variables: the provider; with a suffix, the role's variables (a YAML file) and signatures (a folder)."""
PACKAGES = "packages/edr.txt"
"""Packages of the embedded provider, below ``packer``; an image gets none later."""
SIGNATURES = (".cvd", ".cld", ".cdb", ".hdb", ".hsb", ".ldb", ".mdb", ".msb", ".ndb", ".yar", ".yara")
"""Endings of ClamAV's signatures, as ``saw.edr.clamav`` takes them."""
_OURS = {"edr_provider", "edr_seal", "edr_signatures_files", "edr_signatures_mirror", "edr_vendor_token"}
"""Variables of the role that the build sets itself, or that no image may hold."""
_ENROLS = ("enrol", "enrolled", "token_file")


@dataclass(frozen=True)
class ImageEdr:
    """The choice: provider, a file with variables of the role ``edr``, and a folder with signatures of ClamAV."""

    provider: str = "none"
    variables: Path | None = None
    signatures: Path | None = None

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise ConfigError(
                f"there is no EDR {self.provider!r} for an image", cure=f"take one of: {', '.join(PROVIDERS)}"
            )
        if self.provider == "none" and (self.variables or self.signatures):
            raise ConfigError(
                "this image has no EDR, so variables and signatures of it have no place",
                cure="choose EDR=embedded, or leave them out",
            )
        if self.provider == "vendor_package" and self.signatures:
            raise ConfigError("signatures belong to EDR=embedded", cure="leave them out, or choose that")

    @property
    def options(self) -> dict[str, str]:
        """What was chosen, as the record of the build names it; empty for none."""
        return {} if self.provider == "none" else {"edr": self.provider}

    @property
    def packages(self) -> str:
        """The list of packages that the image needs besides its own, below ``packer``; empty where there are none."""
        return PACKAGES if self.provider == "embedded" else ""

    def role_variables(self) -> dict[str, Any]:
        """Return what the build hands to Ansible; raises :class:`ConfigError` for what an image cannot have."""
        told: dict[str, Any] = {"workspace_converge_edr": self.provider}
        if self.provider == "none":
            return told
        told |= self._own_variables()
        if (self.provider == "vendor_package") != ("edr_vendor" in told):
            raise ConfigError(
                "edr_vendor belongs to EDR=vendor_package, and that one needs it",
                cure="name a file that has edr_vendor: EDR_VARIABLES=FILE",
            )
        if self.provider == "vendor_package":
            told["edr_vendor"] = self._vendor(told["edr_vendor"])
        else:
            told["edr_signatures_mirror"] = ""  # a workspace reaches no mirror
            told["edr_signatures_files"] = [str(path) for path in self._signatures()]
        return told

    def files(self) -> dict[str, Path]:
        """Return every file that goes into the image: its name in the record of the build → path; raises as above."""
        told = self.role_variables()
        found = {} if self.variables is None else {"edr/variables.yml": self.variables}
        if "edr_vendor" in told:
            found["edr/agent.deb"] = Path(told["edr_vendor"]["deb"])
        return found | {f"edr/signatures/{path.name}": path for path in self._signatures()}

    def _signatures(self) -> list[Path]:
        if self.signatures is None:
            return []
        try:
            found = [path for path in self.signatures.absolute().iterdir() if path.suffix in SIGNATURES]
        except OSError as error:
            raise ConfigError(f"{self.signatures}: {error.strerror}", cure="name a folder with signatures") from error
        if not found:
            raise ConfigError(
                f"there are no signatures in {self.signatures}",
                cure=f"bring files that end with one of: {' '.join(SIGNATURES)}",
            )
        return sorted(found)

    def _own_variables(self) -> dict[str, Any]:
        if self.variables is None:
            return {}
        values = read_strict_yaml(self.variables, dict[str, Any], "file of variables", "docs/edr.md")
        for name in values:
            if name in _OURS or not name.startswith("edr_"):
                raise ConfigError(
                    f"{self.variables}: {name} cannot be set for an image",
                    cure="name variables of the role edr, but not its provider, token and mirror (docs/edr.md)",
                )
        return values

    def _vendor(self, vendor: Any) -> dict[str, Any]:
        if not isinstance(vendor, dict) or not isinstance(vendor.get("deb"), str) or "package" in vendor:
            raise ConfigError(
                "edr_vendor of an image needs deb and no package: the build has no way to an archive by then",
                cure="bring the agent's package file and name it",
            )
        enrols = [name for name in _ENROLS if name in vendor]
        if enrols:
            raise ConfigError(
                f"edr_vendor.{enrols[0]}: no agent is enrolled in an image, where every workspace would be the same one",
                cure="take an agent that needs no token",
            )
        deb = ((self.variables or Path()).parent / vendor["deb"]).absolute()
        if not deb.is_file():
            raise ConfigError(f"{deb}, the package of edr_vendor, is no file", cure="correct edr_vendor.deb")
        return {**vendor, "deb": str(deb)}


NONE = ImageEdr()


def chosen(environment: Mapping[str, str] | None = None) -> ImageEdr:
    """Return what the environment chooses; raises :class:`ConfigError`."""
    values = os.environ if environment is None else environment

    def path(suffix: str) -> Path | None:
        value = values.get(f"{VARIABLE}_{suffix}")
        return Path(value).absolute() if value else None

    return ImageEdr(values.get(VARIABLE) or "none", path("VARIABLES"), path("SIGNATURES"))


def variables_file(edr: ImageEdr) -> bytes:
    """Return the JSON file with which Packer tells Ansible what was chosen."""
    return msgspec.json.format(msgspec.json.encode(edr.role_variables())) + b"\n"


__all__ = ["NONE", "PROVIDERS", "SIGNATURES", "VARIABLE", "ImageEdr", "chosen", "variables_file"]
