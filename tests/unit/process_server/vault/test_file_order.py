"""The file store says that an object is there when its bytes and its name are durable, and not before."""

import os
from pathlib import Path

import pytest

from process_server.vault.store.file import FileStore
from process_server.vault.store.protocol import AlreadyExists


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced or named, in order, by path below the vault."""
    found: list[str] = []
    vault = tmp_path / "vault"
    fsync, fdatasync, link, rename = os.fsync, os.fdatasync, os.link, os.rename

    def name_of(path: str) -> str:
        name = os.path.relpath(path, vault)
        return "body" if name.startswith(".tmp/") else name

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        found.append(f"sync {name_of(os.readlink(f'/proc/self/fd/{fd}'))}")

    def noted_fdatasync(fd: int) -> None:
        fdatasync(fd)
        found.append(f"sync {name_of(os.readlink(f'/proc/self/fd/{fd}'))}")

    def noted_link(source: str, target: str, *, follow_symlinks: bool) -> None:
        link(source, target, follow_symlinks=follow_symlinks)
        found.append(f"name {name_of(target)}")

    def noted_rename(source: str, target: str) -> None:
        rename(source, target)
        found.append(f"name {name_of(target)}")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "fdatasync", noted_fdatasync)
    monkeypatch.setattr(os, "link", noted_link)
    monkeypatch.setattr(os, "rename", noted_rename)
    return found


def test_bytes_then_name_then_folder(tmp_path: Path, steps: list[str]) -> None:
    store = FileStore(tmp_path / "vault", create=True)
    steps.clear()
    store.put_new("p/ab/1", b"1")
    # The folders are new: each is durable in the one above before anything lies in it.
    assert steps.index("sync body") < steps.index("name p/ab/1")
    assert {"sync .", "sync p"} <= set(steps[: steps.index("name p/ab/1")])
    assert steps[-2:] == ["name p/ab/1", "sync p/ab"]
    steps.clear()
    store.put_new("p/ab/2", b"2")
    assert steps == ["sync body", "name p/ab/2", "sync p/ab"]


def test_what_is_said_to_exist_is_durable_too(tmp_path: Path, steps: list[str]) -> None:
    store = FileStore(tmp_path / "vault", create=True)
    store.put_new("p/1", b"1")
    steps.clear()
    with pytest.raises(AlreadyExists):
        FileStore(tmp_path / "vault").put_new("p/1", b"1")
    assert steps[-1] == "sync p"
    assert "name p/1" not in steps


def test_a_swap_is_durable_in_the_same_order(tmp_path: Path, steps: list[str]) -> None:
    store = FileStore(tmp_path / "vault", create=True)
    etag = store.cas("root", b"1", None)
    steps.clear()
    store.cas("root", b"2", etag)
    assert steps == ["sync body", "name root", "sync ."]
