"""OCI images into layer directories: blobs are checked by digest, entries by where they lead.

A whiteout becomes what overlay file systems use for one. Devices are left out: a sandbox has its
own. Nothing is executed and nothing is written outside the given directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rorqual.errors import SandboxRequestError

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


def is_oci(source: Path) -> bool:
    """Whether `source` is an OCI layout or a tar file."""
    if source.is_dir():
        return (source / "oci-layout").exists()
    return source.is_file() and tarfile.is_tarfile(source)


def unpack_oci(source: Path, scratch: Path) -> Iterator[Path]:
    """Yield a directory per layer, lowest first; each is removed when the next is asked for.

    Raises:
        SandboxRequestError: the image is damaged, hostile or of another platform only.
    """
    layout = source
    if source.is_file():
        layout = scratch / "layout"
        with tarfile.open(source) as archive:
            archive.extractall(layout, filter="data")
    try:
        index: dict[str, Any] = json.loads((layout / "index.json").read_text())
        described = index["manifests"][0]
        manifest = json.loads(_blob(layout, described["digest"]).read_bytes())
        while "manifests" in manifest:  # an index per platform
            manifest = json.loads(_blob(layout, _native(manifest)["digest"]).read_bytes())
        layers = [layer["digest"] for layer in manifest["layers"]]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise SandboxRequestError(f"{source} is not an OCI image: {error!r}") from error
    for number, digest in enumerate(layers):
        directory = scratch / f"layer-{number}"
        directory.mkdir()
        _unpack_layer(_blob(layout, digest), directory)
        yield directory
        shutil.rmtree(directory)


def _native(index: dict[str, Any]) -> dict[str, Any]:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, "")
    for described in index["manifests"]:
        platform = described.get("platform", {})
        if platform.get("os") == "linux" and platform.get("architecture") == machine:
            found: dict[str, Any] = described
            return found
    raise SandboxRequestError(f"the image has no variant for linux/{machine}")


def _blob(layout: Path, digest: str) -> Path:
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or len(value) != 64 or not value.isalnum():
        raise SandboxRequestError(f"digest {digest!r} is not sha256")
    path = layout / "blobs" / algorithm / value
    with path.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != value:
            raise SandboxRequestError(f"blob {value[:12]} does not match its digest")
    return path


def _unpack_layer(blob: Path, directory: Path) -> None:
    try:
        with tarfile.open(blob) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name.startswith(_WHITEOUT):
                    _whiteout(directory, member)
                elif not (member.ischr() or member.isblk() or member.isfifo()):
                    archive.extract(member, directory, filter="tar", numeric_owner=True)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SandboxRequestError(f"layer {blob.name[:12]}: {error}") from error


def _whiteout(directory: Path, member: tarfile.TarInfo) -> None:
    # The filter checks where the entry's directory leads; the marker itself is never written.
    checked = tarfile.tar_filter(member, str(directory))
    path = directory / checked.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == _OPAQUE:
        os.setxattr(path.parent, "trusted.overlay.opaque", b"y")
    else:
        hidden = path.with_name(path.name.removeprefix(_WHITEOUT))
        os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0))
