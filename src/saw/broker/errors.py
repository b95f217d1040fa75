"""What the broker refuses, each kind with its HTTP status. The body is ``{error, code, message, cure, …}``."""

from __future__ import annotations

from saw.errors import SawError


class BrokerError(SawError):
    """A call that the broker refuses; ``status`` is the HTTP status of the answer."""

    code = "refused"
    status = 400

    def __init__(
        self, message: str, *, cure: str = "", code: str | None = None, details: dict[str, object] | None = None
    ) -> None:
        super().__init__(message, cure=cure, details=details)
        if code is not None:
            self.code = code


class MalformedError(BrokerError):
    """The request's body or parameters are not what the call takes."""

    code = "malformed"


class NotFoundError(BrokerError):
    """The thing named does not exist."""

    code = "not_found"
    status = 404


class ConflictError(BrokerError):
    """The thing exists and is in the way, or is in another state than the call needs."""

    code = "conflict"
    status = 409


class ForbiddenError(BrokerError):
    """The caller may not do this."""

    code = "forbidden"
    status = 403


class BusyError(BrokerError):
    """The caller asks too often."""

    code = "rate_limited"
    status = 429


class NotAttestedError(BrokerError):
    """An attestation was refused. ``failures`` lists ``{code, component, detail}``."""

    code = "not_attested"
    status = 403

    def __init__(self, failures: list[dict[str, str]]) -> None:
        reasons = ", ".join(failure["code"] for failure in failures) or "unknown"
        super().__init__(
            f"the workspace is not attested: {reasons}",
            cure="see the failures; the image, the policy or the TPM differs from what is registered",
            details={"failures": failures},
        )
        self.failures = failures


class TooLargeError(BrokerError):
    """The body exceeds the limit of the call."""

    code = "too_large"
    status = 413


class StorageFull(BrokerError):
    """There is no room for what the call would write. What was acknowledged before is kept."""

    code = "storage_full"
    status = 507

    def __init__(self) -> None:
        super().__init__(
            "the broker's disk takes no more, so what was asked for is refused, or done in part",
            cure="free space for its state directory, or for the database's server; see what is there, and call again",
        )
