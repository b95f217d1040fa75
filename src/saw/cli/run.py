"""``saw run``: one command in the prepared sandbox. ``/opt/saw/libexec/saw-run`` is the same without this start-up."""

from __future__ import annotations

from saw.runtime import shell_client


def main(argv: list[str]) -> int:
    """Run the command named in ``argv`` and return its exit code (125: the sandbox cannot be reached)."""
    return shell_client.main(argv)
