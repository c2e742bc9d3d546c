import os
import random
from pathlib import Path

import pytest

SENTENCE = "the level of a memory is how often its weights are written; fast and slow, naïve, 学習, 🧠."


@pytest.fixture
def prose():
    """prose(number of words, seed): reproducible text with lines, spaces and characters of 1-4 bytes."""

    def make(num_words: int, seed: int = 0) -> str:
        draw = random.Random(seed)
        words, spaces = SENTENCE.split(), [" ", " ", " ", "\n", "\n\n"]
        return "".join(draw.choice(words) + draw.choice(spaces) for _ in range(num_words))

    return make


@pytest.fixture(scope="session")
def shakespeare_path() -> Path:
    folders = [os.environ.get("NESTED_LEARNING_DATA"), Path(__file__).parents[3].parent / "shared" / "data"]
    for folder in folders:
        if folder and (path := Path(folder) / "tinyshakespeare.txt").is_file():
            return path
    pytest.skip("tinyshakespeare.txt is neither in NESTED_LEARNING_DATA nor in ../shared/data")
