"""The smallest things that package managers install, made here: a wheel, an npm tarball, a Debian package with its index."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
import zipfile

from clients_far_ends import App

Files = dict[str, bytes]


def wheel(name: str) -> bytes:
    """Return a wheel of ``name`` 1.0 with one module that says hello (binary distribution format, PyPA)."""
    info = f"{name}-1.0.dist-info"
    files: Files = {
        f"{name}/__init__.py": b"print('hello from the wheel')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD")).encode()
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return raw.getvalue()


def tarball(files: Files) -> bytes:
    """Return a compressed tar archive."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return raw.getvalue()


def debian_package(name: str) -> bytes:
    """Return a Debian package (deb(5)) with nothing in it."""
    control = (
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: test <test@example.com>\nDescription: test\n"
    )
    raw = b"!<arch>\n"
    for member, content in (
        ("debian-binary", b"2.0\n"), ("control.tar.gz", tarball({"./control": control.encode()})), ("data.tar.gz", tarball({})),
    ):  # fmt: skip
        raw += (
            f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return raw


def publish(app: App) -> None:
    """Serve ``demo-pkg`` to pip and npm, and ``demo`` to apt."""
    made = wheel("demo_pkg")
    file = "demo_pkg-1.0-py3-none-any.whl"
    page = f'<a href="/files/{file}#sha256={hashlib.sha256(made).hexdigest()}">{file}</a>'
    app.files["pypi.example.com", "/simple/demo-pkg/"] = ("text/html", page.encode())
    app.files["pypi.example.com", f"/files/{file}"] = ("application/zip", made)

    package = {"name": "demo-pkg", "version": "1.0.0", "main": "index.js"}
    packed = tarball(
        {"package/package.json": json.dumps(package).encode(), "package/index.js": b"console.log('hello from npm')\n"}
    )
    digest = base64.b64encode(hashlib.sha512(packed).digest()).decode()
    dist = {"tarball": "https://npm.example.com/demo-pkg/-/demo-pkg-1.0.0.tgz", "integrity": f"sha512-{digest}"}
    document = {"name": "demo-pkg", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": {**package, "dist": dist}}}
    app.files["npm.example.com", "/demo-pkg"] = ("application/json", json.dumps(document).encode())
    app.files["npm.example.com", "/demo-pkg/-/demo-pkg-1.0.0.tgz"] = ("application/octet-stream", packed)

    deb = debian_package("demo")
    index = (
        "Package: demo\nVersion: 1.0\nArchitecture: all\nMaintainer: test <test@example.com>\nDescription: test\n"
        f"Filename: ./demo.deb\nSize: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\n\n"
    ).encode()
    packed = gzip.compress(index, mtime=0)
    sums = "".join(
        f" {hashlib.sha256(raw).hexdigest()} {len(raw)} {name}\n"
        for name, raw in (("Packages", index), ("Packages.gz", packed))
    )
    release = f"Origin: test\nSuite: test\nDate: Mon, 30 Nov 2026 00:00:00 UTC\nSHA256:\n{sums}"
    for name, raw in (("Release", release.encode()), ("Packages", index), ("Packages.gz", packed), ("demo.deb", deb)):
        app.files["apt.example.com", f"/debian/./{name}"] = app.files["apt.example.com", f"/debian/{name}"] = (
            "application/octet-stream", raw,
        )  # fmt: skip
