"""What the options make of a checkpoint: its card, its context, its device."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from scripted_sessions import CARD, CONFIG

from rorqual.cli.backends import BackendOptions
from rorqual.cli.loading import choose_device, open_session, read_card
from rorqual.cli.main import main
from rorqual.errors import ConfigError, PromptTooLongError

ONE_THREAD = BackendOptions(threads=1)


def released(model_dir: Path, path: Path) -> Path:
    """``model_dir`` as released checkpoints are: without a card."""
    shutil.copytree(model_dir, path)
    (path / "card.json").unlink()
    return path


def test_checkpoint_without_a_card_is_served_as_its_generation(
    model_dir: Path, tmp_path: Path
) -> None:
    path = released(model_dir, tmp_path / "V4-Tiny")
    with open_session(
        str(path), backend=ONE_THREAD, device="cpu", generation="ga", name="flash"
    ) as session:
        assert session.card.name == "flash"
        assert session.card.generation == "ga"
        assert session.card.default_mode == "think"
        assert session.context_tokens == CONFIG.max_position_embeddings
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert json.loads(session.complete(body, 0))["model"] == "flash"
    card = read_card(path, CONFIG, generation="v4.1", name=None)
    assert (card.name, card.generation) == ("V4-Tiny", "v4.1")


def test_checkpoint_without_a_card_or_generation_is_explained(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = released(model_dir, tmp_path / "V4-Tiny")
    assert main(["serve", str(path)]) == 1
    message = capsys.readouterr().err
    assert "no card.json" in message
    assert "--generation preview or ga or v4.1" in message
    example = json.loads(message[message.index("{") :])
    (path / "card.json").write_text(json.dumps(example), "utf-8")
    assert read_card(path, CONFIG, generation=None, name=None).generation == "ga"


def test_options_go_before_the_card(model_dir: Path) -> None:
    kept = read_card(model_dir, CONFIG, generation=None, name=None)
    assert kept == CARD
    changed = read_card(model_dir, CONFIG, generation="ga", name="other")
    assert (changed.name, changed.generation) == ("other", "ga")
    assert changed.sampling == kept.sampling


def test_context_is_the_least_of_option_card_and_network(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert CARD.context_length < CONFIG.max_position_embeddings
    with open_session(str(model_dir), backend=ONE_THREAD) as session:
        assert session.context_tokens == CARD.context_length
    with open_session(str(model_dir), backend=ONE_THREAD, context=300) as session:
        assert session.context_tokens == session.engine.max_context_tokens == 300
        with pytest.raises(PromptTooLongError, match="maximum context length is 300 tokens"):
            session.ask({"messages": [{"role": "user", "content": "hello " * 300}]})
    path = tmp_path / "short"
    shutil.copytree(model_dir, path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    with open_session(str(path), backend=ONE_THREAD) as session:
        assert session.context_tokens == 512
    assert main(["serve", str(path), "--context", "600"]) == 1
    assert "--context 600 exceeds the 512 tokens of tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "has_cuda", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_device_is_chosen_once_and_logged(
    wanted: str, has_cuda: bool, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_device(wanted, has_cuda=has_cuda) == device
    assert [record.getMessage() for record in caplog.records] == [
        f"the model runs on {device} (asked for: {wanted})"
    ]


def test_cuda_that_is_not_there_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        choose_device("cuda", has_cuda=False)
