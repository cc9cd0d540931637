"""Machinery of the fault tests: disks that lose power, processes that are killed, ledgers outside them."""
