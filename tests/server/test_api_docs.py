"""The examples of docs/api.md run, its endpoints exist, and its error table is the enforced one."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

from asgi_call import NANO, call
from starlette.applications import Starlette

from rorqual.engine.request import Request
from rorqual.kernels.layout import BLOCK_TOKENS
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.server.connection import Connection
from rorqual.server.failures import ERRORS
from rorqual.testing.scripted_engine import ScriptedEngine

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
ANSWERS = {
    "<tool_result>": "Let me see.</think>It is 21 degrees.",
    "How warm": f"Let me see.</think>{CALL}",
    "Hello!": "A greeting.</think>Hello to you.",
    "Describe Paris": '{"name": "Paris"}',
    "In what year": "1163",
    "Name a city": '{"name": "Paris"}',
    "<｜fim▁begin｜>": "    return a + b",
    "one line": "'hello')",
}
PRINTED = [
    "get_weather Paris",
    "It is 21 degrees.",
    "Hello to you.",
    "Paris",
    '{"name": "Paris"}',
    '{"name": "Paris"}',
    "1163",
    "return a + b",
    "'hello')",
]


def test_the_examples_run(
    tokenizer: Tokenizer, nano_card: ModelCard, on_socket: Callable[[Starlette], str]
) -> None:
    def script(request: Request) -> str:
        prompt = tokenizer.decode(request.prompt_ids)
        return next(answer for words, answer in ANSWERS.items() if words in prompt)

    url = on_socket(create_app(ScriptedEngine(tokenizer, script), tokenizer, nano_card))
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
    out = io.StringIO()
    names: dict[str, object] = {"__name__": "examples"}
    with contextlib.redirect_stdout(out):
        exec(compile(program.replace("http://127.0.0.1:8000", url), "api.md", "exec"), names)
    names["client"].close()  # type: ignore[attr-defined]
    names["claude"].close()  # type: ignore[attr-defined]
    assert out.getvalue().splitlines() == PRINTED


def test_every_endpoint_named_exists() -> None:
    tokenizer = Tokenizer.from_dir(NANO)
    app = create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, ModelCard.from_dir(NANO))
    named = re.findall(r"`(GET|POST) (/[\w/.]*)", TEXT)
    assert len(named) >= 8
    for method, path in named:
        status = call(app, method, path.replace("NAME", "nano-flash")).status_code
        assert status in (200, 400), path


def test_the_figures_told_are_the_servers(nano_card: ModelCard) -> None:
    assert f"({nano_card.default_max_tokens:,} for `nano-flash`)" in TEXT
    assert f"in blocks of {BLOCK_TOKENS}" in TEXT
    assert f"not reading for {Connection.write_timeout_s:g} seconds" in TEXT


def test_the_error_table_is_the_enforced_one() -> None:
    rows = re.findall(r"^\| (\d+)(?: \(Messages: (\d+)\))? \| `(\w+)` \| `(\w+)` \|", TEXT, re.M)
    told = {code: (int(s), kind, int(other) if other else None) for s, other, code, kind in rows}
    assert told == {
        code: (row.status, row.anthropic_type, row.anthropic_status) for code, row in ERRORS.items()
    }
