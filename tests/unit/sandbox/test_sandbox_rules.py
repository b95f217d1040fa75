"""nftables documents, the system call program and the Landlock requirement, without loading any."""

from __future__ import annotations

import struct

import msgspec
import pytest

from saw.runtime import landlock, netns_rules, seccomp
from saw.runtime.netns import SandboxNet


def listed(ruleset, change=lambda items: items):
    return msgspec.json.encode({"nftables": [{"metainfo": {"version": "1"}}, *change(ruleset.objects())]})


@pytest.mark.control("NET-01")
def test_a_foreign_or_missing_rule_is_a_difference():
    rules = SandboxNet().sandbox_rules()
    assert netns_rules.differences(rules, listed(rules)) == []
    assert "missing" in netns_rules.differences(rules, listed(rules, lambda items: items[:-1]))[0]
    extra = {"rule": {"family": "inet", "table": "saw_sandbox", "chain": "output", "expr": [netns_rules.ACCEPT]}}
    assert "not ours" in netns_rules.differences(rules, listed(rules, lambda items: [*items, extra]))[0]

    def swapped(items):
        return [*items[:-2], items[-1], items[-2]]

    assert any("another order" in text for text in netns_rules.differences(rules, listed(rules, swapped)))


@pytest.mark.control("NET-01")
def test_counters_and_handles_do_not_matter():
    rules = SandboxNet().veth_rules()

    def used(items):
        text = msgspec.json.encode(items).replace(b'"packets":0', b'"packets":7')
        return [{key: {**value, "handle": 9} for key, value in item.items()} for item in msgspec.json.decode(text)]

    assert netns_rules.differences(rules, listed(rules, used)) == []


@pytest.mark.control("NET-01")
def test_vm_wide_rules_name_two_ports_and_our_daemons_only():
    document = msgspec.json.encode(SandboxNet().vm_rules(7, (0, 990)).objects())
    assert b"10.210.7.1" in document
    assert document.count(b'"skuid"') == 4
    assert b'"right":8443' in document
    assert b'"right":8444' in document


@pytest.mark.control("P0-03")
def test_endpoint_detection_reaches_the_brokers_port_alone():
    rules = SandboxNet().vm_rules(7, (0, 990), (988,))
    mine = [
        item
        for item in rules.objects()
        if b'"skuid"' in msgspec.json.encode(item) and b":988" in msgspec.json.encode(item)
    ]
    assert len(mine) == 1
    assert b'"right":8444' in msgspec.json.encode(mine)
    assert msgspec.json.encode(SandboxNet().vm_rules(7, (0, 990), ()).objects()) == msgspec.json.encode(
        SandboxNet().vm_rules(7, (0, 990)).objects()
    )


@pytest.mark.control("RUN-03")
def test_filter_is_loadable_in_size_and_ends_in_returns():
    program = seccomp.build_filter()
    instructions = [struct.unpack("<HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    assert len(instructions) < 4096
    assert instructions[-1][0] == 0x06
    assert instructions[1] == (0x15, 1, 0, seccomp.AUDIT_ARCH_X86_64)


@pytest.mark.control("RUN-02")
def test_old_kernels_are_refused_with_what_they_lack():
    with pytest.raises(landlock.LandlockError, match="abstract Unix sockets and signals") as refusal:
        landlock.require(6, found=5)
    assert "TCP connect" not in str(refusal.value)
    assert landlock.require(6, found=6) == 6
