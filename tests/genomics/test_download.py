"""Fetching genomes from a server of our own: whole, resumed, and with a wrong sum."""

import base64
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from core.errors import UserError
from genomics import download
from genomics.download import SOURCES, checksum, get

CONTENT = bytes(range(256)) * 40
SUM = hashlib.md5(CONTENT).hexdigest()


class _Server(BaseHTTPRequestHandler):
    asked: list[str | None]

    def do_GET(self) -> None:
        if self.path.endswith("md5sum.txt"):
            self._answer(200, f"{SUM}  hg38.fa.gz\n0  hg38.2bit\n".encode())
            return
        span = self.headers.get("Range")
        self.asked.append(span)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        self._answer(416, b"") if start >= len(CONTENT) else self._answer(206 if span else 200, CONTENT[start:])

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("x-goog-hash", "crc32c=AAAAAA==")
        self.send_header("x-goog-hash", f"md5={base64.b64encode(bytes.fromhex(SUM)).decode()}")
        self.end_headers()

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    _Server.asked = []
    running = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(download, "UCSC", address)
    monkeypatch.setattr(download, "BASENJI", address)
    yield address
    running.shutdown()


def test_whole_resumed_and_checked(tmp_path: Path, server: str) -> None:
    assert checksum(SOURCES["hg38"]) == SUM
    path = tmp_path / "new" / "a.gz"
    assert get(f"{server}/a", path, SUM).read_bytes() == CONTENT
    assert get(f"{server}/a", path, SUM) == path  # there already
    for begun in (100, len(CONTENT)):
        path.unlink()
        (path.parent / "a.gz.part").write_bytes(CONTENT[:begun])
        assert get(f"{server}/a", path, SUM).read_bytes() == CONTENT
    assert _Server.asked == [None, "bytes=100-", f"bytes={len(CONTENT)}-"]
    other = tmp_path / "b.gz"
    with pytest.raises(UserError, match="MD5 sum"):
        get(f"{server}/a", other, "0" * 32)
    assert not list(tmp_path.glob("b.gz*"))


def test_listing_and_mistakes(tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    download.download("great_apes")
    out = capsys.readouterr().out
    assert all(
        name in out for name in ("panTro6.fa.gz", "panPan3.fa.gz", "gorGor6.fa.gz", "ponAbe3.fa.gz", "hs1.fa.gz")
    )
    download.download("hg38", folder=str(tmp_path), fetch=True)
    assert (tmp_path / "hg38.fa.gz").read_bytes() == CONTENT
    download.download("hg38_split", folder=str(tmp_path), fetch=True)
    assert (tmp_path / "sequences_human.bed").read_bytes() == CONTENT
    with pytest.raises(UserError, match="no genome 'mouse'"):
        download.download("mouse")
    with pytest.raises(UserError, match=r"broke off|cannot be had"):
        get("http://127.0.0.1:9/x", tmp_path / "x", SUM)
