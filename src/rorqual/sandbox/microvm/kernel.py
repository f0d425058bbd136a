"""Guest kernels: our own small one, built from Debian's linux-source, or Debian's cloud kernel.

Both are kept in the user's cache. Nothing here builds or downloads unless it is asked to by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.errors import SandboxFailedError, SandboxRequestError, SubstrateMissingError
from rorqual.sandbox.microvm.vmlinux import extract_vmlinux
from rorqual.sandbox.tools import KERNEL_TOOLS, install_command, missing_tools

CONFIG = Path(__file__).with_name("kernel.config")
SOURCE_PACKAGE = "linux-source"
CLOUD_PACKAGE = "linux-image-cloud-amd64"
BUILD_COMMAND = "rorqual sandbox kernel build"
FETCH_COMMAND = "rorqual sandbox kernel fetch"

_STEPS = 936
"""Files a build compiles, for the progress bar: counted on linux-source 6.1."""

_MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "erofs",
    "overlay",
    "crc32c_generic",
)

Progress = Callable[[str, int, int], None]
"""Told the stage, and of it how much is done of how much; 0 of 0 where that is not known."""

_SAME_EVERYWHERE = {
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "KBUILD_BUILD_USER": "rorqual",
    "KBUILD_BUILD_HOST": "rorqual",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
    "TZ": "UTC",
}
"""Makes the kernel the same, byte for byte, whoever builds it where and when with one compiler."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that can be started.

    Attributes:
        machine: the QEMU machine it works on.
        modules: to be loaded first, in this order.
        vsock: whether it has sockets to its host, which Firecracker's guests need.
    """

    file: Path
    machine: Literal["microvm", "q35"]
    version: str
    modules: tuple[Path, ...] = ()
    vsock: bool = False

    @property
    def name(self) -> str:
        """Its directory's: machine, version and a digest of it."""
        return self.file.parent.name

    @property
    def note(self) -> str | None:
        """What is lost with it, if anything."""
        if self.machine == "microvm":
            return None
        return (
            f"Debian's cloud kernel on q35 starts slower than our own; build that: {BUILD_COMMAND}"
        )


def default_cache() -> Path:
    """Where kernels are kept."""
    return Path.home() / ".cache" / "rorqual" / "kernels"


def find_kernel(cache: Path | None = None) -> Kernel:
    """The best kernel that is here.

    Raises:
        SubstrateMissingError: there is none; the message says how to get one.
    """
    found = kernels(cache)
    if not found:
        raise SubstrateMissingError(
            f"there is no guest kernel: {FETCH_COMMAND} (Debian's, at once) or "
            f"{BUILD_COMMAND} (our own, 10 to 17 minutes of processor time, starts faster)"
        )
    return found[0]


def kernels(cache: Path | None = None) -> list[Kernel]:
    """Those that are here, best first: our own before Debian's, the newest before older ones."""
    cache = default_cache() if cache is None else cache
    found = []
    for described in cache.glob("*/kernel.json"):
        try:
            found.append((described.stat().st_mtime, _load(described)))
        except (OSError, ValueError, KeyError):
            continue  # half removed by hand: as good as not there
    found.sort(key=lambda timed: (timed[1].machine != "microvm", -timed[0]))
    return [kernel for _, kernel in found]


def remove_kernel(name: str, cache: Path | None = None) -> Kernel:
    """Remove the kernel called `name`; machines that run it go on, snapshots of it are lost.

    Raises:
        SandboxRequestError: there is none of that name.
    """
    here = kernels(cache)
    for kernel in here:
        if kernel.name == name:
            shutil.rmtree(kernel.file.parent)
            return kernel
    names = ", ".join(kernel.name for kernel in here) or "none"
    raise SandboxRequestError(f"there is no kernel {name!r} (here: {names})")


def _load(described: Path) -> Kernel:
    data = json.loads(described.read_text())
    folder = described.parent
    if data["machine"] not in ("microvm", "q35") or not (folder / "vmlinux").exists():
        raise ValueError(f"{described} is damaged")
    modules = tuple(sorted((folder / "modules").glob("*.ko")))
    config = (data.get("about") or {}).get("config", "")
    return Kernel(
        file=folder / "vmlinux",
        machine=data["machine"],
        version=data["version"],
        modules=modules,
        vsock="CONFIG_VIRTIO_VSOCKETS=y" in config.splitlines(),
    )


