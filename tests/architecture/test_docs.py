"""The documents are true: what they name exists, what they tell a reader to run runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_layers import ALLOWED

from rorqual.cli.main import build_parser
from rorqual.engine.request import Request
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.server.run import listen, server_for, url_of
from rorqual.testing.scripted_engine import ScriptedEngine

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "rorqual"
NANO = ROOT / "models" / "nano-flash"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "models/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
README = ROOT / "README.md"
STATES = ("works", "partial", "planned")


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of ``language``."""
    fenced = re.findall(r"^```(\S*)\n(.*?)^```$", text_of(path), re.DOTALL | re.MULTILINE)
    return [content for kind, content in fenced if kind == language]


def prose(path: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.DOTALL | re.MULTILINE)


def code_spans(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(path))


def table_after(path: Path, heading: str) -> list[list[str]]:
    """Cells of the body rows of the first table below ``heading``."""
    lines = text_of(path).split(f"\n{heading}\n", 1)[1].splitlines()
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(path: Path) -> list[str]:
    """Every shell command of a document: lines of bash blocks, and code spans."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    found = [part for line in [*lines, *code_spans(path)] for part in re.split(r"[|#;]", line)]
    return [command.strip() for command in found]


# ---- what is named exists ---------------------------------------------------------------------
def is_path(span: str) -> bool:
    """Whether a code span names a file or folder of this project."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span):
        return False
    return span.endswith((".py", ".toml", "/")) or ("/" in span and span.endswith((".md", ".json")))


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_file_named_exists(path: Path) -> None:
    for span in code_spans(path):
        if is_path(span):
            places = [folder / span for folder in (ROOT, SOURCE, path.parent)]
            assert any(place.exists() for place in places), f"{span} does not exist"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_relative_link_resolves(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(linked), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings}


def test_readmes_file_tree_matches_the_packages() -> None:
    (tree,) = [block for block in blocks(README, "") if block.startswith("src/rorqual/")]
    lines = tree.splitlines()
    packages = {line.split()[0] for line in lines if line.startswith("  ")}
    on_disk = {f"{init.parent.name}/" for init in SOURCE.glob("*/__init__.py")}
    assert packages == on_disk | {"errors.py"}
    for line in lines:
        name, *purpose = line.split()
        if not line.startswith("  "):
            assert (ROOT / name).exists(), name
            assert purpose or name == "src/rorqual/"


def test_architectures_layer_table_is_the_enforced_one() -> None:
    rows = table_after(ROOT / "ARCHITECTURE.md", "## Packages")
    documented = {row[0].strip("`"): set(filter(None, row[2].split(", "))) for row in rows}
    assert documented == ALLOWED


def test_status_rows_have_evidence() -> None:
    rows = table_after(README, "## Status")
    assert {row[1] for row in rows} == set(STATES)
    for part, state, evidence in rows:
        named = re.findall(r"`([^`]+)`", evidence)
        runs = [span for span in named if is_path(span) or span.startswith("rorqual ")]
        assert state == "planned" or runs or "see the results" in evidence, f"{part}: no evidence"


def test_documents_name_no_path_of_one_machine() -> None:
    for path in DOCUMENTS:
        found = re.search(r"(?<![\w.])/(home|root|tmp|work|opt|mnt)/", text_of(path))
        assert found is None, f"{relative(path)}: {found}"


# ---- what is to be run runs -------------------------------------------------------------------
@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_rorqual_command_parses(path: Path) -> None:
    parser = build_parser()
    (actions,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for command in commands(path):
        words = shlex.split(command) if command.startswith("rorqual ") else []
        if len(words) == 2:  # a subcommand by name
            assert words[1] in [*actions.choices, "COMMAND"], command
        elif words and words[1] != "COMMAND":
            try:
                assert callable(parser.parse_args(words[1:]).run)
            except SystemExit:
                pytest.fail(f"{command!r} is wrong usage")


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_make_target_and_module_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for command in commands(path):
        if match := re.match(r"make ([a-z]+)", command):
            assert match[1] in targets, command
        if match := re.match(r"python -m ([\w.]+)", command):
            assert importlib.util.find_spec(match[1]) is not None, command


def script(request: Request, tokenizer: Tokenizer) -> str:
    """What a well-trained model would say to the README's requests."""
    prompt = tokenizer.decode(request.prompt_ids)
    if "<tool_result>" in prompt:
        result = json.loads(prompt.split("<tool_result>")[1].split("</tool_result>")[0])
        return f"Order B427 is {result['status']}; days left: {result['days']}."
    if "lookup_order" in prompt:
        return (
            '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="lookup_order">\n'
            '<｜DSML｜parameter name="order_id" string="true">B427</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
        )
    sentence = "The bright lab was opened in 2010."
    assert sentence in prompt
    assert "What is the opening year of the bright lab?" in prompt
    return f'"{sentence}"\n\nAnswer: 2010'


@pytest.fixture
def url() -> Iterator[str]:
    """A live server whose engine answers as ``script`` says."""
    tokenizer = Tokenizer.from_dir(NANO)
    with ScriptedEngine(tokenizer, lambda request: script(request, tokenizer)) as engine:
        server = server_for(create_app(engine, tokenizer, ModelCard.from_dir(NANO)))
        with listen("127.0.0.1", 0) as listener:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            yield url_of(listener)
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def at(url: str, text: str) -> str:
    """``text`` with the README's address replaced."""
    assert "http://127.0.0.1:8000" in text
    return text.replace("http://127.0.0.1:8000", url)


def test_readmes_python_examples_run(url: str) -> None:
    program = "\n".join(blocks(README, "python"))
    out = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(out):
        exec(compile(at(url, program), str(README), "exec"), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert out.getvalue() == (
        '"The bright lab was opened in 2010."\n\nAnswer: 2010Order B427 is shipped; days left: 3.\n'
    )


def answer_of(stream: str) -> str:
    """The text of a streamed answer."""
    data = [line.removeprefix("data: ") for line in stream.splitlines() if line[:5] == "data:"]
    assert data[-1] == "[DONE]"
    return "".join(json.loads(d)["choices"][0]["delta"]["content"] or "" for d in data[:-1])


def test_readmes_curl_line_gets_a_streamed_answer(url: str) -> None:
    (block,) = [block for block in blocks(README, "bash") if block.startswith("curl")]
    words = shlex.split(at(url, block))
    if shutil.which("curl"):
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
        stream = done.stdout
    else:
        body = words[words.index("-d") + 1].encode()
        header = dict([words[words.index("-H") + 1].split(": ")])
        address = next(word for word in words if word.startswith("http"))
        with urllib.request.urlopen(urllib.request.Request(address, body, header)) as response:
            stream = response.read().decode()
    assert answer_of(stream) == '"The bright lab was opened in 2010."\n\nAnswer: 2010'
