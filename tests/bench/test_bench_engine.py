"""The benchmark measures the same answer everywhere and checks the cache against the formula."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rorqual.bench.engine import RorqualPeer, build_model, main, measure
from rorqual.bench.peers import Peer, TransformersPeer
from rorqual.model.transformer import Transformer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The benchmark sets the thread count; give it back to the other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model()


def test_both_engines_give_the_same_tokens_and_the_predicted_cache(model: Transformer) -> None:
    pytest.importorskip("transformers")
    peers: dict[str, Peer] = {
        "rorqual": RorqualPeer(model),
        "transformers": TransformersPeer(model),
    }
    ours, theirs = measure(peers, 512, decode_tokens=4, repetitions=1)
    assert (ours.engine, theirs.engine) == ("rorqual", "transformers")
    assert theirs.same_tokens == ours.same_tokens == 5
    for row in (ours, theirs):
        # 3 CSA layers of (64 + 64) / 4 floats and 3 HCA layers of 64 / 128 floats per token.
        assert row.predicted_bytes_per_token == 4 * (3 * 128 / 4 + 3 * 64 / 128)
        assert row.cache_bytes_per_token == pytest.approx(row.predicted_bytes_per_token, rel=0.1)
        assert row.prefill_tokens_per_cpu_s > 0
        assert row.decode_tokens_per_cpu_s > 0


def test_csv_holds_the_conditions_and_one_row_per_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.csv"
    argv = ["--lengths", "128,256", "--peers", "none", "--decode-tokens", "2", "--csv", str(file)]
    assert main(argv) == 0
    lines = file.read_text("utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert any("commit" in line for line in header)
    assert any("--lengths 128,256" in line for line in header)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["prompt_tokens"] for row in rows] == ["128", "256"]
    out = capsys.readouterr().out
    assert all(line in out for line in header)


@pytest.mark.parametrize(
    "argv", [["--lengths", "x"], ["--lengths", "0"], ["--peers", "vllm"], ["--decode-tokens", "1"]]
)
def test_wrong_options_are_usage_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
