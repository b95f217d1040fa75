"""``saw review``: look at calls and changes that wait for people, approve or deny them, keep and verify receipts."""

from __future__ import annotations

import argparse
import sys
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from saw import jsontext
from saw.cli.answers import read_file
from saw.cli.operator_options import add_options, add_pages, fields, more, show, table
from saw.errors import SawError
from saw.files import write_atomic

_COLUMNS = ("id", "state", "workspace_id", "method", "host", "path", "group", "quorum", "approved_by", "expires_at")
_REVIEWERS = ("name", "state", "groups", "key_sha256", "added_at", "retired_reason")
_BRIEF = (
    "id",
    "state",
    "detail",
    "workspace_id",
    "agent_id",
    "sponsor",
    "policy_digest",
    "rule",
    "delegation",
    "binary",
    "group",
    "quorum",
    "approved_by",
    "opened_at",
    "expires_at",
    "claimed_at",
    "ended_at",
    "answer_status",
    "context_state",
    "context_detail",
    "broken_at",
    "break_glass_by",
    "after_state",
    "after_due_at",
    "after_at",
    "held_up_by",
    "read_back",
    "read_back_detail",
    "read_back_at",
)


class NotConfirmed(SawError):
    """A decision was not confirmed by whoever asked for it."""

    code = "not_confirmed"


def main(argv: list[str]) -> int:
    """Run one ``saw review`` command."""
    options = _parser().parse_args(argv)
    if options.command == "verify":
        return _verify(options)
    from saw.broker.client import OperatorClient

    client = OperatorClient.from_context(options.context)
    with client.session():
        return int(options.run(client, options))


def _list(client: Any, options: argparse.Namespace) -> int:
    wanted = {"state": options.state, "workspace_id": options.workspace, "owed": "true" if options.owed else None}
    wanted |= {"after": options.after, "limit": options.limit}
    query = urlencode({name: value for name, value in wanted.items() if value is not None})
    answer = client.request("GET", f"/v1/reviews?{query}")
    show(answer, table(answer["reviews"], _COLUMNS) + more(answer), as_json=options.json)
    return 0


def _show(client: Any, options: argparse.Namespace) -> int:
    from saw.review.decide import look

    answer = client.request("GET", _path(options.id))
    if options.body or answer["rendering"] is not None:
        seen = look(client, options.id)
        answer = {**seen.told, "rendering": seen.rendering}
        if options.body:
            write_atomic(options.body, seen.body, mode=0o600)
    show(answer, _text(answer), as_json=options.json)
    return 0


def _decide(client: Any, options: argparse.Namespace) -> int:
    """Show the call, ask, sign, hand in. What is shown and digested is made on this machine from the call's bytes."""
    from saw.policy.keys import read_passphrase
    from saw.policy.signers import open_signer
    from saw.review.decide import decide, look, reviewer_of

    signer = open_signer(options.key, read_passphrase(options.passphrase_file))
    reviewer_of(client, signer)
    seen = look(client, options.id)
    print(
        _text({**seen.told, "rendering": seen.rendering}), file=sys.stderr if options.json else sys.stdout, flush=True
    )
    _confirm(options, seen.told["id"])
    answer = decide(client, seen, signer, options.decision, options.comment)
    text = f"{answer['id']} is {answer['state']}; approved by {', '.join(answer['approved_by']) or 'nobody yet'}"
    if answer["break_glass_by"]:
        text += f"; signed to break the glass: {', '.join(answer['break_glass_by'])}"
    if answer["after_state"]:
        text += f"; after-review {answer['after_state']}, due {answer['after_due_at']}"
    show(answer, text, as_json=options.json)
    return 0


