"""Steps with progress: each says what it does, how far the whole is, and how long it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec


class Step(msgspec.Struct):
    """One finished step of the report."""

    name: str
    ok: bool
    seconds: float


@dataclass
class Progress:
    """Prints ``[ 3/10] name …`` lines and keeps the record of the steps."""

    total: int
    steps: list[Step] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print one line below the running step."""
        print(f"        {text}", flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run one step; an error is recorded and passed on."""
        print(f"[{len(self.steps) + 1:>2}/{self.total}] {name}", flush=True)
        begin = time.monotonic()
        try:
            yield
        except BaseException:
            self.steps.append(Step(name, ok=False, seconds=round(time.monotonic() - begin, 1)))
            print(f"        FAILED after {self.steps[-1].seconds} s", file=sys.stderr, flush=True)
            raise
        self.steps.append(Step(name, ok=True, seconds=round(time.monotonic() - begin, 1)))
        print(f"        done in {self.steps[-1].seconds} s", flush=True)
