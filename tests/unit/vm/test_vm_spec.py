"""The VM specification is read strictly; each refusal names the field and the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.errors import ConfigError
from saw.vm.spec import VmError, VmSpec, load_spec, parse_spec

GOOD: dict[str, Any] = {"id": "ws-demo", "number": 1, "image": "/i/image.qcow2", "image_sha256": "0" * 64}


def raw(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_a_small_specification_gets_the_defaults_and_its_own_network() -> None:
    spec = parse_spec(raw(number=250))
    assert (spec.memory_mib, spec.cpus, spec.data_disk_mib, spec.accel, spec.network) == (1536, 2, 2048, "auto", True)
    assert (spec.bridge, spec.tap, spec.gateway, spec.address) == (
        "sawbr250",
        "sawtap250",
        "10.210.250.1",
        "10.210.250.2",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disk": 1}, "unknown field `disk`"),
        ({"number": "1"}, r"Expected `int`, got `str` - at `\$.number`"),
        ({"accel": "magic"}, "Invalid enum value 'magic'"),
        ({"credentials": {"saw.workspace": {"a": 1}}}, "Expected `str`"),
        ({"id": "../etc"}, "VM id '../etc' is not valid"),
        ({"id": "WS"}, "VM id 'WS' is not valid"),
        ({"id": ""}, "VM id '' is not valid"),
        ({"id": "a" * 64}, "is not valid"),
        ({"id": "-ws"}, "is not valid"),
        ({"id": "ws-"}, "is not valid"),
        ({"id": "ws\n"}, "is not valid"),
        ({"number": 0}, "workspace number 0 is not in 1–64000"),
        ({"number": 64001}, "workspace number 64001 is not in 1–64000"),
        ({"memory_mib": 511}, "VM ws-demo is too small"),
        ({"cpus": 0}, "VM ws-demo is too small"),
        ({"data_disk_mib": 63}, "VM ws-demo is too small"),
        ({"image": "image.qcow2"}, "is no absolute path"),
        ({"image": "/i\n/x"}, "is no absolute path"),
        ({"image_sha256": "A" * 64}, "is no SHA-256"),
        ({"image_sha256": ""}, "is no SHA-256"),
        ({"credentials": {"a=b": "1"}}, "credential name 'a=b' of VM ws-demo is not valid"),
        ({"credentials": {"": "1"}}, "credential name '' of VM ws-demo is not valid"),
    ],
)
def test_what_is_not_a_specification_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse_spec(raw(**changes))
    assert refused.value.cure


@pytest.mark.parametrize("changes", [{"id": "a" * 63}, {"number": 1}, {"number": 250}, {"memory_mib": 512, "cpus": 1}])
def test_the_limits_themselves_are_allowed(changes: dict[str, Any]) -> None:
    parse_spec(raw(**changes))


@given(st.binary(max_size=200))
def test_no_input_does_anything_but_parse_or_be_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_spec(data)


def test_a_stored_vm_is_loaded_and_an_unknown_one_is_refused_with_the_cure(
    make_spec: Callable[..., VmSpec],
) -> None:
    spec = make_spec()
    with pytest.raises(VmError, match="there is no VM ws-t on this hypervisor") as refused:
        load_spec("ws-t")
    assert refused.value.cure == "create it with the workspace_create playbook"
    with pytest.raises(ConfigError, match="is not valid"):
        load_spec("../../etc")
    Path(spec.directory).mkdir()
    (spec.directory / "spec.json").write_bytes(msgspec.json.encode(spec))
    assert load_spec("ws-t") == spec
