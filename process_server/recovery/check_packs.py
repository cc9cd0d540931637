"""Packs, looked at one by one: is each what it says, and has it what rows need of it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from farshore.errors import IntegrityError, NotFound
from process_server.vault.commit import ZEROS, Rows
from process_server.vault.pack import PackReader, pack_name
from process_server.vault.store import Store

THREADS: Final = 8
"""Packs that are looked at together: with an object store the waiting is what takes the time."""
CHUNKS_AT_ONCE: Final = 64

Ends = npt.NDArray[np.uint64]
"""Of a pack: per chunk the highest byte that some row needs of it; 0 where none does."""


@dataclass(frozen=True, slots=True)
class PackState:
    """How a pack was found.

    Attributes:
        why: What is wrong with it; empty when nothing is.
        bad: Chunks that cannot be read; None: none of them can.
        plain_bytes: Of each chunk.
        read: Every byte was read.
    """

    why: str
    bad: frozenset[int] | None
    plain_bytes: npt.NDArray[np.uint32]
    bytes_total: int
    read: bool

    def beyond(self, ends: Ends) -> list[int]:
        """Chunks of which rows need bytes that they do not have."""
        has = np.zeros(max(len(ends), len(self.plain_bytes)), np.uint64)
        has[: len(self.plain_bytes)] = self.plain_bytes
        return [int(chunk) for chunk in np.flatnonzero(ends > has[: len(ends)])]


def look_at_pack(store: Store, reader: PackReader, pack: bytes, *, read: bool) -> PackState:
    """Authenticate a standing pack's index and look at its length; with ``read``, all of its chunks.

    Raises:
        Unreachable: The store did not answer.
    """
    nothing = np.zeros(0, np.uint32)
    try:
        index = reader.index(pack)
        size = store.size(pack_name(pack))
    except NotFound:
        return PackState("it is missing", None, nothing, 0, False)
    except IntegrityError as exc:
        return PackState(reason(exc), None, nothing, 0, False)
    plain = np.array(index.plain_bytes, np.uint32)
    if size != index.bytes_total:
        # What lies within the part that is left can still be read: only reading tells which.
        read, why = True, f"it has {size} bytes of {index.bytes_total}"
    else:
        why = ""
    bad: set[int] = set()
    if read:
        numbers = iter(range(len(index)))
        while some := list(islice(numbers, CHUNKS_AT_ONCE)):
            bad |= unreadable_chunks(reader, pack, some)
        if bad and not why:
            why = f"{len(bad)} of {len(index)} chunks cannot be read"
    return PackState(why, frozenset(bad), plain, index.bytes_total, read)


def unreadable_chunks(reader: PackReader, pack: bytes, numbers: list[int]) -> set[int]:
    """Which of these chunks cannot be read, by halves. Raises Unreachable."""
    try:
        reader.read_chunks(pack, numbers)
    except (IntegrityError, NotFound):
        if len(numbers) == 1:
            return set(numbers)
        half = len(numbers) // 2
        return unreadable_chunks(reader, pack, numbers[:half]) | unreadable_chunks(
            reader, pack, numbers[half:]
        )
    return set()


def needed_ends(rows: Rows) -> dict[int, Ends]:
    """Per number of a pack: what ``rows`` need of its chunks."""
    stored = rows[rows["pack"] != ZEROS]
    found = {}
    for number in np.unique(stored["pack"]).tolist():
        own = stored[stored["pack"] == number]
        ends = np.zeros(int(own["chunk"].max()) + 1, np.uint64)
        np.maximum.at(ends, own["chunk"], own["start"].astype(np.uint64) + own["length"])
        found[number] = ends
    return found


def highest(one: Ends | None, two: Ends) -> Ends:
    if one is None:
        return two
    if len(one) < len(two):
        one, two = two, one
    one = one.copy()
    one[: len(two)] = np.maximum(one[: len(two)], two)
    return one


def look_in_threads(
    items: Sequence[tuple[bytes, Ends]], look: Callable[[bytes], PackState]
) -> Iterator[tuple[tuple[bytes, Ends], PackState]]:
    """Yield each item with what ``look`` says of its pack, as they come."""
    left = iter(items)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="check") as pool:
        under_way: dict[Future[PackState], tuple[bytes, Ends]] = {}
        while True:
            for item in islice(left, 2 * THREADS - len(under_way)):
                under_way[pool.submit(look, item[0])] = item
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                yield under_way.pop(future), future.result()


def reason(exc: IntegrityError | NotFound) -> str:
    """What is wrong, in one clause, without the object's name."""
    return ": ".join(part for part in (exc.what, exc.why) if part)
