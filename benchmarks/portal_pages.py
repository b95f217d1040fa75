"""Pages of the portal as somebody who is signed in gets them, against a file that the same server hands out.

A real broker, a real OpenID provider (the tests'), one connection over TLS that is kept; pages and file in turns.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests/integration/broker")]

from results import Result, quantile, result  # noqa: E402 - the modules beside this one
from sso_rig import sso_lab  # noqa: E402 - the rig lies with the tests

PAGES = {"first_page": "/", "workspace": "/workspaces/ws-a", "reviews": "/reviews"}
STATIC = "/static/style.css"
WORKSPACES, REVIEWS = 20, 20


def measure(count: int) -> list[Result]:
    """Get each page ``count`` times."""
    directory = Path(tempfile.mkdtemp(prefix="saw-bench-"))
    times: dict[str, list[float]] = {name: [] for name in (*PAGES, "static")}
    with sso_lab(directory) as lab:
        lab.activate("ws-a", *(f"ws-{number}" for number in range(WORKSPACES - 1)))
        for _ in range(REVIEWS):
            lab.open_review()
        with lab.browser() as browser:
            browser.sign_in("u-ada")
            for _ in range(count):
                for name, path in {**PAGES, "static": STATIC}.items():
                    begun = perf_counter()
                    answer = browser.http.get(path)
                    times[name].append(perf_counter() - begun)
                    if answer.status_code != 200:
                        raise RuntimeError(f"{path} was answered with {answer.status_code}")
    note = (
        f"{WORKSPACES} workspaces, {REVIEWS} reviews wait; baseline: {STATIC} of the same server, {count} samples each"
    )
    return [
        result(
            f"portal_{name}_p{share * 100:.0f}", quantile(times[name], share) * 1000, "ms",
            baseline=quantile(times["static"], share) * 1000, note=note,
        )
        for name in PAGES
        for share in (0.5, 0.99)
    ]  # fmt: skip
