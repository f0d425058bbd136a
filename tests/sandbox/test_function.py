"""Function calls: results, tools, limits, and what scripts cannot reach."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rorqual.errors import SandboxRequestError, UnsupportedError
from rorqual.sandbox.container.remains import sweep
from rorqual.sandbox.contract import MIB, ExecResult, Limits
from rorqual.sandbox.function.sandbox import FunctionSandbox
from rorqual.sandbox.sandbox import Sandbox

from .conftest import run


def call(
    root: Path,
    *argv: str,
    tools: dict[str, object] | None = None,
    limits: Limits | None = None,
    timeout_s: float = 20.0,
) -> ExecResult:
    async def work() -> ExecResult:
        files = {"/given.txt": b"given"}
        async with await Sandbox.create(
            "function", root=root, files=files, limits=limits or Limits()
        ) as sandbox:
            assert isinstance(sandbox, FunctionSandbox)
            sandbox.with_tools(tools or {})  # type: ignore[arg-type]
            return await sandbox.exec(argv, stdin="typed", timeout_s=timeout_s)

    return run(work())


def test_javascript_computes_with_stdin_and_arguments(root: Path) -> None:
    result = call(root, "js", "-e", "print(stdin, args[0], {a: [1]}); console.error('bad')", "x")
    assert result.ok
    assert result.stdout == b'typed x {"a":[1]}\n'
    assert result.stderr == b"bad\n"
    failed = call(root, "js", "-e", "throw new Error('why')")
    assert failed.returncode == 1
    assert b"why" in failed.stderr


def test_nothing_survives_a_call(root: Path) -> None:
    async def work() -> None:
        async with await Sandbox.create("function", root=root) as sandbox:
            await sandbox.exec(["js", "-e", "globalThis.secret = 1; Array.prototype.x = 2"])
            result = await sandbox.exec(["js", "-e", "print(typeof secret, [].x)"])
            assert result.text == "undefined undefined\n" or result.text == "undefined null\n"

    run(work())


def test_tools_answer_and_their_failures_are_exceptions_inside(root: Path) -> None:
    async def slow(a: int) -> int:
        return a + 1

    def broken() -> None:
        raise RuntimeError("tool broke")

    script = """
        print(tools.slow(41));
        for (const name of ['broken', 'absent'])
            try { tools[name](); } catch (e) { print(e.message); }
    """
    result = call(root, "js", "-e", script, tools={"slow": slow, "broken": broken})
    lines = result.text.splitlines()
    assert lines == ["42", "RuntimeError: tool broke", "no tool is called 'absent'"]


@pytest.mark.sandbox
def test_tools_answer_python_too_and_stderr_stays_what_it_was(root: Path) -> None:
    asked: list[str] = []

    async def look_up(word: str, *, times: int = 1) -> list[str]:
        asked.append(word)
        return [word] * times

    def broken() -> None:
        raise RuntimeError("tool broke")

    script = """
import sys, tools
print('before', file=sys.stderr)
word = 'whale ' * 20000
print(tools.look_up(word) == [word])
for name in ('broken', 'absent'):
    try:
        getattr(tools, name)()
    except tools.ToolError as error:
        print(error)
print('after', file=sys.stderr)
"""
    result = call(root, "python", "-c", script, tools={"look_up": look_up, "broken": broken})
    assert result.stderr == b"before\nafter\n"
    assert result.text == "True\nRuntimeError: tool broke\nno tool is called 'absent'\n"
    assert asked == ["whale " * 20000]


@pytest.mark.sandbox
def test_a_forged_tool_request_is_output_or_an_error_inside(root: Path) -> None:
    script = """
import os, re
mark = re.search(r"b'(\\w+)%08x", open('/tools/tools.py').read()).group(1).encode()
for forged in (b'zzzzzzzz', b'ffffffff', b'00000002{}', b'0000000a["a"      ]'):
    os.write(2, mark + forged)
