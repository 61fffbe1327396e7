"""scripts/rate_distortion.py: files and their fields, resuming, determinism, and retrieval in one pass."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from cachegen.comparison import rate_distortion
from cachegen.comparison.continuation import count_same_tokens, write_continuation
from cachegen.comparison.datasets import Question, read_contexts
from cachegen.comparison.report import COLUMNS
from cachegen.comparison.retrieval import expect_answers, score_retrieval, write_answers
from cachegen.comparison.scoring import wilson_interval
from cachegen.kv_cache import from_planes, load_kv_cache, save_kv_cache
from cachegen.pipeline.generate import generate_answer
from cachegen.pipeline.model import LoadedModel, load_model
from cachegen.pipeline.model_cache import view_kv_cache
from cachegen.pipeline.prefill import prefill, tokenize
from tests.fixtures import read_folder

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("rate_distortion_script", ROOT / "scripts/rate_distortion.py")
assert _SPEC is not None and _SPEC.loader is not None
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)

pytestmark = pytest.mark.usefixtures("one_thread")


def write_prompts(folder: Path, *sources: str) -> Path:
    """Cut long contexts down to their first lines, which have records, and ask for those."""
    folder.mkdir()
    entries = []
    for number, source in enumerate(sources):
        lines = (ROOT / source).read_text().split("\n")[:7]
        records = [line.removeprefix("register ").split(": ") for line in lines if line.startswith("register ")]
        form = "What is the value of register {0}?\nregister {0}:"
        (name, answer), *others = records
        text = "\n".join([*lines, "The record ends.", form.format(name)])
        (folder / f"{number}.txt").write_text(text)
        questions = [{"question": "\n" + form.format(other), "answer": value} for other, value in others]
        questions.append({"question": "\n" + form.format("never-said"), "answer": "12345"})
        entries.append(
            {"file": f"{number}.txt", "question": form.format(name), "answer": answer, "questions": questions}
        )
    (folder / "questions.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    prompts = write_prompts(folder / "prompts", "9k_prompts/8.txt", "9k_prompts/12.txt")
    calibration = write_prompts(folder / "calibration", "9k_prompts/calibration/5.txt")
    return ["--path_to_context", str(prompts), "--path_to_calibration", str(calibration), "--quiet"]


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(ROOT / "models/tiny-mistral"), device=torch.device("cpu"), dtype=torch.float32)


def run(inputs: list[str], output: Path, *flags: str, schemes: tuple[str, ...] = ("uniform",)) -> None:
    assert script.main([*inputs, "--output_path", str(output), "--no_plot", "--schemes", *schemes, *flags]) == 0


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_results_have_a_row_per_method_and_setting_with_all_columns(inputs, tmp_path) -> None:
    run(inputs, tmp_path, "--json", str(tmp_path / "all.json"), schemes=("uniform", "cachegen"))
    rows = read_rows(tmp_path / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 3 * 3 + 3 * 4
    assert {row["contexts"] for row in rows} == {"2"}
    questions = [json.loads((Path(inputs[1]) / "questions.json").read_text())]
    asked = sum(1 + len(entry["questions"]) for entry in questions[0])
    assert {int(row["questions"]) for row in rows} == {asked}
    for row in rows:
        assert 0 < float(row["bits_per_value_without_tables"]) <= float(row["bits_per_value"]) < 16
        assert 0 <= float(row["kl"]) <= float(row["kl_worst"])
        assert int(row["tables_bytes"]) < int(row["encoded_bytes"])
        lost, gained = int(row["answers_lost"]), int(row["answers_gained"])
        right = round(float(row["retrieval_accuracy"]) * asked)
        assert right - gained + lost <= asked and int(row["answers_kept"]) <= asked - lost - gained
    assert len(read_rows(tmp_path / "contexts.csv")) == 2 * len(rows)
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(rows)
    assert json.loads((tmp_path / "all.json").read_text())["results"][0]["method"] == "uniform"


def test_a_row_sums_up_the_contexts(inputs, tmp_path) -> None:
    run(inputs, tmp_path)
    row = next(r for r in read_rows(tmp_path / "results.csv") if r["method"] == "uniform" and r["setting"] == "4-bit")
    parts = [r for r in read_rows(tmp_path / "contexts.csv") if (r["method"], r["setting"]) == ("uniform", "4-bit")]
    assert int(row["encoded_bytes"]) == sum(int(part["encoded_bytes"]) for part in parts)
    assert float(row["kl"]) == pytest.approx(sum(float(part["kl"]) for part in parts) / 2, rel=1e-4)
    assert float(row["kl_worst"]) == max(float(part["kl"]) for part in parts)
    assert float(row["bits_per_value"]) == pytest.approx(
        8 * int(row["encoded_bytes"]) / sum(int(part["num_values"]) for part in parts), rel=1e-4
    )


def test_two_runs_give_the_same_files(inputs, tmp_path) -> None:
    run(inputs, tmp_path / "a")
    run(inputs, tmp_path / "b")
    a, b = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert {n: c for n, c in a.items() if ".pkl" not in n} == {n: c for n, c in b.items() if ".pkl" not in n}


def test_a_run_measures_only_what_is_missing(inputs, tmp_path, monkeypatch) -> None:
    measured = []
    original = rate_distortion._Bench.measure

    def spy(self, scheme, setting, key, known, fitted_on):
        measured.append((self._context.name, setting, known is not None))
        return original(self, scheme, setting, key, known, fitted_on)

    monkeypatch.setattr(rate_distortion._Bench, "measure", spy)
    run(inputs, tmp_path)
    assert len(measured) == 6
    results = (tmp_path / "results.csv").read_bytes()
    measured.clear()
    run(inputs, tmp_path)
    assert measured == []
    (tmp_path / "rows/1/uniform_4-bit.json").unlink()
    (tmp_path / "rows/0/uniform_6-bit.json").write_text("{}")
    run(inputs, tmp_path)
    assert measured == [("0.txt", "6-bit", False), ("1.txt", "4-bit", False)]
    assert (tmp_path / "results.csv").read_bytes() == results
    measured.clear()
    row = tmp_path / "rows/1/uniform_4-bit.json"
    row.write_text(row.read_text().replace('"kl": 0.', '"kl": 1.', 1))  # a digit that has changed
    run(inputs, tmp_path)
    assert measured == [("1.txt", "4-bit", False)]
    assert (tmp_path / "results.csv").read_bytes() == results
    measured.clear()
    run(inputs, tmp_path, "--num_questions", "1")
    assert len(measured) == 6


def test_a_result_is_of_the_caches_that_are_there(inputs, tmp_path) -> None:
    """Same tokens, other values: as of another attention kernel, or with other weights."""
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")
    first = read_rows(tmp_path / "results.csv")
    path = tmp_path / "kv/test/test_kv_0.pkl"
    cache, metadata = load_kv_cache(path)
    save_kv_cache(path, from_planes([2 * plane for plane in cache.planes]), metadata)
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")
    assert [row["kl"] for row in read_rows(tmp_path / "results.csv")] != [row["kl"] for row in first]


def test_a_text_is_measured_without_questions(inputs, tmp_path) -> None:
    (tmp_path / "book.txt").write_text((ROOT / "9k_prompts/3.txt").read_text()[:6000])
    flags = ["--path_to_context", str(tmp_path / "book.txt"), "--context_tokens", "400", "--num_contexts", "2"]
    run(inputs, tmp_path / "out", *flags)
    rows = read_rows(tmp_path / "out/contexts.csv")
    assert {row["context"] for row in rows} == {"book-0", "book-1"}
    assert {row["questions"] for row in rows} == {"0"}
    assert read_rows(tmp_path / "out/results.csv")[0]["retrieval_accuracy"] == ""


def test_records_of_a_data_set_are_measured_with_their_question(inputs, tmp_path) -> None:
    prompt = (Path(inputs[1]) / "0.txt").read_text()
    answer = json.loads((Path(inputs[1]) / "questions.json").read_text())[0]["answer"]
    (tmp_path / "x.jsonl").write_text(json.dumps({"input": prompt, "outputs": [answer]}) + "\n")
    run(inputs, tmp_path / "out", "--path_to_context", str(tmp_path / "x.jsonl"))
    rows = read_rows(tmp_path / "out/contexts.csv")
    assert {(row["context"], row["questions"]) for row in rows} == {("x-0", "1")}
    assert max(int(row["right"]) for row in rows) == 1


def test_the_second_half_is_scored_from_the_first(inputs, tmp_path) -> None:
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")
    tail = read_rows(tmp_path / "contexts.csv")
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1", "--protocol", "half")
    half = read_rows(tmp_path / "contexts.csv")
    assert {row["protocol"] for row in half} == {"half"} and {row["protocol"] for row in tail} == {"tail"}
    num_tokens = len(load_kv_cache(tmp_path / "kv/test/test_kv_0.pkl")[1].token_ids) + 1
    values_per_token = 6 * 2 * 128
    assert {int(row["num_values"]) for row in half} == {num_tokens // 2 * values_per_token}
    assert {int(row["scored_tokens"]) for row in half} == {(num_tokens + 1) // 2 - 1}  # the last has no follower
    results = (tmp_path / "results.csv").read_bytes()
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")  # each protocol's results are kept
    assert read_rows(tmp_path / "contexts.csv") == tail
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1", "--protocol", "half")
    assert (tmp_path / "results.csv").read_bytes() == results


def test_the_noise_floor_is_the_first_row_and_smaller_than_any_loss(inputs, tmp_path) -> None:
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1", "--noise_floor")
    first, *others = read_rows(tmp_path / "results.csv")
    assert (first["method"], float(first["bits_per_value"])) == ("uncompressed", 16)
    assert 0 < float(first["kl"]) < min(float(row["kl"]) for row in others if row["setting"] == "4-bit")


def test_perplexity_bytes_and_quantile_are_those_of_the_scored_text(inputs, tmp_path) -> None:
    run(inputs, tmp_path, "--no_retrieval")
    row = read_rows(tmp_path / "results.csv")[0]
    stored = [json.loads((tmp_path / f"rows/{i}/uniform_4-bit.json").read_text()) for i in (0, 1)]
    nll = sum(s["nll"]["decoded"] for s in stored)
    assert float(row["perplexity"]) == pytest.approx(math.exp(nll / sum(s["nll"]["tokens"] for s in stored)), rel=1e-4)
    tail = (Path(inputs[1]) / "0.txt").read_bytes()[-int(stored[0]["nll"]["bytes"]) :].decode()
    loaded_tokens = len(stored[0]["kl_of_tokens"])
    assert stored[0]["nll"]["tokens"] == loaded_tokens - 1 and tail.endswith("register " + tail.split("register ")[-1])
    assert float(row["bits_per_byte"]) == pytest.approx(
        nll / math.log(2) / sum(s["nll"]["bytes"] for s in stored), rel=1e-4
    )
    pooled = sorted(x for s in stored for x in s["kl_of_tokens"])
    assert pooled[-2] <= float(row["kl_quantile"]) * (1 + 1e-5) and float(row["kl_quantile"]) <= pooled[-1] * (1 + 1e-5)


def test_a_folder_of_texts_is_measured_without_questions(inputs, tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    for number in (10, 2):
        text = (ROOT / "9k_prompts/3.txt").read_text()[100 * number : 100 * number + 1500]
        (tmp_path / f"texts/{number}.txt").write_text(text)
    run(inputs, tmp_path / "out", "--path_to_context", str(tmp_path / "texts"))
    assert [row["context"] for row in read_rows(tmp_path / "out/contexts.csv")][::9] == ["2.txt", "10.txt"]


def test_answers_in_own_words_are_paired_with_the_uncompressed_ones(inputs, tmp_path) -> None:
    prompt = (Path(inputs[1]) / "0.txt").read_text()
    answer = json.loads((Path(inputs[1]) / "questions.json").read_text())[0]["answer"]
    records = [{"input": prompt, "outputs": [answer]}, {"input": prompt, "outputs": [answer, "no such thing"]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--path_to_context", str(tmp_path / "x.jsonl"), "--answers", "--no_retrieval"]
    run(inputs, tmp_path / "out", *flags, schemes=("uniform=8-bit",))
    (row,) = (r for r in read_rows(tmp_path / "out/results.csv") if r["method"] == "uniform")
    assert (row["written_questions"], row["written_right_reference"], row["written_lost"]) == ("2", "1", "0")
    low, high = wilson_interval(0, 1)
    assert float(row["written_lost_low"]) == low and float(row["written_lost_high"]) == pytest.approx(high, rel=1e-4)
    answers = [r for r in read_rows(tmp_path / "out/answers.csv") if r["method"] == "uniform"]
    found = [(r["context"], r["score_reference"], r["score"]) for r in answers]
    assert found == [("x-0", "1", "1"), ("x-1", "0.5", "0.5")]
    assert "| 1 of 2 | 0 (0 to 79 %) | 0 |" in (tmp_path / "out/table.md").read_text()


def test_a_continuation_is_counted_up_to_its_first_difference(inputs, loaded) -> None:
    """Against generation token by token from each cache."""
    token_ids = tokenize(loaded, read_contexts(Path(inputs[1]))[0].text)[:150]
    caches = [prefill(loaded, token_ids[:-1], capacity=len(token_ids) + 40) for _ in range(2)]
    written = write_continuation(loaded, caches[0], token_ids, 40)
    counts = set()
    for noise in (0.0, 0.6, 0.7, 0.8, 1.0, 3.0):
        for exact, plane in zip(*(view_kv_cache(cache, len(token_ids) - 1).planes for cache in caches), strict=True):
            torch.manual_seed(0)
            plane.copy_(exact + noise * torch.randn(plane.shape))
        text = generate_answer(loaded, caches[1], len(token_ids) - 1, token_ids, 40).token_ids
        same = next((i for i, (a, b) in enumerate(zip(written.tolist(), text, strict=True)) if a != b), 40)
        assert count_same_tokens(loaded, caches[1], token_ids, written) == same
        counts.add(same)
    assert 40 in counts and len(counts) > 2, "noise must change what is written, more of it earlier"


def test_a_continuation_is_written_once_and_measured_later_if_need_be(inputs, tmp_path) -> None:
    flags = ["--no_retrieval", "--num_contexts", "1"]
    run(inputs, tmp_path, *flags, schemes=("uniform=8-bit",))
    assert read_rows(tmp_path / "results.csv")[0]["continued_same"] == ""
    run(inputs, tmp_path, *flags, "--continue_tokens", "300", schemes=("uniform=8-bit",))
    (row, *_) = read_rows(tmp_path / "results.csv")
    assert row["continued_tokens"] == "300" and 0 <= float(row["continued_same"]) <= 300
    assert read_rows(tmp_path / "contexts.csv")[0]["continued_same"] == row["continued_same"]
    assert "| same tokens, of 300 |" in (tmp_path / "table.md").read_text().split("\n")[0]


def test_a_context_that_is_too_long_for_the_model_is_warned_about(inputs, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(LoadedModel, "max_tokens", 100)
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")
    assert "warning: 0.txt: " in (text := capsys.readouterr().err) and "--context_tokens" in text


def test_a_damaged_saved_cache_is_computed_again(inputs, tmp_path) -> None:
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")
    path, results = tmp_path / "kv/test/test_kv_0.pkl", (tmp_path / "results.csv").read_bytes()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for row in (tmp_path / "rows/0").iterdir():
        row.unlink()
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")
    assert path.read_bytes() == whole and (tmp_path / "results.csv").read_bytes() == results


def test_questions_can_be_asked_later(inputs, tmp_path) -> None:
    run(inputs, tmp_path / "a", "--no_retrieval")
    row = read_rows(tmp_path / "a/results.csv")[0]
    assert row["retrieval_accuracy"] == "" and row["questions"] == "0"
    run(inputs, tmp_path / "a")
    run(inputs, tmp_path / "b")
    assert (tmp_path / "a/results.csv").read_bytes() == (tmp_path / "b/results.csv").read_bytes()


def test_a_plot_is_drawn(inputs, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    argv = [*inputs, "--output_path", str(tmp_path), "--num_contexts", "1", "--no_retrieval", "--noise_floor"]
    argv += ["--schemes", "uniform"]
    assert script.main(argv) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--path_to_context", "nowhere"], 3, "nowhere/questions.json"),
        (["--path_to_calibration", "nowhere"], 3, "nowhere/questions.json"),
        (["--num_contexts", "9"], 3, "only 2 contexts"),
        (["--model_id", "nowhere"], 3, "nowhere"),
        (["--chat_template"], 2, "--chat_template is for prompts with one question"),
        (["--context_tokens", "2"], 2, "--context_tokens must be at least"),
        (["--gguf_file", "nowhere.gguf"], 3, "nowhere.gguf: no such GGUF file"),
        (["--schemes", "nothing"], 2, "no scheme nothing"),
        (["--output_path", "/dev/null/x"], 7, "/dev/null"),
    ],
)
def test_a_mistake_is_one_line(inputs, tmp_path, refuse, flags, exit_code, words) -> None:
    argv = [*inputs, "--output_path", tmp_path / "out", "--schemes", "uniform", *flags]
    assert words in refuse(script.main, argv, exit_code)
    assert not (tmp_path / "out/results.csv").exists()


def test_questions_that_are_no_list_of_questions_are_refused(inputs, tmp_path, refuse) -> None:
    (tmp_path / "questions.json").write_text('[{"file": "0.txt"}]')
    line = refuse(script.main, [*inputs, "--path_to_context", tmp_path, "--output_path", tmp_path / "out"], 3)
    assert "questions.json" in line


def test_a_saved_cache_of_another_text_is_refused(inputs, tmp_path, refuse) -> None:
    run(inputs, tmp_path, "--no_retrieval", "--num_contexts", "1")
    kv = tmp_path / "kv"
    (kv / "test/test_kv_0.pkl").write_bytes((kv / "calibration/test_kv_0.pkl").read_bytes())
    argv = [*inputs, "--output_path", tmp_path / "new", "--kv_folder", kv, "--schemes", "uniform"]
    assert "is of another text" in refuse(script.main, argv, 5)


# --- retrieval in one pass --------------------------------------------------------------------------------------------


def test_packed_answers_are_those_of_greedy_decoding(inputs, loaded) -> None:
    context = read_contexts(Path(inputs[1]))[1]
    token_ids = tokenize(loaded, context.text)
    reference = prefill(loaded, token_ids[:-1], capacity=len(token_ids) + 400)
    expected = expect_answers(loaded, reference, token_ids, context.questions)
    assert expected[0].right == expected[0].uncompressed
    assert expected[-1].right != expected[-1].uncompressed  # the record that the context does not hold

    generator = torch.Generator().manual_seed(0)
    seen = set()
    for noise in (0.0, 0.5, 1.0, 2.0):
        cache = prefill(loaded, token_ids[:-1], capacity=len(token_ids) + 400)
        for plane in view_kv_cache(cache, len(token_ids) - 1).planes:
            plane += noise * plane.std() * torch.randn(plane.shape, generator=generator)
        answers = []
        for entry in expected:
            prompt = torch.cat([token_ids, torch.tensor(entry.question_ids, dtype=token_ids.dtype)])
            answers.append(generate_answer(loaded, cache, len(token_ids) - 1, prompt, len(entry.right)).token_ids)
        pairs = list(zip(expected, answers, strict=True))
        score = score_retrieval(loaded, cache, token_ids, expected)
        assert score.questions == len(expected)
        assert score.right == sum(answer == entry.right for entry, answer in pairs)
        assert score.kept == sum(answer == entry.uncompressed for entry, answer in pairs)
        assert score.lost == sum(answer != entry.right == entry.uncompressed for entry, answer in pairs)
        assert score.gained == sum(answer == entry.right != entry.uncompressed for entry, answer in pairs)
        seen.add(score.right)
    assert len(seen) > 1


def test_answers_in_the_models_own_words_are_scored_by_their_metric(inputs, loaded) -> None:
    context = read_contexts(Path(inputs[1]))[1]
    token_ids = tokenize(loaded, context.text)
    cache = prefill(loaded, token_ids[:-1], capacity=len(token_ids) + 100)
    own = context.questions[0]
    wrong, half = (
        Question("", "x", answers=("no number",)),
        Question("", "x", answers=(own.answer, "x"), metric="all"),
    )
    answers = write_answers(loaded, cache, token_ids, [own, wrong, half, context.questions[1]], 6)
    assert [answer.score for answer in answers] == [1, 0, 0.5, 1]
    assert own.answer in answers[0].text and context.questions[1].answer in answers[3].text


def test_a_cache_without_room_for_the_questions_is_refused(inputs, loaded) -> None:
    token_ids = tokenize(loaded, "The record ends.")
    cache = prefill(loaded, token_ids[:-1], capacity=len(token_ids))
    with pytest.raises(ValueError, match="room"):
        expect_answers(loaded, cache, token_ids, [Question("\nregister a-b:", "12345")])
