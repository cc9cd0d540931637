"""Stamped blocks: a workload whose every block tells which write it came from.

The oracle of the demo, the benchmarks and the fault tests. A run of writes is numbered 1, 2, 3 …; where each
goes and what it holds follows from a seed and its number, so all that has to be remembered outside the
processes under test is how many were sent and how many acknowledged. A disk that holds exactly the writes 1
to n and nothing of any later one is an exact prefix; anything else is a violation.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

BLOCK_BYTES: Final = 4096
_HEAD: Final = struct.Struct("<8sQQQ")
_MAGIC: Final = b"FARSTAMP"
_CHECK_BYTES: Final = 32
_NOISE_BYTES: Final = 2016
"""About half of a block does not compress: near what file systems of programs and databases do."""
_PLAIN: Final = bytes(BLOCK_BYTES - _HEAD.size - _NOISE_BYTES - _CHECK_BYTES)

_GAMMA: Final = 0x9E3779B97F4A7C15
_MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK: Final = (1 << 64) - 1

Seqs = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Workload:
    """Where the numbered writes of one volume go.

    Attributes:
        seed: Tells runs and volumes apart; in every stamp.
        first_block: First block of the area that is written, in blocks of 4 KiB.
        block_count: Blocks in the area.
    """

    seed: int
    first_block: int
    block_count: int

    def blocks(self, first_seq: int, count: int) -> Seqs:
        """Block numbers (on the volume) of writes ``first_seq`` … ``first_seq + count - 1``."""
        seqs = np.arange(first_seq, first_seq + count, dtype=np.uint64)
        return self.first_block + _mix(seqs ^ np.uint64(self.seed)) % np.uint64(self.block_count)

    def offset(self, seq: int) -> int:
        """Byte offset of one write."""
        # The arithmetic of _mix on plain integers: ten times faster than an array of one.
        value = ((seq ^ self.seed) + _GAMMA) & _MASK
        value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
        value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
        return (self.first_block + (value ^ (value >> 31)) % self.block_count) * BLOCK_BYTES

    def block(self, seq: int) -> bytes:
        """The 4,096 bytes of one write."""
        head = _HEAD.pack(_MAGIC, self.seed, seq, self.offset(seq) // BLOCK_BYTES)
        body = head + blake3(head).digest(_NOISE_BYTES) + _PLAIN
        return body + blake3(body).digest()

    def expected(self, seq: int) -> Seqs:
        """For every block of the area, the newest of the writes 1 to ``seq`` that went there; 0 for none."""
        newest = np.zeros(self.block_count, np.uint64)
        step = 1 << 20
        for first in range(1, seq + 1, step):
            count = min(step, seq + 1 - first)
            area_blocks = (self.blocks(first, count) - np.uint64(self.first_block)).astype(np.intp)
            # Later numbers are assigned later: numpy keeps the last of repeated indexes.
            newest[area_blocks] = np.arange(first, first + count, dtype=np.uint64)
        return newest


def _mix(values: Seqs) -> Seqs:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): consecutive numbers in, uniform numbers out."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(_GAMMA)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
        values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
        return values ^ (values >> np.uint64(31))


def read_stamp(workload: Workload, block: int, content: bytes | memoryview) -> int | None:
    """Number of the write that ``content`` came from.

    Returns:
        The number; 0 when the block bears no stamp of this run; None when a stamp is there but the block is
        not what that write put there (torn, misplaced, or mixed from two writes).
    """
    magic, seed, seq, stamped_block = _HEAD.unpack_from(content)
    if magic != _MAGIC or seed != workload.seed:
        return 0
    body = content[: BLOCK_BYTES - _CHECK_BYTES]
    if stamped_block != block or blake3(body).digest() != bytes(content[BLOCK_BYTES - _CHECK_BYTES :]):
        return None
    return int(seq)


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """What a disk holds of a workload.

    Attributes:
        seq: Highest write found.
        damaged: Blocks that hold no whole write (volume block numbers, at most 20).
        wrong: (block, write found, write that an exact prefix up to ``seq`` has there), at most 20.
    """

    seq: int
    damaged: tuple[int, ...]
    wrong: tuple[tuple[int, int, int], ...]

    @property
    def exact(self) -> bool:
        """The disk holds the writes 1 to ``seq`` and nothing else."""
        return not self.damaged and not self.wrong


def check_prefix(
    workload: Workload,
    read: Callable[[int, int], bytes | memoryview],
    before: Callable[[int], bool] | None = None,
) -> PrefixReport:
    """Hold a disk against a workload.

    Args:
        workload: The run whose stamps are looked for.
        read: ``read(offset, length)`` returns that many bytes of the disk.
        before: Asked for a block that should bear no stamp and bears none; False reports it as damaged (its
            bytes are not what they were before the run). None: not checked.
    """
    found = np.zeros(workload.block_count, np.uint64)
    damaged: list[int] = []
    step = 1 << 10
    for area_block in range(0, workload.block_count, step):
        count = min(step, workload.block_count - area_block)
        first = workload.first_block + area_block
        content = memoryview(read(first * BLOCK_BYTES, count * BLOCK_BYTES))
        for at in range(count):
            stamp = read_stamp(workload, first + at, content[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES])
            if stamp is None:
                damaged.append(first + at)
            else:
                found[area_block + at] = stamp
    seq = int(found.max(initial=0))
    expected = workload.expected(seq)
    wrong = [
        (workload.first_block + int(at), int(found[at]), int(expected[at]))
        for at in np.nonzero(found != expected)[0][:20]
        if workload.first_block + int(at) not in damaged
    ]
    if before is not None:
        blank = np.nonzero((found == 0) & (expected == 0))[0] + workload.first_block
        damaged += [int(block) for block in blank if int(block) not in damaged and not before(int(block))]
    return PrefixReport(seq, tuple(damaged[:20]), tuple(wrong))
