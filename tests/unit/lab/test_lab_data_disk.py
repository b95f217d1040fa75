"""The demonstration workspace's data disk is encrypted where that was asked for, and stays what it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saw.datadisk.recovery import load_public
from saw.errors import UnavailableError
from saw.lab.topology import Lab
from saw.lab.up import data_disk_variables


def told(place: Path, signed: object = None) -> dict[str, Any]:
    image: Any = SimpleNamespace(secure_boot=signed)
    return data_disk_variables(Lab(place, place / "build"), image)


def test_it_is_plain_unless_asked_for_and_then_stays_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAW_DATA_DISK", raising=False)
    assert told(tmp_path) == {}
    monkeypatch.setenv("SAW_DATA_DISK", "encrypted")
    first = told(tmp_path)
    load_public(first["workspace_vm_data_disk_recovery_key"])
    assert first["workspace_vm_data_disk_secure_boot"] is False
    assert told(tmp_path, object()) == {**first, "workspace_vm_data_disk_secure_boot": True}
    monkeypatch.delenv("SAW_DATA_DISK")
    assert told(tmp_path) == first
    monkeypatch.setenv("SAW_DATA_DISK", "plain")
    assert told(tmp_path) == {}


def test_another_word_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAW_DATA_DISK", "yes")
    with pytest.raises(UnavailableError, match="SAW_DATA_DISK is 'yes'"):
        told(tmp_path)
