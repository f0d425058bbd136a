"""The shipped nano model's tokenizer and card."""

from __future__ import annotations

import pytest
from protocol_samples import NANO, TOKENIZER

from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return TOKENIZER


@pytest.fixture(scope="session")
def nano_card() -> ModelCard:
    return ModelCard.from_dir(NANO)
