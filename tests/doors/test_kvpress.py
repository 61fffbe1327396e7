"""The press in kvpress's own pipeline; `make test-door-kvpress` runs this."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import cachegen
from cachegen.errors import InputError
from cachegen.pipeline.model_cache import planes_of_cache
from scripts import kvpress_eval
from tests.fixtures import BUNDLED_MODEL, REPOSITORY
from tests.fixtures.caches import are_equal
from tests.fixtures.models import load_bundled, load_plain, make_token_ids

# Warnings of another package are its own.
pytestmark = [pytest.mark.doors, pytest.mark.filterwarnings("default")]

CONTEXT = (REPOSITORY / "9k_prompts/0.txt").read_text("utf-8")[:3000]
QUESTION = "\nWhat is the value of register letter-pairs?\nregister letter-pairs:"
LOSSLESS = {"method": "lossless"}


def make_press(config, **options):
    from cachegen.integrations.kvpress import CacheGenPress

    return CacheGenPress(config, **options)


@pytest.fixture(scope="module")
def pipeline():
    from kvpress import KVPressTextGenerationPipeline

    loaded = load_bundled()
    return KVPressTextGenerationPipeline(model=loaded.model, tokenizer=loaded.tokenizer)


def test_the_pipeline_answers_from_a_lossless_cache_as_from_its_own(pipeline):
    press = make_press(LOSSLESS)
    expected = pipeline(CONTEXT, questions=[QUESTION, "\nAnd then"], max_new_tokens=8)
    assert pipeline(CONTEXT, questions=[QUESTION, "\nAnd then"], max_new_tokens=8, press=press) == expected
    assert 4 < press.bits_per_value < 16


@pytest.mark.parametrize("config", [{"method": "uniform", "bits": 3}, "transform_tiny"])
def test_the_cache_holds_what_was_decoded(config):
    model, ids = load_plain(), make_token_ids(80).long()[None]
    press = make_press(config, model=load_bundled())
    cache, whole = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        with press(model):
            model.model(input_ids=ids, past_key_values=cache)
        model.model(input_ids=ids, past_key_values=whole)
    compressed = cachegen.compress(whole, ids, load_bundled(), config)
    assert are_equal(planes_of_cache(cache), planes_of_cache(compressed.to_cache(load_bundled(), ids)))
    assert not are_equal(planes_of_cache(cache), planes_of_cache(whole))
    assert press.num_bytes == compressed.num_bytes and press.num_values == compressed.num_values


def test_a_context_in_several_passes_is_refused():
    model, cache = load_plain(), DynamicCache()
    with pytest.raises(InputError, match="in 2 passes"), make_press(LOSSLESS)(model):
        for _ in range(2):
            model.model(input_ids=make_token_ids(8).long()[None], past_key_values=cache)


def test_the_script_scores_every_config_beside_the_uncompressed_cache(tmp_path):
    question = "What is the value of register letter-pairs?"
    record = {"input": f"{CONTEXT}\n{question}", "outputs": ["91115"], "answer_prefix": "register letter-pairs:"}
    (tmp_path / "records.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    (tmp_path / "lossless.json").write_text(json.dumps(LOSSLESS))
    flags = ["--model_id", str(BUNDLED_MODEL), "--path_to_context", str(tmp_path / "records.jsonl")]
    configs = [str(tmp_path / "lossless.json"), str(Path(REPOSITORY) / "config/transform.json")]
    flags += ["--quantization_config", *configs, "--profile", str(Path(BUNDLED_MODEL) / "profile")]
    assert kvpress_eval.main([*flags, "--json", str(tmp_path / "found.json"), "--quiet"]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["methods"]
    assert list(rows) == ["uncompressed", "lossless", "transform"]
    assert rows["lossless"]["score"] == rows["uncompressed"]["score"]
    assert (
        rows["transform"]["bits_per_value"]
        < rows["lossless"]["bits_per_value"]
        < rows["uncompressed"]["bits_per_value"]
    )
