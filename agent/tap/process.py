"""What the kernel is told about a process that others' writes go through. Best effort, each logged."""

import ctypes
import gc
import os
import sys
import threading
from typing import Final

from farshore import heap
from farshore.telemetry import get_logger
from farshore.units import KIB, MIB

_PR_SET_IO_FLUSHER: Final = 57  # linux/prctl.h
_MCL_CURRENT: Final = 1  # asm-generic/mman.h
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_STACK_BYTES: Final = 512 * KIB
_SWITCH_S: Final = 0.0005

_libc: Final = ctypes.CDLL(None, use_errno=True)


def prepare() -> None:
    """Before the first thread: stacks, memory, and what reclaim may expect of us."""
    log = get_logger(component="process")
    threading.stack_size(_STACK_BYTES)
    # A thread that comes back from a system call of 20 µs must not wait 5 ms for the interpreter.
    sys.setswitchinterval(_SWITCH_S)
    heap.keep(512 * MIB)  # payloads come and go at gigabytes a second
    # Memory that is reclaimed by writing to a disk of ours must not wait for memory that we ask for.
    if _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        log.warning("io_flusher_not_set", error=os.strerror(ctypes.get_errno()))
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        log.warning("memory_not_locked", error=os.strerror(ctypes.get_errno()))


def settle() -> None:
    """After start: what exists now stays, so collecting it again and again is time lost."""
    gc.collect()
    gc.freeze()
