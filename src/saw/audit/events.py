"""Builds OCSF 1.8 events: one method for each class, one place for who, where and under which policy.

Every event names principal, agent, workspace, policy digest and request id where they are known. They stand in the
attributes that OCSF has for them (``actor.user``, ``device.uid``, ``policy.uid``, ``metadata.correlation_uid``) and,
under our own names, in ``unmapped.saw``, so that one query finds them in every class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

import saw
from saw.audit.ocsf import CLASSES, SEVERITIES, VERSION, validate

Outcome = Literal["success", "failure"]
Severity = Literal["informational", "low", "medium", "high", "critical"]

_STATUS = {"success": (1, "Success"), "failure": (2, "Failure")}
_SEVERITY = {"informational": 1, "low": 2, "medium": 3, "high": 4, "critical": 5}
#: OCSF type ids of what we name: device 6 = Virtual, user 1 = User, 2 = Admin, 3 = System, 4 = Service.
_DEVICE_VIRTUAL = 6
_HTTP_ACTIVITY = {
    "CONNECT": 1, "DELETE": 2, "GET": 3, "HEAD": 4, "OPTIONS": 5, "POST": 6, "PUT": 7, "TRACE": 8, "PATCH": 9,
}  # fmt: skip


class Subject(msgspec.Struct, frozen=True):
    """Who and what an event is about. Empty means unknown or not applicable.

    ``principal`` is the acting human or service, ``agent`` the registered agent, ``workspace`` the workspace id,
    ``policy_digest`` the policy in force, ``request_id`` the id that ties the events of one request together, ``address``
    the network address or socket that the request came from.
    """

    principal: str = ""
    agent: str = ""
    workspace: str = ""
    policy_digest: str = ""
    request_id: str = ""
    address: str = ""


class EventFactory:
    """Builds and validates events of one product component.

    ``component`` is its name (``saw-broker``), ``host`` the machine's name, ``new_uid`` gives a fresh unique text for each
    event. Every method takes ``time`` (aware) first and returns a dict that is valid OCSF 1.8; ``detail`` lands under
    ``unmapped.saw`` and must be JSON without secrets.
    """

    def __init__(self, component: str, *, host: str, new_uid: Callable[[], str]) -> None:
        self._component = component
        self._host = host
        self._new_uid = new_uid

    def api_activity(
        self,
        time: datetime,
        subject: Subject,
        operation: str,
        *,
        activity: Literal["create", "read", "update", "delete", "other"] = "other",
        outcome: Outcome = "success",
        message: str = "",
        resource: tuple[str, str] | None = None,
        status_detail: str = "",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """API Activity (6003): a call of the control plane. ``resource`` is (type, uid)."""
        activity_id = {"create": 1, "read": 2, "update": 3, "delete": 4, "other": 99}[activity]
        extra: dict[str, Any] = {
            "actor": self._actor(subject),
            "api": {"operation": operation, "service": {"name": self._component}}
            | ({"request": {"uid": subject.request_id}} if subject.request_id else {}),
            "src_endpoint": self._endpoint(subject),
        }
        if resource is not None:
            extra["resources"] = [{"type": resource[0], "uid": resource[1]}]
        return self._build(6003, activity_id, time, subject, outcome, message, status_detail, extra, detail)

    def authentication(
        self,
        time: datetime,
        subject: Subject,
        *,
        activity: Literal["logon", "logoff", "ticket"] = "logon",
        outcome: Outcome = "success",
        message: str = "",
        protocol: str = "",
        session_uid: str = "",
        expires: datetime | None = None,
        certificate: Mapping[str, Any] | None = None,
        status_detail: str = "",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Authentication (3002): an attestation verdict, a certificate issued, a session opened or closed."""
        activity_id = {"logon": 1, "logoff": 2, "ticket": 3}[activity]
        extra: dict[str, Any] = {
            "user": self._user(subject),
            "service": {"name": self._component},
            "is_remote": True,
            "src_endpoint": self._endpoint(subject),
        }
        if protocol:
            extra |= {"auth_protocol": protocol, "auth_protocol_id": 99}
        if session_uid:
            extra["session"] = {"uid": session_uid} | ({"expiration_time": _ms(expires)} if expires else {})
        if certificate:
            extra["certificate"] = dict(certificate)
        return self._build(3002, activity_id, time, subject, outcome, message, status_detail, extra, detail)

    def entity_management(
        self,
        time: datetime,
        subject: Subject,
        entity: tuple[str, str],
        *,
        activity: Literal[
            "create", "update", "delete", "enroll", "enable", "activate", "deactivate", "suspend", "resume"
        ],
        outcome: Outcome = "success",
        message: str = "",
        comment: str = "",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Entity Management (3004): a lifecycle step of a workspace, agent, image or policy. ``entity`` is (type, uid)."""
        names = {"create": 1, "update": 3, "delete": 4, "enroll": 6, "enable": 8, "activate": 10, "deactivate": 11}
        activity_id = {**names, "suspend": 12, "resume": 13}[activity]
        extra: dict[str, Any] = {"entity": {"type": entity[0], "uid": entity[1]}}
        if comment:
            extra["comment"] = comment
        return self._build(3004, activity_id, time, subject, outcome, message, "", extra, detail)

    def account_change(
        self,
        time: datetime,
        subject: Subject,
        user: str,
        *,
        activity: Literal[
            "create", "enable", "password", "disable", "delete", "attach", "detach", "lock", "unlock", "other"
        ],
        outcome: Outcome = "success",
        message: str = "",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Account Change (3001): a person or agent is given, or loses, an account, a password or a group."""
        names = {
            "create": 1,
            "enable": 2,
            "password": 3,
            "disable": 5,
            "delete": 6,
            "attach": 7,
            "detach": 8,
            "lock": 9,
        }
        activity_id = {**names, "unlock": 12, "other": 99}[activity]
        return self._build(3001, activity_id, time, subject, outcome, message, "", {"user": {"uid": user}}, detail)

    def http_activity(
        self,
        time: datetime,
        subject: Subject,
        *,
        method: str,
        scheme: str,
        host: str,
        port: int,
        path: str,
        allowed: bool,
        status_code: int | None = None,
        reason: str = "",
        rule: str = "",
        message: str = "",
        duration_ms: int | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """HTTP Activity (4002): one governed call, allowed or denied. ``reason`` is the deny reason, ``rule`` what decided.

        ``path`` is the canonical path without credentials; ``detail`` may name the credential id used, never its value.
        """
        url: dict[str, Any] = {"scheme": scheme, "hostname": host, "port": port}
        bare, _, query = path.partition("?")
        url |= {"path": bare or "/"} | ({"query_string": query} if query else {})
        request = {"http_method": method, "url": url} | ({"uid": subject.request_id} if subject.request_id else {})
        extra: dict[str, Any] = {
            "http_request": request,
            "dst_endpoint": {"hostname": host, "port": port},
            "src_endpoint": self._endpoint(subject),
            "action_id": 1 if allowed else 2,
            "action": "Allowed" if allowed else "Denied",
            "disposition_id": 1 if allowed else 2,
            "disposition": "Allowed" if allowed else "Blocked",
        }
        if status_code is not None:
            extra["http_response"] = {"code": status_code}
        if rule:
            extra["firewall_rule"] = {"uid": rule}
        if duration_ms is not None:
            extra["duration"] = duration_ms
        activity_id = _HTTP_ACTIVITY.get(method.upper(), 99)
        outcome: Outcome = "success" if allowed else "failure"
        return self._build(4002, activity_id, time, subject, outcome, message, reason, extra, detail)

    def detection_finding(
        self,
        time: datetime,
        subject: Subject,
        *,
        kind: str,
        title: str,
        description: str = "",
        severity: Severity = "high",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Detection Finding (2004): something that ought not to be, such as a gap in a chain or a clock that went back."""
        extra = self._finding(time, kind, title, description, severity)
        return self._build(2004, 1, time, subject, None, title, "", extra, detail, severity=severity)

    def compliance_finding(
        self,
        time: datetime,
        subject: Subject,
        *,
        kind: str,
        title: str,
        control: str,
        standards: Sequence[str],
        severity: Severity = "medium",
        uid: str = "",
        resolved: bool = False,
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Compliance Finding (2003): not as a rule wants it. ``control`` is the rule, ``standards`` where it stands.

        ``uid`` is the finding's own id where it is told again; ``resolved`` closes it: the rule holds now.
        """
        extra = self._finding(time, kind, title, "", severity)
        extra["compliance"] = {"control": control, "standards": list(standards), "status_id": 3, "status": "Fail"}
        if uid:
            extra["finding_info"]["uid"] = uid
        if resolved:
            extra |= {"status_id": 4, "status": "Resolved"}
            extra["compliance"] |= {"status_id": 1, "status": "Pass"}
        step = 3 if resolved else 1
        return self._build(2003, step, time, subject, None, title, "", extra, detail, severity=severity)

    def vulnerability_finding(
        self,
        time: datetime,
        subject: Subject,
        *,
        kind: str,
        title: str,
        vulnerabilities: Sequence[Mapping[str, Any]],
        severity: Severity = "medium",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Vulnerability Finding (2002): known vulnerabilities of what is installed; each is an OCSF ``vulnerability``."""
        extra = self._finding(time, kind, title, "", severity)
        extra["vulnerabilities"] = [dict(one) for one in vulnerabilities]
        return self._build(2002, 1, time, subject, None, title, "", extra, detail, severity=severity)

    def _finding(self, time: datetime, kind: str, title: str, description: str, severity: Severity) -> dict[str, Any]:
        info: dict[str, Any] = {"uid": self._new_uid(), "title": title, "types": [kind], "created_time": _ms(time)}
        if description:
            info["desc"] = description
        return {"finding_info": info, "is_alert": severity in {"high", "critical"}, "status_id": 1, "status": "New"}

    def application_lifecycle(
        self,
        time: datetime,
        subject: Subject,
        app: tuple[str, str],
        *,
        activity: Literal["install", "remove", "start", "stop", "restart", "enable", "disable", "update"],
        outcome: Outcome = "success",
        message: str = "",
        status_detail: str = "",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Application Lifecycle (6002): a component, policy generation or release changes. ``app`` is (name, version)."""
        names = ("install", "remove", "start", "stop", "restart", "enable", "disable", "update")
        extra = {"app": {"name": app[0]} | ({"version": app[1]} if app[1] else {})}
        return self._build(
            6002, names.index(activity) + 1, time, subject, outcome, message, status_detail, extra, detail
        )

    def log(
        self,
        time: datetime,
        subject: Subject,
        *,
        message: str,
        severity: Severity = "informational",
        detail: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Base Event (0): an entry of a log for which OCSF has no class."""
        return self._build(0, 99, time, subject, None, message, "", {}, detail, severity=severity)

    def _build(  # noqa: PLR0917 - the one private place that all classes share
        self,
        class_uid: int,
        activity_id: int,
        time: datetime,
        subject: Subject,
        outcome: Outcome | None,
        message: str,
        status_detail: str,
        extra: Mapping[str, Any],
        detail: Mapping[str, object] | None,
        *,
        severity: Severity | None = None,
    ) -> dict[str, Any]:
        kind = CLASSES[class_uid]
        severity_id = _SEVERITY[severity or ("informational" if outcome == "success" else "medium")]
        names = {name: value for name, value in msgspec.structs.asdict(subject).items() if value and name != "address"}
        event: dict[str, Any] = {
            "class_uid": class_uid,
            "class_name": kind.name,
            "category_uid": kind.category_uid,
            "category_name": kind.category_name,
            "activity_id": activity_id,
            "activity_name": kind.activities[activity_id],
            "type_uid": class_uid * 100 + activity_id,
            "type_name": f"{kind.name}: {kind.activities[activity_id]}",
            "time": _ms(time),
            "severity_id": severity_id,
            "severity": SEVERITIES[severity_id],
            "metadata": {
                "version": VERSION,
                "uid": self._new_uid(),
                "product": {
                    "name": self._component,
                    "vendor_name": "Secure Agent Workspace",
                    "version": saw.__version__,
                },
                "profiles": ["host", "security_control"],
            },
            "unmapped": {"saw": {**names, **(detail or {})}},
            **extra,
        }
        if outcome is not None:
            event["status_id"], event["status"] = _STATUS[outcome]
        if message:
            event["message"] = message
        if status_detail:
            event["status_detail"] = status_detail
        if subject.request_id:
            event["metadata"]["correlation_uid"] = subject.request_id
        if subject.workspace:
            event["device"] = {
                "uid": subject.workspace,
                "type_id": _DEVICE_VIRTUAL,
                "type": "Virtual",
                "is_managed": True,
            }
        if subject.policy_digest:
            event["policy"] = {"uid": subject.policy_digest}
        if "actor" not in event and (subject.principal or subject.agent):
            event["actor"] = self._actor(subject)
        validate(event)
        return event

    def _actor(self, subject: Subject) -> dict[str, Any]:
        actor: dict[str, Any] = {"app_name": subject.agent or self._component}
        if subject.principal:
            actor["user"] = self._user(subject)
        return actor

    @staticmethod
    def _user(subject: Subject) -> dict[str, Any]:
        return {"uid": subject.principal or subject.workspace or "unknown"}

    def _endpoint(self, subject: Subject) -> dict[str, Any]:
        if subject.address:
            return {"name": subject.address}
        return {"uid": subject.workspace} if subject.workspace else {"hostname": self._host}


def _ms(time: datetime) -> int:
    """Return OCSF's timestamp_t: milliseconds since 1970 UTC. Raises ``ValueError`` for a naive time."""
    if time.tzinfo is None:
        raise ValueError("event times carry a zone")
    return int(time.timestamp() * 1000)
