"""Outcomes of experiments: the file, its hostile variants, and what people are shown."""

from __future__ import annotations

import json

import pytest

from cachegen.errors import InputError
from cachegen.experiments.markdown import MAX_ROWS, format_outcomes, format_table
from cachegen.experiments.outcome import (
    Column,
    Figure,
    Table,
    format_value,
    list_outcomes,
    read_outcome,
    write_outcome,
)
from cachegen.experiments.page import _draw, write_page
from tests.fixtures.outcomes import make_outcome


def test_a_file_holds_all_of_an_outcome(tmp_path):
    path = write_outcome(tmp_path, make_outcome())
    assert path.name == "sizes.json" and read_outcome(path) == make_outcome()
    assert list_outcomes(tmp_path) == [make_outcome()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format"),
        ({"tables": []}, "figures[0].table"),
        ({"title": 1}, "title"),
        ({"notes": [1]}, "notes"),
        ({"setting": {"model": []}}, "setting.model"),
    ],
)
def test_files_that_are_none_are_refused_by_name(tmp_path, change, said):
    path = write_outcome(tmp_path, make_outcome())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=rf"sizes\.json: {said.replace('[', '.').replace(']', '.')}"):
        read_outcome(path)


def test_rows_have_the_columns_of_their_table(tmp_path):
    path = write_outcome(tmp_path, make_outcome())
    content = json.loads(path.read_text())
    del content["tables"][0]["rows"][1]["kl"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tables\[0\].rows\[1\]"):
        read_outcome(path)


def test_a_folder_without_results_says_who_writes_them(tmp_path):
    with pytest.raises(InputError, match=r"has no results; scripts/paper.py writes them"):
        list_outcomes(tmp_path)


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (None, 3, ""),
        (True, None, "yes"),
        (7, 3, "7"),
        ("text", 3, "text"),
        (1.0, 3, "1.00"),
        (0.28874, 4, "0.2887"),
        (125.0, 3, "125"),
        (1234.5, 2, "1,200"),
        (0.0000104, 3, "1.04e-05"),
        (0.0, 3, "0.00"),
    ],
)
def test_values_are_shown_with_their_digits(value, digits, shown):
    assert format_value(value, digits) == shown


def test_markdown_has_every_value_and_escapes_what_would_end_a_cell():
    table = Table("t", "T", (Column("a|b", "a|b"), Column("n", "n", 2)), ({"a|b": "x|y", "n": 0.5},))
    assert format_table(table) == "| a\\|b | n |\n|---|---:|\n| x\\|y | 0.50 |\n"
    text = format_outcomes([make_outcome()])
    assert "| size | 3.5 (a 7B model) | 2.5 |" in text and '| c, "d" | 1.00 | 0.10 |' in text
    assert text.startswith("# The paper's experiments on a model\n")


def test_long_tables_are_named_and_not_written_out():
    outcome = make_outcome()
    rows = tuple({"method": "m", "bits": 1.0, "kl": 1.0} for _ in range(MAX_ROWS + 1))
    table = Table("methods", "Every method", outcome.tables[0].columns, rows)
    text = format_outcomes([type(outcome)(**{**vars(outcome), "tables": (table,)})])
    assert f"Every method: {MAX_ROWS + 1} rows, in sizes.json." in text and "| m |" not in text


def test_the_page_needs_no_other_file_and_lets_no_text_become_markup():
    page = write_page({"a <model>": [make_outcome()]}, "A & B")
    ours = page[: page.index('<script type="application/json"')]
    assert "<title>A &amp; B</title>" in ours and "a &lt;model&gt;" in ours and "KL &lt;nats&gt;" in ours
    assert "Every byte &lt;/script&gt; counts." in ours
    assert " src=" not in ours and "http" not in ours
    assert page.count("</script>") == 3


def test_what_cannot_stand_on_a_logarithmic_axis_is_left_out():
    page = write_page({"m": [make_outcome()]}, "t")
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    traces = data["r0-sizes-figure0"]["traces"]
    assert [(trace["name"], trace["x"]) for trace in traces] == [("a & b", [3.0]), ('c, "d"', [1.0])]
    assert data["r0-sizes-methods"]["rows"][2] == ["a & b", 2.0, None]


def test_a_line_joins_only_what_belongs_together_and_a_series_looks_alike_everywhere():
    columns = (Column("text", "text"), Column("method", "method"), Column("x", "x", 2), Column("y", "y", 2))
    values = [("a", "m", 0.0, 1.0), ("a", "n", 1.0, 1.0), ("a", "n", 2.0, 2.0), ("b", "n", 1.0, 3.0)]
    table = Table("t", "T", columns, tuple(dict(zip(("text", "method", "x", "y"), row, strict=True)) for row in values))
    joined, logarithmic = (Figure("f", "t", "x", "y", "method", split="text", log_x=is_log) for is_log in (False, True))
    first, second = _draw(joined, table)["traces"]
    assert (first["name"], second["x"], second["y"]) == ("m", [1.0, 2.0, None, 1.0], [1.0, 2.0, None, 3.0])
    (alone,) = _draw(logarithmic, table)["traces"]
    assert alone["marker"] == second["marker"] and alone["text"] == ["n a", "n a", None, "n b"]
