"""Errors of ring 2 that a person may see."""

from __future__ import annotations

from saw.errors import SawError


class PeerRefused(SawError):
    """The certificate that came with a call is missing, unreadable or not a workspace SVID."""

    code = "no_identity"


class CredentialUnavailable(SawError):
    """A credential that policy grants cannot be used; the message never holds its value."""

    code = "credential_unavailable"


class ResolutionFailed(SawError):
    """A destination has no address, or the resolver did not answer in time."""

    code = "resolution_failed"


class DestinationBlocked(SawError):
    """A destination's name or one of its addresses may never be dialled."""

    code = "destination_blocked"


class SpoolError(SawError):
    """The audit spool cannot record an event, so the call it is about must not happen."""

    code = "gatekeeper_unavailable"


class StateRefused(SawError):
    """What the broker answered, or what the cache holds, cannot be used."""

    code = "gatekeeper_stale"


class EnvoyRefused(SawError):
    """Envoy's own checker refuses the rendered configuration."""

    code = "envoy_config_invalid"
