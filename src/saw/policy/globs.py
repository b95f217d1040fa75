"""Globs that match in time linear in the input, whatever the glob.

``*`` stands for a run of characters inside one segment (path) or label (host), ``**`` for whole segments or labels.
Each glob becomes one regular expression in which every choice is either atomic or leftmost, so that nothing is tried
twice: for a run of literals between wildcards the leftmost occurrence is always as good as a later one.
"""

from __future__ import annotations

import re
from functools import lru_cache

_REFUSED = re.compile(r"[?\[\]{}\\]")
_LABEL = re.compile(r"[a-z0-9_*](?:[a-z0-9_*-]*[a-z0-9_*])?\Z")


class GlobError(ValueError):
    """A glob cannot be used; the text says why."""


def _segment(text: str, run: str) -> str:
    """Return the expression for one segment; ``run`` is the class of a character that ``*`` may stand for."""
    head, *rest = text.split("*")
    if not rest:
        return re.escape(head)
    *middle, last = rest
    expression = re.escape(head)
    for literal in middle:
        if literal:
            expression += f"(?>{run}*?{re.escape(literal)})"
    if last:
        return expression + f"{run}{{{len(last)},}}+(?<={re.escape(last)})"
    return f"{expression}{run}*+"


def _check_text(glob: str, what: str) -> None:
    if not glob:
        raise GlobError(f"the {what} is empty")
    if len(glob) > 1024:
        raise GlobError(f"the {what} is longer than 1024 characters")
    found = _REFUSED.search(glob)
    if found:
        raise GlobError(f"the {what} has {found[0]!r}; only * and ** are wildcards")
    if not glob.isascii() or not glob.isprintable():
        raise GlobError(f"the {what} has characters outside printable ASCII")


@lru_cache(maxsize=8192)
def path_glob(glob: str) -> re.Pattern[str]:
    """Compile a glob over an absolute path; use ``fullmatch``. Raises :class:`GlobError`.

    ``*`` alone stands for one segment that is not empty. ``**`` must be a whole segment: in front or in the middle it
    stands for zero or more segments, at the end for one or more, of which the last may be empty (``/a/**`` matches
    ``/a/`` and ``/a/b/c`` but not ``/a``).
    """
    _check_text(glob, "path glob")
    if not glob.startswith("/"):
        raise GlobError("the path glob does not start with /")
    segments = glob.split("/")[1:]
    if any("**" in segment and segment != "**" for segment in segments):
        raise GlobError("** must be a whole path segment")
    open_end = segments[-1] == "**"
    chunks: list[str] = [""]
    for segment in segments[:-1] if open_end else segments:
        if segment == "**":
            chunks.append("")
        else:
            chunks[-1] += "/" + ("[^/]++" if segment == "*" else _segment(segment, "[^/]"))
    first, *rest = chunks
    expression = first
    for index, chunk in enumerate(rest):
        if index == len(rest) - 1 and not open_end:
            expression += f"(?:/[^/]*+)*?{chunk}"
        else:
            expression += f"(?>(?:/[^/]*+)*?{chunk}(?=/|\\Z))"
    return re.compile(expression + ("/.*+" if open_end else "") + "\\Z", re.DOTALL)


@lru_cache(maxsize=8192)
def segment_glob(segment: str) -> re.Pattern[str]:
    """Compile one segment or label with wildcards inside; use ``fullmatch`` on text without separators."""
    return re.compile(_segment(segment, "."), re.DOTALL)


def ref_glob(glob: str) -> re.Pattern[str]:
    """Compile a glob over a Git ref name; match it against ``"/" + name``. Raises :class:`GlobError`."""
    if glob.startswith("/"):
        raise GlobError("a ref glob does not start with /")
    return path_glob("/" + glob)


