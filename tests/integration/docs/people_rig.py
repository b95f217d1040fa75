"""A broker whose sign-in is that of docs/sign-in.md, a bastion with one workspace, and people who confirm codes in a browser."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import yaml
from page import ROOT
from session_rig import RULES, Bastion, activate
from sso_rig import Browser, SsoLab, localhost_certificate

from databases import beside
from saw.broker.forwarding_settings import ForwardingSettings
from saw.broker.sso_settings import SsoSettings

SIGN_IN = (ROOT / "docs/sign-in.md").read_text(encoding="utf-8")
SESSIONS = (ROOT / "docs/sessions.md").read_text(encoding="utf-8")
PEOPLE = {"u-ada": ["staff"], "u-ben": ["staff", "platform"], "u-cleo": ["internal-audit"]}
"""Groups at the provider, as the page gives them roles: ada sponsors the workspace, ben operates, cleo is an auditor."""
_COMPLETE = re.compile(r"^or open (\S+)$", re.MULTILINE)


def variables(page: str, name: str) -> dict[str, Any]:
    """Return the first ``yaml`` block of a page that sets the variable ``name``."""
    blocks = re.findall(r"^ *```yaml\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    found = [told for told in map(yaml.safe_load, blocks) if isinstance(told, dict) and name in told]
    return dict(found[0])


class People:
    """The lab, and what lies on the machine of somebody who uses it."""

    def __init__(self, lab: SsoLab, bastion: Bastion, desk: Path, ca_file: Path) -> None:
        self.lab, self.bastion, self.desk, self.ca_file = lab, bastion, desk, ca_file
        self.told = desk / "told"

    @property
    def places(self) -> dict[str, str]:
        """Where what the pages name lies here."""
        return {
            "https://saw.example.com:8445": self.lab.origin,
            "https://idp.example.com": self.lab.provider.issuer,
            "/opt/saw/bin/saw": "saw",
        }

    @property
    def environment(self) -> dict[str, str]:
        """A shell whose ``saw`` says on the terminal what the person reads, and keeps its session on this desk."""
        return {
            "PATH": f"{self.desk / 'bin'}:{os.environ['PATH']}",
            "XDG_CONFIG_HOME": str(self.desk / "settings"),
            "SAW_CONTEXT": str(self.desk / "context.json"),
            "SSL_CERT_FILE": str(self.ca_file),
        }

    @contextmanager
    def browser(self) -> Iterator[Browser]:
        """A browser that trusts the certificate of the pages and the provider's."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.load_verify_locations(str(self.lab.provider.ca_file))
        with httpx.Client(verify=context, timeout=60, trust_env=False, base_url=self.lab.origin) as http:
            yield Browser(http, self.lab.origin)

    @contextmanager
    def confirming(self, person: str) -> Iterator[None]:
        """Have ``person`` confirm, in a browser, each code that a command line shows meanwhile."""
        over = threading.Event()
        self.told.write_text("")

        def read() -> None:
            seen = 0
            while not over.wait(0.1):
                addresses = _COMPLETE.findall(self.told.read_text())
                for address in addresses[seen:]:
                    self._confirm(address, person)
                seen = len(addresses)

        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(read)
            try:
                yield
            finally:
                over.set()
            reading.result()

    def _confirm(self, address: str, person: str) -> None:
        with self.browser() as browser:
            page = browser.follow(browser.http.get(address))
            for _ in range(5):
                if "<form" not in page.text:
                    return
                login = {"login": person, "password": "any"} if 'name="login"' in page.text else {}
                page = browser.submit(page, **login)
            raise AssertionError(page.text)


def certificate(folder: Path, name: str) -> Path:
    """Make a certificate of its own for ``name``, and return the file with its key and it."""
    made = folder / "made.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", f"{folder}/made.key"]
    line = ["openssl", "req", "-x509", *key, "-out", str(made), "-days", "60", "-subj", f"/CN={name}"]
    subprocess.run([*line, "-addext", f"subjectAltName=DNS:{name}"], check=True, capture_output=True)
    made.write_bytes((folder / "made.key").read_bytes() + made.read_bytes())
    return made


@contextmanager
def people(workspace: str) -> Iterator[People]:
    """Give a lab with the page's own settings, other in its addresses and files alone."""
    directory = Path(tempfile.mkdtemp(prefix="saw-people-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        ports = msgspec.convert(variables(SESSIONS, "broker_forwarding")["broker_forwarding"], ForwardingSettings)
        lab = SsoLab(directory, sessions=RULES, forwarding=ports)
        stack.callback(lab.provider.stop)
        for person, groups in PEOPLE.items():
            lab.provider.change(person, groups=groups)
        (directory / "pages").mkdir()
        ca_file, leaf, key = localhost_certificate(directory / "pages")
        pem = directory / "pages/pages.pem"
        pem.write_bytes(key.read_bytes() + leaf.read_bytes())
        told = variables(SIGN_IN, "broker_sso")["broker_sso"]
        here = {
            "issuer": lab.provider.issuer,
            "client_secret_file": str(lab.provider.secret_file),
            "ca_file": str(lab.provider.ca_file),
        }
        wanted = {
            **told, "origin": lab.origin, "provider": {**told["provider"], **here}, "operate": True,
            "certificate_file": str(pem), "key_file": str(pem),
            "listen": {"host": "127.0.0.1", "port": urlsplit(lab.origin).port},
        }  # fmt: skip
        lab.config = msgspec.structs.replace(lab.config, sso=msgspec.convert(wanted, SsoSettings))
        lab.config_file.write_bytes(msgspec.json.encode(lab.config))
        lab.start()
        stack.callback(lab.stop)
        desk = directory / "desk"
        (desk / "bin").mkdir(parents=True)
        real = Path(sys.executable).with_name("saw")
        (desk / "bin/saw").write_text(f'#!/bin/bash\nexec {real} "$@" 2> >(tee -a {desk}/told >&2)\n')
        (desk / "bin/saw").chmod(0o755)
        (desk / "ca.pem").write_bytes(ca_file.read_bytes())
        bastion = Bastion(lab, directory)
        stack.callback(bastion.stop)
        bastion.start(workspace, activate(lab, workspace))
        _lease(lab)
        yield People(lab, bastion, desk, ca_file)


def _lease(lab: SsoLab) -> None:
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    with beside(lab.config) as store:
        store.execute("UPDATE workspaces SET lease_expires_at = ?, policy_digest = ?", (until, "a" * 64))
