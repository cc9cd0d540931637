"""The tap: an NBD server in front of each protected disk that logs before it writes (DESIGN, section 4).

One process for all volumes of a machine, run as ``python -m agent.tap DIR``. One thread parses requests and
gives LSNs; everything that can wait for a disk runs in threads of its volume.
"""
