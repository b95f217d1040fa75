"""What a reviewer is shown: whole or saying what is left out, escaped, the same text for the same bytes."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.review.messages import ReviewedCall
from saw.review.render import MAX_HEX, MAX_SHOWN, render

OLD, NEW, NONE = "1" * 40, "2" * 40, "0" * 40


def call(body: bytes = b"", media: str = "", path: str = "/v1/notes", **more: object) -> ReviewedCall:
    headers = (("content-type", media),) if media else ()
    return ReviewedCall(
        **{"method": "POST", "scheme": "https", "host": "api.example.com", "port": 443, "path": path}
        | {"headers": headers, "body": body}
        | more,
    )


def shown(body: bytes, media: str = "", **more: object) -> str:
    return render("ws-a", call(body, media, **more))


def pkt(text: str) -> bytes:
    return f"{len(text) + 4:04x}{text}".encode()


def push(*commands: str, pack: bytes = b"PACKdata") -> bytes:
    first = commands[0] + "\0 report-status\n"
    return b"".join([pkt(first), *(pkt(f"{line}\n") for line in commands[1:]), b"0000", pack])


def test_json_is_shown_as_a_tree_with_numbers_as_they_were_written() -> None:
    text = shown(b'{"amount": 1e400, "to": {"iban": "DE1"}, "tags": ["a", []], "ok": true}', "application/json")
    assert text.endswith('amount": 1e400\n"to":\n  "iban": "DE1"\n"tags":\n  - "a"\n  - []\n"ok": true\n')
    assert "request    POST https://api.example.com/v1/notes\n" in text


@pytest.mark.control("RUN-05")
def test_arguments_of_a_tool_are_shown_one_by_one_and_nothing_hides_in_them() -> None:
    body = b'{"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": "publish", "arguments": '
    body += b'{"path": "/srv/docs/a\\u202e.md", "tags": ["x", 1.0], "more": null}}}'
    text = shown(body, "application/json", path="/mcp")
    tree = [
        '"params":',
        '  "name": "publish"',
        '  "arguments":',
        '    "path": "/srv/docs/a\\u{202e}.md"',
        '    "tags":',
    ]
    assert "\n".join([*tree, '      - "x"', "      - 1.0", '    "more": null']) in text


def test_a_name_that_appears_twice_is_shown_twice_and_marked() -> None:
    assert shown(b'{"to": "a", "to": "b"}', "application/json").count("(this name appears more than once)") == 2


@pytest.mark.parametrize("body", [b'{"a": ', b"[" * 5000 + b"]" * 5000])
def test_what_is_no_readable_json_is_shown_as_the_text_that_it_is(body: bytes) -> None:
    assert "shown as   text" in shown(body, "application/json")


def test_form_fields_are_shown_one_a_line_unquoted_and_escaped() -> None:
    text = shown(b"to=a%0Ab&to=c+d&flag", "application/x-www-form-urlencoded")
    assert text.endswith("to = a\\u{a}b\nto = c d\nflag (no value)\n")


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_a_push_is_shown_by_its_commands(coding: str) -> None:
    body = push(f"{OLD} {NEW} refs/heads/main", f"{NONE} {NEW} refs/heads/new", f"{OLD} {NONE} refs/heads/gone")
    headers = (("content-encoding", coding),) if coding else ()
    body = gzip.compress(body) if coding else body
    text = shown(body, path="/team/notes.git/git-receive-pack", headers=headers)
    assert f"update  {OLD} → {NEW}  refs/heads/main\n" in text
    assert f"create  {NONE} → {NEW}  refs/heads/new\n" in text
    assert f"delete  {OLD} → {NONE}  refs/heads/gone\n" in text
    assert "NOT shown" in text


def test_what_is_nothing_else_is_a_hex_dump_that_says_what_it_leaves_out() -> None:
    text = shown(b"\x00\xffAB" * 8192)
    assert "00000000  00 ff 41 42" in text
    assert f"… {4 * 8192 - MAX_HEX} more bytes are NOT shown" in text
    assert "NOT shown" not in shown(b"\x00\xffAB")


def test_a_text_that_is_cut_says_so() -> None:
    assert "… 5 more bytes are NOT shown" in shown(b"x" * (MAX_SHOWN + 5))
    assert "NOT shown" not in shown(b"x" * MAX_SHOWN)


@pytest.mark.parametrize("hidden", ["\x1b[2J", "\u202e", "\u200b", "\r", "\x9b"])
def test_nothing_steers_the_terminal_or_hides(hidden: str) -> None:
    for media in ("text/plain", "application/json"):
        text = shown(f'"pay {hidden} me"'.encode(), media, path=f"/a{hidden}b")
        assert hidden not in text
        assert f"\\u{{{ord(hidden[0]):x}}}" in text or "1b 5b" in text or "hex dump" in text


def test_names_beyond_ascii_do_not_pass_for_others() -> None:
    assert "https://\\u{430}pi.example.com" in render("ws-a", call(host="\u0430pi.example.com"))


@given(
    st.binary(max_size=200),
    st.sampled_from(["", "application/json", "application/x-www-form-urlencoded", "text/plain"]),
)
def test_every_body_has_one_printable_text(body: bytes, media: str) -> None:
    text = shown(body, media)
    assert text == shown(body, media)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.encode()
