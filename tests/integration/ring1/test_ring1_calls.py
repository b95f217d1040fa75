"""What the sandbox can and cannot send out through ring 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import timedelta

import pytest
from ring1_rig import ENVOY, GOVERNANCE, POLICY, PROXY, run, until

from saw.runtime import generation, ring1

API = "https://api.example.com"


@pytest.mark.control("RUN-01")
def test_an_allowed_call_reaches_ring_2_with_identity_and_facts(rig):
    reply = rig.curl(f"{API}/v1/things?q=1")
    assert reply.status == 200, reply
    told = reply.json()
    headers = told["headers"]
    assert (told["method"], told["path"], told["query"]) == ("GET", "/v1/things", "q=1")
    assert headers["host"] == "api.example.com"
    assert headers["x-saw-scheme"] == "https"
    assert headers["x-saw-port"] == "443"
    assert headers["x-saw-binary"] == "/usr/bin/curl"
    assert headers["x-saw-ring1"] == "allow"
    assert "spiffe://saw.example/workspace/ws-demo" in headers["x-forwarded-client-cert"]
    assert not [name for name in headers if name.startswith("x-saw-i-")]


@pytest.mark.control("REV-01")
def test_a_write_that_a_person_decides_on_goes_on_to_ring_2_and_nothing_else_that_is_refused_does(rig):
    before = len(rig.log("decide"))
    reply = rig.curl(f"{API}/v1/items", "--data", "a=1")
    assert reply.status == 200, reply
    told = reply.json()
    assert (told["method"], told["path"], told["length"]) == ("POST", "/v1/items", 3)
    assert (told["headers"]["x-saw-ring1"], told["headers"]["x-saw-binary"]) == ("review", "/usr/bin/curl")
    for path, reason in (
        ("/v1/never", "action_denied"),
        ("/v1/else", "method_or_path_not_allowed"),
        ("/v1/items/..%2fnotes", "not_canonical"),
    ):
        refused = rig.curl("--path-as-is", f"{API}{path}", "--data", "a=1")
        assert (refused.status, refused.json()["reason"]) == (403, reason)
    other = rig.inside(sys.executable, "-c", OTHER_PROGRAM, check=False)
    assert "403" in other.stderr
    lines = [json.loads(line) for line in rig.log("decide")[before:].splitlines() if line.startswith('{"event"')]
    assert [line["reason"] for line in lines if line["verdict"] == "review"] == ["review_required"]


OTHER_PROGRAM = f"""
import urllib.request
urllib.request.urlopen(urllib.request.Request("{API}/v1/items", data=b"a=1"))
"""


@pytest.mark.control("REV-01")
def test_a_question_about_a_review_passes_where_the_host_is_reached_at_all(rig):
    path = f"/.well-known/saw/reviews/rv-{'0' * 32}"
    reply = rig.curl(f"{API}{path}?wait=5")
    assert (reply.status, reply.json()["path"], reply.json()["query"]) == (200, path, "wait=5")
    for extra in (("--data", "x"), ("--request", "DELETE")):
        refused = rig.curl(f"{API}{path}", *extra)
        assert (refused.status, refused.json()["reason"]) == (403, "method_or_path_not_allowed")
    for target in (
        f"{path}/more",
        f"{path}?wait=5&a=1",
        f"/.well-known/saw/reviews/rv-{'0' * 31}",
        "/.well-known/saw/",
    ):
        refused = rig.curl(f"{API}{target}")
        assert (refused.status, refused.json()["reason"]) == (403, "method_or_path_not_allowed")
    for host in ("unlisted.example.com", "git.example.com"):
        refused = rig.curl(f"https://{host}{path}")
        assert (refused.status, refused.connect) == (403, 403)


@pytest.mark.control("RUN-01")
def test_a_path_outside_the_policy_is_refused_with_a_body_to_act_on(rig):
    reply = rig.curl(f"{API}/v2/things?token=secret")
    assert reply.status == 403
    body = reply.json()
    assert body["error"] == "policy_denied"
    assert body["layer"] == "ring1"
    assert body["reason"] == "method_or_path_not_allowed"
    assert (body["host"], body["port"], body["method"], body["path"]) == ("api.example.com", 443, "GET", "/v2/things")
    assert body["rule_missing"]["path"] == "/v2/things"
    assert body["next_steps"]
    assert body["request_id"]
    assert body["policy_digest"] == rig.decide_status()["policy_digest"]
    assert "secret" not in rig.log("decide")


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(("url", "status"), [(f"{API}/v1/x", 200), ("https://unlisted.example.com/v1/x", 403)])
def test_connect_is_opened_only_to_hosts_of_the_policy(rig, url, status):
    reply = rig.curl(url)
    assert (reply.status, reply.connect) == (status, status), reply


@pytest.mark.control("RUN-01")
def test_a_refused_connect_carries_the_reason(rig):
    script = """