print(open('/tools/answer.json').read())
"""
    result = call(root, "python", "-c", script, tools={"a": lambda: 1})
    assert result.ok
    assert "not a request" in result.text
    assert b"zzzzzzzz" in result.stderr
    assert b"ffffffff" in result.stderr


def test_a_sweep_finds_what_a_killed_function_sandbox_left(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from rorqual.sandbox.sandbox import Sandbox\n"
        "async def main():\n"
        "    root = Path(sys.argv[1])\n"
        "    await Sandbox.create('function', root=root, files={'/a': b'x'})\n"
        "    print('made', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"made\n"
    (left,) = (tmp_path / "sandboxes").iterdir()
    assert sweep(tmp_path) == []  # it lives
    child.kill()
    child.wait()
    child.stdout.close()
    assert (left / "files" / "a").read_bytes() == b"x"
    assert sweep(tmp_path) == [left.name]
    assert not left.exists()


def test_javascript_limits(root: Path) -> None:
    endless = call(root, "js", "-e", "for(;;){}", timeout_s=0.3)
    assert (endless.status, endless.returncode) == ("timed-out", 137)
    small = Limits(memory_bytes=16 * MIB)
    hungry = call(
        root, "js", "-e", "let a=[]; for(;;) a.push(new Array(1000).fill(1))", limits=small
    )
    assert hungry.status == "out-of-memory"
    deep = call(root, "js", "-e", "(function f(){ f(); })()")
    assert deep.returncode == 1
    loud = Limits(output_bytes=100, spill_bytes=5000)
    flood = call(root, "js", "-e", "for(;;) print('x'.repeat(100))", limits=loud)
    assert flood.status == "output-limit"
    assert flood.stdout_bytes == 5000


ESCAPES_JS = {
    "modules": "import('os').then(m => print('REACHED'), e => print('no'))",
    "static import": "import * as os from 'os'; print('REACHED')",
    "std": "print(typeof std === 'undefined' ? 'no' : 'REACHED')",
    "process": "print(typeof process === 'undefined' ? 'no' : 'REACHED')",
    "require": "print(typeof require === 'undefined' ? 'no' : 'REACHED')",
    "load": "try { loadScript('/etc/passwd'); print('REACHED') } catch (e) { print('no') }",
    "callback internals": "try { print(__out.constructor('return this')().os ? 'REACHED' : 'no') }"
    " catch (e) { print('no') }",
    "tool name": "try { tools['__import__']('os'); print('REACHED') } catch (e) { print('no') }",
}


@pytest.mark.parametrize("name", ESCAPES_JS)
def test_javascript_cannot_reach_the_host(root: Path, name: str) -> None:
    result = call(root, "js", "-e", ESCAPES_JS[name])
    assert b"REACHED" not in result.stdout + result.stderr
    assert result.status == "exited"


ESCAPES_PYTHON = {
    "host file": "open('/etc/passwd').read()",
    "host root": "import os; os.listdir('/')",
    "parent": "open('/data/../../etc/passwd').read()",
    "write": "open('/data/x', 'w')",
    "link": "import os; os.symlink('/etc/passwd', '/data/l'); open('/data/l').read()",
    "socket": "import socket; socket.create_connection(('127.0.0.1', 22))",
    "program": "import os; os.system('id') == 0 or 1/0",
    "subprocess": "import subprocess; subprocess.run(['id'], check=True)",
    "ctypes": "import ctypes; ctypes.CDLL(None).getpid()",
    "environment": "import os; print('SECRET' if 'PYTHONPATH' in os.environ else 'no'); 1/0",
}


@pytest.mark.sandbox
def test_python_in_wasm_works_and_cannot_reach_the_host(root: Path) -> None:
    async def work() -> None:
        limits = Limits(memory_bytes=128 * MIB)
        async with await Sandbox.create("function", root=root, limits=limits) as sandbox:
            await sandbox.write("/given.txt", b"given")
            script = (
                "import sys; print(sys.stdin.read(), sys.argv[1], open('/data/given.txt').read())"
            )
            result = await sandbox.exec(["python", "-c", script, "arg"], stdin="typed")
            assert result.stdout == b"typed arg given\n"
            for name, script in ESCAPES_PYTHON.items():
                result = await sandbox.exec(["python", "-c", script], timeout_s=20.0)
                assert result.returncode != 0, name
                assert b"SECRET" not in result.stdout, name
                assert b"root:" not in result.stdout + result.stderr, name
            hungry = await sandbox.exec(["python", "-c", "x = bytearray(10**9)"])
            assert b"MemoryError" in hungry.stderr
            endless = await sandbox.exec(["python", "-c", "while True: pass"], timeout_s=0.5)
            assert endless.status == "timed-out"
            assert (await sandbox.exec(["python", "-c", "print(1)"])).stdout == b"1\n"

    run(work(), timeout_s=240)


def test_a_worker_that_is_broken_into_cannot_do_more_than_compute() -> None:
    import subprocess
    import sys

    # What a script would try after it had taken over the engine's process.
    script = """
