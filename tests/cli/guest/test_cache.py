"""The cache: what is stored comes back, and a failing disk leaves nothing half written."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from softkvm.cli.errors import CacheError
from softkvm.cli.guest.cache import Cache, default_directory, write_atomically


def no_space(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def store(cache: Cache, data: bytes, version: str = "1") -> Path:
    return cache.store("kernel", data, "linux-image", version, "./boot/vmlinuz")


def test_stored_file_comes_back_with_its_record(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache")
    assert store(cache, b"data").read_bytes() == b"data"
    record = cache.record("kernel")
    assert record is not None
    assert (record.package, record.version, record.member) == ("linux-image", "1", "./boot/vmlinuz")


def test_unknown_name_has_no_record(tmp_path: Path) -> None:
    assert Cache(tmp_path).record("kernel") is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(CacheError, match="No space left on device"):
        store(Cache(tmp_path), b"data")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_the_record_is_written_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def fail_for_records(source: str, target: Path) -> None:
        if target.suffix == ".json":
            no_space()
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_for_records)
    cache = Cache(tmp_path)
    with pytest.raises(CacheError):
        store(cache, b"data")
    assert cache.record("kernel") is None
    assert list(tmp_path.glob(".*")) == []


def test_failed_replacement_does_not_vouch_for_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    store(cache, b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CacheError):
        store(cache, b"new", "2")
    assert cache.path("kernel").read_bytes() == b"old"
    assert cache.record("kernel") is None


def test_interrupted_write_removes_its_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("damage", "sentence"), [(b"{", "is damaged"), (b'{"package": 1}', "is damaged")])
def test_damaged_record_is_named(tmp_path: Path, damage: bytes, sentence: str) -> None:
    cache = Cache(tmp_path)
    store(cache, b"data")
    (tmp_path / "kernel.json").write_bytes(damage)
    with pytest.raises(CacheError, match=sentence):
        cache.record("kernel")


def test_record_without_its_file_is_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    store(cache, b"data").unlink()
    with pytest.raises(CacheError, match="but not the file"):
        cache.record("kernel")


def test_unwritable_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be written: Not a directory"):
        store(Cache(tmp_path / "file" / "cache"), b"data")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SOFTKVM_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/softkvm"),
        ({"HOME": "/c"}, "/c/.cache/softkvm"),
    ],
)
def test_directory_follows_the_environment(environ: dict[str, str], expected: str) -> None:
    assert default_directory(environ) == Path(expected)
