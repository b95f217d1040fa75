"""What ``governance.yaml`` may say of a credential: honoured, or refused by name."""

from __future__ import annotations

import pytest

from saw.policy.errors import PolicyError
from saw.policy.loader import load_governance
from saw.policy.references import FIELDS, escape, parse_reference

HEAD = "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n"
INJECT = "inject: {header: Authorization, format: 'Bearer {secret}'}"
TOKEN = "token_url: https://id.example.com/token, client_id: agents"
HERE = "hosts: ['a.example.com:443']"


def problems(text: str) -> str:
    try:
        load_governance((HEAD + text).encode())
    except PolicyError as error:
        return str(error)
    return ""


def one(fields: str, ref: str = "file:a") -> str:
    return problems(f"credentials: [{{id: a, ref: '{ref}', {INJECT}, {fields}}}]\n")


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    "ref",
    [
        "file:a", "local:a", "file:git/{sponsor}", "file:git/{workspace}/{sponsor}", "vault:kv/git", "vault:kv/git/{sponsor}",
        "vault:kv/git/{workspace}#token", "vault:kv/a/b/c.d_e-f",
    ],
)  # fmt: skip
def test_references_that_are_honoured(ref: str) -> None:
    assert one(HERE, ref) == ""
    assert parse_reference(parse_reference(ref).text()) == parse_reference(ref)


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("a", "no store in front"), ("env:A", "there is no store 'env'"), ("aws:a/b", "there is no store 'aws'"),
        ("file:", "part 1"), ("file:../a", "part 1"), ("file:a//b", "part 2"), ("file:/a", "part 1"), ("file:a/", "part 2"),
        ("file:{sponsor}", "a name in front"), ("file:a#b", "a file has no entries"), ("file:a-{sponsor}", "part 1"),
        ("vault:kv", "mount of a KV engine"), ("vault:{sponsor}/a", "mount of a KV engine"), ("vault:kv/a#", "the entry"),
        ("vault:kv/{group}", "part 2"), ("vault:kv/{sponsor}", "a folder below the mount"),
        ("vault:kv/{workspace}/git#a", "a folder below the mount"),
        ("vault:kv/{sponsor}x", "part 2"), ("vault:kv/{}", "part 2"), ("vault:kv/../a", "part 2"),
        ("vault:kv/a#b/c", "the entry"), ("vault:kv/a#{sponsor}", "the entry"), ("file:" + "/".join("abcdefghi"), "more than 8"),
    ],
)  # fmt: skip
def test_references_that_are_refused(ref: str, words: str) -> None:
    found = one(HERE, ref)
    assert "credentials[0].ref: that is not a reference" in found
    assert words in found


def test_a_secret_that_stands_where_a_reference_belongs_is_not_repeated() -> None:
    for text in (
        "gho_0123456789abcdef",
        "file:gho_0123456789abcdef=",
        "vault:kv/gho_0123456789abcdef=",
        "vault:k/x#gho_0123=",
    ):
        found = one(HERE, text)
        assert "not a reference" in found
        assert "gho_" not in found


@pytest.mark.control("CRED-01")
def test_two_names_never_become_one_part_of_a_path() -> None:
    names = [
        "a",
        "A",
        "a/b",
        "a%2Fb",
        "a b",
        "a+b",
        ".",
        "..",
        ".a",
        "a.",
        "ä",
        "a\u0308",
        "%",
        "%25",
        "a\n",
        "a\x00",
        "{sponsor}",
    ]
    escaped = [escape(name, "sponsor") for name in names]
    assert len(set(escaped)) == len(names)
    for text in escaped:
        assert not text.startswith(".")
        assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-@.%")
    assert escape("mia@example.com", "sponsor") == "mia@example.com"


