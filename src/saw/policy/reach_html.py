"""The diff of reach for people: as a text table, and as one HTML page that needs nothing else.

The page has no script, no link and no external resource; its style is one ``<style>`` element, so it can be served under
``default-src 'none'; style-src '<hash>'`` with the hash of :func:`style_hash`. Every text from a bundle is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from html import escape

from saw.policy.reach_diff import ReachDiff
from saw.policy.reach_item import RISKS, Item

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--line:#d0d7de;--soft:#57606a;--critical:#b3001b;--high:#b45309;
--medium:#1d5fa8;--low:#57606a;--good:#1a7f37}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--line:#30363d;--soft:#9aa4af;--critical:#ff7b72;
--high:#f0a35e;--medium:#79c0ff;--low:#9aa4af;--good:#56d364}}
body{margin:2rem auto;max-width:72rem;padding:0 1rem;font:15px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper)}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
code{font:13px/1.4 ui-monospace,monospace;overflow-wrap:anywhere}
article{border:1px solid var(--line);border-left-width:6px;border-radius:6px;padding:.6rem 1rem;margin:.6rem 0}
article.critical{border-left-color:var(--critical)}article.high{border-left-color:var(--high)}
article.medium{border-left-color:var(--medium)}article.low{border-left-color:var(--low)}
article.lost{border-left-color:var(--good)}
.risk{font-weight:600;text-transform:uppercase;font-size:.8rem}
.critical .risk,.risk.critical{color:var(--critical)}.high .risk,.risk.high{color:var(--high)}
.medium .risk,.risk.medium{color:var(--medium)}.low .risk{color:var(--low)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.4rem 0 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}.digest{color:var(--soft)}
"""

_CONTROL = re.compile(r"[^ -~\xa1-\u024f…·→]")


def plain(text: str) -> str:
    """Return ``text`` in one line and without characters that steer a terminal or hide in a page."""
    return _CONTROL.sub(lambda found: f"\\u{{{ord(found[0]):x}}}", text)


def _html(text: str) -> str:
    return escape(plain(text), quote=True)


def style_hash() -> str:
    """Return the source expression of the page's style for a Content-Security-Policy (CSP level 3)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}"


def _facts(item: Item) -> Iterator[tuple[str, str]]:
    """Yield name and value of what there is to say about ``item``."""
    region = item.region
    if region.binaries:
        yield "by", ", ".join(region.binaries)
    if region.action_class:
        yield "class", region.action_class
    yield "why", item.why
    if item.rules:
        yield "rule", "; ".join(item.rules)
    if item.witness is not None:
        yield "example", item.witness.text()
        yield "decisions", f"{item.witness.old} → {item.witness.new}"
    if not item.exact:
        yield "note", "possibly wider: this item may hold more than what was really gained"


def _article(item: Item) -> str:
    kind = item.risk or "lost"
    mark = item.risk or "gone"
    facts = "".join(f"<dt>{_html(name)}</dt><dd><code>{_html(value)}</code></dd>" for name, value in _facts(item))
    head = f'<span class="risk">{mark}</span> · {_html(item.kind)}<br><code>{_html(item.what)}</code>'
    return f'<article class="{kind}">{head}<dl>{facts}</dl></article>'


def _counts(items: Iterable[Item]) -> str:
    risks = [item.risk for item in items]
    return ", ".join(f"{risks.count(risk)} {risk}" for risk in RISKS if risk in risks)


def summary(diff: ReachDiff) -> str:
    """Return the answer in one line."""
    if not diff.widening:
        return f"no widening; {len(diff.lost)} lost" if diff.lost else "no change of reach"
    return f"wider: {_counts(diff.gained)}; {len(diff.lost)} lost"


def page(diff: ReachDiff) -> str:
    """Return the diff as one self-contained HTML page."""
    title = f"Reach: {_html(diff.old)} → {_html(diff.new)}"
    parts = [f"<h1>{title}</h1><p>{_html(summary(diff))}</p>"]
    for risk in RISKS:
        items = [item for item in diff.gained if item.risk == risk]
        if items:
            parts.append(f'<h2>Gained, <span class="risk {risk}">{risk}</span></h2>')
            parts += [_article(item) for item in items]
    if diff.lost:
        parts.append("<h2>Lost</h2>")
        parts += [_article(item) for item in diff.lost]
    parts.append(f'<p class="digest">reach digest <code>{_html(diff.digest)}</code></p>')
    policy = f"default-src 'none'; style-src '{style_hash()}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def table(diff: ReachDiff) -> str:
    """Return the diff as text: one block per item, grouped by risk, then what was lost."""
    lines = [f"{plain(diff.old)} → {plain(diff.new)}: {plain(summary(diff))}"]
    for risk in RISKS:
        items = [item for item in diff.gained if item.risk == risk]
        if items:
            lines += ["", f"GAINED · {risk}"]
            lines += [line for item in items for line in _block(item, "+")]
    if diff.lost:
        lines += ["", "LOST"]
        lines += [line for item in diff.lost for line in _block(item, "-")]
    return "\n".join([*lines, "", f"reach digest {diff.digest}"])


def _block(item: Item, mark: str) -> Iterator[str]:
    yield f"  {mark} {plain(item.what)}"
    for name, value in _facts(item):
        yield f"      {name:<9} {plain(value)}"
