"""Network block device protocol: codec without I/O, server and client.

The protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle handshake,
simple and structured replies, base:allocation).
"""
