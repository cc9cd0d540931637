"""What is particular to the store in a directory, its address, and the start-up probe."""

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from farshore.errors import CapacityError, ConfigError, Conflict, Failed, NotFound, Unreachable
from process_server.vault.store import file as file_module
from process_server.vault.store import open_store
from process_server.vault.store.file import FileStore
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.probe import probe
from process_server.vault.store.protocol import AlreadyExists
from tests.fakes.clock import ManualClock
from tests.fakes.store import Fault, FaultyStore, ForgetfulStore
from tests.harness.faults import Injected


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vault"


def files_below(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*") if found.is_file()}


def test_an_address_opens_a_directory(path: Path) -> None:
    open_store(f"file://{path}", create=True).put_new("a/b", b"1")
    assert open_store(f"file://localhost{path}").get("a/b") == b"1"
    assert files_below(path) == {"a/b"}


def test_an_address_with_a_password_is_refused_without_saying_it() -> None:
    with pytest.raises(ConfigError) as refused:
        open_store("https://me:hunter2@host/x")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["", "vault", "/var/vault", "ftp://x/y", "file://host/x", "file:x", "file:///x?y", "file:///%00"]
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="write file:///"):
        open_store(url)


def test_a_missing_directory_or_a_file_is_no_vault(path: Path) -> None:
    with pytest.raises(NotFound, match="no such directory"):
        FileStore(path)
    path.write_bytes(b"")
    with pytest.raises(NotFound, match="not a directory"):
        FileStore(path)


def test_network_file_systems_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FileStore(path, create=True)
    magic = int(subprocess.run(["stat", "-fc", "0x%t", path], capture_output=True, check=True).stdout, 16)
    monkeypatch.setattr(file_module, "_NETWORK", {magic: "NFS"})
    with pytest.raises(ConfigError, match="it is on NFS, a network file system"):
        FileStore(path)


def test_a_directory_has_one_server(path: Path) -> None:
    first = FileStore(path, owner=True, create=True)
    with pytest.raises(Conflict, match="another server"):
        FileStore(path, owner=True)
    FileStore(path).put_new("x", b"a worker needs no lock")
    first.close()
    FileStore(path, owner=True).close()


