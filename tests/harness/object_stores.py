"""Real object stores on free ports of this host: SeaweedFS, Azurite, and rclone's S3, which keeps no promise.

Started once for a run of tests, each in a session of its own, and ended by its id. Each test takes a prefix.
"""

import base64
import contextlib
import email.utils
import hashlib
import hmac
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

READY_S: Final = 120.0
TRIES: Final = 3
BUCKET: Final = "farshore-test"
S3_KEYS: Final = {"AWS_ACCESS_KEY_ID": "farshore-test", "AWS_SECRET_ACCESS_KEY": "farshore-test-secret"}
# Published with the emulator, the same for everybody.
AZURE_ACCOUNT: Final = "devstoreaccount1"
AZURE_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURE_KEYS: Final = {"AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
ENVIRONMENT: Final = {**S3_KEYS, **AZURE_KEYS}

_prefixes: Final = itertools.count(1)


class Peer:
    """One running store.

    Attributes:
        port: Where it speaks HTTP.
    """

    scheme = "s3"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for left in reversed(range(TRIES)):
            self.process = self._start()
            try:
                self._wait_ready()
                return
            except AssertionError:  # somebody took one of the ports before it did
                self.close()
                if not left:
                    raise

    port = 0

    def _start(self) -> "subprocess.Popen[bytes]":
        raise NotImplementedError

    def _is_ready(self) -> bool:
        raise NotImplementedError

    @property
    def options(self) -> str:
        """What stands behind the ``?`` of an address."""
        raise NotImplementedError

    def url(self, port: int | None = None) -> str:
        """Return the address of a new, empty vault; through a proxy if its port is given."""
        return self.again(f"vault-{next(_prefixes)}", port)

    def again(self, prefix: str, port: int | None = None) -> str:
        """Return the address of a vault, perhaps by another way to the same store."""
        options = self.options if port is None else self.options.replace(f":{self.port}", f":{port}")
        return f"{self.scheme}://{BUCKET}/{prefix}?{options}"

    def close(self) -> None:
        """End it at once: in order it takes half a minute."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _run(self, *command: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_ready(self) -> None:
        until = time.monotonic() + READY_S
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._is_ready():
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready: {(self.folder / 'log').read_text()[-2000:]}")


class SeaweedFS(Peer):
    """``weed server`` with its S3 gateway."""

    def _start(self) -> "subprocess.Popen[bytes]":
        identity = {
            "name": "farshore",
            "credentials": [
                {"accessKey": S3_KEYS["AWS_ACCESS_KEY_ID"], "secretKey": S3_KEYS["AWS_SECRET_ACCESS_KEY"]}
            ],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder / "data").mkdir(exist_ok=True)
        ports = _free_ports(8)
        self.port, self._grpc = ports[6], ports[1::2]
        named = ("master", "volume", "filer", "s3")
        options = [
            option
            for name, port, grpc in zip(named, ports[::2], ports[1::2], strict=True)
            for option in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc}")
        ]
        return self._run(
            *("weed", "server", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options),
            *("-filer", f"-filer.localSocket={self.folder}/filer.sock", "-s3", "-s3.config=s3.json"),
            *(f"-s3.localSocket={self.folder}/s3.sock", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-s3.iam=false", "-master.volumeSizeLimitMB=64", "-volume.max=100"),
        )

    def _is_ready(self) -> bool:
        # Ready when it takes an object, some seconds after it says so.
        from farshore.errors import FarshoreError
        from process_server.vault.store.address import parse_object_address
        from process_server.vault.store.object import ObjectStore

        with contextlib.suppress(FarshoreError):
            ObjectStore(parse_object_address(self.again("ready"))).put_new(f"at{time.monotonic_ns()}", b"")
            return True
        return False

    @property
    def options(self) -> str:
        return f"endpoint=http://127.0.0.1:{self.port}&region=us-east-1"

    def close(self) -> None:
        super().close()
        for name, port in zip(("master", "volume", "filer", "s3"), self._grpc, strict=True):
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)


class Azurite(Peer):
    """The emulator of Azure Blob Storage; its objects are in memory."""

    scheme = "az"

    def _start(self) -> "subprocess.Popen[bytes]":
        (self.port,) = _free_ports(1)
        return self._run(
            *("azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
            *("--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"),
        )

    def _is_ready(self) -> bool:
        return self._make_container() in (201, 409)

    def _make_container(self) -> int:
        date, version = email.utils.formatdate(usegmt=True), "2021-08-06"
        signed = (
            "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n"
            f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{BUCKET}\nrestype:container"
        )
        digest = hmac.new(base64.b64decode(AZURE_KEY), signed.encode(), hashlib.sha256).digest()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(
                "PUT",
                f"/{AZURE_ACCOUNT}/{BUCKET}?restype=container",
                headers={
                    "x-ms-date": date,
                    "x-ms-version": version,
                    "Authorization": f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}",
                    "Content-Length": "0",
                },
            )
            return connection.getresponse().status

    @property
    def options(self) -> str:
        return f"account={AZURE_ACCOUNT}&endpoint=http://127.0.0.1:{self.port}/{AZURE_ACCOUNT}"


class RcloneS3(Peer):
    """``rclone serve s3`` over a folder: it takes conditions and ignores them."""

    def _start(self) -> "subprocess.Popen[bytes]":
        (self.folder / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
        (self.port,) = _free_ports(1)
        keys = ",".join(S3_KEYS.values())
        return self._run(
            *("rclone", "--config", "/dev/null", "serve", "s3", "data"),
            *("--addr", f"127.0.0.1:{self.port}", "--auth-key", keys),
        )

    def _is_ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10):
            return True

    @property
    def options(self) -> str:
        return f"endpoint=http://127.0.0.1:{self.port}&region=us-east-1"


def _free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody has now, all different."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]


def _running(kind: Callable[[Path], Peer], factory: pytest.TempPathFactory, needs: str) -> Iterator[Peer]:
    if shutil.which(needs) is None:  # a test that says so in `needs` is unavailable before it comes here
        pytest.skip(f"needs {needs}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        peer = kind(factory.mktemp("store"))
        yield peer
        peer.close()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A store that speaks S3, and the keys to it in the environment."""
    yield from _running(SeaweedFS, tmp_path_factory, "weed")


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A store that speaks Azure Blob Storage, and the keys to it in the environment."""
    yield from _running(Azurite, tmp_path_factory, "azurite-blob")


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A store that ignores conditions, and the keys to it in the environment."""
    yield from _running(RcloneS3, tmp_path_factory, "rclone")
