"""Settings of volumes, and what is refused at protect time."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent import volumes
from agent.volumes import Host, VolumeConfig, check_protect, in_use
from farshore.errors import ConfigError, Conflict, FarshoreError, NotFound, UsageError
from farshore.units import MIB

SMALL = {"segment_bytes": MIB, "quota_bytes": 4 * MIB}


def image(tmp_path: Path, size: int = MIB, name: str = "disk.img") -> Path:
    path = tmp_path / name
    path.touch()
    os.truncate(path, size)
    return path


def config(disk: Path, name: str = "disk", **settings: Any) -> VolumeConfig:
    values: dict[str, Any] = {
        "id": volumes.new_volume_id(),
        "name": name,
        "disk": str(disk),
        **SMALL,
        **settings,
    }
    return VolumeConfig(**values)


def refused(
    tmp_path: Path, made: VolumeConfig, *others: VolumeConfig, host: Host | None = None
) -> FarshoreError:
    with pytest.raises(FarshoreError) as caught:
        check_protect(tmp_path / "agent", made, others, host=host)
    return caught.value


def test_settings_are_what_was_saved(tmp_path: Path) -> None:
    made = config(image(tmp_path), listen='/run/a "b".sock', on_journal_lost="wait", attach="loop")
    volumes.save_volume(tmp_path, made)
    assert volumes.load_volume(tmp_path, "disk") == made
    assert volumes.list_volumes(tmp_path) == ["disk"]
    assert volumes.nbd_uri(tmp_path, made) == 'nbd+unix:///disk?socket=/run/a "b".sock'
    volumes.remove_volume(tmp_path, "disk")
    assert volumes.list_volumes(tmp_path) == []
    with pytest.raises(NotFound):
        volumes.load_volume(tmp_path, "disk")
    with pytest.raises(NotFound):
        volumes.remove_volume(tmp_path, "disk")


def test_a_file_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    made = config(image(tmp_path))
    volumes.save_volume(tmp_path, made)
    path = volumes.config_path(tmp_path, "disk")
    path.write_text(path.read_text().replace("quota_bytes = 4194304", "quota_bytes = 1"))
    with pytest.raises(ConfigError, match="quota_bytes"):
        volumes.load_volume(tmp_path, "disk")
    path.write_text("surprise = 1\n")
    with pytest.raises(ConfigError, match="surprise"):
        volumes.load_volume(tmp_path, "disk")


@pytest.mark.parametrize("size", [512, 4096, MIB + 512, 1 << 40])
def test_disks_of_any_number_of_sectors_are_taken(tmp_path: Path, size: int) -> None:
    check_protect(tmp_path / "agent", config(image(tmp_path, size)), [])


@pytest.mark.parametrize(
    ("size", "why"), [(0, "no bytes"), (513, "multiple of 512"), (100, "multiple of 512")]
)
def test_disks_of_other_sizes_are_refused_by_the_rule(tmp_path: Path, size: int, why: str) -> None:
    error = refused(tmp_path, config(image(tmp_path, size)))
    assert why in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"name": "Big Disk"}, "name"),
        ({"id": "xyz"}, "id"),
        ({"listen": "relative.sock"}, "listen"),
        ({"segment_bytes": 5000}, "segment_bytes"),
        ({"quota_bytes": 3 * MIB}, "quota_bytes"),
        ({"journal_stall_max_s": 0.0}, "journal_stall_max_s"),
        ({"group_commit_ms": -1.0}, "group_commit_ms"),
        ({"segment_seconds": 0.0}, "segment_seconds"),
    ],
)
def test_settings_that_can_never_work(tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    error = refused(tmp_path, config(image(tmp_path), **settings))
    assert isinstance(error, UsageError)
    assert word in error.where


def test_missing_and_impossible_disks(tmp_path: Path) -> None:
    assert refused(tmp_path, config(tmp_path / "nope")).exit_code == 5
    assert refused(tmp_path, config(tmp_path)).exit_code == 2
    assert refused(tmp_path, config(Path("/dev/null"))).exit_code == 2
    assert refused(tmp_path, config(Path("relative"))).exit_code == 2


def test_a_disk_is_protected_once(tmp_path: Path) -> None:
    disk = image(tmp_path)
    first = config(disk)
    link = tmp_path / "link"
    link.symlink_to(disk)
    hard = tmp_path / "hard"
    hard.hardlink_to(disk)
    for same in (link, hard):
        error = refused(tmp_path, config(same, "other"), first)
        assert isinstance(error, Conflict)
        assert "volume disk" in error.why
    other = image(tmp_path, name="other.img")
    assert refused(tmp_path, config(other), first).exit_code == 6  # the name
    assert (
        refused(tmp_path, config(other, "b", listen=str(tmp_path / "agent/run/disk.sock")), first).exit_code
        == 6
    )


def test_socket_paths_that_do_not_fit_are_refused_with_their_length(tmp_path: Path) -> None:
    error = refused(tmp_path, config(image(tmp_path), listen=f"/{'x' * 120}"))
    assert (error.exit_code, "121 bytes" in error.why) == (3, True)


def test_a_journal_is_not_kept_in_memory_or_beyond_its_file_system(tmp_path: Path) -> None:
    disk = image(tmp_path)
    with pytest.raises(ConfigError, match="tmpfs"):
        check_protect(Path("/dev/shm/farshore-test"), config(disk), [])
    error = refused(tmp_path, config(disk, quota_bytes=1 << 50))
    assert (error.exit_code, "free are" in error.why) == (3, True)


def fake_host(tmp_path: Path, mounts: str, swaps: str = "") -> Host:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(mounts)
    (proc / "swaps").write_text("Filename Type Size Used Priority\n" + swaps)
    return Host(proc=proc)


ROOT = "22 1 254:0 / / rw - ext4 /dev/vda rw\n"


def test_swap_is_in_use(tmp_path: Path) -> None:
    disk = image(tmp_path)
    host = fake_host(tmp_path, ROOT, f"{disk} file 1 0 -2\n")
    assert "swap" in in_use(disk, host=host)
    assert in_use(image(tmp_path, name="other"), host=host) == ""


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.needs("loop", "losetup", "mkfs.ext4", "root")
def test_mounted_and_attached_disks_are_refused_saying_where(tmp_path: Path) -> None:
    disk = image(tmp_path, 16 * MIB)
    run("mkfs.ext4", "-q", disk)
    device = run("losetup", "--find", "--show", disk)
    point = tmp_path / "a place"
    point.mkdir()
    try:
        error = refused(tmp_path, config(disk))
        assert (error.exit_code, device in error.why) == (6, True)
        check_protect(tmp_path / "agent", config(Path(device)), [])
        run("mount", device, point)
        try:
            for path in (disk, Path(device)):
                error = refused(tmp_path, config(path))
                assert error.exit_code == 6
                assert f"mounted on {point}" in error.why
                with pytest.raises(ConfigError, match="lies on the protected disk"):
                    check_protect(point / "agent", config(path), [])
        finally:
            run("umount", point)
        assert refused(tmp_path, config(Path(device), "b"), config(disk)).exit_code == 6
    finally:
        run("losetup", "--detach", device)
    check_protect(tmp_path / "agent", config(disk), [])


def test_the_default_quota_leaves_room_and_is_never_too_small(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    quota = volumes.default_quota_bytes(tmp_path / "not" / "there", 64 * MIB)
    assert quota % (64 * MIB) == 0
    assert 4 * 64 * MIB <= quota <= max(volumes.QUOTA_BYTES, 4 * 64 * MIB)
    assert quota <= max(free // 10, 4 * 64 * MIB)


def test_what_only_reads_takes_any_disk_that_can_be_read(tmp_path: Path) -> None:
    disk = image(tmp_path)
    host = Host(tmp_path / "proc", tmp_path / "sys")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    mounted = f"1 0 7:9 / {tmp_path}/mnt rw - ext4 /dev/loop9 rw\n"
    (tmp_path / "proc" / "self" / "mountinfo").write_text(f"0 0 8:1 / / rw - ext4 /dev/sda1 rw\n{mounted}")
    loop = tmp_path / "sys" / "class" / "block" / "loop9"
    (loop / "loop").mkdir(parents=True)
    (loop / "loop" / "backing_file").write_text(f"{disk}\n")
    (loop / "dev").write_text("7:9\n")
    assert "mounted" in str(refused(tmp_path, config(disk), host=host))
    scanned = config(disk, capture="scan")
    check_protect(tmp_path / "agent", scanned, [], host=host)
    assert "already" in str(refused(tmp_path, config(disk, name="other"), scanned, host=host))
    assert isinstance(refused(tmp_path, config(tmp_path / "none", capture="scan")), NotFound)
    for size in (0, 513):
        assert isinstance(refused(tmp_path, config(image(tmp_path, size, "odd"), capture="scan")), UsageError)


@pytest.mark.parametrize(
    "settings",
    [
        {"capture": "scan", "listen": "/run/x.sock"},
        {"capture": "scan", "attach": "loop"},
        {"capture": "scan", "scan_every_s": 0.1},
        {"capture": "scan", "scan_every_s": float("nan")},
        {"capture": "scan", "scan_every_s": 1e9},
        {"quiesced": True},
        {"scan_every_s": 60.0},
    ],
)
def test_settings_of_another_engine_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        volumes.check_settings(config(image(tmp_path), **settings))


def test_a_tap_is_not_told_of_disks_that_are_scanned(tmp_path: Path) -> None:
    tapped = config(image(tmp_path), name="data")
    scanned = config(image(tmp_path), name="root", capture="scan", quiesced=True, scan_every_s=60.0)
    for made in (tapped, scanned):
        volumes.save_volume(tmp_path, made)
        assert volumes.load_volume(tmp_path, made.name) == made
    assert volumes.list_volumes(tmp_path) == ["data"]
    assert volumes.list_volumes(tmp_path, "scan") == ["root"]
    assert volumes.list_volumes(tmp_path, None) == ["data", "root"]
    # An agent from before scan reads what is written for a tap.
    assert "scan_every_s" not in volumes.config_path(tmp_path, "data").read_text()
    volumes.config_path(tmp_path, "root").write_text("damaged")
    assert volumes.list_volumes(tmp_path) == ["data", "root"]
