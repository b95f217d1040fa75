"""What a governed call costs: both rings, and each alone, against as many plain Envoy TLS hops and direct, in one run (root).

    python benchmarks/governed_call.py [--calls N]

Three private network namespaces, joined as in a workspace: sandbox, VM, perimeter. All paths lead from a client in the sandbox
over the same two links to the same far end, on connections that stay open:

- direct: TLS to the far end; the VM only routes.
- plain: TLS to an Envoy in the VM, TLS to an Envoy at the perimeter, TLS to the far end. Nothing is decided.
- governed: CONNECT and TLS to ring 1, attribution and decision by saw-decide, mutual TLS and HTTP/2 to ring 2, decision by the
  gatekeeper, the credential, TLS to the far end.

A second client in the VM calls ring 2 and the second plain hop alone. At last an Envoy that decides nothing takes ring 2's place,
with the same mutual TLS and HTTP/2: that is ring 1 alone. On each path one client tells the latency, eight at a time the
throughput. What the processes used of the processor meanwhile gives decisions, and plain hops, per second and core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INTEGRATION = ROOT / "tests" / "integration"
sys.path[:0] = [str(Path(__file__).parent), str(INTEGRATION), str(INTEGRATION / "gateway"), str(INTEGRATION / "ring1")]

import msgspec  # noqa: E402 - after the path
import ring1_rig  # noqa: E402 - the rigs lie with the tests
import ring2_rig  # noqa: E402
from results import Goal, Result, processor_time, quantile, result, table  # noqa: E402 - the module beside this one
from ring2_policy import POLICY  # noqa: E402

from saw.files import write_atomic  # noqa: E402
from saw.policy.bundle import verify_bundle  # noqa: E402
from saw.policy.keys import key_id  # noqa: E402
from saw.runtime import generation, ring1  # noqa: E402
from saw.runtime.attestd_svid import secret_discovery  # noqa: E402
from saw.runtime.policyd_bundle import content_of  # noqa: E402

ROUND = 50
RING2 = ("10.210.1.1", 8443)
FIRST, SECOND = ("10.200.0.1", 9443), ("10.210.1.1", 9444)
HOST, PATH = "api.example.com", "/v1/things"
GOAL = Goal("ratio", "most", 1.3)
CLIENTS = 8
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
"""What the kernel counts processor time in (seconds)."""

# Runs with /usr/bin/python3 in a namespace: rounds in turns over all paths, milliseconds of every call as JSON.
CLIENT = """
import http.client, json, socket, ssl, sys, threading, time
task = json.load(sys.stdin)
counted = {path["label"]: [] for path in task["paths"]}
each = max(1, task["calls"] // task["clients"])
def opened(path):
    context = ssl.create_default_context(cafile=path["ca"])
    if path.get("cert"):
        context.load_cert_chain(path["cert"], path["key"])
    link = http.client.HTTPSConnection(*path["address"], timeout=20, context=context)
    if path.get("tunnel"):
        link.set_tunnel(*path["tunnel"])
        link.connect()
    else:
        raw = socket.create_connection(path["address"], 20)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.sock = context.wrap_socket(raw, server_hostname=path["name"])
    return link, path.get("headers", {}), counted[path["label"]]
def call(link, headers, calls):
    start = time.perf_counter()
    link.request("GET", task["path"], headers={"host": task["host"], **headers})
    answer = link.getresponse()
    body = answer.read()
    assert answer.status == 200, (answer.status, body)
    calls.append(1)
    return (time.perf_counter() - start) * 1000
links = {path["label"]: opened(path) for path in task["paths"]}
times = {label: [] for label in links}
for label, link in links.items():
    for _ in range(task["round"]):
        call(*link)
while min(map(len, times.values())) < task["calls"]:
    for label, link in links.items():
        times[label] += [call(*link) for _ in range(task["round"])]
def many(path):
    links = [opened(path) for _ in range(task["clients"])]
    for link in links:
        call(*link)
    failed = []
    def work(link):
        try:
            for _ in range(each):
                call(*link)
        except Exception as error:
            failed.append(repr(error))
    threads = [threading.Thread(target=work, args=(link,)) for link in links]
    start = time.perf_counter()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failed, failed
    return len(links) * each / (time.perf_counter() - start)
rates = {label: [] for label in links}
for _ in range(3):
    for path in task["paths"]:
        rates[path["label"]].append(many(path))
print(json.dumps({label: {"times": times[label], "rates": rates[label], "calls": len(counted[label])} for label in links}))
"""


# What attribution does for every new connection: the kernel walks its whole hash table of connections, however few are in it.
READ_TABLE = """
import time
times = []
for _ in range(50):
    start = time.perf_counter()
    open("/proc/self/net/tcp").read()
    times.append((time.perf_counter() - start) * 1000)
print(min(times))
"""


class Told(msgspec.Struct, frozen=True):
    """What a client told of one path: milliseconds of each call, calls per second of each round, calls in all."""

    times: list[float]
    rates: list[float]
    calls: int


class Chain(ring1_rig.Rig):
    """Ring 1 whose ring 2 is the real one of ``outer``; the VM's end of the link takes 10.210.1.2 over."""

    def __init__(self, directory: Path, outer: ring2_rig.Rig) -> None:
        super().__init__(directory, f"b{os.getpid()}")
        self.outer = outer
        self.settings = ring1.Ring1(
            ring2_address=RING2[0],
            ring2_port=RING2[1],
            decide_socket=directory / "decide" / "authz.sock",
            sds_file=self.svid / "sds.json",
            ca_file=directory / "ca.pem",
            generations=self.generations,
        )

    def start_ring2(self) -> None:
        """Join the VM with the perimeter's bridge and trust its authority, in place of the rig's own far end."""
        self.identity = self.outer.authority
        (self.directory / "ca.pem").write_bytes(self.identity.ca_pem)
        ip = self.outer.namespace.ip
        ip("addr", "del", "10.210.1.2/30", "dev", "sawbr1")
        ip("link", "add", "sawtap1", "type", "veth", "peer", "name", "uplink", "netns", self.vm)
        ip("link", "set", "sawtap1", "master", "sawbr1", "up")
        ring1_rig.run("ip", "-n", self.vm, "addr", "add", "10.210.1.2/30", "dev", "uplink")
        ring1_rig.run("ip", "-n", self.vm, "link", "set", "uplink", "up")

    def enforce(self, raw: bytes) -> None:
        """Take a verified bundle into force and an SVID that names it."""
        keys = {key_id(key.public_key()): key.public_key() for key in self.outer.signer.keys}
        content = content_of(verify_bundle(raw, keys, 2, datetime.now(UTC)))
        made = generation.compile_generation(
            content, self.generations, self.settings, self.authority, datetime.now(UTC), group=None
        )
        generation.place(self.generations, made, content.digest)
        certificate, key = self.outer.svid_files(digest=content.digest)
        write_atomic(self.svid / "sds.json", secret_discovery(certificate.read_text(), key.read_text()))
        generation.switch(self.generations, content.digest)
        ring1_rig.until(
            lambda: (self.decide_status() or {}).get("policy_digest") == content.digest, "saw-decide follows"
        )
        ring1_rig.until(lambda: self.served() == content.digest, "ring 1 follows")


def plain_hop(
    rig: ring2_rig.Rig, listen: tuple[str, int], onward: tuple[str, int], *, mutual: bool = False
) -> dict[str, Any]:
    """Return an Envoy that ends TLS and dials ``onward`` by TLS, and does nothing else; ``mutual``: it ends what ring 2 ends."""
    prefix = "type.googleapis.com/envoy.extensions."
    files = {
        "certificate_chain": {"filename": str(rig.directory / "far.pem")},
        "private_key": {"filename": str(rig.directory / "far.key")},
    }
    trusted = {"trusted_ca": {"filename": str(rig.directory / "corporate" / "ca.pem")}}
    manager = {
        "@type": prefix + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "plain",
        "http_filters": [{"name": "router", "typed_config": {"@type": prefix + "filters.http.router.v3.Router"}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "next", "timeout": "0s"}}],
                }
            ]
        },
    }
    server = {
        "@type": prefix + "transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {"tls_certificates": [files]},
    }
    if mutual:
        tls = rig.config_path.parent / "tls"
        server |= {
            "require_client_certificate": True,
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(tls / "server.pem")},
                        "private_key": {"filename": str(tls / "server.key")},
                    }
                ],
                "validation_context": {"trusted_ca": {"filename": str(tls / "ca.pem")}},
            },
        }
    client = {
        "@type": prefix + "transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": HOST,
        "common_tls_context": {"validation_context": trusted},
    }

    def place(address: tuple[str, int]) -> dict[str, Any]:
        return {"socket_address": {"address": address[0], "port_value": address[1]}}

    chain = {
        "transport_socket": {"name": "tls", "typed_config": server},
        "filters": [{"name": "http", "typed_config": manager}],
    }
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": place(onward)}}]}]
    cluster = {
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "5s",
        "transport_socket": {"name": "tls", "typed_config": client},
        "load_assignment": {"cluster_name": "next", "endpoints": endpoints},
    }
    listener = {"name": "in", "address": place(listen), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def start_hop(
    chain: Chain, name: str, listen: tuple[str, int], onward: tuple[str, int], *, mutual: bool = False
) -> None:
    """Start a plain hop at the perimeter, or in the VM where it is the first; the rig ends what it has in ``processes``."""
    outer = chain.outer
    path = chain.directory / f"{name}.json"
    path.write_text(json.dumps(plain_hop(outer, listen, onward, mutual=mutual)))
    command = (str(ring2_rig.ENVOY), "-c", str(path), "--disable-hot-restart", "--concurrency", "1", "-l", "error")
    if listen == FIRST:
        chain.spawn(name, *command)
    else:
        chain.processes[name] = outer.namespace.popen(*command, stdout=outer.envoy_log, stderr=outer.envoy_log)
        ring2_rig.wait_for(lambda: outer.listens(*listen), f"the plain hop {name}")


def start_plain(chain: Chain) -> None:
    """Start the two plain hops, one in each namespace."""
    start_hop(chain, "plain-second", SECOND, (ring2_rig.FAR, 443))
    start_hop(chain, "plain-first", FIRST, SECOND)


def route_direct(chain: Chain) -> None:
    """Let the sandbox reach the far end without a proxy."""
    far, back = f"{ring2_rig.FAR}/32", "10.200.0.0/30"
    ring1_rig.run("ip", "-n", chain.sandbox, "route", "add", far, "via", "10.200.0.1")
    ring1_rig.run("ip", "-n", chain.vm, "route", "add", far, "via", RING2[0])
    ring1_rig.run("ip", "netns", "exec", chain.vm, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    chain.outer.namespace.ip("route", "add", back, "via", "10.210.1.2")


def ask(namespace: str, paths: list[dict[str, Any]], calls: int) -> dict[str, Told]:
    """Run the client in ``namespace``; return what it told of each path."""
    task = {"paths": paths, "calls": calls, "round": min(ROUND, calls), "clients": CLIENTS, "host": HOST, "path": PATH}
    command = ["ip", "netns", "exec", namespace, "/usr/bin/python3", "-I", "-c", CLIENT]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"the client in {namespace} failed: {done.stderr.strip()[-800:]}")
    return msgspec.json.decode(done.stdout, type=dict[str, Told])


def world(stack: ExitStack) -> tuple[ring2_rig.Rig, Chain, str]:
    """Return ring 2, the chain before it and the file with the far end's authority, once a call arrives on both paths."""
    folders = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saw-bench-"))) for _ in range(2)]
    outer = ring2_rig.Rig(stack, folders[0])
    binaries = 'binaries: [{path: /usr/bin/curl}, {path: "/**/python3*"}]'
    policy = POLICY.replace("binaries: [{path: /usr/bin/curl}]", binaries)
    outer.digest, outer.bundle = outer.signer.release(2, policy=policy)
    outer.reset()
    outer.settle(lease_expires_at=900)
    chain = Chain(folders[1], outer)
    stack.callback(chain.stop)
    chain.start()
    chain.enforce(outer.bundle)
    start_plain(chain)
    url = f"https://{HOST}{PATH}"
    ring1_rig.until(lambda: chain.curl(url).status == 200, "the first governed call")
    corporate = str(outer.directory / "corporate" / "ca.pem")
    plain_url = ("curl", "-s", "-o", "/dev/null", "--cacert", corporate, "--noproxy", "*")
    resolve = ("--resolve", f"{HOST}:{FIRST[1]}:{FIRST[0]}", f"https://{HOST}:{FIRST[1]}{PATH}")
    ring1_rig.until(lambda: chain.inside(*plain_url, *resolve, check=False).returncode == 0, "the first plain call")
    return outer, chain, corporate


def measure(calls: int) -> list[Result]:
    """Measure ``calls`` calls on every path, and three times as many by several clients at a time."""
    with ExitStack() as stack:
        outer, chain, corporate = world(stack)
        route_direct(chain)
        first, second, direct = (
            {"label": label, "address": address, "name": HOST, "ca": corporate}
            for label, address in (("plain", FIRST), ("plain", SECOND), ("direct", (ring2_rig.FAR, 443)))
        )
        governed = {
            "label": "governed", "address": ("10.200.0.1", 3128), "tunnel": (HOST, 443), "ca": str(chain.ca_bundle),
        }  # fmt: skip
        assert outer.gatekeeper is not None
        watched = {
            "decide": chain.processes["decide"],
            "gatekeeper": outer.gatekeeper,
            "plain": chain.processes["plain-first"],
        }
        before = {name: processor_time(process.pid) for name, process in watched.items()}
        both = ask(chain.sandbox, [direct, first, governed], calls)
        used = {name: processor_time(process.pid) - before[name] for name, process in watched.items()}
        certificate, key = outer.svid_files(digest=outer.digest)
        facts = {"x-saw-ring1": "allow", "x-saw-binary": "/usr/bin/curl", "x-saw-scheme": "https", "x-saw-port": "443"}
        ring2 = {
            "label": "governed", "address": RING2, "name": "ring2.saw.internal",
            "ca": str(outer.directory / "ca" / "ca.pem"), "cert": str(certificate), "key": str(key), "headers": facts,
        }  # fmt: skip
        alone = ask(chain.vm, [direct, second, ring2], calls)
        outer.envoy.terminate()
        outer.envoy.wait(20)
        start_hop(chain, "plain-ring2", RING2, (ring2_rig.FAR, 443), mutual=True)
        ring1_rig.until(
            lambda: chain.curl(f"https://{HOST}{PATH}").status == 200, "the first call through ring 1 alone"
        )
        inner = ask(chain.sandbox, [direct, first, governed], calls)
        table_read = float(chain.inside("/usr/bin/python3", "-I", "-c", READ_TABLE).stdout)
    note = "one read of the socket table at its fastest: ring 1 makes one a connection; grows with the machine's memory"
    return [
        *rows("governed", both, "two plain Envoy TLS hops", GOAL),
        *rows("ring2", alone, "one plain Envoy TLS hop"),
        *rows("ring1", inner, "two plain Envoy TLS hops; in ring 2's place is one that decides nothing"),
        *decisions(both, used),
        result("socket_table_read", table_read, "ms", note=note),
    ]


def rows(name: str, told: dict[str, Told], plain: str, goal: Goal | None = None) -> list[Result]:
    """Return latency and throughput of the governed path against the plain one (``plain`` names it) and against none."""
    made = []
    for base, suffix, title in (("plain", "", plain), ("direct", "_over_direct", "the same call direct")):
        ours, theirs = told["governed"], told[base]
        for share in (0.5, 0.99):
            value, baseline = quantile(ours.times, share), quantile(theirs.times, share)
            note = f"{len(ours.times)} calls on a kept connection; baseline: {title}; {value - baseline:+.2f} ms"
            label = f"{name}_call_p{round(share * 100)}{suffix}"
            bound = goal if base == "plain" else None
            made.append(result(label, value, "ms", baseline=baseline, goal=bound, note=note))
        value, baseline = quantile(ours.rates, 0.5), quantile(theirs.rates, 0.5)
        note = f"{CLIENTS} clients, each on its connection; median of {len(ours.rates)} rounds; baseline: {title}"
        made.append(result(f"{name}_calls_per_second{suffix}", value, "/s", baseline=baseline, note=note))
    return made


def decisions(told: dict[str, Told], used: dict[str, float]) -> list[Result]:
    """Return calls per second of processor time of both deciders; ``used`` has the seconds, those of a plain hop too."""
    plain = told["plain"].calls / max(used["plain"], TICK_S)
    return [
        result(
            f"{name}_decisions_per_core",
            told["governed"].calls / max(used[name], TICK_S),
            "/s",
            baseline=plain,
            note=f"{told['governed'].calls} calls in {used[name]:.2f} s of {title}; baseline: calls of a plain Envoy TLS hop",
        )
        for name, title in (
            ("decide", "saw-decide"),
            ("gatekeeper", "the gatekeeper, audit row and credential included"),
        )
    ]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000, help="calls on each path (default 1000)")
    print(table(measure(parser.parse_args().calls)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
