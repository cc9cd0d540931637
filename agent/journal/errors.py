"""What can go wrong with a journal, one class per reaction of the tap or the replicating process."""

from farshore.errors import CapacityError, Failed, IntegrityError


class JournalFull(CapacityError):
    """The quota or the file system is full. Nothing was written and the writer can go on: leave data mode."""


class JournalFailed(Failed):
    """The journal's files can no longer be trusted to keep what they are given: leave data mode.

    Never retried. An fsync that failed may have dropped the pages it could not write and marked them clean,
    so the next one would return 0 over a hole.
    """


class JournalGap(IntegrityError):
    """Records that are needed are no longer in the journal; only a resync closes the gap."""
