"""Reads a vault of format 1 by docs/formats/vault.md alone: no code of ours, so the page lacks nothing."""

import base64
import struct
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


class Reader:
    """Opens ``path`` with a printed recovery key."""

    def __init__(self, path: Path, recovery_key: str) -> None:
        self.path = path
        raw = base64.b32decode(recovery_key.removeprefix("FSRK-").replace("-", ""))
        secret = raw[:32]
        assert raw[32:] == blake3(b"farshore recovery key 1" + secret).digest()[:3]
        body = (path / "root").read_bytes()
        root = msgspec.msgpack.decode(body[:-32])
        self.vault, generation = root["vault"], root["key_generation"]
        keys = (path / f"keys/{self.vault.hex()}/{generation:020}").read_bytes()
        assert blake3(keys[:-32]).digest() == keys[-32:]
        master = self._unwrap(msgspec.msgpack.decode(keys[:-32]), secret)
        self.id_key, root_key, self.seal_key = (
            hkdf(master, self.vault, b"farshore " + label + b" 1", 32) for label in (b"id", b"root", b"seal")
        )
        self.key_check = hkdf(master, self.vault, b"farshore check 1", 32)[:4]
        assert blake3(body[:-32], key=root_key).digest() == body[-32:]
        name = f"control/{root['control']:020}"
        assert blake3((path / name).read_bytes()).digest() == root["control_digest"]
        self.control = msgspec.msgpack.decode(self.open(name, 4)[0])

    def _unwrap(self, keys: Any, secret: bytes) -> bytes:
        for holder in keys["holders"]:
            info = b"farshore holder 1" + keys["vault"] + struct.pack("<I", keys["generation"])
            both = hkdf(secret, holder["salt"], info, 64)
            if both[32:] == holder["check"]:
                context = holder["kind"].encode() + b"\0" + holder["id"]
                return AESGCM(both[:32]).decrypt(bytes(12), holder["wrapped"], context)
        raise AssertionError("wrong key")

    def open(self, name: str, kind: int, body: bytes | None = None) -> tuple[bytes, list[bytes], list[bytes]]:
        """Return head, section ids and sections of a sealed object."""
        body = (self.path / name).read_bytes() if body is None else body
        header = body[:128]
        assert struct.unpack_from("<8sHH", header) == (b"FARSHSEA", 1, kind)
        assert header[120:124] == self.key_check
        info = b"farshore object 1" + self.vault + header[8:12] + header[124:128] + name.encode()
        both = hkdf(self.seal_key, header[16:48] + header[48:80], info, 64)
        assert both[32:] == header[80:112]
        aes = AESGCM(both[:32])
        context = header + self.vault + struct.pack("<H", len(name)) + name.encode()

        def section(index: int, at: int, stored: int, plain: int, id: bytes) -> bytes:
            aad = context + struct.pack("<III", index, stored, plain) + id
            return aes.decrypt(index.to_bytes(12, "little"), body[at : at + stored], aad)

        count, stored = struct.unpack_from("<II", header, 112)
        first = section(0, 128, stored, stored - 16, bytes(32))
        rows, head_bytes = struct.unpack_from("<II", first)
        assert rows == count - 1
        at, ids, sections = 128 + stored, [], []
        for index in range(1, count):
            id, stored, plain, flag, _ = struct.unpack_from("<32sIIII", first, 8 + 48 * (index - 1))
            data = section(index, at, stored, plain, id)
            data = zstandard.ZstdDecompressor().decompress(data) if flag else data
            assert len(data) == plain
            ids.append(id)
            sections.append(data)
            at += stored
        assert at == len(body)
        return first[8 + 48 * rows : 8 + 48 * rows + head_bytes], ids, sections

    def volume_at(self, machine: bytes, volume: bytes, seq: int) -> bytes:
        """Return a volume as it was at commit ``seq``, following the chain from its beginning."""
        image, previous = bytearray(), bytes(32)
        for number in range(1, seq + 1):
            name = f"c/{machine.hex()}/{number:020}"
            raw, _, sections = self.open(name, 2)
            head = msgspec.msgpack.decode(raw)
            assert (head["seq"], head["previous"]) == (number, previous)
            previous = blake3((self.path / name).read_bytes()).digest()
            at = 0
            for entry in head["volumes"]:
                if entry["id"] == volume:
                    image = image[: entry["size_bytes"]].ljust(entry["size_bytes"], b"\0")
                    rows = sections[0][48 * at : 48 * (at + entry["extents"])]
                    for row in struct.iter_unpack("<QQQQIIII", rows):
                        self._apply(image, head["packs"], sections, row)
                at += entry["extents"]
        return bytes(image)

    def _apply(self, image: bytearray, packs: Any, sections: list[bytes], row: tuple[int, ...]) -> None:
        offset, length, _, _, pack, chunk, start, _ = row
        if pack == 0xFFFFFFFF:
            image[offset : offset + length] = bytes(length)
            return
        entry = packs[pack]
        name = f"p/{entry['id'].hex()[:2]}/{entry['id'].hex()}"
        inline = entry["inline"]
        _, ids, chunks = self.open(name, 1, None if inline is None else sections[inline - 1])
        assert blake3(blake3(chunks[chunk]).digest(), key=self.id_key).digest() == ids[chunk]
        image[offset : offset + length] = chunks[chunk][start : start + length]
