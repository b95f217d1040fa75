"""What leaves a worker about a run: short printable lines in which what looks like a secret is not shown.

Ansible itself hides the results of tasks with ``no_log``; this is for words of tools that fail.
"""

from __future__ import annotations

import re

from saw.jobs.messages import MAX_LINE

HIDDEN = "[hidden]"

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
_PATTERNS = (
    # scheme://user:password@host
    (re.compile(r"(://[^/\s:@]{0,128}:)[^/\s@]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), rf"\1 {HIDDEN}"),
    # password=…, "token": "…", --secret …
    (
        re.compile(
            r"(?i)([\w-]*(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|credential|private[_-]?key)[\w-]*"
            r"[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;}\"']+)"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(?i)(--(?:password|passphrase|secret|token|api-key)\s+)\S+"), rf"\1{HIDDEN}"),
    # signed tokens, and keys of well-known services
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), HIDDEN),
    (re.compile(r"\b(?:gh[pousr]_|glpat-|xox[abpr]-|sk-|AKIA)[A-Za-z0-9_-]{10,}"), HIDDEN),
)


def redact(text: str, limit: int = MAX_LINE) -> str:
    """Return ``text`` as one printable line of at most ``limit`` characters, without what looks like a secret."""
    text = _PEM.sub(HIDDEN, text[: 64 * 1024])
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    line = "".join(one if one.isprintable() else " " for one in text)
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
