"""Single sign-on as one object: provider, sessions, both ways in, passkeys."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

from saw.broker.context import Services
from saw.broker.sso.passkeys import Passkeys
from saw.broker.sso.provider import Provider
from saw.broker.sso.sealed import Seal
from saw.broker.sso.sessions import Sessions
from saw.broker.sso.signin import SignIn
from saw.broker.sso_settings import SsoSettings


@dataclass(frozen=True)
class SingleSignOn:
    """Every part, wired; there is none where ``sso`` is not configured."""

    settings: SsoSettings
    provider: Provider
    sessions: Sessions
    signin: SignIn
    passkeys: Passkeys

    @classmethod
    def open(cls, services: Services) -> Self | None:
        """Return the parts for the configuration of ``services``, or None."""
        settings = services.config.sso
        if settings is None:
            return None
        provider = Provider(settings.provider, time.monotonic)
        seal = Seal.load(services.secrets, services.random)
        sessions = Sessions(services, settings, provider, seal)
        signin = SignIn(services, settings, provider, seal, sessions)
        return cls(settings, provider, sessions, signin, Passkeys(services, settings, sessions))
