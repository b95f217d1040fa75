"""Who may import whom: the table "Python packages" of docs/architecture.md, checked on the source."""

from __future__ import annotations

import ast
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = {"addressing", "errors", "files", "https", "jsontext", "mux", "ports", "sqlite", "strict_yaml", "waivers"}
#: Package → the packages of ours it may import, besides itself.
MAY_IMPORT = {
    "addressing": {"errors"},
    "errors": set(),
    "files": {"errors", "jsontext"},
    "https": {"errors"},
    "jsontext": set(),
    "mux": {"errors"},
    "ports": {"errors"},
    "sqlite": set(),
    "strict_yaml": {"errors"},
    "waivers": {"errors"},
    "policy": BASE,
    "identity": BASE,
    "secrets": BASE | {"identity"},
    "attest": BASE,
    "audit": BASE,
    "budget": BASE,
    "baseline": BASE,
    "review": BASE | {"policy", "identity"},
    "sessions": BASE | {"identity"},
    "jobs": BASE,
    "datadisk": BASE,
    "broker": BASE | {"policy", "identity", "attest", "audit", "budget", "review", "sessions", "jobs", "secrets"},
    "runtime": BASE | {"policy", "identity", "attest", "audit", "budget", "review"},
    "gateway": BASE | {"policy", "identity", "attest", "audit", "budget", "review", "secrets"},
    "edr": BASE | {"audit", "runtime"},
    "telemetry": BASE | {"audit", "edr", "runtime"},
    "patching": BASE | {"audit", "edr", "image"},
    "gpu": BASE | {"audit", "edr", "policy", "vm"},
    "drift": BASE | {"audit", "edr", "broker"},
    "conformance": BASE | {"policy", "runtime"},
    "image": BASE | {"attest", "baseline", "vm"},
    "vm": BASE | {"image", "attest", "policy", "datadisk"},
    "lab": BASE
    | {
        "policy",
        "identity",
        "attest",
        "audit",
        "budget",
        "review",
        "broker",
        "gateway",
        "runtime",
        "image",
        "vm",
        "datadisk",
    },
}
#: Single modules with a reason of their own.
EXCEPTIONS = {
    # The image build provisions on one of the lab's light hosts, unbooted (docs/decisions/0004).
    ("saw.image.build", "saw.lab.nspawn"),
    # A machine takes that host's place, with the same keys and name (docs/decisions/0074).
    ("saw.image.machine", "saw.lab.nspawn"),
    # It holds the same build directory as the embedded default does.
    ("saw.image.build", "saw.lab.exclusive"),
    # What becomes the ssh of a terminal confines itself as the launcher of sandboxes does (docs/decisions/0037).
    ("saw.broker.terminal.child", "saw.runtime.landlock"),
}
#: Outside the broker, its modules stay private but for the operator's side, which these packages may use.
BROKER_CLIENT = {"saw.broker.client", "saw.broker.machine_client", "saw.broker.signed_in", "saw.broker.vm_credential"}
#: The one way into the service itself: the command that starts it, `saw broker`, and its part in a module of its own.
BROKER_COMMAND = {"saw.cli.broker", "saw.cli.broker_secrets"}


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: a finalizer that parses (tracebacks do) breaks the depth count of CPython 3.11's ast."""
    gc.disable()
    yield
    gc.enable()


def imports_of(source: str, module: str) -> Iterator[str]:
    """Yield the absolute names of ours that ``source`` imports, wherever in the file; ``from saw import x`` gives ``saw.x``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "saw")
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                name = ".".join([*module.split(".")[: -node.level], *([name] if name else [])])
            if name == "saw":
                yield from (f"saw.{alias.name}" for alias in node.names)
            elif name.startswith("saw."):
                yield name


def refusal(module: str, imported: str) -> str | None:
    """Return why ``module`` may not import ``imported``, or None."""
    if imported == "saw":
        return None  # the version only
    package, other = (name.split(".")[1] for name in (module, imported))
    if other.startswith("__") or package == other or (module, imported) in EXCEPTIONS:
        return None
    if package != "cli" and other not in MAY_IMPORT.get(package, set()):
        return f"{module} imports {imported}: {package} may import {sorted(MAY_IMPORT.get(package, set()))}"
    if other == "broker" and module not in BROKER_COMMAND and imported not in BROKER_CLIENT:
        return f"{module} imports {imported}: only {sorted(BROKER_CLIENT)} may be used outside the broker"
    return None


def modules() -> Iterator[tuple[str, Path]]:
    """Yield module name and file of everything below ``src/saw`` that belongs to a package of ours."""
    for path in sorted((ROOT / "src/saw").rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        if len(parts) > 1 and parts != ("saw", "__init__"):
            yield ".".join(parts), path


def test_every_import_goes_the_allowed_way() -> None:
    found = [
        reason
        for module, path in modules()
        for imported in imports_of(path.read_text(encoding="utf-8"), module)
        if (reason := refusal(module, imported))
    ]
    assert not found, "\n".join(found)


def test_every_package_has_its_line_in_the_architecture() -> None:
    table = (
        (ROOT / "docs/architecture.md")
        .read_text(encoding="utf-8")
        .partition("## Python packages")[2]
        .partition("\n## ")[0]
    )
    packages = {module.split(".")[1] for module, _ in modules()}
    assert packages - set(MAY_IMPORT) - {"cli"} == set()
    assert {name for name in packages if f"`{name}`" not in table} == set()


def test_no_plugin_is_imported_by_the_distribution() -> None:
    wrong = [
        f"{module} imports {node.module}"
        for module, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("ansible_collections", "plugins"))
    ]
    assert wrong == []


def test_a_plugin_uses_the_broker_through_its_client_only() -> None:
    found = [
        f"{path}: {imported}"
        for path in sorted((ROOT / "plugins").rglob("*.py"))
        for imported in imports_of(path.read_text(encoding="utf-8"), "plugins.module")
        if imported.startswith("saw.broker") and imported not in BROKER_CLIENT
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("saw.policy.loader", "from saw.errors import SawError", True),
        ("saw.policy.loader", "from saw.audit import Chain", False),
        ("saw.gateway.link", "import saw.broker.client", False),
        ("saw.gateway.link", "from saw import broker", False),
        ("saw.gateway.link", "from ..broker import client", False),
        ("saw.runtime.policyd", "def f():\n    from saw.broker.client import OperatorClient", False),
        ("saw.lab.up", "from saw.broker.client import OperatorClient", True),
        ("saw.lab.up", "from saw.broker.core import Broker", False),
        ("saw.cli.audit", "from saw.broker.store import Store", False),
        ("saw.cli.broker", "from saw.broker.server import serve", True),
        ("saw.vm.measure", "from saw.image.disk import digest_of", True),
        ("saw.vm.measure", "from saw.lab.up import Bringup", False),
    ],
)
def test_the_guard_tells_right_from_wrong(module: str, source: str, allowed: bool) -> None:
    verdicts = [refusal(module, imported) for imported in imports_of(source, module)]
    assert verdicts
    assert all(verdict is None for verdict in verdicts) is allowed


def test_modules_of_tests_have_names_of_their_own():
    """pytest finds the rigs of a folder by their names alone, so the second of two with one name would be the first."""
    paths = [path for root in ("tests", "benchmarks") for path in sorted((ROOT / root).rglob("*.py"))]
    names = [
        path.name
        for path in paths
        if path.name not in {"conftest.py", "__init__.py"} and "node_modules" not in path.parts
    ]
    assert sorted(name for name, count in Counter(names).items() if count > 1) == []