@pytest.mark.parametrize("name", ["", "x" * 201, "ä" * 101, "\ud800"])
def test_a_name_that_fits_no_path_is_refused(name: str) -> None:
    for field in FIELDS:
        with pytest.raises(ValueError, match=f"no {field}"):
            parse_reference(f"vault:kv/git/{{{field}}}").at({field: name})


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("methods: [get]", "upper-case HTTP method"),
        ("methods: [WEBSOCKET_TEXT]", "upper-case HTTP method"),
        (
            f"oauth2: {{{TOKEN}, token_url: 'http://id.example.com/t'}}".replace(f"{TOKEN}, ", "client_id: a, "),
            "must be https",
        ),
        ("oauth2: {client_id: a, token_url: 'https://id.example.com/t?a=b'}", "and nothing else"),
        ("oauth2: {client_id: a, token_url: 'https://u:p@id.example.com/t'}", "and nothing else"),
        ("oauth2: {client_id: a, token_url: 'https://*.example.com/t'}", "one exact host"),
        ("oauth2: {client_id: a, token_url: 'https://169.254.169.254/t'}", "one exact host that may be reached"),
        ("oauth2: {client_id: a, token_url: 'https://localhost/t'}", "one exact host that may be reached"),
        ("oauth2: {client_id: a, token_url: 'https:///t'}", "token endpoint"),
        ("oauth2: {client_id: a, token_url: 'https://id.example.com:99999/t'}", "not a URL"),
        ("oauth2: {client_id: '', token_url: 'https://id.example.com/t'}", "client id"),
        (f"oauth2: {{{TOKEN}, scopes: ['a b']}}", "is not a scope"),
        (f"oauth2: {{{TOKEN}, resource: api}}", "absolute URI"),
        (f"oauth2: {{{TOKEN}, client_secret: 'file:b'}}", "the secret at ref is the client"),
        (f"oauth2: {{{TOKEN}, grant: refresh_token, client_secret: 'b'}}", "not a reference"),
        (f"oauth2: {{{TOKEN}, grant: password}}", "grant"),
        (f"oauth2: {{{TOKEN}, audience: x}}", "audience"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: str, words: str) -> None:
    assert words in one(f"{HERE}, {fields}")


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("sigv4: {service: s3, region: eu-central-1}", ""),
        (
            f"sigv4: {{service: s3, region: eu-central-1}}, {INJECT}",
            "credentials[0].inject: a signature has headers of its own",
        ),
        (
            f"sigv4: {{service: s3, region: eu-central-1}}, oauth2: {{{TOKEN}}}",
            "credentials[0].oauth2: a call is signed or",
        ),
        ("sigv4: {service: S3, region: x}", "not the name of a service"),
        ("sigv4: {service: s3, region: 'a/b'}", "not the name of a service"),
        ("sigv4: {service: s3}", "region"),
        ("methods: [GET]", "credentials[0].inject: it is not said how"),
    ],
)
def test_a_signature_takes_the_place_of_a_header(fields: str, words: str) -> None:
    found = problems(f"credentials: [{{id: a, ref: 'file:a', {HERE}, {fields}}}]\n")
    assert words in found
    assert bool(words) == bool(found)


@pytest.mark.parametrize(
    "fields",
    [
        "methods: [GET, POST]",
        f"oauth2: {{{TOKEN}}}",
        f"oauth2: {{{TOKEN}, scopes: [a, 'b:c'], resource: 'https://a.example.com'}}",
        f"oauth2: {{{TOKEN}, grant: refresh_token, client_secret: 'vault:kv/agents'}}",
    ],
)
def test_what_is_honoured_loads(fields: str) -> None:
    assert one(f"{HERE}, {fields}") == ""


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("left", "right", "met"),
    [
        ("vault:kv/git/{sponsor}", "vault:kv/git/bot", True),
        ("vault:kv/git/bot#other", "vault:kv/git/{sponsor}#token", True),
        ("file:git/{sponsor}", "local:git/bot", True),
        ("file:git/{sponsor}", "file:git/{workspace}", True),
        ("file:git/{sponsor}/a", "file:git/b/{workspace}", True),
        ("vault:kv/git/{sponsor}#user", "vault:kv/git/{sponsor}#token", False),
        ("vault:kv/git/{sponsor}", "vault:kv/model/bot", False),
        ("vault:kv/git/{sponsor}", "vault:other/git/bot", False),
        ("vault:kv/git/{sponsor}", "vault:kv/git", False),
        ("vault:kv/git/{sponsor}", "file:kv/git/bot", False),
        ("file:git/{sponsor}/a", "file:git/{workspace}/b", False),
        ("file:git/bot", "file:git/other", False),
    ],
)
def test_no_name_of_a_caller_leads_from_one_reference_to_the_secret_of_another(
    left: str, right: str, met: bool
) -> None:
    two = "credentials:\n" + "".join(
        f"- {{id: {name}, ref: '{ref}', {INJECT}, hosts: ['{name}.example.com:443']}}\n"
        for name, ref in (("a", left), ("b", right))
    )
    found = problems(two)
    assert ("credentials[1].ref: a caller with a fitting name would get a secret of a" in found) if met else not found
    found = one(f"{HERE}, oauth2: {{{TOKEN}, grant: refresh_token, client_secret: '{right}'}}", left)
    assert ("credentials[0].oauth2.client_secret: a caller with" in found) if met else not found


def test_credentials_of_other_methods_may_share_paths() -> None:
    def two(left: str, right: str) -> str:
        return problems(
            "credentials:\n" + "".join(
                f"- {{id: {name}, ref: 'file:{name}', {INJECT}, {HERE}, methods: [{methods}]}}\n"
                for name, methods in (("a", left), ("b", right))
            )
        )  # fmt: skip

    assert two("GET", "POST") == two("GET, HEAD", "POST, PUT") == ""
    for left, right in (("GET", "GET, POST"), ("GET", "HEAD"), ("", "POST"), ("", "")):
        assert "both apply on a.example.com:443" in two(left, right)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ("methods: [POST]", "methods"),
        ("paths: ['/v1/**']", "paths"),
        (f"{HERE}, methods: [POST]", "methods"),
        (f"{HERE}, paths: ['/v1/**']", ""),
        (HERE, ""),
    ],
)
def test_a_scope_that_a_route_would_not_ask_for_is_refused(fields: str, refused: str) -> None:
    route = (
        "inference: {routes: [{alias: m.local, models: ['*'], upstream: 'https://m.example.com/v1', credential: a}]}\n"
    )
    found = problems(f"credentials: [{{id: a, ref: 'file:a', {INJECT}, {fields}}}]\n{route}")
    assert (f"credentials[0].{refused}: an inference route takes" in found) if refused else not found
