"""The documentation keeps up with the code: links, commands, targets, dependencies, messages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from saw.cli.main import AREAS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors that a code host gives the headings of ``path``."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_picture_is_there_and_shown() -> None:
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", text_of(page))
    }
    assert shown == {path.resolve() for path in (ROOT / "docs/images").iterdir()}


def test_every_area_of_the_command_is_explained() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [area for area in AREAS if not re.search(rf"\bsaw {area}\b", text)] == []


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        name for line in re.findall(r"^([a-z][a-z0-9 -]*):(?!=)", makefile, re.MULTILINE) for name in line.split()
    }
    pattern = re.compile(r"(?:`|^|&& )make ([a-z][a-z0-9-]*)", re.MULTILINE)
    named = {name for page in PAGES for name in pattern.findall(page.read_text(encoding="utf-8"))}
    assert {"workspace", "test"} <= named
    assert named - targets == set()


def test_every_playbook_that_is_named_exists_and_the_other_way_round() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = {path.stem for path in (ROOT / "playbooks").glob("*.yml")}
    files |= {path.name for path in (ROOT / "roles").iterdir()} | {
        path.stem for path in (ROOT / "plugins").rglob("*.py")
    }
    assert set(re.findall(r"secure_agent\.workspace\.([a-z_]+)", text)) - files == set()
    lifecycle = {path.stem for path in (ROOT / "playbooks").glob("workspace_*.yml")}
    assert {name for name in lifecycle if f"{name}" not in text} == set()


def dependency_lines() -> set[str]:
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([^`]+)` \|.*\S \|$", page, re.MULTILINE))


def declared() -> dict[str, set[str]]:
    """Every dependency by the file that declares it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    python = [*project["project"]["dependencies"]]
    python += [item for group in project["dependency-groups"].values() for item in group if isinstance(item, str)]
    script = (ROOT / "scripts/bootstrap.sh").read_text(encoding="utf-8")
    names = re.findall(r'^(?:packages|tests)="([^"$]+)"', script, re.MULTILINE)
    npm = {
        name: set(yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["dependencies"])
        for name in (
            "packer/mcp/package.json",
            "roles/broker/files/terminal/package.json",
            "tests/clients/package.json",
            "tests/oidc/package.json",
            "tests/oidc/node/package.json",
            "tests/pages/package.json",
        )
    }
    found = {
        "pyproject.toml": {re.split(r"[<>=~!;\[ ]", item, maxsplit=1)[0].lower() for item in python},
        "scripts/bootstrap.sh": {*" ".join(names).split(), *re.findall(r'missing="\$missing ([a-z0-9-]+)"', script)},
        **npm,
    }
    for path in (ROOT / "packer/packages").glob("*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[name_of(path)] = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    return found


def test_every_dependency_has_its_line_and_no_line_is_left_over() -> None:
    lines, wanted = dependency_lines(), declared()
    assert all(wanted.values())
    assert {source: names - lines for source, names in wanted.items() if names - lines} == {}
    assert lines - set().union(*wanted.values()) == set()


def test_every_decision_record_is_listed_and_has_its_three_parts() -> None:
    folder = ROOT / "docs/decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    records = sorted(folder.glob("0*.md"))
    assert [path.name[:4] for path in records] == [f"{number:04d}" for number in range(1, len(records) + 1)]
    for path in records:
        text = path.read_text(encoding="utf-8")
        assert path.name in index
        assert all(part in text for part in ("**Context.**", "**Decision.**", "**Consequences.**")), path.name


def test_the_readme_names_the_real_steps_in_their_order() -> None:
    source = (ROOT / "src/saw/lab/main_job.py").read_text(encoding="utf-8")
    steps = re.findall(r'progress\.step\("([^"]+)"\)', source)
    shown = re.findall(r"^\[ ?\d+/\d+\] (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == steps


def test_every_refusal_of_a_call_is_explained() -> None:
    contract = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    reasons = re.search(r"Reasons: `([^`]+)`", contract)
    assert reasons is not None
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert [reason for reason in re.split(r",\s+", reasons[1]) if f"`{reason}`" not in page] == []


def test_changelog_fragments_use_known_sections() -> None:
    config = yaml.safe_load((ROOT / "changelogs/config.yaml").read_text(encoding="utf-8"))
    known = {name for name, _ in config["sections"]} | {config["prelude_section_name"], config["trivial_section_name"]}
    for path in sorted((ROOT / "changelogs/fragments").glob("*.yml")):
        assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= known, path.name