import http.client, sys
c = http.client.HTTPConnection("10.200.0.1", 3128, timeout=5)
c.request("CONNECT", "unlisted.example.com:443")
r = c.getresponse()
sys.stdout.write(r.read().decode())
"""
    body = json.loads(rig.inside("/usr/bin/python3", "-c", script).stdout)
    assert (body["reason"], body["host"], body["port"]) == ("host_not_allowed", "unlisted.example.com", 443)
    assert body["rule_missing"]["method"] == "CONNECT"


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    "destination",
    [
        "169.254.169.254:443",
        "2852039166:443",
        "0xa9fea9fe:443",
        "0251.0376.0251.0376:443",
        "127.1:443",
        "[::ffff:169.254.169.254]:443",
        "[64:ff9b::a9fe:a9fe]:443",
        "metadata.google.internal:443",
        "localhost:443",
        "0.0.0.0:443",
        "api.example.com.:443",
        "api.example.com:22",
    ],
)
def test_addresses_and_other_names_are_refused_at_connect(rig, destination):
    script = f"""
import socket
s = socket.create_connection(("10.200.0.1", 3128), 5)
s.sendall(b"CONNECT {destination} HTTP/1.1\\r\\nHost: {destination}\\r\\n\\r\\n")
print(s.recv(65536).decode())
"""
    answer = rig.inside("/usr/bin/python3", "-c", script).stdout
    assert answer.startswith(("HTTP/1.1 403", "HTTP/1.1 400")), answer


@pytest.mark.control("RUN-01")
def test_server_name_and_host_must_be_those_of_the_connect(rig):
    other = rig.curl("--connect-to", "api.example.com:443:other.example.com:8443", f"{API}/v1/x")
    assert (other.connect, other.status) == (200, 403)
    assert other.json()["reason"] == "host_not_allowed"
    host = rig.curl("-H", "Host: git.example.com", f"{API}/v1/x")
    assert (host.connect, host.status) == (200, 403)
    assert "git.example.com" in host.json()["detail"]
    assert rig.curl("https://other.example.com:8443/").status == 200


@pytest.mark.control("RUN-01")
def test_a_missing_server_name_is_refused(rig):
    script = """
import http.client, ssl, socket, sys
raw = socket.create_connection(("10.200.0.1", 3128), 5)
raw.sendall(b"CONNECT python.example.com:443 HTTP/1.1\\r\\nHost: python.example.com:443\\r\\n\\r\\n")
assert raw.recv(4096).startswith(b"HTTP/1.1 200")
context = ssl.create_default_context()
context.check_hostname = False
tls = context.wrap_socket(raw, server_hostname=sys.argv[1] or None)
tls.sendall(b"GET / HTTP/1.1\\r\\nHost: python.example.com\\r\\nConnection: close\\r\\n\\r\\n")
print(tls.recv(65536).decode())
"""
    python = "/usr/bin/python3"
    assert rig.inside(python, "-c", script, "").stdout.startswith("HTTP/1.1 403")
    assert rig.inside(python, "-c", script, "python.example.com").stdout.startswith("HTTP/1.1 200")


@pytest.mark.control("RUN-01")
def test_plain_http_is_carried_in_absolute_form_where_the_policy_says_so(rig):
    reply = rig.curl("http://plain.example.com/x")
    assert reply.status == 200
    assert reply.json()["headers"]["x-saw-scheme"] == "http"
    assert reply.json()["headers"]["x-saw-port"] == "80"
    assert rig.curl("-p", "http://plain.example.com/x").status == 200
    refused = rig.curl("http://api.example.com/v1/x")
    assert (refused.status, refused.json()["reason"]) == (403, "host_not_allowed")
    assert rig.curl("http://api.example.com:443/v1/x").status == 403
    assert rig.curl("http://169.254.169.254/latest/meta-data").json()["reason"] == "destination_blocked"


@pytest.mark.control("RUN-01")
def test_an_https_address_in_absolute_form_is_refused_in_words_and_by_a_tunnel_it_passes(rig):
    before = len(rig.arrived())
    proxy = ("10.200.0.1", 3128)
    script = f"""
