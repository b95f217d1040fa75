"""The runner of pages runs what a page calls ``sh``, and finds a command that fails or prints something else."""

from __future__ import annotations

from pathlib import Path

import page
import pytest

PAGE = """# Page

```sh
echo one; echo "$NAME"
```

```text
one
n…e
```

```console
$ false
```

```sh
echo two > file
```
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(text: str) -> Path:
        (tmp_path / "page.md").write_text(text)
        monkeypatch.setattr(page, "ROOT", tmp_path)
        return tmp_path

    return write


def test_blocks_run_in_order_and_console_does_not(written) -> None:
    folder = written(PAGE)
    assert page.run_page("page.md", folder, {"NAME": "nobody else"}) == ["one\nnobody else\n", ""]
    assert (folder / "file").read_text() == "two\n"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("echo two", "false; echo two", "page.md:16"),
        ("n…e", "n…x", "not printed"),
        ("two >", "$MISSING >", "page.md:16"),
    ],
)
def test_a_page_that_is_wrong_is_found(written, old: str, new: str, why: str) -> None:
    folder = written(PAGE.replace(old, new))
    with pytest.raises(AssertionError, match=why):
        page.run_page("page.md", folder, {"NAME": "nobody else"})
