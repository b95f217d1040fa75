"""Java inside the sandbox: proxy and authorities come from the one variable that every virtual machine reads."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from clients_rig import HOME, Workspace

CLIENT = """
import java.net.*;
import java.net.http.*;
public class Client {
    public static void main(String[] words) throws Exception {
        URI to = URI.create(words[1]);
        if (words[0].equals("new")) {
            var asked = HttpRequest.newBuilder(to).build();
            var answer = HttpClient.newHttpClient().send(asked, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.body());
        } else {
            var call = (HttpURLConnection) to.toURL().openConnection();
            int status = call.getResponseCode();
            var body = status < 400 ? call.getInputStream() : call.getErrorStream();
            System.out.println(status + " " + new String(body.readAllBytes()));
        }
    }
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the client's class; compiled outside, where it costs less."""
    if shutil.which("javac") is None or shutil.which("java") is None:
        pytest.skip("needs a JDK (Debian: default-jdk-headless)")
    folder = Path(tmp_path_factory.mktemp("java"))
    (folder / "Client.java").write_text(CLIENT)
    subprocess.run(["javac", "-d", str(folder), str(folder / "Client.java")], check=True)
    return (folder / "Client.class").read_bytes()


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("which", ["new", "old"])
def test_java_is_allowed_or_refused(workspace: Workspace, compiled: bytes, which: str) -> None:
    workspace.put(f"{HOME}/project/Client.class", compiled)

    def java(url: str) -> tuple[int, str, str]:
        done = workspace.client("java", "-cp", f"{HOME}/project", "Client", which, url)
        return done.code, done.out, done.err

    code, out, err = java("https://api.example.com/v1/things")
    assert (code, out[:3]) == (0, "200"), err
    assert json.loads(out[4:])["path"] == "/v1/things"
    code, out, err = java("https://api.example.com/v2/things")
    assert (code, out[:3]) == (0, "403"), err
    assert json.loads(out[4:])["reason"] == "method_or_path_not_allowed"
    code, out, err = java("https://hidden.example.com/")
    assert (code, "403" in err or "tunnel" in err.lower()) == (1, True), err
    assert workspace.told() == ("host_not_allowed", "hidden.example.com")
