"""What a user does with a vault in a bucket: protect, lose everything but bucket and key, get it back."""

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farshore.site import Site, run, wait_for
from farshore.stamps import BLOCK_BYTES, Workload, check_prefix
from farshore.units import MIB
from tests.harness.faults import Injected
from tests.harness.object_stores import AZURE_KEY, BUCKET, Peer
from tests.harness.writing import writing

pytestmark = pytest.mark.timeout(400)

MACHINE = "db1"
DISK_BYTES = 48 * MIB
COPIED_BYTES = 24 * MIB
WORKLOAD = Workload(
    seed=50, first_block=COPIED_BYTES // BLOCK_BYTES, block_count=(DISK_BYTES - COPIED_BYTES) // BLOCK_BYTES
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def begin(site: Site, vault: str) -> str:
    """Make a server for a vault there and protect a disk; return its URI."""
    site.vault = vault
    site.init()
    site.start_server()
    site.enrol(MACHINE)
    site.start_agent(MACHINE)
    disk = site.directory / "disk.img"
    disk.write_bytes(os.urandom(COPIED_BYTES))
    os.truncate(disk, DISK_BYTES)
    return str(site.protect(MACHINE, "data", disk)["uri"])


def end(site: Site) -> tuple[str, bytes]:
    """Mark the end, then lose agent, server and disk; return the point and what the disk held."""
    point = site.json("point", "create", MACHINE, "--tag", "end", "--wait", "vaulted")["point"]
    disk = site.directory / "disk.img"
    expected = disk.read_bytes()
    site.kill_agent(MACHINE)
    site.kill_server()
    disk.unlink()
    for path in sorted(site.server_dir.rglob("*"), reverse=True):
        path.unlink() if not path.is_dir() else path.rmdir()
    return str(point), expected


def vaulted(site: Site) -> int:
    machine: dict[str, Any] = site.json("status")["machines"][0]
    return int(machine["volumes"][0]["vaulted_lsn"] or 0) if machine["volumes"] else 0


def metric(site: Site, name: str) -> float:
    assert site.server is not None
    with urllib.request.urlopen(f"http://{site.server.ready['metrics']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


@pytest.mark.fault("F1")
@pytest.mark.needs("weed")
def test_a_server_killed_under_load_goes_on_and_the_disk_comes_back_from_bucket_and_key(
    site: Site, seaweedfs: Peer, injected: Injected
) -> None:
    uri = begin(site, seaweedfs.url())
    with writing(uri, WORKLOAD, site.directory / "ledger", rate=500) as ledger:
        first = vaulted(site)
        wait_for(lambda: vaulted(site) > first + 500, 60, "replication under load")
        # The packs of the first copy were put by the workers.
        assert metric(site, 'farshore_blob_bytes_total{op="put"}') > COPIED_BYTES
        before = ledger.state().acked
        site.kill_server()
        injected("F1")
        wait_for(lambda: ledger.state().acked > before + 200, 60, "writes to go on without a server")
        site.start_server()
        first = vaulted(site)
        wait_for(lambda: vaulted(site) > first + 500, 60, "replication to go on")
        # With these the new main process came up.
        assert metric(site, 'farshore_blob_requests_total{code="ok",op="get"}') > 0
        assert metric(site, 'farshore_blob_request_seconds_count{op="put"}') > 0
        acked = ledger.state()
    assert acked.errors == 0
    point, expected = end(site)

    recovered = site.directory / "recovered.img"
    result = site.recover(MACHINE, point, recovered)
    assert result["volumes"][0]["bytes"] == DISK_BYTES
    content = recovered.read_bytes()
    assert content == expected
    report = check_prefix(WORKLOAD, lambda at, length: content[at : at + length])
    assert report.exact
    assert report.seq >= acked.acked


@pytest.mark.needs("azurite-blob")
def test_a_disk_comes_back_from_a_container_and_its_lost_server_is_replaced(
    site: Site, azurite: Peer
) -> None:
    uri = begin(site, azurite.url())
    with writing(uri, WORKLOAD, site.directory / "ledger", rate=500) as ledger:
        wait_for(lambda: ledger.state().acked > 500, 60, "writes")
    point, expected = end(site)
    recovered = site.directory / "recovered.img"
    site.recover(MACHINE, point, recovered)
    assert recovered.read_bytes() == expected
    again = site.directory / "again"
    adopted = site.json("server", "adopt", again, "--vault", site.vault, "--recovery-key-file", site.key)
    assert adopted["machines"] == [MACHINE]
    assert AZURE_KEY not in (again / "server.toml").read_text()


@pytest.mark.needs("rclone")
def test_no_vault_is_made_where_it_would_not_be_safe(site: Site, rclone_s3: Peer) -> None:
    url = rclone_s3.url()
    words = ("server", "init", site.server_dir, "--vault", url, "--recovery-key-file", site.key, "--json")
    run(*words, code=3, env=site.env)
    assert not site.key.exists()
    assert not site.server_dir.exists()


@pytest.mark.needs("azurite-blob")
def test_a_vault_is_not_made_twice_and_a_bucket_never(site: Site, azurite: Peer) -> None:
    site.vault = azurite.url()
    site.init()
    other = site.directory / "other"
    words = ("server", "init", other, "--recovery-key-file", site.directory / "other.key", "--vault")
    run(*words, site.vault, code=6, env=site.env)
    run(*words, site.vault.replace(BUCKET, "another-box"), code=3, env=site.env)
    run(*words, "s3://bucket?secret_access_key=hunter2", code=3, env=site.env)
    assert not other.exists()
