"""What a guest's root is made of: EROFS files of an image, lowest first.

"host" cannot be shared with a guest as a container does; it becomes a copy of this machine's
essential Debian packages and Python, packed once per set of versions. No network, no maintainer
scripts, nothing of the host's /etc, /home or /var.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from rorqual.errors import SandboxFailedError, SandboxRequestError
from rorqual.sandbox.images import HOST, ImageStore
from rorqual.sandbox.layout import Layout

ROOTS = ("python3", "procps", "iproute2", "ca-certificates", "curl", "git")
"""Packages taken beside the essential ones, where they are installed."""

_STATUS = Path("/var/lib/dpkg/status")
_LISTS = Path("/var/lib/dpkg/info")
_LEFT_OUT = re.compile(r"/usr/share/(doc|man|locale|info|i18n|lintian|bug|icons|fonts|zoneinfo)/")
_TOP = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def layer_files(image: str | Path | None, store: ImageStore, layout: Layout) -> list[Path]:
    """The layers of an image as files, lowest first.

    Raises:
        SandboxRequestError: there is no such image.
        SandboxFailedError: "host" is asked for and this is no Debian.
    """
    if image is None or image == HOST:
        return [store.layer_file(digest) for digest in _host_layers(store, layout)]
    if isinstance(image, Path) or str(image).startswith("/"):
        directory = Path(image).resolve()
        if not directory.is_dir():
            raise SandboxRequestError(f"image {str(image)!r} is not a directory")
        # Under a name of its own, so that the layer is found, replaced and removed like others.
        name = f"directory-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"
        return [store.layer_file(digest) for digest in store.build(name, directory).layers]
    found = store.get(str(image))
    below = [] if found.base is None else layer_files(found.base, store, layout)
    return [*below, *(store.layer_file(digest) for digest in found.layers)]


def _host_layers(store: ImageStore, layout: Layout) -> tuple[str, ...]:
    if not _STATUS.exists():
        raise SandboxFailedError(
            "this machine is no Debian: build an image for guests and name it: "
            "rorqual sandbox image build NAME DIRECTORY"
        )
    versions = choose_packages(_STATUS.read_text("utf-8", "replace"), ROOTS)
    told = repr(sorted(versions.items())) + repr(layout.host_layer().name)
    name = f"host-copy-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    for image in store.all():
        if image.name == name:
            return image.layers
    store.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.root, prefix=".copy-") as scratch:
        root = Path(scratch) / "root"
        for package in versions:
            _copy_package(package, root)
        layers = (store.add_layer(root), store.add_layer(layout.host_layer()))
    return store.save(name, layers, None).layers


def choose_packages(status: str, roots: tuple[str, ...]) -> dict[str, str]:
    """Installed packages to take with their versions: essential ones, `roots`, and what they need.

    Args:
        status: contents of dpkg's status file.
    """
    fields: dict[str, dict[str, str]] = {}
    provided: dict[str, str] = {}
    for stanza in status.split("\n\n"):
        told = dict(re.findall(r"^([A-Za-z-]+): *(.*)$", stanza, re.MULTILINE))
        if not told.get("Status", "").endswith(" installed"):
            continue
        name = told["Package"]
        fields.setdefault(name, told)
        for other in re.findall(r"([a-z0-9][a-z0-9.+-]+)", told.get("Provides", "")):
            provided.setdefault(other, name)
    waiting = [name for name, told in fields.items() if told.get("Essential") == "yes"]
    waiting += [name for name in roots if name in fields]
    chosen: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        name = name if name in fields else provided.get(name, "")
        if name == "" or name in chosen:
            continue
        told = fields[name]
        chosen[name] = told.get("Version", "")
        for clause in f"{told.get('Depends', '')},{told.get('Pre-Depends', '')}".split(","):
            options = [option.strip().split(" ")[0].split(":")[0] for option in clause.split("|")]
            waiting += [option for option in options if option in fields or option in provided][:1]
    return chosen


def _copy_package(package: str, root: Path) -> None:
    lists = [*_LISTS.glob(f"{package}.list"), *_LISTS.glob(f"{package}:*.list")]
    for line in lists[0].read_text().splitlines() if lists else []:
        parts = line.strip("/").split("/")
        if parts[0] in _TOP:  # the directories of old are links into /usr
            line = f"/usr{line}"
        source = Path(line)
        if not line.startswith("/usr/") or _LEFT_OUT.match(line + "/") or not os.path.lexists(line):
            continue
        target = root / line[1:]
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(target):
                _take(source, target)
        elif source.is_dir():
            target.mkdir(parents=True, exist_ok=True)


def _take(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)  # it is only read before it goes
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