def _compare(client: Any, options: argparse.Namespace) -> int:
    """Compare the files of a change with a folder of one's own, such as a checkout of the commit that was reviewed."""
    from pathlib import Path

    from saw.review.decide import look
    from saw.review.gate import GateRequest, changed_files
    from saw.review.tree import bound_files

    content = look(client, options.id).content
    if not isinstance(content, GateRequest):
        raise SawError(f"{options.id} is a call of an agent", cure="saw review show ID --body FILE writes its body")
    stated = tuple(item for item in content.statement.files if not item.path.startswith("/"))
    mine = bound_files([(Path(options.folder), "")], content.statement.excluded)
    differ = changed_files(mine, stated)
    answer = {"id": options.id, "same": not differ, "files": len(stated), "differ": differ}
    elsewhere = len(content.statement.files) - len(stated)
    text = [*differ, f"{len(stated)} files, {'the same' if not differ else f'{len(differ)} differ'}"]
    if elsewhere:
        text.append(f"{elsewhere} more files lie elsewhere and are not compared")
    show(answer | {"elsewhere": elsewhere}, "\n".join(text), as_json=options.json)
    return 1 if differ else 0


def _cancel(client: Any, options: argparse.Namespace) -> int:
    answer = client.request("POST", f"{_path(options.id)}/cancel", {"reason": options.reason})
    show(answer, fields({name: answer[name] for name in ("id", "state", "detail", "changed")}), as_json=options.json)
    return 0


def _read_back(client: Any, options: argparse.Namespace) -> int:
    answer = client.request("POST", f"{_path(options.id)}/read-back", {"reason": options.reason})
    show(
        answer, f"{answer['id']} is read back; saw review show {answer['id']} says what was found", as_json=options.json
    )
    return 0


def _receipt(client: Any, options: argparse.Namespace) -> int:
    answer = client.request("GET", f"{_path(options.id)}/receipt")
    if options.out:
        write_atomic(options.out, answer["receipt"] + "\n")
    show(answer, f"written to {options.out}" if options.out else answer["receipt"], as_json=options.json)
    return 0


def _reviewer_add(client: Any, options: argparse.Namespace) -> int:
    body = {"groups": options.group, "public_key": read_file(options.key).decode("ascii", "replace")}
    answer = client.request("PUT", f"/v1/reviewers/{quote(options.name, safe='')}", body)
    show(answer, fields({name: answer[name] for name in (*_REVIEWERS, "changed")}), as_json=options.json)
    return 0


def _reviewer_list(client: Any, options: argparse.Namespace) -> int:
    answer = client.request("GET", "/v1/reviewers")
    show(answer, table(answer["reviewers"], _REVIEWERS), as_json=options.json)
    return 0


