"""``saw policy learn``: from denials to a draft bundle that somebody reviews."""

from __future__ import annotations

import argparse
from pathlib import Path

from saw.cli.answers import Add, Answer, read_file
from saw.cli.folders import write_new_folder
from saw.errors import ConfigError
from saw.policy.denials import as_line, read_denials
from saw.policy.draft import TESTS_FILE, build_draft, report
from saw.policy.learn import Lesson
from saw.policy.learn import learn as learn_rules
from saw.policy.loader import load_bundle_folder

_LEAST = 3


def learn(options: argparse.Namespace) -> Answer:
    """Propose the smallest rules for what was denied, as a new folder; exit code 1 if nothing could be proposed."""
    if options.generalise and options.at_least < 2:
        raise ConfigError(f"--at-least {options.at_least} would generalise a single call", cure="give 2 or more")
    base = load_bundle_folder(options.base)
    unknown = sorted(set(options.allow_credential) - {credential.id for credential in base.governance.credentials})
    if unknown:
        raise ConfigError(f"{options.base} has no credential {unknown[0]}", cure="name an id of governance.yaml")
    read = [read_denials(read_file(path), path) for path in options.denials]
    lesson = learn_rules(
        base,
        [denial for found in read for denial in found.denials],
        generalise_from=options.at_least if options.generalise else 0,
        allow_credentials=frozenset(options.allow_credential),
    )
    others = sum(found.others for found in read)
    summary = {**report(lesson), "other_records": others}
    if not lesson.proposals:
        return {"ok": False, **summary}, "\n".join([*_told(lesson), "nothing to propose; no draft was written"]), 1
    path = Path(options.base) / TESTS_FILE
    draft = build_draft(base, lesson, path.read_bytes() if path.is_file() else None)
    write_new_folder(options.out, draft.files)
    answer = {"ok": True, **summary, "out": options.out, "name": draft.name, "version": draft.version}
    lines = [*_told(lesson), *(f"BREAKS       case {name!r} of the base" for name in draft.broken_cases)]
    lines.append(f"{options.out}: {draft.name} {draft.version}, {len(lesson.rules)} new network rules to review")
    return {**answer, "broken_cases": list(draft.broken_cases)}, "\n".join(lines), 0


def _told(lesson: Lesson) -> list[str]:
    lines = []
    for proposal in lesson.proposals:
        asked = proposal.asked[0]
        count = f" (from {len(proposal.asked)} paths)" if len(proposal.asked) > 1 else ""
        query = "".join(f" {key}={'|'.join(values)}" for key, values in asked.query)
        lines.append(
            f"proposed     {asked.method} https://{asked.host}:{asked.port}{proposal.path}{query} by {asked.binary}{count}"
        )
    for left in lesson.left:
        count = f" ({left.times} times)" if left.times > 1 else ""
        lines.append(f"not proposed {as_line(left.denial)}{count}: {left.reason}; {left.cure}")
    return lines


def register(add: Add) -> None:
    """Add the command to the group ``saw policy``."""
    sub = add("learn", learn, "propose rules for what was denied, as a draft folder to review")
    sub.add_argument(
        "--denials", nargs="+", required=True, metavar="FILE", help="refusals, ring-1 journal or audit export"
    )
    sub.add_argument("--base", required=True, help="bundle folder that denied them")
    sub.add_argument("--out", required=True, help="folder of the draft; must not exist")
    sub.add_argument("--generalise", action="store_true", help="put * where enough paths differ in one segment only")
    sub.add_argument("--at-least", type=int, default=_LEAST, help="how many paths are enough (default: %(default)s)")
    sub.add_argument(
        "--allow-credential",
        action="append",
        default=[],
        metavar="ID",
        help="this credential may travel with learned calls",
    )
