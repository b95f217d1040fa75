"""The variants of a golden image: ``cpu``, the default, and ``gpu``, which has the NVIDIA driver besides.

A variant adds to the image and changes nothing that both have: the image ``cpu`` is made of the same inputs whether there are
other variants or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saw.image.disk import ImageError, digest_of

Name = Literal["cpu", "gpu"]
"""The word for a variant in commands, Packer's variables and release records."""


@dataclass(frozen=True)
class Variant:
    """What one variant has besides the workspace itself."""

    name: Name
    packages: str = ""
    """List of further packages below ``packer``."""
    components: tuple[str, ...] = ()
    """Components of Debian's archive that those come from, besides main."""
    setup: str = ""
    """Shell command that mmdebstrap runs on the empty tree ``$1``, before any package is there."""
    only: tuple[str, ...] = ()
    """Files and folders of the repository that go into images of this variant alone."""

    @property
    def prefix(self) -> str:
        """Return what the names of its images begin with."""
        return "workspace-" if self.name == "cpu" else f"workspace-{self.name}-"


CPU = Variant("cpu")
GPU = Variant(
    "gpu",
    packages="packages/gpu.txt",
    components=("contrib", "non-free", "non-free-firmware"),
    # The package would build its modules at once, unpatched and signed with a key that it makes up itself.
    setup='mkdir -p "$1/etc/dkms" && : > "$1/etc/dkms/no-autoinstall"',
    only=("packer/packages/gpu.txt", "roles/gpu_driver"),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (CPU, GPU)}


def variant_of(name: str) -> Variant:
    """Return the variant ``name``; raise :class:`ImageError` when there is none."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise ImageError(f"there is no image variant {name!r}", cure=f"take one of: {', '.join(VARIANTS)}") from None


@dataclass(frozen=True)
class ModuleKey:
    """The owner's key for kernel modules on this machine: private key (PEM) and certificate (DER or PEM), by path.

    The certificate is one of the image's inputs. The key is not: it is read while the modules are built, and stays out of the
    image.
    """

    key: Path
    certificate: Path


def key_for(variant: Variant, key: Path | None, certificate: Path | None) -> ModuleKey | None:
    """Return the key that ``variant`` is built with, None where it needs none; raise :class:`ImageError` for half a pair."""
    if variant.name == "cpu":
        if key or certificate:
            raise ImageError("the image variant cpu has no modules to sign", cure="leave the key out, or build gpu")
        return None
    if key is None or certificate is None:
        raise ImageError(
            f"the image variant {variant.name} needs a key that its kernel modules are signed with",
            cure="give --module-key and --module-certificate (docs/gpu.md says how to make them)",
        )
    for path in (key, certificate):
        if not path.is_file():
            raise ImageError(f"{path} is no file", cure="name the key and the certificate for kernel modules")
    return ModuleKey(key.resolve(), certificate.resolve())


def certificate_digest(key: ModuleKey) -> str:
    """Return the SHA-256 of the certificate file, which stands among the inputs of an image."""
    return digest_of(key.certificate)
