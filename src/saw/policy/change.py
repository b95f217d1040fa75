"""One edit of a bundle, as it is shown to the person who would make it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from saw.policy import globs
from saw.policy.decode import Steps, path_text
from saw.policy.yamltext import dump

Operation = Literal["add", "append", "first", "replace", "remove"]


class NoRemedy(Exception):
    """No change of the policy may allow the call, or none that names it alone; the text says why."""


class Change(msgspec.Struct, frozen=True):
    """One edit: what is done at ``at`` (a way of fields, names and positions) of a member of the bundle."""

    file: str
    operation: Operation
    at: Steps
    value: Any = None

    def text(self) -> str:
        """Return the edit as YAML, with a comment that says where it goes."""
        where = path_text(self.at)
        if self.operation == "remove":
            return f"# {self.file}: remove {where}\n"
        how = {
            "add": f"add under {path_text(self.at[:-1])}",
            "append": f"append to {where}",
            "first": f"put first under {where}",
            "replace": f"write in place of {where}",
        }[self.operation]
        value: Any = [self.value] if self.operation in {"append", "first"} else self.value
        for step in reversed(self.at):
            value = [value] if isinstance(step, int) else {step: value}
        return f"# {self.file}: {how}\n{dump(value)}"


def exact(what: str, text: str, *, flat: bool = False) -> str:
    """Return ``text`` when a rule can name exactly it, as a path or as plain text; else raise :class:`NoRemedy`."""
    try:
        (globs.flat_glob if flat else globs.path_glob)(text)
    except globs.GlobError as error:
        raise NoRemedy(f"the {what} cannot be written as a rule: {error}") from error
    if not globs.is_exact(text):
        raise NoRemedy(f"the {what} holds a *, which a rule reads as any text; write a rule by hand")
    return text
