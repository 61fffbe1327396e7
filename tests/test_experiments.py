"""The paper's experiments: each on a small bench, what they compute against a second way, and scripts/paper.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cachegen.comparison.datasets import PromptContext
from cachegen.comparison.schemes import SavedCache
from cachegen.experiments import insights, layer_sensitivity, slo_misses
from cachegen.experiments.bench import Bench, Prices
from cachegen.experiments.outcome import Outcome, read_outcome, write_outcome
from cachegen.experiments.registry import EXPERIMENTS, in_order
from cachegen.experiments.running import find_done, run_experiment
from cachegen.experiments.timings import EncodingTimes
from cachegen.kv_cache import hash_planes
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.model import load_model
from scripts import paper, report
from tests.fixtures import BUNDLED_MODEL, REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CHARACTERS = 1000


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bundled model, and a context of a few hundred tokens."""
    text = (REPOSITORY / "9k_prompts/0.txt").read_text()
    contexts = [PromptContext(f"{i}.txt", text[i * NUM_CHARACTERS :][:NUM_CHARACTERS], ()) for i in range(3)]
    load = functools.cache(functools.partial(load_model, BUNDLED_MODEL, device=torch.device("cpu")))
    return Bench(
        loaded=load_model(BUNDLED_MODEL, device=torch.device("cpu"), dtype=torch.float32),
        load_for_prefill=load,
        data_sets={"text": contexts[:1]},
        calibration=contexts[1:],
        profile=load_profile(REPOSITORY / "models/tiny-mistral/profile", for_encoding=True),
        work=tmp_path_factory.mktemp("work"),
        left_out=frozenset({"pca", "cachegen-delta"}),
        block_size=128,
        num_threads=1,
        config=REPOSITORY / "config/adaptation",
        prices=Prices(0.02, 2.0),
        say=lambda line: None,
    )


