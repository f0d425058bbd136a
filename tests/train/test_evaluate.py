"""The evaluation finds everything right with a model that is, and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import CheckpointError
from rorqual.model.checkpoint import save_model
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.render import RenderedRequest
from rorqual.protocol.tokenizer import THINK_END, THINK_START, USER, Tokenizer
from rorqual.train.conversation import Dialogue
from rorqual.train.documents import ABSENT, answer
from rorqual.train.evaluate import load_candidate, main, table_rows
from rorqual.train.exam import DocumentExam, draw_documents, draw_tool_dialogues
from rorqual.train.examiner import Examiner, Slice, merged, num_answers
from rorqual.train.generate import Decoder
from rorqual.train.run_state import save_run_state
from rorqual.train.served import ChatModel, Reply, parse_reply

from .conftest import NANO, SMALL, small_model
from .test_conversation import generated_text
from .test_grading import ids_of

BUCKET = (64, 512)


class Oracle(ChatModel):
    """Knows the exam. ``says`` may spoil an answer, given its kind and the right text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        exams: Sequence[DocumentExam],
        dialogues: Sequence[Dialogue],
        says: Callable[[str, str], str] = lambda kind, text: text,
    ) -> None:
        super().__init__(small_model(), tokenizer, ModelCard.from_dir(NANO))
        self.decoder = NoDecoder()
        self.exams, self.dialogues, self.says = exams, dialogues, says
        self.vocabulary = tokenizer
        self.prompts: list[str] = []

    def reply(
        self, requests: Sequence[RenderedRequest], *, on_done: Callable[[], None] = lambda: None
    ) -> list[Reply]:
        replies = []
        for request in requests:
            self.prompts.append(request.prompt)
            kind, text = self.right(request.prompt)
            said = self.says(kind, text)
            if request.prompt.endswith(THINK_START):
                said = f"I think.{THINK_END}{said}"
            ids = ids_of(self.vocabulary, said)
            replies.append(parse_reply(self.vocabulary, request, ids, stopped=True))
            on_done()
        return replies

    def right(self, prompt: str) -> tuple[str, str]:
        """Kind and text of the right answer to ``prompt``."""
        last = prompt.rpartition(USER)[2]
        for exam in self.exams:
            if exam.text in prompt:
                questions = [q for q in (*exam.questions, *exam.follow_ups) if q.text in last]
                question = max(questions, key=lambda q: len(q.text))
                fact = question.fact
                return ("evidence", answer(fact)) if fact else ("absent", ABSENT)
        for dialogue in self.dialogues:
            turns = dialogue.turns
            for number, turn in enumerate(turns):
                asked = all(t.user in prompt for t in turns[:number]) and turn.user in last
                if asked and all(tool["name"] in prompt for tool in dialogue.tools):
                    text = generated_text(dialogue, number).removesuffix("<｜end▁of▁sentence｜>")
                    return turn.kind, text
        raise AssertionError(prompt)


class NoDecoder(Decoder):
    """Has nothing to remember."""

    def __init__(self) -> None:
        pass

    def remember(self, ids: Sequence[int]) -> None:
        pass

    def forget(self) -> None:
        pass


@pytest.fixture(scope="module")
def exams(tokenizer: Tokenizer) -> list[DocumentExam]:
    return draw_documents(tokenizer, seed=3, bucket=BUCKET, num_questions=30)


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    return [
        *draw_tool_dialogues(seed=3, first=0, count=6, num_requests=2),
        *draw_tool_dialogues(seed=3, first=6, count=12, num_requests=1),
    ]


def rates(examiner: Examiner, task: str, mode: str, turn: str) -> dict[str, float]:
    (row,) = (
        r for r in merged([examiner]) if (r["task"], r["mode"], r["turn"]) == (task, mode, turn)
    )
    return {name: share["rate"] for name, share in row["measures"].items()}


MODES = ("non-think", "think")
TURNS = ("first", "follow-up")


