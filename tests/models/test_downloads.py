"""Downloads of weights say what comes, how big it is and how far it is, and keep nothing that is not whole. The server is our own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tltrain.core.output import progress
from tltrain.models.weight_files import download
from tltrain.models.weight_files.download import Transfer, fetch

CONTENT = os.urandom(1 << 20) * 3
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as its client asks for: repositories with model.safetensors, and the same file at any other address."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if self.path.startswith("/api/models/org/"):
            files = [{"rfilename": name, "size": len(CONTENT)} for name in ("config.json", "model.safetensors")]
            tree = [{"type": "file", "path": file["rfilename"], "size": file["size"], "oid": "0" * 40} for file in files]
            answer: object = tree if "/tree/" in self.path else {"id": "org/vit", "sha": "c0ffee" * 6 + "c0ff", "siblings": files}
            return self._send(json.dumps(answer).encode(), body, "application/json")
        content = b'{"model_type": "vit"}' if self.path.endswith("config.json") else CONTENT
        if self.path.endswith("processor_config.json"):
            return self.send_error(404)
        length = 2 * len(CONTENT) if "short" in self.path else len(content)
        return self._send(content, body, "application/octet-stream", length)

    def _send(self, content: bytes, body: bool, kind: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "c0ff")
        self.end_headers()
        if body:
            self.wfile.write(content)
        if length is not None and length > len(content):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_whole_and_spoken_of(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REPORT_S", 0.0)
    heard: list[str] = []
    with progress.heard_by(heard.append):
        fetch(f"{address}/models/net.pth", tmp_path / "net.pth", DIGEST[:8])
    assert (tmp_path / "net.pth").read_bytes() == CONTENT
    assert capsys.readouterr().err == f"tltrain: downloading 3.15 MB from {address.removeprefix('http://')}: net.pth\n"
    assert heard[0].startswith("downloading net.pth, 131 KB of 3.15 MB, ")
    assert heard[-1].startswith("downloading net.pth, 3.15 MB of 3.15 MB, ")
    assert heard[-1].endswith("a second, 0 s left")
    assert len(heard) == len(CONTENT) // download.CHUNK


@pytest.mark.parametrize(
    ("name", "prefix", "says"),
    [("short.pth", "", r"ended after 3,145,728 of 6,291,456 bytes|ended too early"), ("net.pth", "00000000", "is not that file")],
)
def test_what_does_not_arrive_whole_is_not_kept(address: str, tmp_path: Path, name: str, prefix: str, says: str) -> None:
    with pytest.raises(OSError, match=says):
        fetch(f"{address}/{name}", tmp_path / name, prefix)
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_is_not_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    Transfer("config.json", "https://hub").advance(800, 800)
    assert capsys.readouterr().err == ""


_CODE = """
import sys
from tltrain.core.output import progress
from tltrain.models import hf_hub
from tltrain.models.timm import hub
progress.REPORT_S = 0.0
heard = []
with progress.heard_by(heard.append):
    print(hub._hub_file("org/net", ("model.safetensors",), network=True).stat().st_size)
    print(next(hf_hub.download("org/vit", network=True).glob("*.safetensors")).stat().st_size)
print(*heard, sep="\\n")
"""


def test_the_hub_s_own_client_reports_bytes_and_draws_no_bar(address: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_")) and not k.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [str(len(CONTENT))] * 2
    assert lines[2].startswith("downloading org/net/model.safetensors, ")
    for what in ("org/net/model.safetensors", "org/vit"):
        assert any(line.startswith(f"downloading {what}, 3.15 MB of 3.15 MB, ") for line in lines[2:]), done.stdout
    assert f"tltrain: downloading 3.15 MB from {address.removeprefix('http://')}: org/net/model.safetensors\n" in done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
