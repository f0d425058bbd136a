"""A server in a process of its own, whose engine costs nothing, to be measured or worn out.

    python -m rorqual.qualify.target MODEL [--answer TEXT] [--step-s S]

Prints its URL on a free loopback port, then serves until SIGTERM. The model's tokenizer and card
are the real ones; its weights are not read. ``Target`` starts it and reads its cost from /proc.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_START_S = 60.0


class Target:
    """The process; use it as a context manager. Linux only.

    Args:
        step_s: time between two tokens of an answer; 0 answers at once.
        log: where the server writes its access log and errors.
    """

    def __init__(self, model: Path, *, answer: str, step_s: float, log: BinaryIO) -> None:
        command = [sys.executable, "-m", "rorqual.qualify.target", str(model)]
        command += ["--answer", answer, "--step-s", str(step_s)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError("the server to be measured did not start; see its log")

    def cpu_s(self) -> float:
        """CPU time used so far."""
        fields = self._read("stat").rsplit(")", 1)[1].split()  # the name may hold spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory now."""
        return int(self._read("statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def num_open_files(self) -> int:
        """File descriptors, sockets among them."""
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def signal(self) -> None:
        """Ask it to end: the first time to drain, the second time at once."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait(_START_S)

    def stop(self) -> int:
        """Both."""
        self.signal()
        return self.wait()

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(_START_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self, name: str) -> str:
        return Path(f"/proc/{self._process.pid}/{name}").read_text()


def main() -> None:
    """Serve until told to stop."""
    from rorqual.protocol.modes import ModelCard
    from rorqual.protocol.tokenizer import Tokenizer
    from rorqual.qualify.paced_engine import PacedEngine
    from rorqual.server.access_log import AccessLog
    from rorqual.server.history import History
    from rorqual.server.run import serve

    parser = argparse.ArgumentParser(prog="python -m rorqual.qualify.target")
    parser.add_argument("model", type=Path)
    parser.add_argument("--answer", default="ok")
    parser.add_argument("--step-s", type=float, default=0.0)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_dir(args.model)
    ids = tuple(tokenizer.encode_plain(args.answer))

    def announce(welcome: str) -> None:
        print(welcome.split(" is served at ")[1].split()[0], flush=True)

    # A short memory, so that its being filled is not taken for a leak.
    with PacedEngine(ids, step_s=args.step_s) as engine, History(max_turns=100) as history:
        serve(
            engine,
            tokenizer,
            ModelCard.from_dir(args.model),
            port=0,
            history=history,
            access_log=AccessLog(sys.stderr.buffer),
            drain_s=5,
            end_running=engine.close,
            announce=announce,
        )


if __name__ == "__main__":
    main()