def test_a_model_that_answers_right_gets_full_marks(
    tokenizer: Tokenizer, exams: list[DocumentExam], dialogues: list[Dialogue]
) -> None:
    oracle = Oracle(tokenizer, exams, dialogues)
    done: list[None] = []
    examiner = Examiner(oracle, on_done=lambda: done.append(None))
    examiner.ask_documents(exams, BUCKET[1])
    examiner.ask_tools(dialogues)
    for row in merged([examiner]):
        assert all(share["rate"] == 1.0 for share in row["measures"].values()), row
        assert row["wrong_examples"] == []
    totals = {
        (row["task"], row["mode"], row["turn"]): next(iter(row["measures"].values()))["total"]
        for row in merged([examiner])
    }
    num_absent = sum(q.fact is None for e in exams for q in e.questions)
    for mode in MODES:
        assert totals["evidence", mode, "first"] == 30
        assert totals["evidence", mode, "follow-up"] == 2 * len(exams)
        assert totals["absent", mode, "first"] == num_absent
        assert totals["tool", mode, "first"] == 18
        assert totals["tool", mode, "follow-up"] == 6
    assert len(done) == len(oracle.prompts) == num_answers([exams], dialogues)
    # Right calls stand in the conversation as the model made them, thought included.
    after_calls = [prompt for prompt in oracle.prompts if "<tool_result>" in prompt]
    assert sum("I think." in prompt for prompt in after_calls) == 18 + 2 * 6


def test_a_model_that_always_declines_is_right_about_absent_facts_only(
    tokenizer: Tokenizer, exams: list[DocumentExam], dialogues: list[Dialogue]
) -> None:
    examiner = Examiner(Oracle(tokenizer, exams, dialogues, says=lambda *_: ABSENT))
    examiner.ask_documents(exams, BUCKET[1])
    examiner.ask_tools(dialogues)
    for mode in MODES:
        assert rates(examiner, "absent", mode, "first") == {"refused": 1.0}
        for turn in TURNS:
            assert set(rates(examiner, "evidence", mode, turn).values()) == {0.0}
            assert set(rates(examiner, "tool", mode, turn).values()) == {0.0}


@pytest.mark.parametrize("well_formed", [0.0, 1.0])
def test_wrong_calls_do_not_spoil_the_answers_from_results(
    well_formed: float, tokenizer: Tokenizer, dialogues: list[Dialogue]
) -> None:
    def no_right_calls(kind: str, text: str) -> str:
        if kind != "call":
            return text
        return (
            text.replace('invoke name="', 'invoke name="wrong_') if well_formed else "A wrong_ one."
        )

    oracle = Oracle(tokenizer, [], dialogues, says=no_right_calls)
    examiner = Examiner(oracle)
    examiner.ask_tools(dialogues)
    for mode in MODES:
        for turn in TURNS:
            assert rates(examiner, "tool", mode, turn) == {
                "well_formed": well_formed,
                "fits_schema": 0.0,
                "correct": 0.0,
                "answer": 1.0,
                "round_trip": 0.0,
            }
    assert not any("wrong_" in prompt for prompt in oracle.prompts)


def test_a_stray_call_instead_of_an_answer_is_wrong_and_does_not_end_the_conversation(
    tokenizer: Tokenizer, dialogues: list[Dialogue]
) -> None:
    calls = {}

    def calls_again(kind: str, text: str) -> str:
        if kind == "call":
            calls["last"] = text
            return text
        return calls["last"]

    examiner = Examiner(Oracle(tokenizer, [], dialogues, says=calls_again))
    examiner.ask_tools(dialogues)
    for mode in MODES:
        for turn in TURNS:
            measured = rates(examiner, "tool", mode, turn)
            assert (measured["correct"], measured["answer"]) == (1.0, 0.0)


def test_parts_of_an_exam_add_up(
    tokenizer: Tokenizer, exams: list[DocumentExam], dialogues: list[Dialogue]
) -> None:
    def examined(*parts: Sequence[DocumentExam]) -> list[dict[str, Any]]:
        def half_right(kind: str, text: str) -> str:
            return text if len(text) % 2 else "Who knows?"

        examiners = [Examiner(Oracle(tokenizer, exams, dialogues, half_right)) for _ in parts]
        for examiner, part in zip(examiners, parts, strict=True):
            examiner.ask_documents(part, BUCKET[1])
        return merged(examiners)

    assert examined(exams) == examined(exams[:2], exams[2:])


