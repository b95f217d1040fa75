"""Root in the VM is lost: what the attacker then has, shown with a real root shell in a workspace that still attests."""

from __future__ import annotations

import json

import pytest
from vm_access import Workspace, wait_until

DIRECT = (
    "curl -s -m 15 --cert {cert} --key {key} --cacert /run/saw/ca.pem --resolve ring2.saw.internal:8443:10.210.{number}.1 "
    "-H 'Host: api.example.com' -H 'x-saw-scheme: https' -H 'x-saw-port: 443' -H 'x-saw-binary: /usr/bin/curl' "
    "-H 'x-saw-ring1: allow' -w '\\n%{{http_code}}' https://ring2.saw.internal:8443{path}"
)


def direct(workspace: Workspace, path: str = "/v1/items") -> str:
    """Shell command: a call straight to ring 2 with the workspace's own identity, past ring 1."""
    return DIRECT.format(cert="/run/saw/svid/svid.pem", key="/run/saw/svid/key.pem", number=workspace.number, path=path)


@pytest.fixture(scope="module")
def rooted(workspace: Workspace) -> Workspace:
    """The workspace with a root implant; it boots and attests like before."""
    workspace.saw("lab", "stop", timeout=300)
    workspace.implant()
    workspace.saw("lab", "start", timeout=900)
    code, text = workspace.root("id -u")
    assert (code, text.strip()) == (0, "0")
    return workspace


@pytest.mark.control("NET-01")
@pytest.mark.control("NET-03")
def test_root_reaches_ring_2_and_the_broker_and_nothing_else(rooted: Workspace) -> None:
    gateway = f"10.210.{rooted.number}.1"
    targets = {
        f"{gateway}:8443": "open", f"{gateway}:8444": "open", f"{gateway}:22": "shut", f"{gateway}:80": "shut",
        "10.77.0.10:8443": "shut", "10.77.0.10:22": "shut", "10.77.0.20:22": "shut", "10.77.0.30:443": "shut",
        "10.77.0.1:22": "shut", "169.254.169.254:80": "shut", "10.210.2.1:8443": "shut", "127.0.0.1:22": "open",
    }  # fmt: skip
    connect = "import socket, sys; h, p = sys.argv[1].rsplit(':', 1); socket.create_connection((h, int(p)), 2)"
    script = f"""
nft flush ruleset
ip route replace default via {gateway}
for t in {" ".join(targets)}; do
  if timeout 5 python3 -c "{connect}" $t 2>/dev/null; then echo $t open; else echo $t shut; fi
done
"""
    code, text = rooted.root(script)
    assert code == 0
    assert dict(line.split() for line in text.strip().splitlines()) == targets
    dns = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2); "
        "s.sendto(b'x' * 12, ('10.77.0.1', 53)); s.recv(9)"
    )
    assert rooted.root(f'python3 -c "{dns}"')[0] != 0


@pytest.mark.control("POL-04")
@pytest.mark.control("POL-05")
def test_ring_2_decides_again_when_ring_1_is_bypassed(rooted: Workspace) -> None:
    allowed = rooted.root(direct(rooted))[1].strip().splitlines()
    assert allowed[-1] == "200"
    refused = rooted.root(direct(rooted, "/v1/admin/users"))[1].strip().splitlines()
    assert refused[-1] == "403"
    body = json.loads(refused[0])
    assert (body["layer"], body["reason"]) == ("ring2", "deny_rule")


@pytest.mark.control("CRED-01")
def test_no_credential_is_in_the_memory_or_on_the_disks_of_the_vm(rooted: Workspace) -> None:
    marker = "marker-that-is-in-the-vm-4711"
    assert rooted.agent(f"printf %s {marker} > ~/marker; sync; cat ~/marker").stdout == marker
    dump = (
        f"/opt/saw/bin/python - <<'EOF'\n"
        "from saw.vm import qemu\nfrom saw.vm.spec import load_spec\n"
        f"spec = load_spec('{rooted.id}')\n"
        "size = spec.memory_mib * 1048576\n"
        "print(qemu.qmp(spec, {'execute': 'stop'}, {'execute': 'pmemsave', 'arguments': {'val': 0, 'size': size, "
        "'filename': str(spec.directory / 'memory.dump')}}, {'execute': 'cont'}))\nEOF\n"
    )
    assert "error" not in rooted.host("edge", dump)
    rooted.host(
        "edge", f"cd /var/lib/saw/vms/{rooted.id}; qemu-img convert -U -O raw root.qcow2 root.dump", timeout=300
    )
    search = f"""
cat > /run/patterns
cd /var/lib/saw/vms/{rooted.id}
for f in memory.dump root.dump data.img; do
  if grep -q -a -F -f /run/patterns $f; then echo $f found; else echo $f clean; fi
done
"""
    try:
        assert "found" in rooted.host("edge", search, stdin=marker), "the search finds what is there"
        found = rooted.host("edge", search, stdin="\n".join(rooted.secrets()))
    finally:
        rooted.host("edge", f"cd /var/lib/saw/vms/{rooted.id}; rm -f memory.dump root.dump /run/patterns")
    assert found.split() == ["memory.dump", "clean", "root.dump", "clean", "data.img", "clean"]


@pytest.mark.control("POL-02")
def test_a_policy_that_root_changed_is_not_loaded_and_is_reported(rooted: Workspace) -> None:
    before = rooted.show()["policy_digest"]
    policy = "/run/saw/generations/current/policy.yaml"
    widen = f"sed -i 's#/v1/notes#/v1/**#; s#/v1/admin/#/v1/nothing/#' {policy} && grep -q nothing {policy}"
    assert rooted.root(widen)[0] == 0

    def found() -> bool:
        return any("tamper" in json.dumps(event["event"]) for event in rooted.events())

    wait_until("a finding about the changed policy", found, patience=120, interval=3)
    status, body = rooted.call("https://api.example.com/v1/admin/users")
    assert (status, body.get("reason")) == (403, "deny_rule")
    assert rooted.call()[0] == 200
    assert rooted.show()["policy_digest"] == before
