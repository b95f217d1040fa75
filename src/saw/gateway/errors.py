"""Errors of ring 2 that a person may see."""

from __future__ import annotations

from saw.errors import SawError


class PeerRefused(SawError):
    """The certificate that came with a call is missing, unreadable or not a workspace SVID."""

    code = "no_identity"


class CredentialUnavailable(SawError):
    """A credential that policy grants cannot be used; the message never holds its value."""

    code = "credential_unavailable"


class CallUnsignable(CredentialUnavailable):
    """A call cannot be signed with the credential that policy grants for it; another form of the same call may be."""


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


class ReviewUnavailable(SawError):
    """A review cannot be opened, looked at or told the end of: the broker does not answer, or says what cannot be."""

    code = "review_unavailable"


class ReviewRefused(SawError):
    """The broker takes a call in for no review, or a result for none; ``details`` has its ``reason``."""

    code = "review_refused"


class UnknownReview(SawError):
    """The broker knows no such review of this workspace."""

    code = "unknown_review"


class EnvoyRefused(SawError):
    """Envoy's own checker refuses the rendered configuration."""

    code = "envoy_config_invalid"
