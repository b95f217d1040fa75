"""Root in the VM is lost: what the attacker then has, shown with a real root shell in a workspace that still attests."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from secret_search import Markers, forms_of, search
from vm_access import Workspace, facts, wait_until

from saw.policy.loader import load_governance, load_policy
from saw.policy.matcher import Matcher
from saw.policy.model import Request

POLICY = "/run/saw/generations/current/policy.yaml"
LAST_GOOD = "/var/lib/saw/policyd/last-good.bundle.json"
ITEMS = "https://api.example.com/v1/items"
ADMIN = "https://api.example.com/v1/admin/users"
WIDEN = "sed -i 's#/v1/notes#/v1/**#; s#/v1/admin/#/v1/nothing/#' {file} && grep -q /v1/nothing/ {file}"
"""What the attacker wants: the administration of the API, and that POST is not refused as outside the rules."""


@pytest.mark.control("POL-04")
@pytest.mark.control("POL-05")
def test_ring_2_decides_again_when_ring_1_is_bypassed(rooted: Workspace) -> None:
    allowed = rooted.root(rooted.direct())[1].strip().splitlines()
    assert allowed[-1] == "200"
    refused = rooted.root(rooted.direct("/v1/admin/users"))[1].strip().splitlines()
    assert refused[-1] == "403"
    body = json.loads(refused[0])
    assert (body["layer"], body["reason"]) == ("ring2", "deny_rule")


HARDENED = {
    "kernel.kptr_restrict": "2",
    "kernel.unprivileged_bpf_disabled": "1",
    "kernel.unprivileged_userns_clone": "0",
    "kernel.io_uring_disabled": "1",
    "kernel.yama.ptrace_scope": "2",
    "kernel.dmesg_restrict": "1",
    "fs.suid_dumpable": "0",
    "net.core.bpf_jit_harden": "2",
    "dev.tty.legacy_tiocsti": "0",
}
"""Kernel parameters that a container cannot show: here they are in force from the boot on."""


@pytest.mark.control("P0-07")
def test_the_golden_image_is_hardened_and_the_agent_can_still_work(rooted: Workspace) -> None:
    code, text = rooted.root(
        f"sysctl {' '.join(HARDENED)}; for p in /tmp /var/tmp /dev/shm; do findmnt -no OPTIONS $p; done"
    )
    assert code == 0, text
    lines = text.strip().splitlines()
    assert dict(line.split(" = ") for line in lines[: len(HARDENED)]) == HARDENED
    mounted = lines[len(HARDENED) :]
    assert [{"nosuid", "nodev", "noexec"} <= set(options.split(",")) for options in mounted] == [True] * 3, mounted
    program = "for d in /tmp /var/tmp ~; do cp /bin/true $d/program && $d/program && rm $d/program || exit 1; done; echo works"
    done = rooted.agent(program)
    assert done.stdout.strip() == "works", done.stderr


PLANT = """
import os, subprocess, sys, time
sys.path.insert(0, "/run")
from markers import Markers, forms_of
markers = Markers(sys.argv[1])
for place, path in (("root disk", "/var/lib/marker"), ("data disk", "/home/agent/marker")):
    with open(path, "w") as stream:
        stream.write(markers.text(place))
        stream.flush()
        os.fsync(stream.fileno())
tpm = {**os.environ, "TPM2TOOLS_TCTI": "device:/dev/tpmrm0"}
index = "0x01800e2e"
subprocess.run(["tpm2_nvdefine", "-Q", "-C", "o", "-s", "35", "-a", "ownerread|ownerwrite", index], env=tpm, check=True)
subprocess.run(["tpm2_nvwrite", "-Q", "-C", "o", "-i", "-", index], env=tpm, check=True, input=markers.text("tpm").encode())
held = [text.encode() for text in forms_of(markers.text("memory")).values()] + [markers.text("utf-16").encode("utf-16-le")]
if os.fork() == 0:
    os.setsid()
    for descriptor in range(3):
        os.dup2(os.open("/dev/null", os.O_RDWR), descriptor)
    with open("/run/marker.pid", "w") as stream:
        stream.write(str(os.getpid()))
    held = [bytes(text) for text in held]
    while True:
        time.sleep(60)
        held.reverse()