@pytest.fixture(scope="module")
def outcomes(bench: Bench) -> dict[str, Outcome]:
    """The outcome of every experiment, with fewer simulated links."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slo_misses, "NUM_TRACES", 4)
        return {name: run(bench) for name, run in EXPERIMENTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_finds_something_and_its_figures_can_be_drawn(outcomes, name, tmp_path):
    outcome = outcomes[name]
    assert outcome.name == name and outcome.tables and all(table.rows for table in outcome.tables)
    assert read_outcome(write_outcome(tmp_path, outcome)) == outcome
    for figure in outcome.figures:
        assert sum(row[figure.y] is not None for row in outcome.table(figure.table).rows) > 1


def test_sizes_are_compared_with_8_bit(outcomes):
    rows = {(row["method"], row["setting"]): row for row in outcomes["size-quality"].table("methods").rows}
    eight_bit, exact = rows["uniform", "8-bit"], rows["lossless", "exact"]
    assert eight_bit["over_8_bit"] == 1 and 8 < eight_bit["bits_per_value"] < 8.2
    assert exact["kl"] == 0 and exact["agreement"] == 1
    ours = rows["cachegen, without deltas", "32/16 bins"]
    assert outcomes["size-quality"].published[0].ours.startswith(f"{1 / ours['over_8_bit']:.2f} at")


def test_entropy_is_that_of_each_groups_counts():
    symbols = np.random.default_rng(0).integers(0, insights.NUM_BINS - 1, (3, 200))
    expected = 0.0
    for group in symbols.tolist():
        counts = Counter(group)
        expected -= sum(n * math.log2(n / len(group)) for n in counts.values())
    assert insights._code_length(symbols) == pytest.approx(expected)


def test_finer_groups_never_have_more_entropy(outcomes):
    bits = {row["grouping"]: row["bits"] for row in outcomes["insights"].table("entropies").rows}
    assert bits["nothing"] >= bits["keys or values"] >= bits["layer"] >= bits["layer and channel"]
    assert bits["nothing"] >= bits["channel"] >= bits["layer and channel"]


def test_differences_are_to_the_first_of_ten_tokens():
    rows = torch.arange(25.0)[:, None]
    expected = [token % 10 for token in range(25) if token % 10]
    assert insights._differences(rows)[:, 0].tolist() == expected


def test_one_layer_at_a_time_loses_precision(bench, outcomes):
    rows = outcomes["layer-sensitivity"].table("layers").rows
    assert [(row["layer"], row["part"]) for row in rows] == [(i, part) for i in range(6) for part in ("keys", "values")]
    assert all(row["kl"] > 0 for row in rows)
    saved: SavedCache = bench.load_caches("text")[0]
    before = hash_planes(saved.cache)
    layer_sensitivity._measure(bench, saved, {})
    assert hash_planes(saved.cache) == before


def test_a_chunk_is_decoded_while_those_behind_it_arrive():
    times = EncodingTimes("m", (1000, 1000, 1000), 0.0, 3.0)
    assert times.seconds_over(8e9) == pytest.approx(3.0, rel=1e-5)  # decoding alone counts
    assert times.seconds_over(80) == pytest.approx(300 + 1)  # after the last has arrived, its own decoding
    assert times.num_bytes == 3000


def test_chunks_cost_bytes_and_one_chunk_is_the_measure(outcomes):
    rows = outcomes["chunk-length"].table("lengths").rows
    methods = {row["method"] for row in rows}
    for method in methods:
        shares = [row["over_one_chunk"] for row in rows if row["method"] == method]
        assert shares[-1] == 1 and shares[0] > 1


def test_storage_pays_from_as_many_uses_as_its_price_is_of_computing(outcomes):
    rows = {row["method"]: row for row in outcomes["storage-cost"].table("costs").rows}
    raw = rows["cache, fp16"]
    assert raw["megabytes"] == pytest.approx(9491 * 65536 * 2 / 1e6)
    assert raw["month"] == pytest.approx(raw["megabytes"] / 1000 * 0.02)
    assert rows["uniform, 8 bits"]["uses"] < 0.6 * raw["uses"]


# --- what is done already ---------------------------------------------------------------------------------------------


def test_what_is_done_is_kept_until_what_it_depends_on_changes(bench, tmp_path):
    name = "storage-cost"
    assert find_done(tmp_path, name, bench) is None
    outcome = run_experiment(tmp_path, name, bench, "the command")
    assert find_done(tmp_path, name, bench) == outcome and outcome.setting["command"] == "the command"
    for changed in (
        dataclasses.replace(bench, prices=Prices(1.0, 1.0)),
        dataclasses.replace(bench, data_sets={"text": bench.calibration}),
        dataclasses.replace(bench, profile=None),
    ):
        assert find_done(tmp_path, name, changed) is None
    path = tmp_path / f"{name}.json"
    path.write_text(path.read_text()[:-20])
    assert find_done(tmp_path, name, bench) is None


def test_a_report_is_in_the_order_of_the_experiments(outcomes):
    shuffled = [outcomes[name] for name in sorted(outcomes)]
    assert [outcome.name for outcome in in_order(shuffled)] == list(EXPERIMENTS)


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """Flags of a small text."""
    path = tmp_path / "text.txt"
    path.write_text((REPOSITORY / "9k_prompts/0.txt").read_text()[: 4 * NUM_CHARACTERS])
    place = ["--path_to_context", str(path), "--path_to_calibration", str(path), "--context_tokens", "300"]
    return [*place, "--num_contexts", "1", "--num_calibration", "2", "--output_path", str(tmp_path / "out")]


def test_the_script_resumes_and_its_page_shows_all(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert paper.main(["chunk-length", *text, "--quiet"]) == 0
    before = (out / "chunk-length.json").stat().st_mtime_ns
    assert paper.main(["chunk-length", "storage-cost", *text, "--json", str(tmp_path / "said.json"), "--quiet"]) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert (said["done"], said["kept"]) == (["storage-cost"], ["chunk-length"])
    assert (out / "chunk-length.json").stat().st_mtime_ns == before
    assert "## Length of chunks" in (out / "README.md").read_text()
    assert report.main([str(out), "--output_path", str(tmp_path / "page.html"), "--quiet"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.index("Length of chunks") < page.index("Cost of storage")
    assert capsys.readouterr().err == ""


def test_a_text_that_has_changed_is_measured_anew_and_one_that_is_back_is_not_prefilled_again(text, tmp_path, capsys):
    path, out = Path(text[1]), tmp_path / "out"
    first = path.read_text()
    found = []
    for content in (first, first[::-1], first):
        path.write_text(content)
        assert paper.main(["storage-cost", *text, "--quiet"]) == 0, capsys.readouterr().err
        found.append((out / "storage-cost.json").read_text())
    assert found[0] != found[1] and found[0] == found[2]
    assert len(list((out / "work").glob("text-*"))) == 2


def test_two_data_sets_of_one_name_are_refused(text, tmp_path, capsys):
    path = text[1]
    assert paper.main(["chunk-length", *text, "--path_to_context", path, path, "--quiet"]) != 0
    assert "two data sets of the name text" in capsys.readouterr().err


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path), "--output_path", str(tmp_path / "page.html")]) != 0
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "page.html").exists()
