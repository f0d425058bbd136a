"""Where sandboxes keep their things on this machine, and the small base layers made there."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
from pathlib import Path
from typing import Literal

from rorqual.sandbox import native

_TOP_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DIRECTORIES = (
    "dev",
    "proc",
    "run",
    "root",
    "tmp",
    "var/tmp",
    "workspace",
    "home",
    "etc",
    ".rorqual",
)
_HOST_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types")
_PASSWD = """root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
user:x:1000:1000:user:/home/user:/bin/sh
"""
_GROUP = "root:x:0:\nnogroup:x:65534:\nuser:x:1000:\n"


class Layout:
    """The directory of all sandboxes of one owner: root's is system-wide.

    Everything below it can be made again; images and live sandboxes are the only state.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            system = os.geteuid() == 0
            root = Path("/var/lib/rorqual") if system else Path.home() / ".cache" / "rorqual"
        self.root = root.absolute()

    @property
    def sandboxes(self) -> Path:
        """One directory per live sandbox."""
        return self.root / "sandboxes"

    @property
    def images(self) -> Path:
        """The image store."""
        return self.root / "images"

    @property
    def binaries(self) -> Path:
        """Compiled programs."""
        return self.root / "bin"

    def agent(self) -> Path:
        """The agent's binary."""
        return self._built("agent")

    def shim(self) -> Path:
        """The shim's binary."""
        return self._built("shim")

    def _built(self, program: Literal["agent", "shim"]) -> Path:
        binary = _build_once(program, self.binaries)
        if not binary.exists():  # the directory was emptied since
            _build_once.cache_clear()
            binary = _build_once(program, self.binaries)
        return binary

    def agent_layer(self) -> Path:
        """A directory with the agent and the mount points every sandbox needs."""
        agent = self.agent()
        layer = self.root / "layers" / agent.name
        if not layer.exists():
            with _whole(layer) as partial:
                for name in ("dev", "proc", "run", "tmp", ".rorqual"):
                    (partial / name).mkdir(parents=True)
                (partial / "tmp").chmod(0o1777)
                shutil.copy2(agent, partial / ".rorqual" / "agent")
        return layer

    def host_layer(self) -> Path:
        """The "host" image: an almost empty root whose /usr is this machine's, read-only.

        Nothing of the host's /etc but what programs in /usr need to start; no users, keys, homes.
        """
        layer = self.root / "layers" / "host-1"
        if not layer.exists():
            with _whole(layer) as partial:
                for name in (*_DIRECTORIES, "usr", "home/user"):
                    (partial / name).mkdir(parents=True, exist_ok=True)
                for name in ("tmp", "var/tmp", "workspace"):
                    (partial / name).chmod(0o1777)
                for name in _TOP_LINKS:
                    if (Path("/usr") / name).is_dir():
                        (partial / name).symlink_to(f"usr/{name}")
                etc = partial / "etc"
                for name in _HOST_ETC:
                    source = Path("/etc") / name
                    if source.is_dir():
                        shutil.copytree(source, etc / name, symlinks=True)
                    elif source.exists():
                        shutil.copy2(source, etc / name)
                (etc / "passwd").write_text(_PASSWD)
                (etc / "group").write_text(_GROUP)
                (etc / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
                (etc / "nsswitch.conf").write_text(
                    "passwd: files\ngroup: files\nhosts: files dns\n"
                )
                if os.geteuid() == 0:
                    os.chown(partial / "home" / "user", 1000, 1000)
        return layer


# Hashing the sources takes longer than starting a container may; they change with the package only.
_build_once = functools.cache(native.build)


class _whole:  # noqa: N801  (reads as a word of the with statement)
    """Make a directory under another name and move it into place when it is complete."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}")

    def __enter__(self) -> Path:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self._partial

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            try:
                self._partial.rename(self._target)
                return
            except OSError:
                if not self._target.exists():
                    raise
        shutil.rmtree(self._partial, ignore_errors=True)