os.sync()
"""
FORGET = """
kill "$(cat /run/marker.pid)"
rm -f /run/marker.pid /run/markers.py /var/lib/marker /home/agent/marker
TPM2TOOLS_TCTI=device:/dev/tpmrm0 tpm2_nvundefine -Q -C o 0x01800e2e
"""


def use_every_credential(workspace: Workspace) -> None:
    """Make a call with each of the three credentials, so that each could have leaked."""
    assert workspace.call()[0] == 200
    listed = workspace.agent("git ls-remote https://git.example.com/team/project.git main")
    assert "refs/heads/main" in listed.stdout, listed.stderr
    question = json.dumps({"model": "demo-small", "messages": [{"role": "user", "content": "hello"}]})
    url = "https://inference.local/v1/chat/completions"
    assert workspace.call(url, "-H", "Content-Type: application/json", "--data", question)[0] == 200


@pytest.mark.control("CRED-01")
def test_no_credential_is_in_the_memory_on_the_disks_or_in_the_tpm_of_the_vm(rooted: Workspace) -> None:
    use_every_credential(rooted)
    assert rooted.root("swapon --show --noheadings")[1] == "", "swap would be one more place to search"
    markers = Markers()
    library = f"cat > /run/markers.py <<'END_OF_PROGRAM'\n{marker_library()}\nEND_OF_PROGRAM\n"
    assert rooted.root(library)[0] == 0
    rooted.root_python(PLANT, markers.seed)
    places = ("memory", "utf-16", "root disk", "data disk", "tpm")
    planted = {place: markers.text(place) for place in places}
    credentials = {f"credential {number}": secret for number, secret in enumerate(rooted.secrets())}
    assert len(credentials) == 3
    try:
        found = search(rooted, planted | credentials)
    finally:
        rooted.root(FORGET)
    seen_at = {place: {name for name, _ in pairs} for place, pairs in found.items()}
    every_form = {("memory", form) for form in forms_of("marker")}
    for place in ("memory", "process qemu-system-x86_64"):
        assert every_form <= found[place], (place, "the search finds each form in memory")
        assert ("utf-16", "raw") in found[place], place
    for place in ("root disk", "data disk", "tpm"):
        assert (place, "raw") in found[place], (place, "the search finds what is there")
        assert not {"memory", "utf-16"} & seen_at[place], (place, "and only that")
    assert not {"root disk", "tpm"} & seen_at["data disk"]
    assert not {"data disk", "tpm"} & seen_at["root disk"]
    assert {"process swtpm", "other files"} <= found.keys()
    assert {place: names & credentials.keys() for place, names in seen_at.items()} == {place: set() for place in found}


def marker_library() -> str:
    """The source of this search's own markers and forms, for the VM to derive them itself."""
    import inspect

    import secret_search

    parts = (inspect.getsource(secret_search.forms_of), inspect.getsource(secret_search.Markers))
    head = "import base64\nimport secrets\nfrom dataclasses import dataclass, field\n"
    return "from __future__ import annotations\n" + head + "\n".join(parts)


def refused_by_ring_1(workspace: Workspace, url: str, reason: str, *options: str) -> None:
    """Assert that ring 1 itself refused: ring 2 would refuse a call of a widened policy as well."""
    status, body = workspace.call(url, *options)
    assert (status, body.get("layer"), body.get("reason")) == (403, "ring1", reason), body


def old_policy_decides(workspace: Workspace) -> None:
    """Assert that ring 1 decides by the policy that was released: both calls refused by its rules, the allowed twin passes."""
    refused_by_ring_1(workspace, ADMIN, "deny_rule")
    refused_by_ring_1(workspace, ITEMS, "method_or_path_not_allowed", "--data", "x")
    assert workspace.call()[0] == 200


def findings_since(workspace: Workspace, seq: int, reason: str) -> list[dict[str, Any]]:
    """The findings about this workspace for ``reason`` that the trail took in behind ``seq``."""
    return [
        event
        for event in workspace.events(after=seq)
        if event["event"]["class_uid"] == 2004
        and event["event"]["finding_info"]["title"] == reason
        and facts(event).get("workspace") == workspace.id
    ]


def would_show(policy: str, governance: str) -> None:
    """Assert that the changed policy decides both calls in another way: loading it would have shown."""
    matcher = Matcher.compile(load_policy(policy.encode()), load_governance(governance.encode()))

    def decide(method: str, path: str) -> tuple[str, str]:
        decision = matcher.decide(Request("https", "api.example.com", 443, method, path, binary="/usr/bin/curl"))
        return decision.verdict, decision.reason

    assert decide("GET", "/v1/admin/users") == ("allow", "")
    assert decide("POST", "/v1/items") == ("deny", "review_required"), "the rules allow it, its class alone does not"


