"""How long a sequence may become: the limit of every kind of model, and its refusal before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import main
import run_decoding_disk
import run_decoding_remote
import run_encoding
import run_publishing
from cachegen.errors import InputError
from cachegen.pipeline import prefill as prefill_module
from cachegen.pipeline.generate import generate_answer, generate_from_text
from cachegen.pipeline.model_cache import empty_cache, view_kv_cache
from cachegen.pipeline.prefill import extend_cache, prefill, prefill_context
from tests.fixtures.absmax import write_config
from tests.fixtures.models import (
    CONFIGS,
    SMALL_SIZES,
    VOCABULARY_SIZE,
    load_tokenizer,
    make_loaded,
    make_named,
    make_token_ids,
    save_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 48
_SMALL = {"vocab_size": VOCABULARY_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "is_decoder": True,
}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
TABLES = {
    "learned (gpt2)": transformers.GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=LIMIT),
    "learned (gpt_bigcode)": transformers.GPTBigCodeConfig(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=LIMIT),
    "learned from row 2 (opt)": transformers.OPTConfig(
        **_SMALL,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=LIMIT,
    ),
    "learned from row 2 (bart)": transformers.BartConfig(
        **_SMALL, **_BART, max_position_embeddings=LIMIT, is_decoder=True, is_encoder_decoder=False
    ),
    "learned from the padding token's (roberta)": transformers.RobertaConfig(
        **{**_SMALL, "pad_token_id": 1}, **_BERT, max_position_embeddings=LIMIT + 2
    ),
    "sinusoids in an embedding (marian)": transformers.MarianConfig(
        **_SMALL,
        **_BART,
        max_position_embeddings=LIMIT,
        decoder_start_token_id=1,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
    "sinusoids in a buffer (ctrl)": transformers.CTRLConfig(
        **_SMALL, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=LIMIT
    ),
    "rotary angles in a buffer (gptj)": transformers.GPTJConfig(
        **_SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=LIMIT
    ),
    "biases (mpt)": transformers.MptConfig(**_SMALL, d_model=32, n_heads=4, n_layers=2, max_seq_len=LIMIT),
}
_ROPE = {"rope_theta": 10000.0, "factor": 4.0}
SWITCHES = {
    "dynamic": {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", **_ROPE},
    },
    "longrope": {
        "max_position_embeddings": 4 * LIMIT,
        "rope_parameters": {
            "rope_type": "longrope",
            **_ROPE,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": LIMIT,
        },
    },
}


def make_switching(rope_type: str) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), **SWITCHES[rope_type]})


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_ends_exactly_where_the_limit_is(name):
    loaded = make_loaded(TABLES[name])
    assert loaded.length_limit is not None and loaded.length_limit.num_tokens == LIMIT
    cache = empty_cache(loaded.cache_layout, LIMIT + 1)
    extend_cache(loaded, cache, make_token_ids(LIMIT), 16)
    with pytest.raises((IndexError, RuntimeError)):
        extend_cache(loaded, cache, make_token_ids(1))


@pytest.mark.parametrize("rope_type", SWITCHES)
def test_a_rotary_embedding_switches_exactly_beyond_the_limit(rope_type):
    loaded = make_loaded(make_switching(rope_type))
    assert loaded.length_limit is not None and loaded.length_limit.num_tokens == LIMIT
    rotary = loaded.model.model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary(torch.zeros(1), torch.tensor([[LIMIT - 1]]))
    assert torch.equal(rotary.inv_freq, before)
    rotary(torch.zeros(1), torch.tensor([[LIMIT]]))
    assert not torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize("name", ["llama", "mistral with a sliding window", "gemma3 with local and global layers"])
def test_models_that_compute_their_positions_have_no_limit(name):
    assert make_named(name).length_limit is None


def test_of_several_rotary_embeddings_the_first_to_switch_counts():
    config = CONFIGS["gemma3 with local and global layers"].to_dict()
    config["max_position_embeddings"] = LIMIT
    config["rope_parameters"]["full_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
    limit = make_loaded(transformers.Gemma3TextConfig(**config)).length_limit
    assert limit is not None and limit.num_tokens == LIMIT and "(dynamic)" in limit.reason


@pytest.mark.parametrize("config", [TABLES["learned (gpt2)"], make_switching("longrope")], ids=["gpt2", "longrope"])
def test_every_way_through_the_model_refuses_what_is_too_long(config):
    loaded = make_loaded(config)
    cache = prefill(loaded, make_token_ids(LIMIT), 16, capacity=LIMIT + 10)
    with pytest.raises(InputError, match=f"{LIMIT + 1} tokens, but random takes {LIMIT}: "):
        prefill(loaded, make_token_ids(LIMIT + 1), 16)
    # The last token of a context is not cached, but passes through the model.
    assert prefill_context(loaded, make_token_ids(LIMIT), 16)[0].num_tokens == LIMIT - 1
    with pytest.raises(InputError, match=f"the context: {LIMIT + 1} tokens"):
        prefill_context(loaded, make_token_ids(LIMIT + 1), 16)
    # The last token of an answer does not.
    prompt = make_token_ids(LIMIT - 4)
    assert len(generate_answer(loaded, cache, 10, prompt, 5).token_ids) <= 5
    assert generate_from_text(loaded, prompt, 5).token_ids
    for generate in (
        lambda: generate_answer(loaded, cache, 10, prompt, 6),
        lambda: generate_from_text(loaded, prompt, 6),
    ):
        with pytest.raises(InputError, match=f"the prompt and its answer: {LIMIT + 1} tokens"):
            generate()


EARLIER = {
    **CONFIGS,
    "alibi (bloom)": transformers.BloomConfig(**_SMALL, hidden_size=32, n_layer=2, n_head=4),
    "chunks and temperatures (llama 4)": transformers.Llama4TextConfig(
        **SMALL_SIZES,
        intermediate_size_mlp=64,
        num_local_experts=2,
        no_rope_layers=[1, 1, 0],
        attention_chunk_size=16,
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.5,
    ),
    "sinks and experts (gpt-oss)": transformers.GptOssConfig(
        **SMALL_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
}


@pytest.mark.parametrize("name", EARLIER)
def test_later_tokens_do_not_change_what_is_cached_of_earlier_ones(name):
    loaded = make_loaded(EARLIER[name])
    ids = make_token_ids(2 * LIMIT)
    before = view_kv_cache(prefill(loaded, ids[:LIMIT], LIMIT), LIMIT)
    together = view_kv_cache(prefill(loaded, ids, 2 * LIMIT), LIMIT)
    for plane, expected in zip(before.planes, together.planes, strict=True):
        torch.testing.assert_close(plane, expected, rtol=1e-4, atol=1e-4)


class TestScripts:
    """One line and exit code 3, before the model computes anything."""

    @pytest.fixture(params=["gpt2", "dynamic", "longrope"])
    def model_id(self, request, tmp_path) -> Path:
        config = TABLES["learned (gpt2)"] if request.param == "gpt2" else make_switching(request.param)
        return save_model(config, tmp_path / "model")

    @pytest.fixture
    def context(self, tmp_path) -> Path:
        """A text of `LIMIT` - 8 tokens."""
        tokenizer = load_tokenizer()
        ids = tokenizer("and there was light upon the face of the waters " * 20)["input_ids"]
        text = tokenizer.decode(ids[1 : LIMIT - 8])
        assert len(tokenizer(text)["input_ids"]) == LIMIT - 8
        (tmp_path / "0.txt").write_text(text)
        return tmp_path / "0.txt"

    @pytest.fixture
    def computed(self, monkeypatch) -> list[int]:
        """The number of tokens of every call of the model."""
        calls: list[int] = []
        run_model = prefill_module.run_model

        def note(loaded, cache, token_ids, num_logits):
            calls.append(len(token_ids))
            return run_model(loaded, cache, token_ids, num_logits)

        monkeypatch.setattr(prefill_module, "run_model", note)
        return calls

    @staticmethod
    def prefill_argv(model_id: Path, context: Path) -> list[str]:
        flags = ["--model_id", model_id, "--path_to_context", context, "--save_dir", context.parent / "data", "--quiet"]
        return [str(flag) for flag in [*flags, "--max_total_tokens", LIMIT]]

    @pytest.fixture
    def argv(self, model_id, context, tmp_path) -> list[str]:
        """Flags for both decoding scripts, but for where the document is: encoded and published."""
        assert main.main(self.prefill_argv(model_id, context)) == 0
        config = write_config(tmp_path / "config.json")
        kv = ["--path_to_kv", str(tmp_path / "data" / "test_kv_0.pkl")]
        encoded = ["--output_path", str(tmp_path / "encoded"), "--quantization_config", str(config), "--quiet"]
        assert run_encoding.main([*kv, *encoded]) == 0
        store = ["--path_to_encoded_kv", str(tmp_path / "encoded"), "--path_to_store", str(tmp_path / "store")]
        assert run_publishing.main([*kv, *store, "--quiet"]) == 0
        return ["--model_id", str(model_id), "--path_to_context", str(context)]

    def test_a_context_is_refused_before_prefilling(self, model_id, context, refuse, computed):
        text = context.read_text()
        context.write_text(f"{text} {text}")
        error = refuse(main.main, self.prefill_argv(model_id, context), 3)
        assert f"{context}: " in error and f"{model_id} takes {LIMIT}: " in error and computed == []

    @pytest.mark.parametrize("script", [run_decoding_disk, run_decoding_remote], ids=lambda script: script.__name__)
    def test_questions_and_answers_are_refused_before_decoding(self, argv, context, refuse, computed, capsys, script):
        folder = "store" if script is run_decoding_remote else "encoded"
        argv = [*argv, "--path_to_encoded_kv", str(context.parent / folder)]
        computed.clear()
        for flags in (["--max_new_tokens", "10"], ["--question", " the waters" * 9, "--max_new_tokens", "1"]):
            if script is run_decoding_remote:
                flags = [*flags, "--max_total_tokens", str(LIMIT)]
            error = refuse(script.main, [*argv, *flags], 3)
            assert f"takes {LIMIT}: " in error and "(--question, --max_new_tokens)" in error
        # A single token tells what shapes the model's cache has.
        assert set(computed) <= {1}
        flags = ["--max_total_tokens", str(LIMIT)] if script is run_decoding_remote else []
        assert script.main([*argv, *flags, "--max_new_tokens", "9", "--verify"]) == 0
        assert "same answer" in capsys.readouterr().out
