"""Every family of the zoo: right in blocks, files and answers, or refused in one line; as docs/models.md says."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from cachegen.errors import BackendUnavailableError, InputError
from tests.fixtures import REPOSITORY
from tests.zoo.checkpoints import Specimen
from tests.zoo.checks import (
    check_answers,
    check_blocks,
    check_bytes,
    check_limit,
    check_python,
    check_questions,
    check_windows,
)
from tests.zoo.families import FAMILIES
from tests.zoo.report import describe
from tests.zoo.shapes import SHAPES, describe_shapes

PAGE = REPOSITORY / "docs/models.md"
CONSTRAINTS = REPOSITORY / "tools/constraints.txt"


def test_there_are_families_enough():
    assert sum(family.is_known for family in FAMILIES.values()) >= 45
    assert len({family.name for family in FAMILIES.values()}) == len(FAMILIES)


def test_blocks_give_the_cache_of_one_pass(working: Specimen):
    check_blocks(working)


def test_answers_from_lossless_files_are_those_from_the_text(working: Specimen, tmp_path: Path):
    check_answers(working, tmp_path)


def test_a_notebook_gets_the_answer_from_the_text(working: Specimen, tmp_path: Path):
    check_python(working, tmp_path)


def test_predictions_behind_a_context_are_those_of_one_pass(working: Specimen):
    check_questions(working)


def test_what_windows_and_chunks_let_go_of_is_seen_by_no_later_token(working: Specimen):
    check_windows(working)


def test_what_transformers_keeps_is_what_is_stored(working: Specimen, tmp_path: Path):
    check_bytes(working, tmp_path)


def test_what_is_too_long_is_refused_before_anything_is_computed(working: Specimen):
    if working.exact.length_limit is None:
        pytest.skip("it computes its positions, and has no limit")
    check_limit(working)


def test_a_refusal_is_one_line_and_comes_with_the_loading(specimen: Specimen):
    error = specimen.error
    if error is None:
        pytest.skip("it works")
    assert isinstance(error, InputError | BackendUnavailableError)
    assert "\n" not in str(error) and str(error).startswith(f"{specimen.folder}: ")


def test_what_the_page_says_works_works_with_any_transformers(specimen: Specimen):
    if "install a later transformers" in str(specimen.error):
        pytest.skip("this transformers has no names for its states")
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| {specimen.family.name} |")]
    assert (rows[-1].split(" | ")[2] == "yes") == (specimen.error is None)


def test_the_page_says_what_is_found(specimen: Specimen):
    if f"transformers=={version('transformers')}" not in CONSTRAINTS.read_text("utf-8").splitlines():
        pytest.skip("docs/models.md is of the transformers of tools/constraints.txt")
    row = describe(specimen)
    assert row in PAGE.read_text("utf-8").splitlines(), "docs/models.md is stale: run scripts/model_zoo.py"


def test_the_page_has_no_other_families():
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    others = {row.split(" | ")[0].removeprefix("| ") for row in rows} - set(FAMILIES)
    assert others <= {"family", "model", *SHAPES}


def test_the_page_says_how_much_no_later_token_sees():
    lines = PAGE.read_text("utf-8").splitlines()
    assert set(describe_shapes()) <= set(lines), "docs/models.md is stale: run scripts/model_zoo.py"
