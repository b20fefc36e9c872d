"""The guest cache: files that were fetched once, with a record of where each came from.

It lies in `$SOFTKVM_CACHE`, else `$XDG_CACHE_HOME/softkvm`, else `~/.cache/softkvm` (XDG Base Directory Specification 0.8). A file is
written beside its final name, flushed to the disk and renamed; its record, `NAME.json`, follows in the same way. A name without a record
does not exist, so an interrupted or failed write leaves either the old file or nothing. Who fetches a file holds the cache's lock
(flock(2)), so of several processes that want it one fetches it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from softkvm.cli.errors import CacheError


class Record(msgspec.Struct, frozen=True):
    """Where a cached file came from: Debian package and version, the path inside it, and the SHA-256 of the content."""

    package: str
    version: str
    member: str
    sha256: str


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """The cache directory that the environment asks for."""
    if chosen := environ.get("SOFTKVM_CACHE"):
        return Path(chosen)
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(environ.get("HOME", "~")).expanduser() / ".cache") / "softkvm"


class Cache:
    """Named files in `directory`, which is created at the first write."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Where the file of `name` lies, or would lie."""
        return self.directory / name

    def record(self, name: str) -> Record | None:
        """The record of `name`; None if it is not cached. Raises CacheError for a record that is damaged or has lost its file."""
        record_path = self._record_path(name)
        try:
            record = msgspec.json.decode(record_path.read_bytes(), type=Record)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"the cache record {record_path} cannot be read: {error.strerror}") from error
        except msgspec.DecodeError:
            raise CacheError(f"the cache record {record_path} is damaged; delete it to fetch the file again") from None
        if not self.path(name).is_file():
            raise CacheError(f"the cache has a record of {self.path(name)} but not the file; delete {record_path} to fetch it again")
        return record

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the block; raises CacheError where the directory cannot be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CacheError(f"the cache {self.directory} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def store(self, name: str, data: bytes, package: str, version: str, member: str) -> Path:
        """Keep `data` as `name`, replacing an older version; raises CacheError where the disk refuses, with nothing half written."""
        record = Record(package, version, member, hashlib.sha256(data).hexdigest())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Without the record the name does not exist, so an old record must not vouch for a new file.
            self._record_path(name).unlink(missing_ok=True)
            write_atomically(self.path(name), data)
            write_atomically(self._record_path(name), msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        except OSError as error:
            raise CacheError(f"the cache {self.directory} cannot be written: {error.strerror}") from error
        return self.path(name)

    def _record_path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, all of it or nothing: also after a crash or on a full disk. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