@pytest.mark.control("POL-02")
def test_a_generation_that_root_changed_is_not_loaded_is_restored_and_reported(rooted: Workspace) -> None:
    digest, seq = rooted.show()["policy_digest"], rooted.last_seq()
    old_policy_decides(rooted)
    widen = WIDEN.format(file=POLICY)
    read = (
        f"sha256sum < {POLICY}; {widen}; echo ---; cat {POLICY}; echo ---; cat {POLICY.replace('policy', 'governance')}"
    )
    code, text = rooted.root(read)
    assert code == 0
    genuine, changed, governance = text.split("---\n")
    would_show(changed, governance)

    def reported() -> list[dict[str, Any]]:
        old_policy_decides(rooted)
        return findings_since(rooted, seq, "generation_tampered")

    wait_until("a finding about the changed policy", reported, patience=120, interval=1)
    old_policy_decides(rooted)
    again = f"sha256sum < {POLICY}; readlink /run/saw/generations/current; cat /run/saw/policy/state.json"
    restored, current, state = rooted.root(again)[1].splitlines()
    assert (restored, current) == (genuine.strip(), digest)
    assert (json.loads(state)["state"], json.loads(state)["policy_digest"]) == ("loaded", digest)
    assert rooted.show()["policy_digest"] == digest


@pytest.mark.control("POL-02")
def test_a_decision_service_that_starts_on_a_changed_generation_refuses_it(rooted: Workspace) -> None:
    digest, seq = rooted.show()["policy_digest"], rooted.last_seq()
    change = f"systemctl stop saw-policyd && {WIDEN.format(file=POLICY)} && systemctl restart saw-decide"
    try:
        assert rooted.root(change)[0] == 0
        for url in (ITEMS, ADMIN):
            # Over HTTPS the way in (CONNECT) is refused, and curl shows no body of that.
            status, body = rooted.call(url.replace("https:", "http:"))
            assert (status, body.get("layer"), body.get("reason")) == (403, "ring1", "not_released"), body
            assert "policy.yaml was changed" in body["detail"]
    finally:
        rooted.root("systemctl start saw-policyd")
    wait_until("an allowed call by the restored policy", lambda: rooted.call()[0] == 200, patience=90)
    old_policy_decides(rooted)
    wait_until("a finding", lambda: findings_since(rooted, seq, "generation_tampered"), patience=60, interval=2)
    assert rooted.root("readlink /run/saw/generations/current")[1].strip() == rooted.show()["policy_digest"] == digest


CHANGE_LAST_GOOD = """
import base64, json, subprocess, sys
path = sys.argv[1]
with open(path) as stream:
    bundle = json.load(stream)
policy = base64.b64decode(bundle["members"]["policy.yaml"]).decode()
changed = policy.replace("/v1/notes", "/v1/**").replace("/v1/admin/", "/v1/nothing/")
bundle["members"]["policy.yaml"] = base64.b64encode(changed.encode()).decode()
with open(path, "w") as stream:
    json.dump(bundle, stream)
print(bundle["members"]["policy.yaml"])
print(bundle["members"]["governance.yaml"])
"""
CUT_OFF = """
nft add table inet cut
nft add chain inet cut out '{ type filter hook output priority 0; }'
nft add rule inet cut out tcp dport 8444 reject with tcp reset
"""
WAIT_FOR_STATE = """
for try in $(seq 240); do
  if grep -q '"state":"STATE"' /run/saw/policy/state.json; then break; fi
  sleep 0.5
done
cat /run/saw/policy/state.json; echo; readlink /run/saw/generations/current
"""


@pytest.mark.control("POL-02")
def test_a_last_known_good_bundle_that_root_changed_is_not_loaded_and_is_replaced(rooted: Workspace) -> None:
    digest, seq = rooted.show()["policy_digest"], rooted.last_seq()
    assert rooted.root(f"systemctl stop saw-policyd && cp {LAST_GOOD} /root/genuine.json")[0] == 0
    try:
        changed = rooted.root_python(CHANGE_LAST_GOOD, LAST_GOOD).split()
        would_show(*(base64.b64decode(member).decode() for member in changed))
        # Without the broker the agent has nothing but its copy to take up.
        begin = f"set -e\n{CUT_OFF}\nrm -f /run/saw/policy/state.json\nsystemctl start saw-policyd\n"
        code, text = rooted.root(begin + WAIT_FOR_STATE.replace("STATE", "refused"))
        assert code == 0, text
        state, current = text.strip().splitlines()[-2:]
        told = json.loads(state)
        assert (told["state"], told["reason"]) == ("refused", "member_mismatch"), told
        assert told["detail"].startswith("last-known-good: ")
        assert current == digest
        old_policy_decides(rooted)
    finally:
        rooted.root("nft delete table inet cut; systemctl start saw-policyd")
    code, text = rooted.root(WAIT_FOR_STATE.replace("STATE", "loaded") + f"\ncmp {LAST_GOOD} /root/genuine.json")
    assert code == 0, text
    old_policy_decides(rooted)
    wait_until("a finding", lambda: findings_since(rooted, seq, "member_mismatch"), patience=60, interval=2)
    assert rooted.show()["policy_digest"] == digest
