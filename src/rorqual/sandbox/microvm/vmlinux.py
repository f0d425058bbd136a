"""The uncompressed kernel inside a bzImage, which QEMU starts directly (PVH entry).

Reads gzip, xz and LZ4 (the legacy frame kernels use); decompresses in memory.
"""

from __future__ import annotations

import lzma
import struct
import zlib

from rorqual.errors import SandboxFailedError, SandboxRequestError

_LZ4_LEGACY = b"\x02\x21\x4c\x18"


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF file inside a bzImage.

    Raises:
        SandboxRequestError: it is no bzImage.
        SandboxFailedError: its compression is not known here, or it is damaged.
    """
    if len(image) < 0x260 or image[0x202:0x206] != b"HdrS":
        raise SandboxRequestError("not a Linux kernel image (bzImage)")
    setup_sectors = image[0x1F1] or 4
    offset, size = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + size]
    try:
        if payload[:4] == _LZ4_LEGACY:
            kernel = unpack_lz4_legacy(payload)
        elif payload[:2] == b"\x1f\x8b":
            kernel = zlib.decompressobj(wbits=31).decompress(payload)
        elif payload[:6] == b"\xfd7zXZ\0":
            kernel = lzma.LZMADecompressor().decompress(payload)
        else:
            raise SandboxFailedError(f"kernel compression {payload[:4].hex()} is not known here")
    except (zlib.error, lzma.LZMAError, IndexError, struct.error) as error:
        raise SandboxFailedError(f"the kernel image is damaged: {error}") from error
    if kernel[:4] != b"\x7fELF":
        raise SandboxFailedError("the kernel image does not hold an ELF file")
    return bytes(kernel)


def unpack_lz4_legacy(data: bytes) -> bytes:
    """Unpack LZ4's legacy frame: a magic number, then blocks of at most 8 MiB with their size."""
    out = bytearray()
    at = 4
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        if at + 4 + size > len(data):  # the kernel's build appends the unpacked size
            break
        out += _unpack_block(memoryview(data)[at + 4 : at + 4 + size])
        at += 4 + size
    return bytes(out)


def _unpack_block(block: memoryview) -> bytearray:
    out = bytearray()
    at, end = 0, len(block)
    while at < end:
        token = block[at]
        at += 1
        literals = token >> 4
        if literals == 15:
            while (more := block[at]) == 255:
                literals += 255
                at += 1
            literals += more
            at += 1
        out += block[at : at + literals]
        at += literals
        if at >= end:  # the last sequence has no match
            break
        distance = block[at] | block[at + 1] << 8
        at += 2
        length = token & 15
        if length == 15:
            while (more := block[at]) == 255:
                length += 255
                at += 1
            length += more
            at += 1
        length += 4
        start = len(out) - distance
        if distance == 0 or start < 0:
            raise IndexError("a match before the beginning")
        if distance >= length:
            out += out[start : start + length]
        else:  # the match overlaps what it makes
            pattern = out[start:]
            out += (pattern * (length // distance + 1))[:length]
    return out
