"""Copies an image to a host that lacks it: layers in pieces, checked against their digests.

The control plane's own store says what an image is. A host that has other layers under the same
name gets these; images the control plane does not know are the host's own business.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rorqual.errors import SandboxFailedError, SandboxRequestError
from rorqual.sandbox.control.hosts import Line
from rorqual.sandbox.images import ImageStore

PIECE_BYTES = 4 << 20


class Manifest(NamedTuple):
    """What an image consists of; see `Image`."""

    name: str
    layers: tuple[str, ...]
    base: str | None


def manifest_of(store: ImageStore, name: str) -> Manifest | None:
    """An image of `store`, or None if it has none called so."""
    for image in store.all():
        if image.name == name:
            return Manifest(image.name, image.layers, image.base)
    return None


async def send_image(
    store: ImageStore, manifest: Manifest, line: Line, *, piece_bytes: int = PIECE_BYTES
) -> int:
    """Give a host what it lacks of an image of `store`; returns the bytes that were sent."""
    missing: list[str] = await line.call("layers", "lacks", manifest)
    sent = 0
    for digest in missing:
        key = secrets.token_hex(8)
        with store.layer_file(digest).open("rb") as file:
            while piece := await asyncio.to_thread(file.read, piece_bytes):
                await line.call("layers", "take", key, digest, piece)
                sent += len(piece)
        await line.call("layers", "finish", key, digest)
    await line.call("layers", "save", manifest)
    return sent


class LayerTaker:
    """A host's end: writes what comes beside the store, and into it once it is whole."""

    def __init__(self, root: Path) -> None:
        self._store = ImageStore(root)
        self._files: dict[str, BinaryIO] = {}

    def lacks(self, manifest: Manifest) -> list[str]:
        """Digests of an image's layers that are not here."""
        return [d for d in manifest.layers if not self._store.layer_file(d).exists()]

    def take(self, key: str, digest: str, piece: bytes) -> None:
        """The next bytes of a layer; `key` names this copying of it."""
        if key not in self._files:
            path = self._partial(key, digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[key] = path.open("xb")
        self._files[key].write(piece)

    def finish(self, key: str, digest: str) -> None:
        """It is whole; raises `SandboxFailedError` if it is not what its digest says."""
        path = self._partial(key, digest)
        self._files.pop(key).close()
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != digest:
            path.unlink()
            raise SandboxFailedError(f"layer {digest[:12]} arrived damaged, as {found[:12]}")
        path.chmod(0o444)
        path.replace(self._store.layer_file(digest))

    def save(self, manifest: Manifest) -> None:
        """Name the image, unless it is so named already."""
        if manifest_of(self._store, manifest.name) != manifest:
            self._store.save(*manifest)

    def _partial(self, key: str, digest: str) -> Path:
        if not (key.isalnum() and digest.isalnum()):
            raise SandboxRequestError(f"{digest!r} is no digest")
        file = self._store.layer_file(digest)
        return file.with_name(f".{file.name}.{key}")