import ctypes, os, socket
from rorqual.sandbox.function.wall import raise_wall
if not raise_wall(allow_files=False):
    print("unknown machine"); raise SystemExit
tries = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "socket": lambda: socket.socket(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os.fork(),
    "kill": lambda: os.kill(1, 0),
    "pipe": lambda: os.pipe(),
    "ptrace": lambda: ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0 or (_ for _ in ()).throw(OSError()),
}
for name, attempt in tries.items():
    try:
        attempt()
        print("REACHED", name)
    except OSError:
        print("refused", name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert "REACHED" not in done.stdout, done.stdout
    assert done.stdout.count("refused") == 7 or "unknown machine" in done.stdout, done.stderr


def test_full_python_runs_in_a_fresh_container_for_each_call(root: Path) -> None:
    async def work() -> None:
        limits = Limits(output_bytes=100, spill_bytes=100_000)
        before = set((root / "sandboxes").iterdir()) if (root / "sandboxes").exists() else set()
        async with await Sandbox.create(
            "function", isolation="container", root=root, limits=limits, files={"/a.txt": b"given"}
        ) as sandbox:
            assert isinstance(sandbox, FunctionSandbox)
            await sandbox.warm("python")
            script = (
                "import subprocess, sys\n"  # what WebAssembly has not
                "print(sys.stdin.read(), sys.argv[1], open('/data/a.txt').read())\n"
                "open('/tmp/left', 'x').close()\n"
                "subprocess.run(['echo', 'child'], check=True)\n"
            )
            for _ in range(2):  # the second call finds nothing of the first
                result = await sandbox.exec(["python", "-c", script, "arg"], stdin="typed")
                assert sorted(result.text.splitlines()) == ["child", "typed arg given"]
            long = await sandbox.exec(["python", "-c", "print('x' * 5000)"])
            assert long.stdout_file is not None
            assert long.stdout_file.stat().st_size == 5001
            endless = await sandbox.exec(["python", "-c", "while True: pass"], timeout_s=0.3)
            assert endless.status == "timed-out"
            assert (await sandbox.exec(["js", "-e", "print(1)"])).text == "1\n"
        assert set((root / "sandboxes").iterdir()) <= before

    run(work())


def test_callers_mistakes_are_named(root: Path) -> None:
    async def work() -> None:
        async with await Sandbox.create("function", root=root) as sandbox:
            with pytest.raises(UnsupportedError, match="functions run"):
                await sandbox.exec("echo shell")
            with pytest.raises(SandboxRequestError, match="usage: js"):
                await sandbox.exec(["js"])
            with pytest.raises(UnsupportedError):
                await sandbox.pause()
            with pytest.raises(UnsupportedError):
                await sandbox.pty()
            with pytest.raises(SandboxRequestError, match=r"holds '\.\.'"):
                await sandbox.read("/../etc/passwd")

    run(work())


HOST = """
import asyncio, sys
from pathlib import Path
from rorqual.sandbox.sandbox import Sandbox
async def work():
    sandbox = await Sandbox.create("function", root=Path(sys.argv[1]))
    await sandbox.exec(sys.argv[2:], timeout_s=600)
asyncio.run(work())
"""


@pytest.mark.parametrize(
    "script", [("js", "-e", "while (true) {}"), ("python", "-c", "while True: pass")]
)
def test_an_endless_script_ends_when_its_host_is_killed(
    tmp_path: Path, script: tuple[str, ...]
) -> None:
    def workers() -> list[Path]:
        """Those below this root, by their arguments."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes()
                if b"function.worker" in line and os.fsencode(tmp_path) in line:
                    found.append(process)
        return found

    def computing() -> bool:
        """Whether one has used processor time for more than its start."""
        with contextlib.suppress(OSError, IndexError):
            fields = (workers()[0] / "stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) > 3 * os.sysconf("SC_CLK_TCK")
        return False

    pytest.importorskip("quickjs" if script[0] == "js" else "wasmtime")
    host = subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path), *script])
    try:
        deadline = time.monotonic() + 60
        while not computing() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert computing()
    finally:
        host.kill()
        host.wait()
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers() == []
