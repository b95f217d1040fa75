"""A thousand workspaces on one ring 2: each has its own listeners, and those beyond 250 are told apart like the first ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ring2_rig import DRAIN_S, FAR, Rig, wait_for

from saw import addressing

COUNT = addressing.DEFAULT_MOST
SEEN = (1, 250, 251, 500, 501, COUNT)
"""Workspaces whose bridges are there; the others are only listened for."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with ExitStack() as stack:
        rig = Rig(stack, Path(tmp_path_factory.mktemp("crowd")), drain_s=DRAIN_S)
        for number in SEEN[1:]:
            bridge = addressing.bridge(number)
            rig.namespace.ip("link", "add", bridge, "type", "bridge")
            for address in (addressing.gateway(number), addressing.workspace(number)):
                rig.namespace.ip("addr", "add", f"{address}/30", "dev", bridge)
            rig.namespace.ip("link", "set", bridge, "up")
        like = rig.broker.workspaces["ws-1"]
        for number in (*range(3, COUNT + 1), COUNT + 1):
            given = {"id": f"ws-{number}", "number": number, "agent": f"agent-{number}", "lease_expires_at": 900}
            rig.broker.workspaces[f"ws-{number}"] = {**like, **given}
        rig.settle(lease_expires_at=900)
        wait_for(lambda: all(rig.listens(addressing.gateway(number), 8443) for number in SEEN), "the listeners", 300)
        yield rig


@pytest.mark.thorough
@pytest.mark.control("NET-01")
def test_each_is_served_at_its_own_place_and_at_no_other(crowd: Rig) -> None:
    for number in SEEN:
        assert crowd.call(context=crowd.svid(f"ws-{number}"), number=number).status == 200
    for own, other in ((251, 1), (1, 251), (501, 251), (COUNT, 250)):
        assert crowd.call(context=crowd.svid(f"ws-{own}"), number=other).outcome[0] == 403


def test_each_has_an_ingress_port_and_a_passage_to_the_broker(crowd: Rig) -> None:
    for number in SEEN:
        assert crowd.listens(FAR, addressing.ingress_port(number))
        assert crowd.listens(addressing.gateway(number), 8444)


def test_what_another_perimeter_serves_has_no_listener_here(crowd: Rig) -> None:
    text = (crowd.config.ring2.xds_dir / "lds.json").read_text()
    assert f'"ring2-{COUNT}"' in text
    assert f'"ring2-{COUNT + 1}"' not in text
    assert not crowd.listens(FAR, addressing.ingress_port(COUNT + 1))


@pytest.mark.thorough
@pytest.mark.control("LIF-02")
def test_one_that_is_cut_off_is_cut_off_alone(crowd: Rig) -> None:
    crowd.broker.put("ws-501", state="quarantined")
    wait_for(lambda: not crowd.listens(addressing.gateway(501), 8443), "the end of the listener")
    assert crowd.call(context=crowd.svid("ws-251"), number=251).status == 200
