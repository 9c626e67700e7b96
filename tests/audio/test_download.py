"""Fetching recordings from a server of our own: unpacked, resumed, refused with a wrong sum."""

import hashlib
import io
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from audio import download
from audio.download import Source, fetch_source, stated_sum, unpack
from core.errors import UserError


def archive(top: str) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as file:
        for i in range(3):
            file.writestr(f"{top}out{i}.wav", b"x" * 5000)
    return body.getvalue()


class _Server(BaseHTTPRequestHandler):
    content = archive("set/")
    asked: list[str | None]

    def do_HEAD(self) -> None:
        self.send_response(302)
        self.send_header("Location", "http://127.0.0.1:9/storage")
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.end_headers()

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        self.asked.append(span)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Server.asked = []
    running = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/set.zip"
    running.shutdown()


def test_fetched_by_the_servers_sum_resumed_and_unpacked(tmp_path: Path, server: str) -> None:
    assert stated_sum(server) == hashlib.sha256(_Server.content).hexdigest()
    (tmp_path / "set.zip.part").write_bytes(_Server.content[:77])
    source = Source("a set", "none", 1, server, "youtubemix")
    fetch_source(source, tmp_path / "set")
    assert _Server.asked == ["bytes=77-"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["out0.wav", "out1.wav", "out2.wav"]
    assert not list(tmp_path.glob("*.zip*"))
    with pytest.raises(UserError, match="exists already"):
        fetch_source(source, tmp_path / "set")
    with pytest.raises(UserError, match="SHA-256 sum"):
        fetch_source(Source("a set", "none", 1, server, "x", "0" * 64), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_archives_that_cannot_be_unpacked(tmp_path: Path) -> None:
    broken = tmp_path / "a.tar.gz"
    broken.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(broken, tmp_path / "out")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as file:
        item = tarfile.TarInfo("../outside")
        file.addfile(item, io.BytesIO())
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "b.tar.gz", tmp_path / "out")
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "out").exists()


def test_a_repository_is_cloned(tmp_path: Path) -> None:
    origin = tmp_path / "origin.git"
    subprocess.run(["git", "init", "-q", str(origin)], check=True)
    (origin / "recordings").mkdir()
    (origin / "recordings" / "7_jackson_32.wav").write_bytes(b"x")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(origin), "add", "-A"], check=True)
    subprocess.run(["git", "-C", str(origin), *who, "commit", "-qm", "x"], check=True)
    fetch_source(Source("clips", "none", 1, f"file://{origin}", "fsdd"), tmp_path / "fsdd")
    assert (tmp_path / "fsdd" / "recordings" / "7_jackson_32.wav").is_file()
    with pytest.raises(UserError, match="cannot be had"):
        fetch_source(Source("clips", "none", 1, f"file://{tmp_path}/none.git", "fsdd"), tmp_path / "none")


def test_listing_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    download.download()
    out = capsys.readouterr().out
    assert all(source.address in out for source in download.SOURCES.values())
    with pytest.raises(UserError, match="no recordings 'sc10'"):
        download.download("sc10")
    with pytest.raises(UserError, match="one set at a time"):
        download.download(fetch=True)
    with pytest.raises(UserError, match="cannot be had"):
        stated_sum("http://127.0.0.1:9/x.zip")