@lru_cache(maxsize=8192)
def flat_glob(glob: str) -> re.Pattern[str]:
    """Compile a glob over a name without structure (a model, a query value): ``*`` stands for any run. ``fullmatch``."""
    _check_text(glob, "glob")
    return re.compile(_segment(re.sub(r"\*+", "*", glob), "."), re.DOTALL)


@lru_cache(maxsize=8192)
def host_glob(glob: str) -> re.Pattern[str]:
    """Compile a host glob against lower-case host names; use ``fullmatch``. Raises :class:`GlobError`.

    ``*`` alone is one label, ``**`` (first label only) one or more labels, ``*`` inside a label any run of its
    characters. The last two labels are literal, so ``*``, ``**`` and ``*.com`` are refused.
    """
    name = glob.lower()
    _check_text(name, "host")
    if name.endswith("."):
        raise GlobError("the host ends with a dot")
    labels = name.split(".")
    if len(name) > 253 or any(len(label) > 63 for label in labels):
        raise GlobError("the host is longer than a DNS name may be")
    if not all(_LABEL.match(label) for label in labels):
        raise GlobError("the host has an empty label or one with characters a host name cannot have")
    if any("*" in label for label in labels[-2:]):
        raise GlobError("a wildcard needs at least two literal labels after it")
    if any("**" in label and (label != "**" or index) for index, label in enumerate(labels)):
        raise GlobError("** must be the whole first label")
    parts = []
    for label in labels:
        if label == "**":
            parts.append("[^.]++(?:\\.[^.]++)*?")
        else:
            parts.append("[^.]++" if label == "*" else _segment(label, "[^.]"))
    return re.compile("\\.".join(parts) + "\\Z", re.DOTALL)


def is_exact(glob: str) -> bool:
    """Return whether ``glob`` has no wildcard."""
    return "*" not in glob


def literal_tail(host: str) -> str:
    """Return the last two labels of a host or host glob, which no wildcard may stand for."""
    return ".".join(host.rsplit(".", 2)[-2:])


def specificity(glob: str) -> tuple[int, int, int]:
    """Return a key that is larger for the more specific glob: exact before glob, more literals, fewer wildcards."""
    stars = glob.count("*")
    return (0 if stars else 1, len(glob) - stars, -stars)


def begin_or_end_apart(left: str, right: str) -> bool:
    """Return whether the literal text before the first wildcards, or after the last, already tells the two globs apart."""
    a, b = left.partition("*")[0], right.partition("*")[0]
    if not (a.startswith(b) or b.startswith(a)):
        return True
    a, b = left.rpartition("*")[2], right.rpartition("*")[2]
    return not (a.endswith(b) or b.endswith(a))


def may_overlap(left: str, right: str, separator: str = "/") -> bool:
    """Return ``False`` only if no string matches both globs (``**`` is taken as any run, which errs towards ``True``)."""
    if begin_or_end_apart(left, right):
        return False
    a, b = _tokens(left), _tokens(right)
    seen = {(0, 0)}
    pending = [(0, 0)]
    while pending:
        i, j = pending.pop()
        if i == len(a) and j == len(b):
            return True
        following: list[tuple[int, int]] = []
        x = a[i] if i < len(a) else ""
        y = b[j] if j < len(b) else ""
        if x.startswith("*"):
            following.append((i + 1, j))
            if y and (len(x) > 1 or y != separator):
                following.append((i, j + 1))
        if y.startswith("*"):
            following.append((i, j + 1))
            if x and (len(y) > 1 or x != separator):
                following.append((i + 1, j))
        if x and x == y:
            following.append((i + 1, j + 1))
        for state in following:
            if state not in seen:
                seen.add(state)
                pending.append(state)
    return False


def _tokens(glob: str) -> list[str]:
    """Split into literals, ``*`` and ``**``; a separator next to ``**`` is swallowed because ``**`` may stand for none."""
    return re.findall(r"\*\*|\*|[^*]", re.sub(r"[/.]\*\*", "**", glob))
