"""Rules of 9k_prompts/calibration: nothing of the contexts that results are measured on is in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
# The longest run of tokens that both folders have, besides records and frame, has 36: a sentence that the PostgreSQL
# manual has in two chapters. Below that it is the Bible's formulas ("And the LORD spake unto Moses, saying, ...").
SHARED_TOKENS = 40
RECORD = re.compile(r"^register (\S+): (\d{5})$", re.MULTILINE)
FRAME = {"The record of the registers follows.", "The record ends."}


def read_texts(folder: str) -> list[str]:
    entries = json.loads((ROOT / folder / "questions.json").read_text())
    return [(ROOT / folder / entry["file"]).read_text() for entry in entries]


@pytest.fixture(scope="module")
def calibration_texts() -> list[str]:
    return read_texts("9k_prompts/calibration")


@pytest.fixture(scope="module")
def test_texts() -> list[str]:
    return read_texts("9k_prompts")


def test_calibration_has_at_least_eight_contexts_of_9000_tokens(calibration_texts: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(ROOT / "models/tiny-mistral/tokenizer.json"))
    sizes = [len(tokenizer.encode(text).ids) for text in calibration_texts]
    assert len(sizes) >= 8
    assert all(8900 <= size <= 9100 for size in sizes)


def test_no_register_and_no_value_is_in_both(calibration_texts: list[str], test_texts: list[str]) -> None:
    of_calibration, of_tests = (
        [record for text in texts for record in RECORD.findall(text)] for texts in (calibration_texts, test_texts)
    )
    assert len(of_calibration) == 40 * len(calibration_texts)
    for field in (0, 1):
        assert {record[field] for record in of_calibration}.isdisjoint(record[field] for record in of_tests)


def test_no_line_is_in_both_but_titles_of_one_word(calibration_texts: list[str], test_texts: list[str]) -> None:
    of_calibration, of_tests = (
        {line for text in texts for line in text.split("\n")} for texts in (calibration_texts, test_texts)
    )
    assert all(line in FRAME or line.isalpha() for line in of_calibration & of_tests)


def test_no_long_run_of_tokens_is_in_both(calibration_texts: list[str], test_texts: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(ROOT / "models/tiny-mistral/tokenizer.json"))

    def runs(texts: list[str]) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()
        for text in texts:
            prose = "\n".join(line for line in text.split("\n") if not RECORD.match(line) and line not in FRAME)
            ids = tokenizer.encode(prose, add_special_tokens=False).ids
            found.update(tuple(ids[i : i + SHARED_TOKENS]) for i in range(len(ids) - SHARED_TOKENS + 1))
        return found

    assert runs(calibration_texts).isdisjoint(runs(test_texts))
