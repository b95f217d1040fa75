"""Chained events as OpenTelemetry log records over HTTPS, and back (OTLP 1.x, HTTP with JSON).

A record's body is the OCSF event as JSON text, over which its hash was made; its attributes ``saw.source``, ``saw.seq``,
``saw.prev``, ``saw.hash`` and ``saw.position`` carry its place in the chain, and ``saw.mark`` what is wrong. So what a receiver
stored can be proved complete without the broker. A request is acknowledged as a whole by its answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

import saw
from saw import jsontext
from saw.audit.chain import ChainedEvent
from saw.audit.receiver import DeliveryError, Receiver, tls_context
from saw.errors import ConfigError, SawError

#: OCSF's severity_id → OTLP's SeverityNumber (INFO, INFO2, WARN, ERROR, FATAL, FATAL4).
_SEVERITY = {1: 9, 2: 10, 3: 13, 4: 17, 5: 21, 6: 24}
_MOST_BYTES = 4 * 1024 * 1024
"""Most bytes of one request, unless one record alone is longer."""
_LONGEST_ANSWER = 65_536
_LONGEST_WAIT_S = 300.0
_SCOPE = "secure_agent.workspace.audit"
_LATER = frozenset({429, 502, 503, 504})
_CURES = {
    401: "check receiver.token_file or certificate_file",
    403: "check receiver.token_file or certificate_file",
    404: "check receiver.path; collectors listen at /v1/logs",
    413: "raise what the receiver takes, or lower max_message_bytes",
}


class OtlpError(SawError):
    """A line is no export of ours, or holds one without its event."""

    code = "otlp_invalid"


class Records:
    """The way of shipping: records of OTLP, to a receiver that is named by its certificate."""

    def message(self, item: ChainedEvent, position: int, mark: str, host: str, longest: int) -> bytes:
        """Return one element of ``resourceLogs`` as JSON."""
        body = msgspec.json.encode(item.event).decode()
        raw = _resource(item, position, mark, host, body=body)
        if len(raw) > longest:
            raw = _resource(item, position, mark, host, body="", omitted=len(body.encode()))
        return raw

    @contextmanager
    def open(self, receiver: Receiver) -> Iterator[Export]:
        """Make the client; the first request connects."""
        name = receiver.name or receiver.host
        headers = {"host": f"{name}:{receiver.port}", "user-agent": f"saw/{saw.__version__}"}
        if receiver.token_file is not None:
            headers["authorization"] = f"Bearer {_token(receiver.token_file)}"
        with httpx.Client(
            base_url=f"https://{_in_url(receiver.host)}:{receiver.port}",
            verify=tls_context(receiver),
            timeout=receiver.timeout_s,
            headers=headers,
            trust_env=False,
        ) as client:
            yield Export(client, receiver)


class Export:
    """Requests to one receiver, over connections that are kept."""

    def __init__(self, client: httpx.Client, receiver: Receiver) -> None:
        self._client = client
        self._receiver = receiver
        self._extensions = {"sni_hostname": receiver.name or receiver.host}

    def deliver(self, messages: Sequence[bytes], acknowledged: Callable[[int], None]) -> None:
        """Send ``messages`` in requests of at most 4 MiB; each is acknowledged as a whole. Raises :class:`DeliveryError`."""
        start = 0
        while start < len(messages):
            end, size = start + 1, len(messages[start])
            while end < len(messages) and size + len(messages[end]) <= _MOST_BYTES:
                size += len(messages[end])
                end += 1
            self._post(b'{"resourceLogs":[' + b",".join(messages[start:end]) + b"]}", end - start)
            start = end
            acknowledged(end)

    def check(self) -> None:
        """Nothing is open between two requests that could have ended."""

    def _post(self, body: bytes, count: int) -> None:
        address = self._receiver.address
        try:
            with self._client.stream(
                "POST",
                self._receiver.path,
                content=body,
                headers={"content-type": "application/json"},
                extensions=self._extensions,
            ) as answer:
                said = _read(answer)
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DeliveryError(
                    f"{address} is not the receiver that was named: {error}",
                    cure="check receiver.name and receiver.ca_file, and who answers there",
                ) from error
            raise DeliveryError(
                f"{address} cannot be reached over TLS: {error}",
                cure="check that the receiver runs, and takes OTLP over HTTPS",
            ) from error
        except httpx.HTTPError as error:
            raise DeliveryError(
                f"the connection to {address} broke: {type(error).__name__}: {error}",
                cure="it is tried again by itself; a receiver that asks for a certificate needs certificate_file",
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise _refusal(address, answer, said)
        rejected, why = _partial(address, said)
        if rejected:
            # OTLP forbids to send these again as they are; a trail with holes is worse than a collector that is asked twice.
            raise DeliveryError(
                f"{address} rejects {rejected} of {count} records: {why or 'it does not say why'}",
                cure="see the receiver's log; nothing goes on until it takes them",
                wait_s=_LONGEST_WAIT_S / 10,
            )


def parse_export(line: str) -> Iterator[ChainedEvent]:
    """Yield the chained events of one export as JSON, as a collector stores it; raises :class:`OtlpError`.

    What is not of the audit trail in it is passed over.
    """
    try:
        value = jsontext.decode(line, kind=dict[str, Any])
        scopes = [scope for one in value.get("resourceLogs", []) for scope in one.get("scopeLogs", [])]
        ours = [scope for scope in scopes if scope.get("scope", {}).get("name") == _SCOPE]
        records = [record for scope in ours for record in scope.get("logRecords", [])]
        attributes = [{one["key"]: _plain(one["value"]) for one in record["attributes"]} for record in records]
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
        raise OtlpError(
            f"this is no export of log records: {error}", cure="store exports as JSON, one on each line"
        ) from error
    for record, fields in zip(records, attributes, strict=True):
        if "saw.omitted" in fields:
            raise OtlpError(
                f"event {fields.get('saw.seq')} of {fields.get('saw.source')} was too long to be sent",
                cure="take it from saw audit export, and raise max_message_bytes here and at the receiver",
            )
        try:
            event = jsontext.decode(record["body"]["stringValue"], kind=dict[str, Any])
            source, prev, digest = (str(fields[f"saw.{name}"]) for name in ("source", "prev", "hash"))
            yield ChainedEvent(source, int(str(fields["saw.seq"])), prev, event, digest)
        except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
            raise OtlpError(f"this record is not whole: {error}", cure="check what the receiver cuts off") from error


def _resource(item: ChainedEvent, position: int, mark: str, host: str, *, body: str, omitted: int = 0) -> bytes:
    event = item.event
    fields: dict[str, object] = {"saw.source": item.source, "saw.seq": item.seq, "saw.prev": item.prev}
    fields |= {"saw.hash": item.hash, "saw.position": position}
    fields |= {"ocsf.class_name": event.get("class_name"), "ocsf.type_uid": event.get("type_uid")}
    fields |= {"saw.mark": mark or None, "saw.omitted": omitted or None}
    severity, time = event.get("severity_id"), event.get("time")
    record: dict[str, object] = {
        "severityNumber": _SEVERITY.get(severity, 9) if isinstance(severity, int) else 9,
        "severityText": str(event.get("severity", "")),
        "body": {"stringValue": body},
        "attributes": _attributes(fields),
    }
    if isinstance(time, int) and 0 <= time < 2**63 // 10**6:
        record["timeUnixNano"] = str(time * 10**6)
    named = {"service.name": "saw", "service.version": saw.__version__, "host.name": host}
    scope = {"scope": {"name": _SCOPE, "version": saw.__version__}, "logRecords": [record]}
    return msgspec.json.encode({"resource": {"attributes": _attributes(named)}, "scopeLogs": [scope]})


def _attributes(fields: Mapping[str, object]) -> list[dict[str, object]]:
    """Return attributes as OTLP's JSON has them: whole numbers of 64 bits are text there."""
    return [
        {"key": name, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": str(value)}}
        for name, value in fields.items()
        if value is not None
    ]


def _plain(value: Mapping[str, Any]) -> object:
    return value["intValue"] if "intValue" in value else value.get("stringValue", "")


def _read(answer: httpx.Response) -> bytes:
    said = bytearray()
    for chunk in answer.iter_bytes():
        said += chunk
        if len(said) > _LONGEST_ANSWER:
            break
    return bytes(said)


def _partial(address: str, said: bytes) -> tuple[int, str]:
    """Return how many records an answer rejects and why; raise :class:`DeliveryError` for what is no answer of OTLP."""
    try:
        value = jsontext.decode(said or b"{}", kind=dict[str, Any])
        partial = value.get("partialSuccess") or {}
        return int(partial.get("rejectedLogRecords", 0)), str(partial.get("errorMessage", ""))[:200]
    except (msgspec.MsgspecError, ValueError, TypeError, AttributeError) as error:
        raise DeliveryError(
            f"{address} does not answer as OTLP does: {error}", cure="check receiver.port and receiver.path"
        ) from error


def _refusal(address: str, answer: httpx.Response, said: bytes) -> DeliveryError:
    text = ""
    with contextlib.suppress(msgspec.MsgspecError):
        text = str(jsontext.decode(said, kind=dict[str, Any]).get("message", ""))[:200]
    status = answer.status_code
    if status in _LATER:
        after = answer.headers.get("retry-after", "")
        wait = min(float(after), _LONGEST_WAIT_S) if after.isdecimal() else 0.0
        return DeliveryError(
            f"{address} is busy: {status} {text}".strip(), cure="it is tried again by itself", wait_s=wait
        )
    cure = _CURES.get(status, "see the receiver's log, and check receiver.path")
    return DeliveryError(f"{address} refuses records: {status} {text}".strip(), cure=cure)


def _token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", cure="check receiver.token_file") from error
    if not token or any(not "!" <= char <= "~" for char in token):
        raise ConfigError(f"{path} holds no token in one line of ASCII", cure="check receiver.token_file")
    return token


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


__all__ = ["Export", "OtlpError", "Records", "parse_export"]