def _reviewer_retire(client: Any, options: argparse.Namespace) -> int:
    path = f"/v1/reviewers/{quote(options.name, safe='')}/retire"
    answer = client.request("POST", path, {"reason": options.reason})
    show(answer, fields({name: answer[name] for name in (*_REVIEWERS, "changed")}), as_json=options.json)
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Check a receipt without the broker; ``--ca`` is the certificate of its authority."""
    from saw.review.receipt import verify_receipt

    token = read_file(options.file).decode("ascii", "replace").strip()
    if token.startswith("{"):
        try:
            token = str(jsontext.decode(token).get("receipt", ""))
        except msgspec.DecodeError as error:
            raise SawError(f"{options.file} holds no receipt", cure="give what saw review receipt printed") from error
    found = verify_receipt(token, read_file(options.ca))
    decisions = [
        {
            "approver": one.said.approver,
            "decision": one.said.decision,
            "decided_at": one.decided_at,
            "key_sha256": one.key_sha256,
            "passkey_origin": one.origin or None,
            "comment": one.said.comment,
        }
        for one in found.decisions
    ]
    plain = msgspec.to_builtins(found.receipt)
    answer = {**plain, "decisions": decisions, "signer": found.signer}
    text = "\n".join(
        [
            fields({name: value for name, value in answer.items() if name != "decisions"}),
            "",
            table(decisions, ("approver", "decision", "decided_at", "key_sha256", "passkey_origin", "comment")),
        ]
    )
    show(answer, text, as_json=options.json)
    return 0


def _path(identifier: str) -> str:
    return f"/v1/reviews/{quote(identifier, safe='')}"


def _confirm(options: argparse.Namespace, identifier: str) -> None:
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise NotConfirmed(f"nobody is there to {options.command} {identifier}", cure="look at it, then add --yes")
    print(f"type the id of the review to {options.command} it: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != identifier:
        raise NotConfirmed(f"{identifier} is as it was", cure="type its whole id")


def _text(answer: dict[str, Any]) -> str:
    lines = [fields({name: answer[name] for name in _BRIEF if answer.get(name)}), ""]
    if answer["rendering"] is not None:
        lines.append(answer["rendering"])
    else:
        lines.append("the bytes of the call are no longer kept")
    if answer["decisions"]:
        lines.append(table(answer["decisions"], ("approver", "decision", "decided_at", "comment")))
    return "\n".join(lines).rstrip("\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw review", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(group: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = group.add_parser(name, help=text)
        add_options(command)
        command.set_defaults(run=run)
        return command

    listing = add(commands, "list", _list, "list reviews, newest first")
    listing.add_argument("--state", help="only those in this state, such as pending")
    listing.add_argument("--owed", action="store_true", help="only those whose broken glass somebody has to look at")
    listing.add_argument("--workspace", help="only those of this workspace")
    add_pages(listing, "1000")
    one = add(commands, "show", _show, "show one review: the call, the decisions, how it ended")
    one.add_argument("id", help="review id")
    one.add_argument(
        "--body", metavar="FILE", help="write the exact body of the call, or the statement of a change, to this file"
    )
    for name, decision, text in (
        ("approve", "approve", "let a call be sent, once"),
        ("deny", "deny", "end a call that waits"),
        (
            "break-glass",
            "break_glass",
            "let a call be sent that its group cannot decide in time; takes two keys, and is told",
        ),
        ("uphold", "uphold", "say afterwards that it was right to break the glass"),
        ("reject", "reject", "say afterwards that it was wrong to break the glass"),
    ):
        decide = add(commands, name, _decide, text)
        decide.set_defaults(decision=decision)
        decide.add_argument("id", help="review id")
        decide.add_argument("--key", required=True, help="your private key file, or exec:/path/to/program that signs")
        decide.add_argument("--passphrase-file", help="file with the passphrase of the key")
        must = decision not in {"approve", "deny"}
        decide.add_argument(
            "--comment", default="", required=must, help="why, at most 256 characters; it is signed and kept"
        )
        decide.add_argument("--yes", action="store_true", help="do not ask; you have looked at it")
    compare = add(commands, "compare", _compare, "compare the files of a change to the fleet with a folder of your own")
    compare.add_argument("id", help="review id")
    compare.add_argument("folder", help="what you trust, such as a checkout of the commit that was reviewed")
    cancel = add(commands, "cancel", _cancel, "end a review without a decision")
    cancel.add_argument("id", help="review id")
    cancel.add_argument("--reason", required=True, help="why; it is audited")
    read_back = add(commands, "read-back", _read_back, "look once more at the far end what became of an unknown push")
    read_back.add_argument("id", help="review id")
    read_back.add_argument("--reason", required=True, help="why; it is audited")
    receipt = add(commands, "receipt", _receipt, "print the broker's signed receipt of a review that has ended")
    receipt.add_argument("id", help="review id")
    receipt.add_argument("--out", metavar="FILE", help="write it to this file")
    verify = commands.add_parser("verify", help="check a receipt, and every signature in it, without the broker")
    verify.add_argument("file", help="the receipt, or the JSON of `saw review receipt --json`")
    verify.add_argument("--ca", required=True, help="certificate of the broker's authority (PEM)")
    verify.add_argument("--json", action="store_true", help="print JSON")
    people = commands.add_parser("reviewer", help="who may decide").add_subparsers(dest="step", required=True)
    person = add(people, "add", _reviewer_add, "register somebody, or change the groups")
    person.add_argument("name", help="the person's name, as in the sponsor of a workspace, such as ada@example.com")
    person.add_argument("--group", action="append", required=True, help="a group of the policy; may be given again")
    person.add_argument("--key", required=True, metavar="FILE", help="the person's public key (PEM)")
    add(people, "list", _reviewer_list, "list reviewers, the retired ones too")
    retire = add(people, "retire", _reviewer_retire, "end somebody's say, also where it was not used yet")
    retire.add_argument("name", help="the person's name")
    retire.add_argument("--reason", required=True, help="why; it is audited")
    return parser
