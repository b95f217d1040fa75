"""How a Vault or OpenBao is reached and who we are there."""

from __future__ import annotations

import msgspec


class AppRole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Logs in as a role (auth method AppRole); the secret id is the content of a file."""

    role_id: str
    secret_id_file: str
    mount: str = "approle"


class VaultSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``url``: https, without a path. ``ca_file``: authorities (PEM) of its certificate, None for the system's.

    One of ``token_file`` (read again for each call, so that an agent may renew it) and ``approle``. ``mount`` is a KV engine of
    version 2, below whose ``prefix`` all secrets of this installation are. ``timeout_s``: for each phase of a call, seconds.
    """

    url: str
    ca_file: str | None = None
    namespace: str | None = None
    mount: str = "secret"
    prefix: str = "saw/broker"
    token_file: str | None = None
    approle: AppRole | None = None
    timeout_s: float = 10.0
