"""Images: named stacks of read-only layers, each a content-addressed EROFS file.

Containers mount a layer's file and virtual machines take the same file as a disk. A layer belongs
to every image whose manifest lists it and is removed when none does.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxFailedError, SandboxRequestError, SubstrateMissingError
from rorqual.sandbox.layout import Layout

HOST = "host"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(:[a-z0-9._-]{1,64})?")
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MNT_DETACH = 1, 2, 4, 2


@dataclass(frozen=True, kw_only=True)
class Image:
    """One manifest.

    Attributes:
        layers: digests, lowest first.
        base: a root below the layers that is not stored here: "host" or an absolute directory.
        created_s: seconds since 1970.
    """

    name: str
    layers: tuple[str, ...]
    base: str | None
    created_s: float
    num_bytes: int


class ImageStore:
    """The images below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._layers = root / "layers"
        self._manifests = root / "manifests"
        self._mounts = root / "mounts"
        self._memories = root / "memories"

    # -- reading
    def all(self) -> list[Image]:
        """Every image, by name."""
        if not self._manifests.exists():
            return []
        paths = sorted(self._manifests.glob("*.json"))
        return [self._load(path) for path in paths]

    def get(self, name: str) -> Image:
        """One image; raises `SandboxRequestError` if there is none."""
        path = self._manifest_path(name)
        if not path.exists():
            raise SandboxRequestError(
                f"there is no image {name!r}: rorqual sandbox image ls shows those that are here, "
                f"rorqual sandbox image build {name} DIRECTORY makes one"
            )
        return self._load(path)

    def _manifest_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise SandboxRequestError(f"{name!r} is not an image name: a-z 0-9 . _ - and one :tag")
        return self._manifests / f"{name.replace(':', '@')}.json"

    def _load(self, path: Path) -> Image:
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            return Image(
                name=data["name"],
                layers=tuple(data["layers"]),
                base=data["base"],
                created_s=data["created_s"],
                num_bytes=sum(self.layer_file(d).stat().st_size for d in data["layers"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SandboxFailedError(f"{path} is damaged: {error}") from error

    def layer_file(self, digest: str) -> Path:
        """The EROFS file of a layer, for a machine's disk."""
        return self._layers / f"{digest}.erofs"

    def memory(self, name: str) -> Path:
        """Directory of the processes' checkpoint that belongs to snapshot `name`."""
        return self._memories / name

    def resolve(self, image: str | Path | None, layout: Layout) -> tuple[list[Path], bool]:
        """Read-only directories of an image, topmost first, and whether its /usr is the host's."""
        if image is None or image == HOST:
            return [layout.host_layer()], True
        if isinstance(image, Path) or str(image).startswith("/"):
            directory = Path(image).resolve()
            if not directory.is_dir():
                raise SandboxRequestError(f"image {str(image)!r} is not a directory")
            if any(mark in str(directory) for mark in ":,\\"):
                raise SandboxRequestError(
                    f"an image's path may not hold ':' ',' '\\\\': {directory}"
                )
            return [directory], False
        found = self.get(image)
        below, host_usr = ([], False) if found.base is None else self.resolve(found.base, layout)
        return [*(self.mount(digest) for digest in reversed(found.layers)), *below], host_usr

    # -- mounting
    def mount(self, digest: str) -> Path:
        """Mount a layer read-only (once per machine) and return where."""
        point = self._mounts / digest
        if os.path.ismount(point):
            return point
        point.mkdir(parents=True, exist_ok=True)
        file = self.layer_file(digest)
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
        if libc.mount(bytes(file), bytes(point), b"erofs", flags, None) == 0:
            return point
        # Before Linux 6.12 a file needs a loop device.
        command = ["mount", "-t", "erofs", "-o", "loop,ro,nosuid,nodev", str(file), str(point)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SandboxFailedError(f"cannot mount layer {digest[:12]}: {done.stderr.strip()}")
        return point

    def unmount(self, digest: str) -> None:
        """Unmount a layer; sandboxes that use it keep their own view of it."""
        point = self._mounts / digest
        if os.path.ismount(point):
            ctypes.CDLL(None).umount2(bytes(point), _MNT_DETACH)
        if point.exists():
            point.rmdir()

    # -- writing
    def add_layer(self, directory: Path, *, seen_by: int | None = None) -> str:
        """Pack a directory into a layer; returns its digest, equal for equal content.

        Args:
            seen_by: process in whose mount namespace `directory` is looked up.
        """
        packer = shutil.which("mkfs.erofs")
        if packer is None:
            raise SubstrateMissingError(
                "mkfs.erofs is not installed: apt-get install --no-install-recommends erofs-utils"
            )
        self._layers.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._layers, prefix=".new-") as scratch:
            file = Path(scratch) / "layer"
            entry = ["nsenter", f"--target={seen_by}", "--mount", "--"] if seen_by else []
            command = [*entry, packer, "-x1", "-T0", "-U", _NO_UUID, str(file), str(directory)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SandboxFailedError(f"mkfs.erofs: {done.stderr.strip()[-500:]}")
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            file.chmod(0o444)
            file.replace(self.layer_file(digest))
        return digest

    def save(self, name: str, layers: tuple[str, ...], base: str | None) -> Image:
        """Write a manifest, replacing one of the same name."""
        path = self._manifest_path(name)
        self._manifests.mkdir(parents=True, exist_ok=True)
        data = {"name": name, "layers": layers, "base": base, "created_s": time.time()}
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        partial.write_text(json.dumps(data, indent=1))
        partial.replace(path)
        return self.get(name)

    def build(self, name: str, source: Path) -> Image:
        """An image from a directory or an OCI archive (a tar file or an unpacked layout)."""
        from rorqual.sandbox.oci import is_oci, unpack_oci

        self._manifest_path(name)
        if not source.exists():
            raise SandboxRequestError(f"{source} does not exist")
        if not is_oci(source):
            if not source.is_dir():
                raise SandboxRequestError(f"{source} is neither a directory nor an OCI archive")
            return self.save(name, (self.add_layer(source),), None)
        self._layers.mkdir(parents=True, exist_ok=True)
        layers = []
        with tempfile.TemporaryDirectory(dir=self._layers, prefix=".oci-") as scratch:
            for directory in unpack_oci(source, Path(scratch)):
                layers.append(self.add_layer(directory))
        return self.save(name, tuple(layers), None)

    def build_debian(
        self, name: str, *, suite: str, packages: tuple[str, ...], mirror: str
    ) -> Image:
        """An image with a minimal Debian, made by mmdebstrap from `mirror`."""
        self._manifest_path(name)
        program = shutil.which("mmdebstrap")
        if program is None:
            raise SubstrateMissingError(
                "mmdebstrap is not installed: apt-get install --no-install-recommends mmdebstrap"
            )
        self._layers.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._layers, prefix=".deb-") as scratch:
            root = Path(scratch) / "root"
            command = [program, "--variant=minbase", "--mode=root", suite, str(root)]
            if packages:
                command.append(f"--include={','.join(packages)}")
            if mirror:
                command.append(mirror)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SandboxFailedError(f"mmdebstrap: {done.stderr.strip()[-800:]}")
            return self.save(name, (self.add_layer(root),), None)

    def commit(
        self,
        directory: Path,
        base: str | Path | None,
        *,
        seen_by: int | None = None,
        name: str | None = None,
    ) -> str:
        """A new image: `directory` over image `base`; returns its (content-derived) name."""
        below: tuple[str, ...] = ()
        bottom: str | None = HOST if base is None else str(base)
        if bottom != HOST and not str(bottom).startswith("/"):
            parent = self.get(str(bottom))
            below, bottom = parent.layers, parent.base
        layers = (*below, self.add_layer(directory, seen_by=seen_by))
        identity = hashlib.sha256(repr((layers, bottom)).encode()).hexdigest()
        return self.save(name or f"snapshot-{identity[:24]}", layers, bottom).name

    def remove(self, name: str) -> None:
        """Remove an image, and the layers only it used."""
        self.get(name)
        self._manifest_path(name).unlink()
        shutil.rmtree(self.memory(name), ignore_errors=True)
        self.collect()

    def collect(self) -> list[str]:
        """Remove layers no image lists; returns their digests."""
        used = {digest for image in self.all() for digest in image.layers}
        removed = []
        for file in sorted(self._layers.glob("*.erofs")) if self._layers.exists() else []:
            if file.stem not in used:
                self.unmount(file.stem)
                file.unlink()
                removed.append(file.stem)
        return removed
