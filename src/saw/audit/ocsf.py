"""The part of OCSF 1.8 that this product emits, as data, and the strict check of an event against it.

Classes, objects, attribute names, identifiers and requirements are those of the Open Cybersecurity Schema Framework 1.8
(https://schema.ocsf.io/1.8.0). Only attributes that we emit are listed: the check refuses every other one, so that a
misspelt attribute is an error here and not a hole in somebody's SIEM. What OCSF has no word for goes under ``unmapped``,
which OCSF reserves for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saw.errors import SawError

VERSION = "1.8.0"

#: Longest text that an attribute may hold, in characters: an event is a record, not a store.
MAX_TEXT = 8192


class EventInvalid(SawError):
    """An event does not follow OCSF 1.8; ``problems`` lists every reason."""

    code = "event_invalid"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            "the event is not valid OCSF 1.8: " + "; ".join(problems),
            cure="build events with saw.audit.EventFactory",
            details={"problems": list(problems)},
        )
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Attribute:
    """One attribute: ``kind`` is ``str``, ``int``, ``bool``, ``json``, or the name of an object; ``many`` means a list."""

    kind: str
    required: bool = False
    many: bool = False
    values: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ObjectType:
    """An OCSF object or class: its attributes, and groups of which at least one member must be present."""

    attributes: Mapping[str, Attribute]
    at_least_one: tuple[str, ...] = ()


@dataclass(frozen=True)
class EventClass:
    """One OCSF event class."""

    uid: int
    name: str
    category_uid: int
    category_name: str
    activities: Mapping[int, str]
    body: ObjectType
    statuses: frozenset[int] = field(default=frozenset({0, 1, 2, 99}))


def _text(*names: str, required: Sequence[str] = ()) -> dict[str, Attribute]:
    return {name: Attribute("str", required=name in required) for name in names}


def _one(kind: str, *, required: bool = False, many: bool = False) -> Attribute:
    return Attribute(kind, required=required, many=many)


_INT = Attribute("int")
_BOOL = Attribute("bool")
_TYPE_ID = Attribute("int", values=frozenset({0, 1, 2, 3, 4, 99}))

OBJECTS: dict[str, ObjectType] = {
    "product": ObjectType(_text("name", "uid", "vendor_name", "version", "feature"), ("name", "uid")),
    "metadata": ObjectType(
        {
            **_text("version", "uid", "correlation_uid", "log_name", "event_code", required=("version",)),
            "product": _one("product", required=True),
            "profiles": _one("str", many=True),
            "sequence": _INT,
            "original_time": _one("str"),
        }
    ),
    "group": ObjectType(_text("name", "uid"), ("name", "uid")),
    "user": ObjectType(
        {**_text("name", "uid", "domain", "email_addr"), "type_id": _TYPE_ID, "groups": _one("group", many=True)},
        ("name", "uid"),
    ),
    "session": ObjectType(
        {**_text("uid", "issuer", "credential_uid"), "created_time": _INT, "expiration_time": _INT, "is_remote": _BOOL}
    ),
    "process": ObjectType({**_text("name", "uid", "path"), "pid": _INT}, ("name", "uid", "path", "pid")),
    "actor": ObjectType(
        {
            **_text("app_name", "app_uid", "invoked_by"),
            "user": _one("user"),
            "process": _one("process"),
            "session": _one("session"),
        },
        ("process", "user", "invoked_by", "session", "app_name", "app_uid"),
    ),
    "device": ObjectType(
        {
            **_text("uid", "name", "hostname", "ip", "type"),
            "type_id": Attribute("int", required=True),
            "is_managed": _BOOL,
        }
    ),
    "endpoint": ObjectType(
        {**_text("ip", "uid", "name", "hostname", "svc_name", "domain"), "port": _INT},
        ("ip", "uid", "name", "hostname", "svc_name", "domain"),
    ),
    "service": ObjectType(_text("name", "uid", "version"), ("name", "uid")),
    "api_request": ObjectType({**_text("uid", required=("uid",)), "data": _one("json")}),
    "api_response": ObjectType({**_text("error", "error_message", "message"), "code": _INT}),
    "api": ObjectType(
        {
            **_text("operation", "version", required=("operation",)),
            "service": _one("service"),
            "request": _one("api_request"),
            "response": _one("api_response"),
        }
    ),
    "url": ObjectType(
        {**_text("url_string", "hostname", "path", "query_string", "scheme"), "port": _INT}, ("url_string", "path")
    ),
    "http_request": ObjectType(
        {**_text("http_method", "uid", "user_agent", "version"), "url": _one("url"), "body_length": _INT}
    ),
    "http_response": ObjectType(
        {**_text("status", "message", "content_type"), "code": Attribute("int", required=True), "latency": _INT}
    ),
    "policy": ObjectType({**_text("uid", "name", "version", "desc"), "is_applied": _BOOL}, ("name", "uid")),
    "rule": ObjectType(_text("uid", "name", "desc", "type"), ("name", "uid")),
    "fingerprint": ObjectType({**_text("value", required=("value",)), "algorithm_id": Attribute("int", required=True)}),
    "certificate": ObjectType(
        {
            **_text("serial_number", "issuer", "subject", "uid", required=("serial_number",)),
            "created_time": _INT,
            "expiration_time": _INT,
            "fingerprints": _one("fingerprint", many=True),
        }
    ),
    "resource": ObjectType(_text("name", "uid", "type", "version"), ("name", "uid")),
    "managed_entity": ObjectType(
        {**_text("name", "uid", "type", "version"), "type_id": _INT, "data": _one("json")}, ("name", "uid")
    ),
    "application": ObjectType(_text("name", "uid", "version", "type"), ("name", "uid")),
    "analytic": ObjectType(
        {**_text("name", "uid", "desc"), "type_id": Attribute("int", required=True)}, ("name", "uid")
    ),
    "finding_info": ObjectType(
        {
            **_text("uid", "title", "desc", required=("uid",)),
            "created_time": _INT,
            "types": _one("str", many=True),
            "analytic": _one("analytic"),
        }
    ),
    "compliance": ObjectType(
        {
            **_text("control", "status", "status_detail"),
            "standards": Attribute("str", required=True, many=True),
            "requirements": _one("str", many=True),
            "status_id": Attribute("int", values=frozenset({0, 1, 2, 3, 99})),
        }
    ),
    "cve": ObjectType(_text("uid", "title", "desc", required=("uid",))),
    "affected_package": ObjectType(
        {
            **_text("name", "version", required=("name", "version")),
            **_text("architecture", "package_manager", "fixed_in_version"),
        }
    ),
    "vulnerability": ObjectType(
        {
            **_text("title", "desc", "severity", "vendor_name"),
            "cve": _one("cve"),
            "is_fix_available": _BOOL,
            "affected_packages": _one("affected_package", many=True),
        },
        ("cve",),
    ),
}

#: What every class may carry: the base event with the profiles ``host`` and ``security_control``.
BASE: dict[str, Attribute] = {
    "activity_id": Attribute("int", required=True),
    "category_uid": Attribute("int", required=True),
    "class_uid": Attribute("int", required=True),
    "type_uid": Attribute("int", required=True),
    "time": Attribute("int", required=True),
    "severity_id": Attribute("int", required=True, values=frozenset({0, 1, 2, 3, 4, 5, 6, 99})),
    "metadata": _one("metadata", required=True),
    **_text("activity_name", "category_name", "class_name", "type_name", "message", "severity"),
    **_text("status", "status_code", "status_detail", "action", "disposition"),
    "status_id": Attribute("int"),
    "duration": _INT,
    **dict.fromkeys(("count", "start_time", "end_time"), _INT),
    "unmapped": _one("json"),
    "actor": _one("actor"),
    "device": _one("device"),
    "action_id": Attribute("int", values=frozenset({0, 1, 2, 3, 4, 99})),
    "disposition_id": Attribute("int", values=frozenset({*range(28), 99})),
    "policy": _one("policy"),
    "firewall_rule": _one("rule"),
    "is_alert": _BOOL,
}

_CRUD = {1: "Create", 2: "Read", 3: "Update", 4: "Delete"}
_EDGES = {"http_request": _one("http_request"), "http_response": _one("http_response")}
_SRC = {"src_endpoint": _one("endpoint")}


def _event_class(
    uid: int,
    name: str,
    category: tuple[int, str],
    activities: Mapping[int, str],
    extra: Mapping[str, Attribute],
    *,
    at_least_one: tuple[str, ...] = (),
    statuses: frozenset[int] = frozenset({0, 1, 2, 99}),
) -> EventClass:
    every = {0: "Unknown", **activities, 99: "Other"}
    body = ObjectType({**BASE, **extra}, at_least_one)
    return EventClass(uid, name, category[0], category[1], every, body, statuses)


_IAM = (3, "Identity & Access Management")
_APPLICATION = (6, "Application Activity")

_FINDINGS = (2, "Findings")
_FINDING_STEPS = {1: "Create", 2: "Update", 3: "Close"}
_FINDING = {"finding_info": _one("finding_info", required=True), "resources": _one("resource", many=True)}
_FINDING_STATUSES = frozenset({0, 1, 2, 3, 4, 5, 6, 99})

CLASSES: dict[int, EventClass] = {
    item.uid: item
    for item in (
        _event_class(0, "Base Event", (0, "Uncategorized"), {}, {}),
        _event_class(
            2002,
            "Vulnerability Finding",
            _FINDINGS,
            _FINDING_STEPS,
            {**_FINDING, "vulnerabilities": Attribute("vulnerability", required=True, many=True)},
            statuses=_FINDING_STATUSES,
        ),
        _event_class(
            2003,
            "Compliance Finding",
            _FINDINGS,
            _FINDING_STEPS,
            {**_FINDING, "compliance": _one("compliance", required=True)},
            statuses=_FINDING_STATUSES,
        ),
        _event_class(2004, "Detection Finding", _FINDINGS, _FINDING_STEPS, _FINDING, statuses=_FINDING_STATUSES),
        _event_class(
            3001,
            "Account Change",
            _IAM,
            {
                1: "Create",
                2: "Enable",
                3: "Password Change",
                5: "Disable",
                6: "Delete",
                7: "Attach Policy",
                8: "Detach Policy",
                9: "Lock",
                12: "Unlock",
            },
            {"user": _one("user", required=True), **_SRC, **_EDGES},
        ),
        _event_class(
            3002,
            "Authentication",
            _IAM,
            {
                1: "Logon",
                2: "Logoff",
                3: "Authentication Ticket",
                4: "Service Ticket Request",
                5: "Service Ticket Renew",
                6: "Preauth",
            },
            {
                "user": _one("user", required=True),
                "service": _one("service"),
                "dst_endpoint": _one("endpoint"),
                "session": _one("session"),
                "certificate": _one("certificate"),
                "is_remote": _BOOL,
                "is_mfa": _BOOL,
                **_text("auth_protocol", "logon_type"),
                "auth_protocol_id": _INT,
                "logon_type_id": _INT,
                **_SRC,
                **_EDGES,
            },
            at_least_one=("service", "dst_endpoint"),
        ),
        _event_class(
            3004,
            "Entity Management",
            _IAM,
            {
                **_CRUD,
                5: "Move",
                6: "Enroll",
                7: "Unenroll",
                8: "Enable",
                9: "Disable",
                10: "Activate",
                11: "Deactivate",
                12: "Suspend",
                13: "Resume",
            },
            {
                "entity": _one("managed_entity", required=True),
                "entity_result": _one("managed_entity"),
                **_text("comment"),
                **_SRC,
                **_EDGES,
            },
        ),
        _event_class(
            4002,
            "HTTP Activity",
            (4, "Network Activity"),
            {
                1: "Connect",
                2: "Delete",
                3: "Get",
                4: "Head",
                5: "Options",
                6: "Post",
                7: "Put",
                8: "Trace",
                9: "Patch",
            },
            {"dst_endpoint": _one("endpoint"), **_text("app_name"), **_SRC, **_EDGES},
            at_least_one=("http_request", "http_response"),
        ),
        _event_class(
            6002,
            "Application Lifecycle",
            _APPLICATION,
            {1: "Install", 2: "Remove", 3: "Start", 4: "Stop", 5: "Restart", 6: "Enable", 7: "Disable", 8: "Update"},
            {"app": _one("application", required=True)},
        ),
        _event_class(
            6003,
            "API Activity",
            _APPLICATION,
            _CRUD,
            {
                "actor": _one("actor", required=True),
                "api": _one("api", required=True),
                "src_endpoint": _one("endpoint", required=True),
                "dst_endpoint": _one("endpoint"),
                "resources": _one("resource", many=True),
                **_EDGES,
            },
        ),
    )
}

SEVERITIES = {
    0: "Unknown",
    1: "Informational",
    2: "Low",
    3: "Medium",
    4: "High",
    5: "Critical",
    6: "Fatal",
    99: "Other",
}


def validate(event: Mapping[str, Any]) -> None:
    """Raise :class:`EventInvalid` naming every way in which ``event`` is not a strict OCSF 1.8 event of a class we emit."""
    kind = CLASSES.get(event.get("class_uid", -1)) if isinstance(event.get("class_uid"), int) else None
    if kind is None:
        raise EventInvalid([f"class_uid {event.get('class_uid')!r} is not one of {sorted(CLASSES)}"])
    problems: list[str] = []
    _check_object(kind.body, event, "", problems)
    activity = event.get("activity_id")
    if not isinstance(activity, int) or activity not in kind.activities:
        problems.append(f"activity_id {activity!r} is not one of class {kind.uid}")
    elif event.get("type_uid") != kind.uid * 100 + activity:
        problems.append("type_uid is not class_uid × 100 + activity_id")
    if event.get("category_uid") != kind.category_uid:
        problems.append(f"category_uid of class {kind.uid} is {kind.category_uid}")
    # what is no number is told as such above, and may have no hash to look it up by
    if isinstance(event.get("status_id"), int) and event["status_id"] not in kind.statuses:
        problems.append(f"status_id {event['status_id']!r} is not one of class {kind.uid}")
    metadata = event.get("metadata")
    if isinstance(metadata, Mapping) and metadata.get("version") != VERSION:
        problems.append(f"metadata.version must be {VERSION}")
    if problems:
        raise EventInvalid(problems)


def _check_object(kind: ObjectType, value: Mapping[str, Any], where: str, problems: list[str]) -> None:
    problems.extend(f"{where}{name} is not an attribute here" for name in value if name not in kind.attributes)
    for name, attribute in kind.attributes.items():
        if name in value:
            _check_attribute(attribute, value[name], where + name, problems)
        elif attribute.required:
            problems.append(f"{where}{name} is required")
    if kind.at_least_one and not any(name in value for name in kind.at_least_one):
        problems.append(f"{where or 'the event '}needs one of {', '.join(kind.at_least_one)}")


def _check_attribute(attribute: Attribute, value: Any, where: str, problems: list[str]) -> None:
    if attribute.many:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{where} must be a list")
            return
        for index, item in enumerate(value):
            _check_value(attribute, item, f"{where}[{index}]", problems)
    else:
        _check_value(attribute, value, where, problems)


def _check_value(attribute: Attribute, value: Any, where: str, problems: list[str]) -> None:
    if attribute.kind == "str":
        if not isinstance(value, str):
            problems.append(f"{where} must be text")
        elif len(value) > MAX_TEXT:
            problems.append(f"{where} is longer than {MAX_TEXT} characters")
    elif attribute.kind == "int":
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**53) < value < 2**53:
            problems.append(f"{where} must be an integer of at most 53 bits")
        elif attribute.values and value not in attribute.values:
            problems.append(f"{where} {value} is not one of its values")
    elif attribute.kind == "bool":
        if not isinstance(value, bool):
            problems.append(f"{where} must be true or false")
    elif attribute.kind == "json":
        if not isinstance(value, Mapping):
            problems.append(f"{where} must be an object")
    elif not isinstance(value, Mapping):
        problems.append(f"{where} must be an object")
    else:
        _check_object(OBJECTS[attribute.kind], value, where + ".", problems)