def test_the_next_owner_clears_what_a_crash_left(path: Path) -> None:
    FileStore(path, create=True).put_new("x", b"1")
    (path / ".tmp" / "left").write_bytes(b"half")
    FileStore(path, owner=True).close()
    assert files_below(path) == {"x", ".owner"}


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    "place", ["vault.file.before_sync", "vault.file.before_link", "vault.file.after_link"]
)
def test_killed_at_any_step_an_object_is_whole_or_absent(path: Path, place: str, injected: Injected) -> None:
    body = b"0123456789" * 1000
    script = (
        "import sys, pathlib; from process_server.vault.store.file import FileStore;"
        "FileStore(pathlib.Path(sys.argv[1]), owner=True, create=True).put_new('a/b', b'0123456789' * 1000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        env=os.environ | {"FARSHORE_FAILPOINTS": f"{place}=kill", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    injected("F1")
    store = FileStore(path, owner=True)
    names = list(store.list(""))
    assert names == (["a/b"] if place == "vault.file.after_link" else [])
    if names:
        assert store.get("a/b") == body
        with pytest.raises(AlreadyExists):
            store.put_new("a/b", b"other")
    else:
        store.put_new("a/b", body)
    store.close()
    assert files_below(path) == {"a/b", ".owner"}


@pytest.mark.fault("F1")
@pytest.mark.parametrize("place", ["vault.file.before_rename", "vault.file.after_rename"])
def test_killed_in_a_swap_the_object_is_the_old_or_the_new_one(
    path: Path, place: str, injected: Injected
) -> None:
    store = FileStore(path, create=True)
    etag = store.cas("root", b"old", None)
    script = (
        "import sys, pathlib; from process_server.vault.store.file import FileStore;"
        "FileStore(pathlib.Path(sys.argv[1])).cas('root', b'new', sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path, etag],
        env=os.environ | {"FARSHORE_FAILPOINTS": f"{place}=kill", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    injected("F1")
    body, etag = store.get_with_etag("root")
    assert body == (b"new" if place.endswith("after_rename") else b"old")
    store.cas("root", b"next", etag)  # and the lock died with its holder


def test_a_full_disk_leaves_no_part_of_an_object(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(path, create=True)

    def pwritev(fd: int, views: list[memoryview], at: int) -> int:
        if at >= 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(fd, views[0][: 4096 - at], at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(CapacityError, match="No space left"):
        store.put_new("a/b", bytes(10_000))
    monkeypatch.undo()
    assert files_below(path) == set()
    store.put_new("a/b", bytes(10_000))


def test_a_short_direct_write_is_finished_the_other_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(path, create=True)
    body = os.urandom(2**20 + 8192)
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: whole(fd, bytes(view[:5000]), at))
    with mmap.mmap(-1, len(body)) as memory:
        memory[:] = body
        flags: list[int] = []
        monkeypatch.setattr(fcntl, "fcntl", _without_direct(flags))
        with memoryview(memory) as view:
            store.put_new("x", view)
    monkeypatch.undo()
    assert store.get("x") == body
    assert flags, "the direct way was not tried"


def _without_direct(seen: list[int]):  # type: ignore[no-untyped-def]  # stands in for an overloaded builtin
    real = fcntl.fcntl

    def call(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            seen.append(argument)
            argument &= ~os.O_DIRECT
        return real(fd, command, argument)

    return call


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_io_is_written_buffered(
    path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    store = FileStore(path, create=True)
    body = os.urandom(2**20 + 17)

    def refuse(fd: int, view: memoryview, at: int) -> int:
        raise OSError(refusal, "refused")

    monkeypatch.setattr(os, "pwrite", refuse)
    with mmap.mmap(-1, len(body)) as memory:
        memory[:] = body
        with memoryview(memory) as view:
            store.put_new("x", view)
    monkeypatch.undo()
    assert store.get("x") == body


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_after_a_failed_sync_the_store_writes_no_more(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = FileStore(path, create=True)
    store.put_new("before", b"1")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(Failed, match="fsync"):
        store.put_new("x", b"1")
    monkeypatch.undo()
    for write in (lambda: store.put_new("y", b"1"), lambda: store.cas("root", b"1", None)):
        with pytest.raises(Failed, match="fsync"):
            write()
    assert store.get("before") == b"1"
    assert "y" not in files_below(path)


def test_a_lock_that_is_never_given_back_is_not_waited_for_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(path, create=True)
    monkeypatch.setattr(file_module, "LOCK_WAIT_S", 0.05)
    with open(path / ".lock", "wb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(Unreachable, match="was held"):
            store.cas("root", b"1", None)
    store.cas("root", b"1", None)


def test_strays_are_not_objects(path: Path) -> None:
    store = FileStore(path, create=True)
    store.put_new("a/b", b"1")
    (path / "a" / "Thumbs.db").write_bytes(b"")
    (path / "a" / ".hidden").write_bytes(b"")
    (path / "a" / "link").symlink_to(path / "a" / "b")
    (path / "a" / "folder").mkdir()
    assert list(store.list("")) == ["a/b"]
    with pytest.raises(Failed):
        store.get("a/link")


def test_two_stores_see_each_other(path: Path) -> None:
    first, second = FileStore(path, create=True), FileStore(path)
    etag = first.cas("root", b"1", None)
    second.cas("root", b"2", etag)
    assert first.get("root") == b"2"


def test_readers_never_see_half_of_what_is_swapped(path: Path) -> None:
    store = FileStore(path, create=True)
    bodies = [bytes([number]) * 50_000 for number in range(50)]
    etag = store.cas("root", bodies[0], None)
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(store.get("root"))

    reader = threading.Thread(target=read)
    reader.start()
    for body in bodies[1:]:
        etag = store.cas("root", body, etag)
    stop.set()
    reader.join()
    assert seen <= set(bodies)


def test_the_probe_finds_a_store_that_ignores_conditions() -> None:
    with pytest.raises(ConfigError, match="a create never replaces"):
        probe(ForgetfulStore(MemoryStore()))


@pytest.mark.parametrize("seconds", [-86_450, -450, 450, 259_250])
def test_the_probe_finds_a_clock_that_is_wrong(seconds: float) -> None:
    store = MemoryStore()
    with pytest.raises(ConfigError, match=rf"clock differs from the store's: by {abs(seconds) // 100:.0f}"):
        probe(store, ManualClock(wall_ns=time.time_ns() + int(seconds * 1e9)))
    assert list(store.list("")) == []


@pytest.mark.parametrize("seconds", [-200, 0, 200])
def test_the_probe_takes_clocks_that_differ_a_little(seconds: float) -> None:
    probe(MemoryStore(), ManualClock(wall_ns=time.time_ns() + int(seconds * 1e9)))


class Refusing(MemoryStore):
    def get_range(self, name: str, at: int, length: int) -> bytes:
        raise Failed("cannot read the object", why="all of it came")


def test_the_probe_names_the_promise_that_a_store_refuses_to_keep() -> None:
    with pytest.raises(ConfigError, match=r"a part of an object can be read \(all of it came\)"):
        probe(Refusing())


def test_the_probe_passes_on_that_the_store_does_not_answer() -> None:
    with FaultyStore(MemoryStore(), Fault("put_new", "refused")) as store, pytest.raises(Unreachable):
        probe(store)
