from __future__ import annotations

import hashlib
import socket
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from samcompress.core import _download
from samcompress.core._download import cache_folder, fetch
from samcompress.core._progress import Event
from samcompress.core.errors import CheckpointError
from samcompress.core.zoo import File

CONTENT = bytes(range(256)) * 40  # 10 240 bytes
PAGE = "https://example.org/weights"


class Server(ThreadingHTTPServer):
    """Serves CONTENT, in whatever bad way it is told to."""

    ranges = True
    most: int | None = None  # bytes after which a connection is cut
    kind = "application/octet-stream"
    code = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/model.pt"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked[6:-1]) if asked and server.ranges else 0
        if start >= len(CONTENT) or server.code != 200:
            self.send_response(416 if server.code == 200 else server.code)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:][: server.most])

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(_download, "CHUNK", 1000)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(file: File) -> str:
    with pytest.raises(CheckpointError) as info:
        fetch(file)
    return str(info.value)


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def half(cache: Path, n: int, name: str = "model.pt") -> None:
    cache.mkdir()
    (cache / f"{name}.part").write_bytes(CONTENT[:n])


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("SAMCOMPRESS_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "samcompress" / "models"


def test_download_is_checked_counted_and_done_once(server: Server, cache: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    md5 = hashlib.md5(CONTENT).hexdigest()[:6]
    file = File(name="model.pt", url=server.url, size=len(CONTENT), md5=md5.upper(), sha256=digest)
    events: list[Event] = []
    path = fetch(file, progress=events.append)
    assert path == cache / "model.pt"
    assert path.read_bytes() == CONTENT
    assert left(cache) == ["model.pt"]
    assert events[-1] == Event("download", "model.pt, MiB", 11, 11)
    assert fetch(file) == path
    assert server.asked == [None]


def test_cut_connection_is_taken_up_again(server: Server) -> None:
    server.most = 4096
    assert fetch(File(name="model.pt", url=server.url)).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=4096-", "bytes=8192-"]


def test_cut_download_is_kept_for_the_next_call(server: Server, cache: Path) -> None:
    half(cache, 3000)
    server.most = 0
    file = File(name="model.pt", url=server.url, size=len(CONTENT), page=PAGE)
    assert refusal(file) == (
        "the download of model.pt was cut off.\n"
        f"  where     {server.url}\n"
        "  got       3,000 bytes; the connection ended early\n"
        "  expected  10,240 bytes\n"
        "  try       the same again: it goes on from there; "
        f"or get model.pt from {PAGE} and put it into {cache}"
    )
    assert left(cache) == ["model.pt.part"]
    server.most = None
    assert fetch(file).read_bytes() == CONTENT
    assert server.asked == ["bytes=3000-"] * 2


def test_connection_that_brings_nothing(server: Server, cache: Path) -> None:
    server.most = 0
    text = refusal(File(name="model.pt", url=server.url))
    assert text.startswith("model.pt could not be downloaded.\n")
    assert "  got       ConnectionError: the connection ended early\n" in text
    assert left(cache) == []


def test_connection_that_is_always_cut(server: Server, cache: Path) -> None:
    server.most = 1
    assert "  got       5 bytes; the connection ended early\n" in refusal(
        File(name="model.pt", url=server.url)
    )
    assert left(cache) == ["model.pt.part"]


def test_server_without_ranges(server: Server, cache: Path) -> None:
    half(cache, 3000)
    server.ranges = False
    assert fetch(File(name="model.pt", url=server.url)).read_bytes() == CONTENT
    assert server.asked == ["bytes=3000-"]


def test_all_was_there_already(server: Server, cache: Path) -> None:
    half(cache, len(CONTENT))
    file = File(name="model.pt", url=server.url)
    assert fetch(file).read_bytes() == CONTENT
    assert server.asked == ["bytes=10240-"]
    (cache / "model.pt").rename(cache / "model.pt.part")
    assert fetch(File(name="model.pt", url=server.url, size=len(CONTENT))).is_file()
    assert len(server.asked) == 1


def test_more_than_all_was_there(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "model.pt.part").write_bytes(CONTENT * 2)
    assert fetch(File(name="model.pt", url=server.url)).read_bytes() == CONTENT
    assert server.asked == ["bytes=20480-", None]


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_wrong_hash(kind: str, server: Server, cache: Path) -> None:
    file = File(name="model.pt", url=server.url, page=PAGE, **{kind: "0123"})
    found = hashlib.new(kind, CONTENT).hexdigest()
    assert refusal(file) == (
        "model.pt is not the official file.\n"
        f"  where     {cache / 'model.pt.part'}\n"
        f"  got       {kind} {found}\n"
        f"  expected  {kind} 0123\n"
        "  try       the same again; if that does not help, "
        f"get model.pt from {PAGE} and put it into {cache}"
    )
    assert left(cache) == []


def test_wrong_size(server: Server, cache: Path) -> None:
    text = refusal(File(name="model.pt", url=server.url, size=7))
    assert text.startswith("model.pt has another size than the official file.\n")
    assert "  got       10,240 bytes\n  expected  7 bytes\n" in text
    assert f"get model.pt from {server.url} and put it into {cache}" in text
    assert left(cache) == []


def test_copy_in_the_cache_of_another_size(cache: Path) -> None:
    cache.mkdir()
    (cache / "model.pt").write_bytes(b"short")
    assert refusal(File(name="model.pt", url="http://127.0.0.1:9/", size=7)) == (
        "model.pt has another size than the official file.\n"
        f"  where     {cache / 'model.pt'}\n"
        "  got       5 bytes\n"
        "  expected  7 bytes\n"
        "  try       remove it; the same again downloads model.pt"
    )


def test_offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/model.pt"
    text = refusal(File(name="model.pt", url=url, page=PAGE))
    assert text.startswith(
        f"model.pt could not be downloaded.\n  where     {url}\n  got       URLError: [Errno"
    )
    assert left(cache) == []
    assert text.endswith(
        "  expected  the file\n"
        f"  try       check the connection; or get model.pt from {PAGE} and put it into {cache}"
    )


def test_not_found(server: Server) -> None:
    server.code = 404
    text = refusal(File(name="model.pt", url=server.url))
    assert "  got       HTTP 404 Not Found\n" in text


def test_web_page_in_place_of_a_file(server: Server, cache: Path) -> None:
    server.kind = "text/html; charset=utf-8"
    assert "  got       a web page instead of a file\n" in refusal(
        File(name="model.pt", url=server.url)
    )
    assert not (cache / "model.pt").exists()


def test_by_hand(cache: Path) -> None:
    file = File(name="model.pt", page=PAGE)
    assert refusal(file) == (
        "model.pt has to be downloaded by hand.\n"
        f"  where     {PAGE}\n"
        f"  got       no model.pt in {cache}\n"
        f"  try       get model.pt from {PAGE} and put it into {cache}"
    )
    cache.mkdir()
    (cache / "model.pt").write_bytes(CONTENT)
    assert fetch(file) == cache / "model.pt"


def test_file_url(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "there.pt"
    source.write_bytes(CONTENT)
    half(cache, 3000)
    assert fetch(File(name="model.pt", url=source.as_uri())).read_bytes() == CONTENT
    text = refusal(File(name="other.pt", url=(tmp_path / "absent.pt").as_uri()))
    assert "other.pt could not be downloaded." in text


def test_archive_is_unpacked(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "model.pt.zip"
    with zipfile.ZipFile(source, "w") as box:
        box.writestr("weights/model.pt", CONTENT)
    file = File(name="model.pt", url=source.as_uri(), size=source.stat().st_size)
    assert fetch(file).read_bytes() == CONTENT
    assert left(cache) == ["model.pt"]
    assert fetch(file) == cache / "model.pt"  # whose size is not that of the archive
    text = refusal(File(name="other.pt", url=source.as_uri()))
    assert text.startswith("what was downloaded is not the file.\n")
    assert text.endswith("  expected  a zip archive with other.pt")
    assert left(cache) == ["model.pt"]


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub

    source = tmp_path / "model.pt"
    source.write_bytes(CONTENT)

    def fake(repository: str, name: str) -> str:
        assert (repository, name) == ("someone/sam", "model.pt")
        return str(source)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    assert fetch(File(name="model.pt", hub="someone/sam")) == source
    assert "another size" in refusal(File(name="model.pt", hub="someone/sam", size=3))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: 1 / 0)
    assert refusal(File(name="model.pt", hub="someone/sam")) == (
        "model.pt could not be downloaded.\n"
        "  where     https://huggingface.co/someone/sam\n"
        "  got       ZeroDivisionError: division by zero\n"
        "  expected  the file\n"
        "  try       check the connection; or get model.pt from https://huggingface.co/someone/sam "
        f"and put it into {cache / 'someone--sam'}"
    )
    (cache / "someone--sam").mkdir(parents=True)
    (cache / "someone--sam" / "model.pt").write_bytes(CONTENT)
    assert fetch(File(name="model.pt", hub="someone/sam")).parent == cache / "someone--sam"


def test_cache_that_cannot_be_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("SAMCOMPRESS_CACHE", str(tmp_path / "taken" / "cache"))
    text = refusal(File(name="model.pt", url=server.url))
    assert text.startswith("could not write the download.\n")
    assert text.endswith(
        "  try       set the environment variable SAMCOMPRESS_CACHE to another folder"
    )


def test_two_at_once_download_once(server: Server) -> None:
    file = File(name="model.pt", url=server.url)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(file, progress=False), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert server.asked == [None]


def test_a_file_of_the_same_name_has_a_folder_of_its_own(cache: Path) -> None:
    cache.mkdir()
    (cache / "model.pt").write_bytes(CONTENT)
    other = File(name="model.pt", folder="second", page="https://example.org/second")
    with pytest.raises(CheckpointError, match="has to be downloaded by hand") as caught:
        fetch(other)
    assert f"put it into {cache / 'second'}" in str(caught.value)
    (cache / "second").mkdir()
    (cache / "second" / "model.pt").write_bytes(CONTENT)
    assert fetch(other) == cache / "second" / "model.pt"
