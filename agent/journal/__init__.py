"""The journal of one protected volume: its segments, marks, dirty map and what can be proved from them.

A directory per volume, byte by byte in ``docs/formats/hrl.md``. The tap writes it, one process per machine;
the replicating process reads it. Nothing else passes between the two.
"""
