"""Official files, from where their authors put them to a folder of this machine."""

from __future__ import annotations

import hashlib
import math
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ._progress import Progress, ProgressLike
from ._require import require
from ._weights import first_line
from .errors import CheckpointError
from .files import whole

if TYPE_CHECKING:
    from ._official import File

CACHE = "SAMCOMPRESS_CACHE"
CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
# A connection that was cut is taken up again, as long as each try brings something.
TRIES = 5


def cache_folder() -> Path:
    """Where official files are kept: ``$SAMCOMPRESS_CACHE``, or a folder below the user's home."""
    return Path(os.environ.get(CACHE) or "~/.cache/samcompress/models").expanduser()


def fetch(file: File, *, progress: ProgressLike = True) -> Path:
    """The local copy of an official file; downloaded where there is none yet.

    A download that was interrupted is taken up where it ended. Nothing appears under the file's
    name before its size and hash were checked, where they are known.

    Args:
        file: what to get.
        progress: as for a pipeline; counts MiB.

    Raises:
        CheckpointError: if it can only be downloaded by hand, there is no connection, or what came
            is not the file.
    """
    # On the Hub, many files are called model.safetensors.
    place = cache_folder() / (file.hub or file.folder).replace("/", "--") / file.name
    if place.is_file():
        if not _archived(file):
            _check_size(file, place, fix=f"remove it; the same again downloads {file.name}")
        return place
    if file.hub is not None:
        return _from_hub(file, place)
    if file.url is None:
        raise CheckpointError(
            f"{file.name} has to be downloaded by hand.",
            where=file.page or None,
            got=f"no {file.name} in {place.parent}",
            fix=_by_hand(file, place),
        )
    target = place.with_name(f"{place.name}.zip") if _archived(file) else place
    part = target.with_name(f"{target.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part) as stream:
            if place.is_file():  # another process was faster
                return place
            _Download(file, place, stream, Progress(progress, "download")).run()
            _verify(file, part, place)
            part.replace(target)
        if target != place:
            _unpack(file, target, place)
    except OSError as err:
        raise CheckpointError(
            "could not write the download.",
            where=str(part),
            got=f"{type(err).__name__}: {err.strerror or err}",
            expected="a writable folder with enough room",
            fix=f"set the environment variable {CACHE} to another folder",
        ) from err
    return place


@dataclass
class _Download:
    """Appends to a file what is missing of it."""

    file: File
    place: Path
    stream: IO[bytes]
    progress: Progress

    def run(self) -> None:
        """Until all of it is there, or a try brings nothing more."""
        last: Exception = ConnectionError("the server does not go on")
        for _ in range(TRIES):
            before = self.stream.seek(0, os.SEEK_END)
            if before and before == self.file.size:
                return
            try:
                self.go_on(before)
            except urllib.error.HTTPError as err:
                err.close()  # it holds the connection
                if err.code != 416:  # else we asked to begin after the end
                    raise self.failed(f"HTTP {err.code} {err.reason}") from err
                if _total(err.headers.get("Content-Range")) == before:
                    return
                self.stream.truncate(0)
            except urllib.error.URLError as err:
                raise self.failed(f"{type(err).__name__}: {first_line(str(err.reason))}") from err
            except (HTTPException, ConnectionError, TimeoutError) as err:
                self.stream.flush()
                here = self.stream.seek(0, os.SEEK_END)
                if not here:
                    raise self.failed(f"{type(err).__name__}: {first_line(err)}") from err
                if here <= before:
                    raise self.cut(err) from err
                last = err
            else:
                return
        raise self.cut(last) from last

    def go_on(self, here: int) -> None:
        """One connection, from `here` on."""
        file, stream = self.file, self.stream
        request = urllib.request.Request(str(file.url), headers={"User-Agent": "samcompress"})
        if here:
            request.add_header("Range", f"bytes={here}-")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise self.failed("a web page instead of a file")
            if here and answer.status != 206:
                # Servers that know no ranges send all of it.
                here = stream.seek(0)
                stream.truncate()
            length = answer.headers.get("Content-Length")
            count = None if length is None else math.ceil(int(length) / CHUNK)
            chunks = iter(lambda: answer.read(CHUNK), b"")
            for chunk in self.progress.track(chunks, label=f"{file.name}, MiB", total=count):
                stream.write(chunk)
            stream.flush()
            # A connection that ends early ends silently.
            if length is not None and stream.seek(0, os.SEEK_END) < here + int(length):
                raise ConnectionError("the connection ended early")

    def failed(self, got: str) -> CheckpointError:
        """No byte came."""
        return CheckpointError(
            f"{self.file.name} could not be downloaded.",
            where=self.file.url,
            got=got,
            expected="the file",
            fix="check the connection; or " + _by_hand(self.file, self.place),
        )

    def cut(self, err: Exception) -> CheckpointError:
        """Some came."""
        size = self.file.size
        return CheckpointError(
            f"the download of {self.file.name} was cut off.",
            where=self.file.url,
            got=f"{self.stream.seek(0, os.SEEK_END):,} bytes; {first_line(err)}",
            expected=f"{size:,} bytes" if size else "the whole file",
            fix="the same again: it goes on from there; or " + _by_hand(self.file, self.place),
        )


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """The unfinished file, open for appending; other processes that want it wait."""
    while True:
        with part.open("ab") as stream:
            _lock(stream)
            # Whoever had it before may have renamed or removed it meanwhile.
            if part.exists() and os.path.samestat(part.stat(), os.fstat(stream.fileno())):
                try:
                    yield stream
                finally:
                    if part.exists() and not part.stat().st_size:
                        part.unlink()
                return


def _lock(stream: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows; there the size tells that two wrote at once
        return
    with suppress(OSError):  # nor on every network drive
        fcntl.flock(stream, fcntl.LOCK_EX)


def _from_hub(file: File, place: Path) -> Path:
    hub = require("huggingface_hub", purpose="models of the Hugging Face Hub")
    try:
        found = Path(hub.hf_hub_download(file.hub, file.name))
    except Exception as err:
        # The client, its cache and its HTTP library each raise kinds of their own.
        raise CheckpointError(
            f"{file.name} could not be downloaded.",
            where=f"https://huggingface.co/{file.hub}",
            got=f"{type(err).__name__}: {first_line(err)}",
            expected="the file",
            fix="check the connection; or " + _by_hand(file, place),
        ) from err
    _check_size(file, found, fix="remove it; the same again downloads it")
    return found


def _verify(file: File, part: Path, place: Path) -> None:
    """Check size and hash of what was downloaded; what is wrong is removed."""
    fix = "the same again; if that does not help, " + _by_hand(file, place)
    try:
        _check_size(file, part, fix=fix)
        _check_hash(file, part, fix=fix)
    except CheckpointError:
        part.unlink()
        raise


def _check_size(file: File, path: Path, *, fix: str) -> None:
    found = path.stat().st_size
    if file.size is not None and found != file.size:
        raise CheckpointError(
            f"{file.name} has another size than the official file.",
            where=str(path),
            got=f"{found:,} bytes",
            expected=f"{file.size:,} bytes",
            fix=fix,
        )


def _check_hash(file: File, path: Path, *, fix: str) -> None:
    for kind, wanted in (("md5", file.md5), ("sha256", file.sha256)):
        if wanted is None:
            continue
        found = _digest(path, kind)
        if not found.startswith(wanted.lower()):
            raise CheckpointError(
                f"{file.name} is not the official file.",
                where=str(path),
                got=f"{kind} {found}",
                expected=f"{kind} {wanted}",
                fix=fix,
            )


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _archived(file: File) -> bool:
    return file.url is not None and file.url.endswith(".zip") and not file.name.endswith(".zip")


def _unpack(file: File, archive: Path, place: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as box, whole(place) as temporary:
            member = next(n for n in box.namelist() if Path(n).name == file.name)
            with box.open(member) as source, temporary.open("wb") as target:
                while chunk := source.read(CHUNK):
                    target.write(chunk)
    except (zipfile.BadZipFile, StopIteration) as err:
        raise CheckpointError(
            "what was downloaded is not the file.",
            where=file.url,
            got=f"{type(err).__name__}: {first_line(err)}",
            expected=f"a zip archive with {file.name}",
        ) from err
    finally:
        archive.unlink()


def _by_hand(file: File, place: Path) -> str:
    source = file.page or file.url or f"https://huggingface.co/{file.hub}"
    return f"get {file.name} from {source} and put it into {place.parent}"


def _total(content_range: str | None) -> int | None:
    """The 9 of ``bytes */9``."""
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None
