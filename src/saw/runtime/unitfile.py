"""The text of systemd's unit files (systemd.syntax(7)), as saw writes them."""

from __future__ import annotations

MARK = "# Written by saw from the loaded policy generation; changes here are overwritten."
"""First line of every unit that is made here."""

Properties = list[tuple[str, str]]
"""Directives and their values; one may come more than once."""


def unit_text(sections: dict[str, Properties]) -> str:
    """Return a unit file of ``sections``, name → directives in their order."""
    lines = [MARK]
    for section, properties in sections.items():
        lines += ["", f"[{section}]", *(f"{name}={value}" for name, value in properties)]
    return "\n".join(lines) + "\n"
