"""The numbers of the documents' tables are those of the results files that they come from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import choosing
from cachegen.experiments.markdown import format_outcomes
from cachegen.experiments.outcome import list_outcomes
from cachegen.experiments.registry import in_order
from tests.fixtures import REPOSITORY

SMOLLM2 = REPOSITORY / "docs/results/smollm2"
BUNDLED = REPOSITORY / "docs/results/rate_distortion"
OURS = ("transform", "transform-sinks")
"""The second, which recomputes the first tokens, stands for a setting where it was measured."""
NOISE_FLOOR = ("uncompressed", "checkpoint's dtype")
PREFILL_SHARE = 0.0625  # two of 32 layers
NUM_TOKENS = 8192

Row = Mapping[str, str]


def read_rows(path: Path, protocol: str = "tail") -> dict[tuple[str, str], Row]:
    """Return the rows of a results file by method and setting."""
    with path.open() as stream:
        return {
            (row["method"], row["setting"]): row
            for row in csv.DictReader(stream)
            if row.get("protocol", protocol) == protocol
        }


def read_means(path: Path) -> dict[tuple[str, str], Row]:
    """Return the means over contexts of a file that has a row for each, as far as tables show them."""
    found: dict[tuple[str, str], list[Row]] = {}
    with path.open() as stream:
        for row in csv.DictReader(stream):
            found.setdefault((row["method"], row["setting"]), []).append(row)
    means = {}
    for key, rows in found.items():
        total = {name: sum(float(row[name]) for row in rows) for name in ("encoded_bytes", "num_values", "kl")}
        bits = 8 * total["encoded_bytes"] / total["num_values"]
        means[key] = {"method": key[0], "bits_per_value": str(bits), "kl": str(total["kl"] / len(rows))}
    return means


def bits_at(kl: float, rows: Mapping[tuple[str, str], Row]) -> float:
    """Return the bits per value at which the transform has a KL, on straight lines between its logarithms."""
    chosen = {setting: rows[method, setting] for name in OURS for method, setting in rows if method == name}
    points = sorted((float(row["kl"]), float(row["bits_per_value"])) for row in chosen.values())
    assert points[0][0] <= kl <= points[-1][0]
    logs = np.log(np.array(points))
    return float(np.exp(np.interp(np.log(kl), logs[:, 0], logs[:, 1])))


def is_shown(text: str, value: float) -> bool:
    """Tell whether a text is this value, rounded to the digits it has."""
    number = text.replace(",", "")
    digits = len(number.partition(".")[2])
    return abs(float(number) - value) <= 0.5001 * 10.0**-digits


def table_under(document: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins so."""
    lines = (REPOSITORY / document).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def parse_point(label: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return methods and settings that a row names, and the KLs in its brackets."""
    match = re.fullmatch(r"(?:`(?P<method>[\w.-]+)` (?P<settings>.+?)|the noise floor) \((?P<kl>[\d., ]+)\)", label)
    assert match is not None, label
    if match["method"] is None:
        return [NOISE_FLOOR], [match["kl"]]
    return [(match["method"], setting) for setting in match["settings"].split(", ")], match["kl"].split(", ")


def check_equal_kl(label: str, cells: Sequence[str], rows: Mapping[tuple[str, str], Row], ours=None) -> None:
    """Check a row of bits per value, the transform's at the same KL, and their ratio or the ratios' range."""
    points, kls = parse_point(label)
    ratios = []
    for point, kl, bits, own in zip(points, kls, *(cell.split(", ") for cell in cells[:2]), strict=True):
        row = rows[point]
        expected = bits_at(float(row["kl"]), ours or rows)
        assert is_shown(kl, float(row["kl"])), (label, row["kl"])
        assert is_shown(bits, float(row["bits_per_value"])), (label, row["bits_per_value"])
        assert is_shown(own, expected), (label, expected)
        ratios.append(float(row["bits_per_value"]) / expected)
    for text, ratio in zip(cells[2].split(" to "), sorted({min(ratios), max(ratios)}), strict=True):
        assert is_shown(text, ratio), (label, ratio)


@pytest.mark.parametrize("folder", sorted((REPOSITORY / "docs/results/paper").iterdir()), ids=lambda path: path.name)
def test_experiments_are_written_out_from_their_files(folder):
    assert (folder / "README.md").read_text() == format_outcomes(in_order(list_outcomes(folder)))


def test_the_table_for_choosing_is_that_of_its_benchmarks():
    results = REPOSITORY / "docs/results/choosing"
    methods, prefill = (json.loads((results / f"{name}.json").read_text()) for name in ("methods", "prefill"))
    layers, heads, dims = methods["shape"]
    rates = {row["case"]: row["decode_gb_per_second"] for row in methods["cases"]}
    text_seconds = NUM_TOKENS / prefill["tokens_per_second"] / PREFILL_SHARE
    table = choosing.format_table(4 * layers * heads * dims * NUM_TOKENS, rates, text_seconds)
    assert table in (REPOSITORY / "docs/choosing.md").read_text()


def test_the_readme_shows_what_was_measured():
    rows, fine = read_rows(SMOLLM2 / "results.csv"), read_means(SMOLLM2 / "contexts_fine.csv")
    names = {
        "llama.cpp's q8_0": ("llama.cpp", "q8_0"),
        "llama.cpp's q4_0": ("llama.cpp", "q4_0"),
        "`cachegen` 64/32 bins": ("cachegen", "64/32 bins"),
        "`cachegen` 32/16 bins": ("cachegen", "32/16 bins"),
        "KVTC-like, 1 bit": ("pca", "1 bit"),
    }
    shown = {cells[0]: cells[1:] for cells in table_under("README.md", "| method | bits per value | KL |")}
    for name, point in names.items():
        bits, kl, own = shown[name]
        assert is_shown(bits, float(rows[point]["bits_per_value"])) and is_shown(kl, float(rows[point]["kl"]))
        expected = bits_at(float(rows[point]["kl"]), fine if "finer profile" in own else rows)
        assert is_shown(own.split()[0], expected), (name, expected)
    own = [row for key, row in rows.items() if key[0] == "transform-own"]
    bits, kl, equal = shown["`transform` without a profile of the model"]
    (row,) = [row for row in own if is_shown(bits, float(row["bits_per_value"]))]
    assert is_shown(kl, float(row["kl"])) and is_shown(equal.split()[0], bits_at(float(row["kl"]), rows))


def test_equal_losses_of_the_real_model_are_those_that_were_measured():
    both = {protocol: read_rows(SMOLLM2 / "results.csv", protocol) for protocol in ("tail", "half")}
    for protocol, label, *cells in table_under("docs/results/smollm2/README.md", "| protocol | at the KL of |"):
        check_equal_kl(label, cells, both[protocol])
    fine = read_means(SMOLLM2 / "contexts_fine.csv")
    for label, *cells in table_under("docs/results/smollm2/README.md", "| at the KL of | bits"):
        check_equal_kl(label, cells, both["tail"], fine)


def test_sizes_of_the_bundled_model_are_those_that_were_measured():
    rows = read_rows(BUNDLED / "results.csv")
    for method, setting, bits, smaller, _, kl, *_ in table_under("docs/results.md", "| method | setting |"):
        row = rows[method.strip("`"), setting]
        mean, worst = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", kl).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert is_shown(bits, float(row["bits_per_value"])) and is_shown(mean, float(row["kl"]))
        assert is_shown(worst, float(row["kl_worst"]))
        assert is_shown(smaller.removesuffix("x"), 16 / float(row["bits_per_value"]))
    for label, *cells in table_under("docs/results.md", "| at the KL of | bits per value |"):
        check_equal_kl(label.replace(" bit (", "-bit (") if "pca-profile" not in label else label, cells, rows)