def test_follow_ups_build_on_the_models_own_answers(
    tokenizer: Tokenizer, exams: list[DocumentExam]
) -> None:
    oracle = Oracle(tokenizer, exams, [], says=lambda kind, text: "Who knows?")
    Examiner(oracle).ask_documents(exams[:1], BUCKET[1])
    num_earlier = sorted(prompt.count("Who knows?") for prompt in oracle.prompts)
    assert num_earlier == [0] * (2 * len(exams[0].questions)) + [1, 1, 2, 2]


def test_wrong_answers_are_kept_to_be_read(tokenizer: Tokenizer, exams: list[DocumentExam]) -> None:
    examiner = Examiner(Oracle(tokenizer, exams, [], says=lambda kind, text: "Who knows?"))
    examiner.ask_documents(exams, BUCKET[1])
    tally = examiner.tallies[Slice("evidence", BUCKET[1], "non-think", "first")]
    example = tally.examples[0]
    fact = exams[0].questions[0].fact
    assert fact is not None
    assert example["question"] == exams[0].questions[0].text
    assert fact.sentence in example["expected"]
    assert example["got"] == "Who knows?"


# ---- whole evaluations -------------------------------------------------------------------------
def save_checkpoint(folder: Path, step: int = 7) -> dict[str, Any]:
    state = {
        "trainer": {"model": small_model().state_dict(), "num_steps": step, "num_tokens": 99},
        "settings": {"model": SMALL.to_dict()},
    }
    save_run_state(folder, step, state)
    return state


def test_runs_checkpoints_and_model_folders_can_be_evaluated(tmp_path: Path) -> None:
    state = save_checkpoint(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000007.pt"
    save_model(small_model(), tmp_path / "model")
    for path in (tmp_path, newest, tmp_path / "model"):
        candidate = load_candidate(path)
        for name, tensor in candidate.model.state_dict().items():
            assert tensor.equal(state["trainer"]["model"][name])
    assert load_candidate(tmp_path).source == {
        "checkpoint": str(newest), "step": 7, "tokens": 99,
    }  # fmt: skip
    assert load_candidate(tmp_path / "model").source == {"model": str(tmp_path / "model")}


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a model folder nor a run"):
        load_candidate(tmp_path)
    save_run_state(tmp_path, 1, {"something": 1})
    with pytest.raises(CheckpointError, match=r"step-00000001.pt: not a checkpoint of a training"):
        load_candidate(tmp_path)


def test_an_untrained_model_gets_a_complete_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path)
    out = tmp_path / "eval.json"
    options = ["--samples", "1", "--workers", "2", "--max-tokens", "512", "--tokenizer", str(NANO)]
    assert main([str(tmp_path), "--out", str(out), *options]) == 0
    report = json.loads(out.read_text("utf-8"))
    assert (report["step"], report["samples"], report["seed"]) == (7, 1, 0)
    assert report["parameters"] == sum(p.numel() for p in small_model().parameters())
    assert report["overall"]["evidence proven"]["right"] == 0
    assert report["overall"]["evidence proven"]["total"] == 2
    assert {(r["task"], r["mode"], r["turn"]) for r in report["slices"]} >= {
        (task, mode, "first") for task in ("evidence", "tool") for mode in MODES
    }
    shown = capsys.readouterr().out
    assert "evidence, held-out" in shown
    assert "0.0 (0.0-79.3)" in shown  # none of one
    header, lines = table_rows(report, "tool")
    assert header == [
        "mode", "turn", "answers", "well_formed", "fits_schema", "correct", "answer", "round_trip",
    ]  # fmt: skip
    assert all(len(line) == len(header) for line in lines)


def test_the_command_explains_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert "neither a model folder nor a run" in capsys.readouterr().err
    save_checkpoint(tmp_path)
    assert main([str(tmp_path), "--samples", "0", "--tokenizer", str(NANO)]) == 1
    assert "samples must be >= 1, got 0" in capsys.readouterr().err
