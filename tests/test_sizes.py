"""Sizes at the edges: a cache of 70,000 tokens, and a model of odd dimensions through all three scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import main
import run_decoding_disk
import run_encoding
from cachegen.kv_cache import load_kv_cache, save_kv_cache
from cachegen.methods import load_config
from tests.fixtures import REPOSITORY
from tests.fixtures.absmax import decode_folder, quantize_and_dequantize, write_config
from tests.fixtures.caches import are_equal, make_cache, make_metadata
from tests.fixtures.models import VOCABULARY_SIZE, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = (REPOSITORY / "9k_prompts" / "1.txt").read_text()[:1200]


@pytest.mark.parametrize("chunk_flags", [[], ["--num_chunks", "1"]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_of_70000_tokens_round_trips(tmp_path, chunk_flags, dtype):
    cache, metadata = make_cache(70_000, head_dim=16, dtype=dtype), make_metadata(70_000)
    save_kv_cache(tmp_path / "kv.pkl", cache, metadata)
    config = write_config(tmp_path / "config.json")
    argv = ["--path_to_kv", str(tmp_path / "kv.pkl"), "--quantization_config", str(config), "--quiet"]
    assert run_encoding.main([*argv, "--output_path", str(tmp_path / "encoded"), *chunk_flags]) == 0
    assert len(list((tmp_path / "encoded").glob("*.cgc"))) == (1 if chunk_flags else 47)
    decoded = decode_folder(tmp_path / "encoded", cache, metadata.token_ids)
    assert are_equal(decoded, quantize_and_dequantize(cache, load_config(config)))


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory) -> Path:
    """A random Mistral model of 3 layers with 1 head of keys and values of 80 dims."""
    folder = tmp_path_factory.mktemp("models") / "odd"
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=80,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return save_model(config, folder)


@pytest.mark.parametrize("config", ["quantization_7b.json", "quantization_tiny.json", "uniform_4bit.json"])
def test_a_model_of_3_layers_1_head_and_80_dims_goes_through_all_stages(odd_model, tmp_path, capsys, config):
    """Also with the boundaries of a 7B config, which lie beyond its layers."""
    config_path, context = REPOSITORY / "config" / config, tmp_path / "4.txt"
    context.write_text(TEXT)
    shared = ["--quiet", "--json", "-"]
    model_flags = ["--model_id", str(odd_model), "--path_to_context", str(context)]
    assert main.main([*model_flags, "--save_dir", str(tmp_path), "--block_size", "100", *shared]) == 0
    (document,) = json.loads(capsys.readouterr().out)["documents"]
    num_tokens = document["num_tokens"]
    assert num_tokens % 32 != 0 and document["kv_bytes"] == 2 * 3 * 2 * 80 * num_tokens

    encode_flags = ["--path_to_kv", document["path_to_kv"], "--output_path", str(tmp_path / "encoded")]
    config_flags = ["--quantization_config", str(config_path)]
    assert run_encoding.main([*encode_flags, *config_flags, "--num_chunks", "3", *shared]) == 0
    encoding = json.loads(capsys.readouterr().out)
    assert encoding["num_tokens"] == num_tokens and encoding["kv_bytes"] == document["kv_bytes"]
    cache, metadata = load_kv_cache(document["path_to_kv"])
    expected = quantize_and_dequantize(cache, load_config(config_path))
    assert are_equal(decode_folder(tmp_path / "encoded", cache, metadata.token_ids), expected)

    model_config = tmp_path / "model.json"
    model_config.write_text('{"layers": 3, "channels": 80, "kv_heads": 1, "head_dim": 80}')
    decode_flags = ["--path_to_encoded_kv", str(tmp_path / "encoded"), "--model_config", str(model_config)]
    assert run_decoding_disk.main([*model_flags, *decode_flags, *config_flags, "--verify", *shared]) == 0
    decoding = json.loads(capsys.readouterr().out)
    assert (decoding["num_cached_tokens"], decoding["num_recomputed_tokens"]) == (num_tokens, 0)
    assert decoding["encoded_bytes"] == encoding["encoded_bytes"]
    assert decoding["kl"] > 0 and decoding["verified_tokens"] == min(256, (num_tokens + 1) // 2)
