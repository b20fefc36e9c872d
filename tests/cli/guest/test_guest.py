"""The default guest out of the cache: no network, no apt."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from softkvm.cli import guest
from softkvm.cli.errors import GuestUnavailable
from softkvm.cli.guest import initramfs
from softkvm.cli.guest.cache import Record


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> guest.Cache:
    """A cache with a cloud kernel and busybox, on a machine without apt."""
    monkeypatch.setenv("PATH", "")
    cache = guest.Cache(tmp_path)
    cache.store("vmlinuz-cloud", b"kernel", "linux-image-6.1", "6.1-1", "./boot/vmlinuz-6.1")
    cache.store("busybox", b"busybox", "busybox-static", "1.35", "./bin/busybox")
    return cache


def test_cached_guest_needs_no_apt(cache: guest.Cache) -> None:
    image = guest.prepare("cloud", cache=cache)
    assert image.kernel.read_bytes() == b"kernel"
    assert image.initrd == initramfs.build(b"busybox")
    assert image.title == "linux-image-6.1 6.1-1, busybox-static 1.35"


def test_kernel_that_is_not_cached_needs_apt(cache: guest.Cache) -> None:
    with pytest.raises(GuestUnavailable, match="--selftest"):
        guest.prepare("generic", cache=cache)


def test_of_two_that_want_a_kernel_one_fetches_it(cache: guest.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one, without apt, has seen that it is not there, and waits."""
    missed, record = threading.Event(), cache.record

    def noted(name: str) -> Record | None:
        found = record(name)
        missed.set()
        return found

    monkeypatch.setattr(cache, "record", noted)
    with ThreadPoolExecutor(1) as pool:
        with cache.lock():
            other = pool.submit(guest.prepare, "generic", cache=cache)
            assert missed.wait(60)
            cache.store("vmlinuz-generic", b"generic", "linux-image-6.1", "6.1-1", "./boot/vmlinuz-6.1")
        assert other.result().kernel.read_bytes() == b"generic"


def test_command_is_a_second_archive(cache: guest.Cache) -> None:
    image = guest.prepare("cloud", command=("sh", "-c", "exit 7"), cache=cache)
    assert image.initrd == initramfs.build(b"busybox") + initramfs.command_archive(("sh", "-c", "exit 7"))


def test_own_files_need_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    image = guest.prepare(Path("bzImage"), Path("my.cpio"), cache=guest.Cache(tmp_path / "none"))
    assert (image.kernel, image.initrd, image.title) == (Path("bzImage"), Path("my.cpio"), "bzImage, my.cpio")
    assert not image.announces_shell
    assert not (tmp_path / "none").exists()


def test_command_words_survive_the_guests_shell() -> None:
    archive = initramfs.command_archive(("echo", "a b", "it's", "$HOME"))
    assert b"""echo 'a b' 'it'"'"'s' '$HOME'\n""" in archive
