"""Who may decide on reviews under a registered key: names, groups, and one key each."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import ConflictError, MalformedError, NotFoundError
from saw.broker.review_states import GATE
from saw.broker.reviewer_names import ReviewerName
from saw.broker.schema import reviewers
from saw.policy.errors import KeyFileError
from saw.policy.keys import key_id, parse_public_key, public_pem, raw_public
from saw.review.messages import SPONSORS

Group = Annotated[str, msgspec.Meta(pattern=r"^[!-~][ -~]{0,254}\Z")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Reviewer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A person's groups and public key (PEM, Ed25519 or ECDSA P-256). Groups replace those of before; the key stays."""

    groups: Annotated[tuple[Group, ...], msgspec.Meta(min_length=1, max_length=64)]
    public_key: Annotated[str, msgspec.Meta(max_length=4096)]


class Retire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why somebody decides no longer."""

    reason: Text


class Reviewers:
    """The register of reviewers (control REV-02). A name or a key that was used once is never another person's."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def put(self, caller: Caller, name: str, body: Reviewer) -> dict[str, Any]:
        """Register somebody, or change the groups; the same again changes nothing. Raises :class:`ConflictError`."""
        try:
            name = msgspec.convert(name, ReviewerName)
            key = parse_public_key(body.public_key.encode(), f"of {name}")
        except msgspec.ValidationError as error:
            raise MalformedError(
                f"{name[:64]!r} is no reviewer's name", cure="use lower-case letters, digits and . _ @ + -"
            ) from error
        except KeyFileError as error:
            raise MalformedError(error.message, cure=error.cure, code="key_refused") from error
        groups, print_ = sorted(set(body.groups)), hashlib.sha256(raw_public(key)).hexdigest()
        now = self._s.clock()
        with self._s.store.write() as tx:
            same = tx.connection.execute(select(reviewers).where(reviewers.c.name == name)).one_or_none()
            holder = tx.connection.execute(select(reviewers).where(reviewers.c.key_sha256 == print_)).one_or_none()
            if same is not None and (same.key_sha256 != print_ or same.state != "active"):
                raise ConflictError(
                    f"{name} is registered {'with another key' if same.state == 'active' else 'and retired'}",
                    cure="retire the old entry and register the person under a new name",
                    code="reviewer_exists",
                )
            if holder is not None and same is None:
                raise ConflictError(
                    f"this key is {holder.name}'s", cure="every reviewer has a key of their own", code="key_in_use"
                )
            before = None if same is None else _groups(same)
            if same is None:
                tx.connection.execute(
                    reviewers.insert().values(
                        name=name,
                        groups=msgspec.json.encode(groups).decode(),
                        public_key=public_pem(key).decode(),
                        key_id=key_id(key),
                        key_sha256=print_,
                        state="active",
                        added_by=caller.principal,
                        added_at=iso(now),
                    )
                )
            elif before != groups:
                changed = {"groups": msgspec.json.encode(groups).decode()}
                tx.connection.execute(reviewers.update().where(reviewers.c.name == name).values(**changed))
            if before != groups:
                tx.record(
                    self._s.events.account_change(
                        now,
                        caller.subject(),
                        name,
                        activity="create" if before is None else "enable",
                        message="reviewer registered" if before is None else "groups of a reviewer changed",
                        detail={"groups": groups, "before": before or [], "key_sha256": print_},
                    )
                )
        return {**self.show(name), "changed": before != groups}

    def show(self, name: str) -> dict[str, Any]:
        """Return one reviewer."""
        with self._s.store.read() as connection:
            return _view(get_reviewer(connection, name))

    def list(self) -> dict[str, Any]:
        """Return all reviewers, the retired ones too."""
        with self._s.store.read() as connection:
            rows = connection.execute(select(reviewers).order_by(reviewers.c.name)).all()
        return {"reviewers": [_view(row) for row in rows]}

    def retire(self, caller: Caller, name: str, body: Retire) -> dict[str, Any]:
        """End somebody's say: approvals of theirs that were not claimed yet no longer count."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = get_reviewer(tx.connection, name)
            changed = row.state == "active"
            if changed:
                values = {"state": "retired", "retired_by": caller.principal, "retired_at": iso(now)}
                values["retired_reason"] = body.reason
                tx.connection.execute(reviewers.update().where(reviewers.c.name == name).values(**values))
                tx.record(
                    self._s.events.account_change(
                        now,
                        caller.subject(),
                        name,
                        activity="disable",
                        message=body.reason,
                        detail={"groups": _groups(row), "key_sha256": row.key_sha256},
                    )
                )
        return {**self.show(name), "changed": changed}


def get_reviewer(connection: Connection, name: str) -> Row[Any]:
    """Return the row of a reviewer or raise :class:`NotFoundError`."""
    row = connection.execute(select(reviewers).where(reviewers.c.name == name)).one_or_none()
    if row is None:
        raise NotFoundError(
            f"there is no reviewer {name[:64]!r}",
            cure="saw review reviewer list shows them",
            code="unknown_reviewer",
        )
    return row


def may_decide(reviewer: Row[Any], group: str) -> bool:
    """Tell whether somebody is an active member of ``group``."""
    return reviewer.state == "active" and group in _groups(reviewer)


def is_self_approval(review: Row[Any], name: str) -> bool:
    """Tell whether ``name`` asked for what is reviewed: the workspace's sponsor, unless the group asks for sponsors.

    Of a change to the fleet, it is the person who is said to ask, and whoever the client is.
    """
    name = name.strip().casefold()
    if review.kind == GATE and name == str(review.perimeter).partition(":")[2].casefold():
        return True
    return review.group_name != SPONSORS and name == str(review.sponsor).strip().casefold()


def _groups(row: Row[Any]) -> list[str]:
    return jsontext.decode(row.groups, kind=list[str])


def _view(row: Row[Any]) -> dict[str, Any]:
    return {**row._mapping, "groups": _groups(row)}  # noqa: SLF001 - SQLAlchemy's public name for a row as a mapping
