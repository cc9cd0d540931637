"""Keeps the catalog behind the chains: in a thread of its own, one step after the other, in nobody's way."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from farshore.errors import Failed, FarshoreError
from farshore.telemetry import get_logger
from process_server.catalog.queries import Catalog, PointRow
from process_server.vault.chain import Chain
from process_server.vault.commit import CommitHead

log = get_logger()


def open_catalog(path: Path) -> Catalog | None:
    """Open the catalog, made anew when what is there cannot be used; None when not even that can be done."""
    for _ in range(2):
        try:
            return Catalog(path)
        except Failed as error:
            log.warning("catalog_not_usable", error=str(error))
            with suppress(OSError):
                path.unlink()
    return None


class CatalogKeeper:
    """What of the chains is in ``catalog``; whoever asks for more reads the vault.

    Nothing waits for it but `points`: not a commit, not an acknowledgement, not the start of the server.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catalog")

    def follow(self, chain: Chain, machine: bytes) -> None:
        """Catch up with a chain, some time soon."""
        self._thread.submit(self._follow, chain, machine)

    def note(self, head: CommitHead, digest: bytes, chain: Chain) -> None:
        """Take a new commit of ``chain``, some time soon; ``digest`` is the commit's."""
        self._thread.submit(self._note, head, digest, chain)

    def points(self, machine: bytes, seq: int) -> list[PointRow] | None:
        """Return all points when the catalog is at commit ``seq``, else None. Blocking; raises nothing."""

        def read() -> list[PointRow] | None:
            position = self._catalog.position(machine)
            return self._catalog.points(machine) if position is not None and position[0] == seq else None

        try:
            return self._thread.submit(read).result()
        except FarshoreError as error:
            log.warning("catalog_not_usable", error=str(error))
            return None

    def close(self) -> None:
        """Leave what was not begun, wait for the step under way, close the file."""
        self._thread.shutdown(cancel_futures=True)
        self._catalog.close()

    def _note(self, head: CommitHead, digest: bytes, chain: Chain) -> None:
        try:
            if self._catalog.add(head, digest):
                return
        except FarshoreError as error:
            log.warning("catalog_behind", machine=head.machine_name, error=str(error))
            return
        self._follow(chain, head.machine)

    def _follow(self, chain: Chain, machine: bytes) -> None:
        try:
            self._catalog.follow(chain, machine)
        except FarshoreError as error:
            log.warning("catalog_behind", machine=machine.hex(), error=str(error))