def _save(
    cache: Path,
    machine: str,
    version: str,
    vmlinux: Path,
    *,
    modules: Sequence[Path] = (),
    others: Sequence[Path] = (),
    about: object = None,
) -> Kernel:
    identity = hashlib.sha256(vmlinux.read_bytes()).hexdigest()[:12]
    folder = cache / f"{machine}-{version}-{identity}"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as scratch:
        partial = Path(scratch) / "kernel"
        (partial / "modules").mkdir(parents=True)
        shutil.copyfile(vmlinux, partial / "vmlinux")
        for number, module in enumerate(modules):
            shutil.copyfile(module, partial / "modules" / f"{number:02}-{module.name}")
        for other in others:
            shutil.copyfile(other, partial / other.name)
        described = {"machine": machine, "version": version, "about": about}
        (partial / "kernel.json").write_text(json.dumps(described, indent=1))
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # QEMU reads it as nobody
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return _load(folder / "kernel.json")


# -- our own
def build_kernel(
    *,
    source: Path | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
    scratch: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Kernel:
    """Build the small kernel and keep it.

    Args:
        source: an unpacked tree or Debian's linux-source-*.tar.xz; else /usr/src is looked at,
            then the package is downloaded with apt-get.
        scratch: where to work; 2 GB.
        progress: told the stages: downloading, unpacking, configuring, compiling.

    Raises:
        SubstrateMissingError: a tool is missing.
        SandboxFailedError: the build failed; the message has its last lines.
    """
    if missing := missing_tools(tools=KERNEL_TOOLS):
        named = ", ".join(tool.programs[0] for tool in missing)
        raise SubstrateMissingError(
            f"building a kernel needs {named}: rorqual sandbox install --kernel, which is "
            f"{' '.join(install_command(missing))}"
        )
    with tempfile.TemporaryDirectory(dir=scratch, prefix="rorqual-kernel-") as place:
        tree = _source_tree(source, Path(place), progress)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        progress("configuring", 0, 0)
        _configure(tree)
        _compile(tree, jobs or os.cpu_count() or 1, progress)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        version = _run(["make", "-s", "kernelversion"], tree).strip()
        stripped = Path(place) / "vmlinux"
        _run(["strip", "-o", str(stripped), "vmlinux"], tree)
        about = {"config": CONFIG.read_text(), "build_cpu_s": round(cpu_s, 1)}
        kept = default_cache() if cache is None else cache
        return _save(kept, "microvm", version, stripped, about=about)


def _source_tree(source: Path | None, place: Path, progress: Progress) -> Path:
    if source is None:
        installed = sorted(Path("/usr/src").glob("linux-source-*.tar.xz"))
        if not installed:
            progress("downloading the source", 0, 0)
        source = installed[-1] if installed else _download_source(place)
    if source.is_dir():
        if not (source / "Kconfig").exists():
            raise SandboxRequestError(f"{source} is not a kernel source tree")
        return source.resolve()
    if not source.is_file() or not tarfile.is_tarfile(source):
        raise SandboxRequestError(f"{source} is neither a kernel source tree nor an archive of one")
    progress("unpacking the source", 0, 0)
    _run(["tar", "-xf", str(source.resolve()), "-C", str(place)], place)
    trees = [path.parent for path in place.glob("*/Kconfig")]
    if len(trees) != 1:
        raise SandboxRequestError(f"{source} does not hold one kernel source tree")
    return trees[0]


def _download_source(place: Path) -> Path:
    listed = _run(["apt-cache", "depends", SOURCE_PACKAGE], place)
    found = re.search(r"Depends: (linux-source-\S+)", listed)
    if found is None:
        raise SubstrateMissingError(
            "apt knows no linux-source here; give --source a kernel tree or tar file"
        )
    unpacked = _download(found[1], place)
    return next(iter(unpacked.glob("usr/src/linux-source-*.tar.xz")))


def _download(package: str, place: Path) -> Path:
    """Download a Debian package and unpack it, without installing."""
    place.chmod(0o755)
    _run(["apt-get", "download", package], place)
    (archive,) = place.glob(f"{package}_*.deb")
    unpacked = place / "unpacked"
    _run(["dpkg-deb", "-x", str(archive), str(unpacked)], place)
    archive.unlink()
    return unpacked


def _configure(tree: Path) -> None:
    wanted = CONFIG.read_text()
    (tree / "rorqual.config").write_text(wanted)
    _run(["make", "-s", "tinyconfig"], tree)
    _run(["scripts/kconfig/merge_config.sh", "-m", ".config", "rorqual.config"], tree)
    _run(["make", "-s", "olddefconfig"], tree)
    missing = missing_settings(wanted, (tree / ".config").read_text())
    if missing:
        raise SandboxFailedError(f"this kernel source refuses {', '.join(missing)}")


def missing_settings(wanted: str, config: str) -> list[str]:
    """Lines of the fragment `wanted` that a complete `config` does not honour."""
    present = set(config.splitlines())
    missing = []
    for line in filter(lambda line: line.startswith("CONFIG_"), wanted.splitlines()):
        name, _, value = line.partition("=")
        is_there = f"{name}=y" not in present if value == "n" else line in present
        if not is_there:
            missing.append(line)
    return missing


def _compile(tree: Path, jobs: int, progress: Progress) -> None:
    process = subprocess.Popen(
        ["nice", "-n", "10", "make", f"-j{jobs}", "vmlinux"],
        cwd=tree,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **_SAME_EVERYWHERE},
        process_group=0,
    )
    assert process.stdout is not None
    last: list[str] = []
    done = 0
    try:
        for line in process.stdout:
            last = [*last[-20:], line]
            if line.startswith(("  CC ", "  AS ")):
                done += 1
                progress("compiling", done, max(done, _STEPS))
        code = process.wait()
    except BaseException:
        # make and all compilers: what still writes would keep the directory from being removed.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code != 0:
        raise SandboxFailedError(f"the kernel build failed: {''.join(last)[-1500:]}")


