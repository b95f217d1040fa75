"""Where the secrets of a service are kept, as its configuration says it; and the store that follows from it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from saw.errors import ConfigError
from saw.secrets.credential import handed_over, is_credential
from saw.secrets.environment import EnvironmentStore
from saw.secrets.files import FileStore
from saw.secrets.sealed import SealedStore
from saw.secrets.store import SecretStore, is_name
from saw.secrets.vault import VaultStore
from saw.secrets.vault_settings import VaultSettings

Provider = Literal["files", "sealed", "vault", "environment"]
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,7}/?")


class SealedSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``credential``: the name under which systemd hands the key over (``LoadCredentialEncrypted=``)."""

    credential: str = "saw-secrets"


class SecretsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``provider`` is where secrets are. The others say how a place is reached; one that secrets are moved from stays until then.

    ``only_for_tests`` permits the provider ``environment``.
    """

    provider: Provider = "files"
    sealed: SealedSettings | None = None
    vault: VaultSettings | None = None
    only_for_tests: bool = False


def problems_of_secrets(settings: SecretsSettings) -> Iterator[str]:
    """Yield what is wrong, naming the field."""
    if settings.provider == "vault" and settings.vault is None:
        yield "secrets.vault is missing"
    if settings.provider == "environment" and not settings.only_for_tests:
        yield "secrets.provider environment is for tests: anything that is started inherits it"
    if settings.sealed is not None and not is_credential(settings.sealed.credential):
        yield "secrets.sealed.credential must be the name of a credential"
    if (vault := settings.vault) is None:
        return
    yield from problems_of_vault(vault, "secrets.vault")
    if not is_name(vault.mount) or not is_name(vault.prefix):
        yield "secrets.vault.mount and prefix must be paths of a-z, 0-9, '.', '_' and '-'"


def problems_of_vault(vault: VaultSettings, setting: str) -> Iterator[str]:
    """Yield what is wrong with how a server is reached; ``setting`` is where that stands in the configuration."""
    url = urlsplit(vault.url)
    if url.scheme != "https" or not url.hostname or url.username or url.query or url.fragment or url.path.strip("/"):
        yield f"{setting}.url must be https://NAME or https://NAME:PORT"
    if (vault.token_file is None) == (vault.approle is None):
        yield f"{setting} takes one of token_file and approle"
    if vault.namespace is not None and not _NAMESPACE.fullmatch(vault.namespace):
        yield f"{setting}.namespace must be a path"
    if not 1 <= vault.timeout_s <= 120:
        yield f"{setting}.timeout_s must be 1 to 120"
    files = [vault.ca_file, vault.token_file]
    if vault.approle is not None:
        files.append(vault.approle.secret_id_file)
        if not vault.approle.role_id or not is_name(vault.approle.mount):
            yield f"{setting}.approle needs role_id, and mount must be a path"
    if not all(Path(name).is_absolute() for name in files if name is not None):
        yield f"files of {setting} must be absolute paths"


def open_store(
    settings: SecretsSettings,
    provider: Provider,
    folders: Mapping[str, Path],
    *,
    random: Callable[[int], bytes] = os.urandom,
    environ: Mapping[str, str] = os.environ,
) -> SecretStore:
    """Return the store of ``provider``; ``folders`` has the places of ``files`` and ``sealed``. Raise :class:`ConfigError`."""
    if provider == "files":
        return FileStore(folders["files"])
    if provider == "sealed":
        name = (settings.sealed or SealedSettings()).credential
        return SealedStore(folders["sealed"], handed_over(name, environ), random)
    if provider == "vault":
        if settings.vault is None:
            raise ConfigError("secrets.vault is missing", cure="say how the vault is reached")
        return VaultStore(settings.vault)
    return EnvironmentStore(environ, only_for_tests=settings.only_for_tests)
