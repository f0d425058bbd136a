"""The C programs of the sandbox: the agent inside, a guest machine's init, the shim on the host.

They are compiled statically at first use, so that the agent runs in any file system, and cached by
the hash of their sources.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from rorqual.errors import SubstrateMissingError

SOURCES = Path(__file__).parent
_FLAGS = ("-static", "-O2", "-s", "-std=gnu11", "-Wall")


def build(program: Literal["agent", "shim", "init"], cache: Path) -> Path:
    """Return the path of the compiled program, compiling it if `cache` has no current one.

    Raises:
        SubstrateMissingError: there is no C compiler, or it failed.
    """
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    binary = cache / f"{program}-{digest.hexdigest()[:16]}"
    if binary.exists():
        return binary
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("musl-gcc")
    if compiler is None:
        raise SubstrateMissingError(
            "a C compiler is needed once to build the sandbox's agent: "
            "apt-get install --no-install-recommends gcc libc6-dev"
        )
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f".{binary.name}.{secrets.token_hex(6)}"
    command = [compiler, *_FLAGS, "-o", str(partial), str(SOURCES / f"{program}.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SubstrateMissingError(
            f"{compiler} could not build the sandbox's {program}: {done.stderr.strip()[-500:]}"
        )
    partial.chmod(0o755)
    partial.replace(binary)  # whole or not at all, also with several builders at once
    return binary