# -- Debian's
def fetch_kernel(
    *, package: Path | None = None, cache: Path | None = None, scratch: Path | None = None
) -> Kernel:
    """Take Debian's cloud kernel out of its package, without installing it.

    Args:
        package: the .deb file; else it is downloaded with apt-get.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="rorqual-kernel-") as temporary:
        place = Path(temporary)
        if package is None:
            listed = _run(["apt-cache", "depends", CLOUD_PACKAGE], place)
            found = re.search(r"Depends: (linux-image-\S+)", listed)
            if found is None:
                raise SubstrateMissingError(f"apt knows no {CLOUD_PACKAGE} here")
            unpacked = _download(found[1], place)
        else:
            unpacked = place / "unpacked"
            _run(["dpkg-deb", "-x", str(package.resolve()), str(unpacked)], place)
        images = list(unpacked.glob("boot/vmlinuz-*"))
        if len(images) != 1:
            raise SandboxRequestError("the package holds no kernel image")
        version = images[0].name.removeprefix("vmlinuz-")
        vmlinux = place / "vmlinux"
        vmlinux.write_bytes(extract_vmlinux(images[0].read_bytes()))
        modules = _with_dependencies(unpacked / "lib" / "modules" / version)
        kept = default_cache() if cache is None else cache
        # A boot loader on a disk wants the compressed image.
        whole = images[0].rename(place / "vmlinuz")
        return _save(kept, "q35", version, vmlinux, modules=modules, others=[whole])


def _with_dependencies(folder: Path) -> list[Path]:
    """The files of `_MODULES` and of what they need, each after what it needs."""
    files = {path.stem: path for path in folder.rglob("*.ko")}
    order: list[str] = []

    def add(name: str) -> None:
        file = files.get(name)
        if file is None or name in order:  # built into the kernel, or there already
            return
        found = re.search(rb"\0depends=([^\0]*)\0", file.read_bytes())
        for needed in found[1].decode().split(",") if found else []:
            add(needed.replace("-", "_"))
            add(needed)
        order.append(name)

    for name in _MODULES:
        add(name)
    return [files[name] for name in order]


def _run(command: list[str], place: Path) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise SubstrateMissingError(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-800:]
        raise SandboxFailedError(f"{' '.join(command[:3])} failed: {said}")
    return done.stdout
