"""A mail that waits: who it goes to, all that it says as programs for mail read it, and warnings where they differ."""

from __future__ import annotations

import base64
import hashlib
import json
from email.message import EmailMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.review.json_text import Unreadable
from saw.review.messages import ReviewedCall
from saw.review.mime_text import MAX_TEXT, show_mail
from saw.review.render import render

pytestmark = pytest.mark.control("REV-01")


def call(body: bytes, media: str, path: str = "/v1/messages/send") -> ReviewedCall:
    return ReviewedCall(
        method="POST", scheme="https", host="mail.example.com", port=443, path=path, headers=(("content-type", media),), body=body
    )  # fmt: skip


def mail(**more: str) -> EmailMessage:
    made = EmailMessage()
    made["Subject"] = "Invoice 4711"
    made["From"] = "agent@example.com"
    made["To"] = "ada@example.com, ben@example.com"
    for name, value in more.items():
        made[name] = value
    made.set_content("Please pay 100 EUR.\nThanks\n")
    return made


def plain(*lines: str) -> bytes:
    return "\r\n".join(lines).encode()


def kind_of(text: str) -> str:
    return next(line for line in text.split("\n") if line.startswith("shown as")).removeprefix("shown as   ")


def test_who_it_goes_to_comes_first_then_what_it_says_then_every_header():
    text = render("ws-a", call(mail(Bcc="eve@example.com").as_bytes(), "message/rfc822"))
    shown = text.split("shown as   a mail\n\n")[1].split("\n")
    assert shown[:4] == [
        "from       agent@example.com",
        "to         ada@example.com, ben@example.com",
        "bcc        eve@example.com",
        "subject    Invoice 4711",
    ]
    assert "# the mail: text/plain" in shown
    assert shown.index("| Please pay 100 EUR.") + 1 == shown.index("| Thanks")
    assert (
        shown.index("| Thanks")
        < shown.index("# all headers as they are written")
        < shown.index("header     MIME-Version: 1.0")
    )


def test_attachments_are_named_with_their_digests_and_other_forms_are_all_shown():
    made = mail()
    made.add_alternative("<p>Please pay <b>9000</b> EUR.</p>", subtype="html")
    made.add_attachment(b"\x89PNG\0", maintype="image", subtype="png", filename='pay "now".png')
    made.add_attachment("a,b\n1,2\n", filename="t.csv", subtype="csv")
    made.add_attachment(mail(Cc="cleo@example.com"))
    lines = show_mail(made.as_bytes())
    at = lines.index('# the mail, part 2: image/png file "pay \\"now\\".png"')
    digest = hashlib.sha256(b"\x89PNG\0").hexdigest()
    assert [f"5 bytes, sha256 {digest}", "it is NOT shown"] == [line for line in lines[at:] if "header" not in line][
        1:3
    ]
    assert "| <p>Please pay <b>9000</b> EUR.</p>" in lines
    assert {"| a,b", "| 1,2"} <= set(lines)
    assert "# the mail, part 4, the mail in it: text/plain" in lines
    assert "header     Cc: cleo@example.com" in lines


def test_words_in_other_scripts_are_shown_as_written_and_as_read():
    made = mail(Cc="=?utf-8?q?C=C3=A9line?= <c@example.com>")
    del made["Subject"]
    made["Subject"] = "Für Ådne"
    lines = show_mail(made.as_bytes())
    assert "  reads    Für Ådne" in lines
    assert any(line.startswith("subject    =?utf-8?") for line in lines)
    odd = show_mail(plain("To: a@example.com", "Subject: =?utf-8?b?4oCu?= =?x-odd?b?QQ==?=", "", "x"))
    assert "  reads    \\u{202e}=?x-odd?b?QQ==?=" in odd
    assert not [line for line in odd if not line.isprintable()]