import socket
sock = socket.create_connection({proxy!r}, timeout=20)
sock.sendall(b"GET https://api.example.com/v1/x HTTP/1.1\\r\\nHost: api.example.com\\r\\nConnection: close\\r\\n\\r\\n")
print(b"".join(iter(lambda: sock.recv(65536), b"")).decode())
"""
    head, _, body = rig.inside("/usr/bin/python3", "-c", script).stdout.partition("\n\n")
    assert head.startswith("HTTP/1.1 403") and "content-type: application/json" in head.lower()
    told = json.loads(body)
    assert (told["error"], told["layer"], told["reason"]) == ("policy_denied", "ring1", "method_or_path_not_allowed")
    assert told["next_steps"] == ["open a tunnel with CONNECT host:443 and speak TLS in it"]
    assert len(rig.arrived()) == before
    assert rig.curl(f"{API}/v1/x").status == 200


@pytest.mark.control("RUN-01")
def test_a_rule_for_one_executable_refuses_another(rig):
    script = """
import urllib.request, urllib.error
try:
    print(urllib.request.urlopen("{url}", timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print(error)
"""
    python = "/usr/bin/python3"
    assert rig.inside(python, "-c", script.format(url="https://python.example.com/")).stdout.strip() == "200"
    assert "403" in rig.inside(python, "-c", script.format(url=f"{API}/v1/x")).stdout
    refused = rig.curl("https://python.example.com/")
    assert refused.status == 403
    assert rig.curl(f"{API}/v1/x").status == 200


@pytest.mark.control("RUN-01")
def test_the_child_of_a_granted_executable_is_granted_and_named_by_it(rig):
    copy = rig.directory / "curl-copy"
    shutil.copyfile("/usr/bin/curl", copy)
    copy.chmod(0o755)
    url = "https://python.example.com/"
    direct = rig.inside(str(copy), "-s", "-o", "/dev/null", "-w", "%{http_connect}", url, check=False)
    assert direct.stdout == "403"
    script = (
        f"import subprocess; print(subprocess.run(['{copy}', '-s', '{url}'], capture_output=True, text=True).stdout)"
    )
    told = json.loads(rig.inside("/usr/bin/python3", "-c", script).stdout)
    assert "python3" in told["headers"]["x-saw-binary"]


@pytest.mark.control("RUN-01")
def test_nothing_a_client_says_under_our_names_arrives(rig):
    forged = [
        "X-Saw-Ring1: forged",
        "x-saw-binary: /usr/bin/git",
        "x-saw-port: 22",
        "x-saw-extra: 1",
        "x-request-id: mine",
    ]
    forged += ["x-saw-i-connect: git.example.com:443", "x-saw-i-to-path: /v2/secret", "x-saw-i-stage: plain"]
    forged += ["x-forwarded-for: 10.0.0.1", "x-envoy-upstream-rq-timeout-ms: 1"]
    arguments = [argument for line in forged for argument in ("-H", line)]
    headers = rig.curl(*arguments, f"{API}/v1/x").json()["headers"]
    assert headers["x-saw-ring1"] == "allow"
    assert headers["x-saw-binary"] == "/usr/bin/curl"
    assert headers["x-saw-port"] == "443"
    assert "x-saw-extra" not in headers
    assert headers["x-request-id"] != "mine"
    assert not [name for name in headers if name.startswith("x-saw-i-")]
    assert rig.curl(*arguments, f"{API}/v2/x").status == 403


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("path", "status", "arrives"),
    [
        ("/v1/a/../b", 200, "/v1/b"),
        ("/v1//a", 200, "/v1/a"),
        ("/v1/%61", 200, "/v1/a"),
        ("/v1/../../etc", 403, ""),
        ("/v1/a%2fb", 403, ""),
        ("/v1/%00", 403, ""),
        ("/v1/../v2", 403, ""),
        ("/v1/%c0%ae", 403, ""),
    ],
)
def test_what_is_sent_is_what_was_matched(rig, path, status, arrives):
    reply = rig.curl("--path-as-is", f"{API}{path}")
    assert reply.status == status, reply
    if status == 200:
        assert reply.json()["path"] == arrives


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    "arguments",
    [
        ("-X", "TRACE"),
        ("-X", "DELETE"),
        ("-H", "X-HTTP-Method-Override: DELETE"),
        ("--http1.1", "-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "-H", "Sec-WebSocket-Key: eA=="),
        ("--http1.1", "-H", "a_b: underscore"),
    ],
)
def test_methods_and_headers_that_dodge_the_rules_are_refused(rig, arguments):
    assert rig.curl(*arguments, f"{API}/v1/x").status in {400, 403, 404}
    assert rig.curl(f"{API}/v1/x").status == 200


@pytest.mark.control("RUN-01")
def test_a_real_git_clone_works_and_a_push_is_refused(rig, tmp_path):
    source, bare = tmp_path / "source", rig.directory / "repositories" / "team" / "tool.git"
    if not bare.exists():
        run("git", "init", "-q", "-b", "main", str(source))
        (source / "README").write_text("hello\n")
        run("git", "-C", str(source), "add", ".")
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        run("git", "-C", str(source), *who, "commit", "-qm", "first")
        bare.parent.mkdir()
        run("git", "clone", "-q", "--bare", str(source), str(bare))
        run("git", "-C", str(bare), "config", "http.receivepack", "true")
    clone = tmp_path / "clone"
    rig.inside("git", "clone", "-q", "https://git.example.com/team/tool.git", str(clone))
    assert (clone / "README").read_text() == "hello\n"
    pushed = rig.inside("git", "-C", str(clone), "push", "-q", "origin", "HEAD:refs/heads/new", check=False)
    assert pushed.returncode != 0
    assert "403" in pushed.stderr
    assert rig.inside(
        "git", "clone", "-q", "https://git.example.com/other/x.git", str(tmp_path / "no"), check=False
    ).returncode


@pytest.mark.control("RUN-01")
def test_bodies_are_decided_on_and_long_ones_still_stream(rig, tmp_path):
    body = tmp_path / "body"
    body.write_bytes(b"x" * 3_000_000)
    reply = rig.curl("--data-binary", f"@{body}", "-H", "Expect:", f"{API}/v1/notes")
    assert (reply.status, reply.json()["length"]) == (200, 3_000_000)
    prompt = tmp_path / "prompt.json"
    url = "https://inference.local/v1/chat/completions"
    for model, status in (("demo-small", 200), ("other-large", 403)):
        prompt.write_text(json.dumps({"messages": [{"content": "y" * 200_000}], "model": model}))
        reply = rig.curl("--data-binary", f"@{prompt}", "-H", "content-type: application/json", url)
        assert reply.status == status, reply
    assert reply.json()["reason"] == "model_not_allowed"


@pytest.mark.control("POL-05")
@pytest.mark.parametrize("what", ["missing", "past", "garbage"])
def test_without_a_running_lease_nothing_leaves(rig, what):
    assert rig.curl(f"{API}/v1/x").status == 200
    if what == "missing":
        (rig.svid / "lease.json").unlink()
    elif what == "past":
        rig.lease(timedelta(seconds=-1))
    else:
        (rig.svid / "lease.json").write_text("{}")
    reply = rig.curl("http://plain.example.com/")
    assert (reply.status, reply.json()["reason"]) == (403, "lease_expired")
    rig.lease(timedelta(hours=1))
    assert rig.curl("http://plain.example.com/").status == 200


@pytest.mark.control("POL-05")
def test_when_the_policy_agent_is_gone_nothing_leaves(rig):
    rig.heartbeat(age=4000)
    reply = rig.curl("http://plain.example.com/")
    assert (reply.status, reply.json()["reason"]) == (403, "lease_expired")
    assert "policy agent" in reply.json()["detail"]
    rig.heartbeat()
    assert rig.curl("http://plain.example.com/").status == 200


@pytest.mark.control("POL-05")
def test_when_the_decision_service_is_gone_nothing_leaves(rig):
    rig.stop_process("decide")
    reply = rig.curl("http://plain.example.com/")
    assert (reply.status, reply.json()["reason"]) == (503, "gatekeeper_stale")
    rig.start_decide()
    assert rig.curl("http://plain.example.com/").status == 200


KEEP_ALIVE = """
import http.client, ssl, sys
c = http.client.HTTPSConnection("10.200.0.1", 3128, timeout=5)
c.set_tunnel("python.example.com", 443)
for line in sys.stdin:
    try:
        c.request("GET", "/x")
        r = c.getresponse()
        r.read()
        print(r.status, flush=True)
    except (OSError, http.client.HTTPException) as error:
        print("closed", flush=True)
"""


@pytest.mark.control("RUN-01")
def test_a_kept_connection_is_decided_by_the_new_policy(rig):
    process = subprocess.Popen(
        ["ip", "netns", "exec", rig.sandbox, "/usr/bin/python3", "-c", KEEP_ALIVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"SSL_CERT_FILE": str(rig.ca_bundle)},
    )

    def ask() -> str:
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    try:
        assert ask() == "200"
        assert ask() == "200"
        rig.activate(POLICY.replace("/**/python3*", "/nowhere"), revision=2)
        assert ask() in {"403", "closed"}
        assert ask() in {"403", "closed"}
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@pytest.mark.control("RUN-01")
def test_a_stream_that_runs_is_ended_by_a_new_policy(rig):
    process = subprocess.Popen(
        ["ip", "netns", "exec", rig.sandbox, "curl", "-sN", "-x", PROXY, "--cacert", rig.ca_bundle, f"{API}/v1/stream"],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"first\n"
        rig.activate(POLICY, GOVERNANCE + "\n", revision=2)
        process.wait(10)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.control("POL-02")
def test_a_changed_policy_file_is_not_loaded_and_the_old_one_stays(rig):
    before = rig.decide_status()["policy_digest"]
    wider = rig.compile(POLICY.replace("/v1/**", "/**"), GOVERNANCE, revision=3)
    changed = rig.generations / wider / "policy.yaml"
    changed.write_bytes(changed.read_bytes() + b"# changed\n")
    generation.switch(rig.generations, wider)
    status = until(lambda: (s := rig.decide_status())["problem"] and s, "saw-decide refuses it")
    assert status["policy_digest"] == before
    assert "changed after it was verified" in status["problem"]
    assert rig.curl("http://plain.example.com/").status == 200


@pytest.mark.control("RUN-01")
def test_without_ring_2_the_answer_says_so(rig):
    assert rig.curl("http://plain.example.com/").status == 200
    rig.stop_process("ring2")
    reply = rig.curl("http://plain.example.com/")
    assert (reply.status, reply.json()["reason"]) == (503, "no_identity")
    assert reply.json()["next_steps"] == ["wait for the next attestation; if it lasts, ask the platform team"]
    rig.start_ring2_proxy()
    until(lambda: rig.curl("http://plain.example.com/").status == 200, "ring 2 is back")


def test_envoy_accepts_the_configuration_that_validation_reads(rig):
    digest = rig.decide_status()["policy_digest"]
    candidate = rig.directory / "static.json"
    candidate.write_bytes(ring1.static_config(rig.settings, digest, rig.generations / digest))
    done = subprocess.run(
        [ENVOY, "--mode", "validate", "-c", candidate, "-l", "warning"], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "eprecated" not in done.stderr


@pytest.mark.control("INT-01")
def test_a_supervisor_in_the_vm_itself_goes_out_by_ring_1_under_its_own_name_and_nothing_else_does(rig):
    """OpenShell's way out: its supervisor is in the VM's network and calls by CONNECT; a copy of curl stands for that program."""
    supervisor = rig.directory / "openshell-sandbox"
    shutil.copy(shutil.which("curl") or "", supervisor)
    policy = POLICY.replace("[{path: /usr/bin/curl}]", f"[{{path: /usr/bin/none}}, {{path: {supervisor}}}]")

    def call(program: str, path: str, namespace: str) -> str:
        words = [
            "-s",
            "-m",
            "60",
            "-x",
            PROXY,
            "--cacert",
            str(rig.ca_bundle),
            "-w",
            "%{http_code}%{http_connect}",
            f"{API}{path}",
        ]
        done = subprocess.run(
            ["ip", "netns", "exec", namespace, program, *words], capture_output=True, text=True, check=False, timeout=90
        )
        return done.stdout

    rig.stop_process("decide")
    rig.start_decide(rig.vm)
    try:
        rig.activate(policy, revision=2)
        until(lambda: call(str(supervisor), "/v1/ready", rig.vm).endswith("200200"), "ring 1 asks the new service")
        allowed = call(str(supervisor), "/v1/openshell", rig.vm)
        headers = json.loads(allowed.removesuffix("200200"))["headers"]
        assert headers["x-saw-binary"] == str(supervisor)
        assert "spiffe://saw.example/workspace/ws-demo" in headers["x-forwarded-client-cert"]
        assert call(str(supervisor), "/v2/else", rig.vm).endswith("403200"), (
            "the policy holds for it as for any program"
        )
        assert call("/usr/bin/curl", "/v1/openshell", rig.vm).endswith("403"), "another program of the VM"
        assert call(str(supervisor), "/v1/openshell", rig.sandbox).endswith("403"), (
            "nobody is looked for in the sandbox"
        )
    finally:
        rig.stop_process("decide")
        rig.start_decide()
    until(lambda: rig.curl(f"{API}/v1/again").status in {200, 403}, "ring 1 asks the new service")
