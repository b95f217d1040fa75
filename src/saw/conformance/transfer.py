"""The probe as one program, and the strict reading of what comes back.

What runs in a sandbox may lie, and may write anything. A line counts when it carries the run's token, names a case that was
asked for, once, and has exactly the known fields; everything else is a problem of the run, and never a pass.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from saw import jsontext

PARTS = ("core", "net", "process", "files", "git", "web", "h2", "far")
LONGEST_LINE = 8192
LONGEST_OUTPUT = 4 * 1024 * 1024
_PACKAGE = "saw.conformance.probe"


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the probe says of one case.

    ``errno`` is its name, ``status`` that of an HTTP answer, ``reason`` its word for why, ``layer`` its word for who refused.
    """

    id: str
    outcome: Literal["refused", "allowed", "error", "not_possible"]
    detail: str = ""
    errno: str = ""
    reason: str = ""
    status: int = 0
    layer: str = ""


class _End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    end: int


@dataclass
class Answer:
    """The cases that were told of, and what was wrong with the output."""

    told: dict[str, Told] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def script(job: dict[str, Any]) -> bytes:
    """Return the probe with its ``job`` as one Python program for standard input."""
    sources = {name: (Path(__file__).parent / "probe" / f"{name}.py").read_text(encoding="utf-8") for name in PARTS}
    return (
        "import json, sys, types\n"
        f"SOURCES = json.loads({json.dumps(json.dumps(sources))})\n"
        "for name, source in SOURCES.items():\n"
        f"    module = types.ModuleType({_PACKAGE!r} + '.' + name)\n"
        "    sys.modules[module.__name__] = module\n"
        "    exec(compile(source, name + '.py', 'exec'), module.__dict__)\n"
        f"sys.modules[{_PACKAGE!r} + '.core'].main(json.loads({json.dumps(json.dumps(job))}))\n"
    ).encode()


def read(output: bytes, token: str, asked: set[str]) -> Answer:
    """Read the probe's output; a case that is told of twice, or not at all, has no answer."""
    answer = Answer()
    if len(output) > LONGEST_OUTPUT:
        answer.problems.append(f"more than {LONGEST_OUTPUT} bytes were written")
        output = output[:LONGEST_OUTPUT]
    mark, ended, twice = f"saw-probe:{token} ".encode(), None, set()
    for line in re.split(rb"\r?\n", output):
        if not line.startswith(mark):
            continue  # a greeting of the way in; without the token it says nothing
        text = line[len(mark) :]
        if len(text) > LONGEST_LINE:
            answer.problems.append("a line is too long")
            continue
        try:
            if text.startswith(b'{"end"'):
                ended = jsontext.decode(text, kind=_End).end
                continue
            told = jsontext.decode(text, kind=Told)
        except msgspec.DecodeError as error:
            answer.problems.append(f"a line cannot be read: {error}")
            continue
        if told.id not in asked:
            answer.problems.append(f"a case that nobody asked for: {told.id[:80]!r}")
        elif told.id in answer.told or told.id in twice:
            answer.problems.append(f"{told.id} is told of twice")
            twice.add(told.id)
            answer.told.pop(told.id, None)
        else:
            answer.told[told.id] = told
    missing = sorted(asked - set(answer.told) - twice)
    if missing:
        answer.problems.append(f"no answer for {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}")
    if ended != len(asked):
        answer.problems.append("the probe did not come to its end")
    return answer