@pytest.mark.parametrize(
    ("raw", "warning"),
    [
        (plain("To: a@example.com", "To: b@example.com", "", "x"), "! to appears more than once"),
        (
            plain("To: a@example.com", "Content-Type: text/plain", "Content-Type: text/html", "", "x"),
            "! content-type appears",
        ),
        (
            plain("To: a@example.com", "Content-Transfer-Encoding: base64", "", "not base64!"),
            "! it says base64 and is none: shown as it is",
        ),
        (
            plain("To: a@example.com", "Content-Transfer-Encoding: x-odd", "", "x"),
            "! it is encoded in a way that is not read",
        ),
        (
            plain("To: a@example.com", "Content-Type: multipart/mixed; boundary=b", "", "--b", "", "x"),
            "! it cannot be taken apart: its parts do not end where they should",
        ),
        (
            plain(
                "To: a@example.com",
                "Content-Type: multipart/mixed; boundary=b; boundary=c",
                "",
                "--b",
                "",
                "x",
                "--b--",
            ),
            "! it cannot be taken apart: it has no boundary",
        ),
        (
            plain(
                "To: a@example.com", "Content-Type: multipart/mixed; boundary=b", "", "hidden", "--b", "", "x", "--b--"
            ),
            "! 6 bytes outside its parts are NOT shown",
        ),
        (
            plain("To: a@example.com", "Content-Type: text/plain; charset=x-odd", "", "x"),
            "it is NOT shown: not in a character",
        ),
        (plain("To: a@example.com", "", "x" * (MAX_TEXT + 3)), "… 3 more bytes are NOT shown"),
    ],
)
def test_where_readers_differ_or_something_is_not_shown_it_is_said(raw: bytes, warning: str):
    assert [line for line in show_mail(raw) if line.startswith(warning)]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no headers at all",
        plain("Subject: to nobody", "", "x"),
        plain(" folded first", "To: a@example.com", "", "x"),
        plain("To : a@example.com", "", "x"),
        b"To: a@example.com\rBcc: b@example.com\r\n\r\nx",
        b"To: \xff@example.com\r\n\r\nx",
        plain(*(f"X-{number}: a" for number in range(300)), "To: a@example.com", "", "x"),
    ],
)
def test_what_is_no_mail_for_certain_is_not_shown_as_one(raw: bytes):
    with pytest.raises(Unreadable):
        show_mail(raw)
    assert kind_of(render("ws-a", call(raw or b"-", "message/rfc822"))) in {"text", "hex dump"}


def test_a_mail_that_json_carries_is_shown_as_the_mail_with_the_rest_of_the_json():
    raw = base64.urlsafe_b64encode(mail().as_bytes()).decode()
    for body in ({"raw": raw, "threadId": "t1"}, {"message": {"raw": raw.rstrip("="), "threadId": "t1"}}):
        text = render("ws-a", call(json.dumps(body).encode(), "application/json"))
        assert kind_of(text) == "a mail in JSON"
        assert "to         ada@example.com, ben@example.com" in text
        assert "| Please pay 100 EUR." in text
        assert '"threadId": "t1"' in text
        assert raw[:40] not in text


def test_json_that_could_be_read_as_two_mails_hides_none_of_them():
    one, other = (
        base64.urlsafe_b64encode(mail(Cc=name).as_bytes()).decode() for name in ("x@a.example", "y@a.example")
    )
    text = render("ws-a", call(json.dumps({"raw": one, "message": {"raw": other}}).encode(), "application/json"))
    assert other in text
    twice = f'{{"raw": "{one}", "raw": "{other}"}}'.encode()
    assert kind_of(render("ws-a", call(twice, "application/json"))) == "JSON"
    for word in ("raw" * 9, one + "*", base64.urlsafe_b64encode(b"no mail").decode()):
        assert kind_of(render("ws-a", call(json.dumps({"raw": word}).encode(), "application/json"))) == "JSON"


def test_a_form_with_files_is_shown_field_by_field():
    form = plain(
        "--b",
        'Content-Disposition: form-data; name="to"',
        "",
        "account 4711",
        "--b",
        'Content-Disposition: form-data; name="f"; filename="x.bin"',
        "Content-Type: application/octet-stream",
        "",
        "\0\1",
        "--b--",
        "",
    )
    text = render("ws-a", call(form, "multipart/form-data; boundary=b"))
    assert kind_of(text) == "form fields and files"
    assert "# to: text/plain\n" in text
    assert "| account 4711\n" in text
    assert '# f: application/octet-stream file "x.bin"' in text
    assert f"2 bytes, sha256 {hashlib.sha256(bytes([0, 1])).hexdigest()}\nit is NOT shown" in text
    for other in (form.replace(b'name="to"', b"size=2"), b"hidden\r\n" + form, form.replace(b"--b--", b"--b")):
        assert kind_of(render("ws-a", call(other, "multipart/form-data; boundary=b"))) != "form fields and files"


@given(st.binary(max_size=300))
def test_no_bytes_are_too_odd(raw: bytes):
    for body in (
        raw,
        b"To: a@example.com\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n" + raw + b"\r\n--b--",
    ):
        text = render("ws-a", call(body or b"-", "message/rfc822"))
        assert all(line.isprintable() for line in text.split("\n"))
