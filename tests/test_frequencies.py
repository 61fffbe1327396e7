"""Rotary frequencies that depend on the length: chosen before the prefill, the same at decoding, as transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import main
import run_decoding_disk
import run_decoding_remote
import run_encoding
import run_publishing
from cachegen.errors import InputError
from cachegen.kv_cache import hash_rotary_embeddings, load_kv_cache
from cachegen.pipeline.frequencies import choose_frequencies, match_frequencies, round_total
from cachegen.pipeline.generate import generate_answer, generate_from_text
from cachegen.pipeline.model import LoadedModel, quiet_transformers, read_rotary_embeddings
from cachegen.pipeline.model_cache import set_length
from cachegen.pipeline.prefill import extend_cache, prefill, run_model
from cachegen.pipeline.verify import compare_with_text
from tests.fixtures.models import CONFIGS, SMALL_SIZES, load_tokenizer, make_loaded, make_token_ids, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SWITCH = 48
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 8.0],
}
PHI_3 = {
    **SMALL_SIZES,
    "max_position_embeddings": 4 * SWITCH,
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": SWITCH},
}
del PHI_3["head_dim"]
MODELS: dict[str, Any] = {
    "phi-3 with longrope": lambda: transformers.Phi3Config(**PHI_3),
    "llama with longrope": lambda: transformers.LlamaConfig(
        **SMALL_SIZES,
        max_position_embeddings=4 * SWITCH,
        rope_parameters={**_LONGROPE, "original_max_position_embeddings": SWITCH, "factor": 4.0},
    ),
    "llama with dynamic NTK": lambda: transformers.LlamaConfig(
        **SMALL_SIZES,
        max_position_embeddings=SWITCH,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "gemma-3 with dynamic NTK in global layers": lambda: make_mixed(),
}
LONGROPE = [name for name in MODELS if "longrope" in name]
NUM_CONTEXT, NUM_PROMPT, NUM_NEW = 40, 64, 8


def make_mixed() -> transformers.Gemma3TextConfig:
    config = CONFIGS["gemma3 with local and global layers"].to_dict()
    config["max_position_embeddings"] = SWITCH
    config["rope_parameters"]["full_attention"] |= {"rope_type": "dynamic", "factor": 4.0}
    return transformers.Gemma3TextConfig(**config)


def plain_logits(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the model says after each token of a text, in one pass of its own."""
    with torch.inference_mode():
        return loaded.model(input_ids=ids.long()[None]).logits[0]


@pytest.mark.parametrize("name", MODELS)
class TestChosen:
    def test_a_context_below_the_switch_serves_a_prompt_beyond_it(self, name):
        """The logits are those of one plain pass over all of the prompt; without the choice they are not."""
        loaded = make_loaded(MODELS[name]())
        ids = make_token_ids(NUM_PROMPT)
        expected = plain_logits(loaded, ids)[-1]
        chosen = choose_frequencies(loaded, NUM_PROMPT)
        assert chosen.total_tokens == NUM_PROMPT
        cache = prefill(chosen, ids[:NUM_CONTEXT], 16, capacity=NUM_PROMPT)
        extend_cache(chosen, cache, ids[NUM_CONTEXT:-1], 16)
        found = run_model(chosen, cache, ids[-1:], 1)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert found.argmax() == expected.argmax()

        # What was wrong, and refused: keys with the frequencies of the context alone.
        stale = prefill(loaded, ids[:NUM_CONTEXT], 16, capacity=NUM_PROMPT)
        wrong = run_model(chosen, stale, ids[NUM_CONTEXT:], 1)[0]
        assert (wrong - expected).abs().max() > 0.005

    def test_the_model_is_as_it_was_afterwards(self, name):
        loaded = make_loaded(MODELS[name]())
        config, embeddings = loaded.model.config.to_json_string(), read_rotary_embeddings(loaded.model)
        short = plain_logits(loaded, make_token_ids(NUM_CONTEXT))
        chosen = choose_frequencies(loaded, NUM_PROMPT)
        with chosen.fixed_frequencies(), chosen.fixed_frequencies():
            assert read_rotary_embeddings(loaded.model) != embeddings
            assert [r.inv_freq for r in read_rotary_embeddings(loaded.model)] == [
                r.inv_freq for r in chosen.rotary_embeddings
            ]
        assert loaded.model.config.to_json_string() == config
        assert read_rotary_embeddings(loaded.model) == embeddings == loaded.rotary_embeddings
        assert torch.equal(plain_logits(loaded, make_token_ids(NUM_CONTEXT)), short)

    def test_a_file_tells_what_was_chosen(self, name):
        loaded = make_loaded(MODELS[name]())
        for total in (SWITCH, SWITCH + 1, 64, 1000, 100_000):
            chosen = choose_frequencies(loaded, total)
            found = match_frequencies(loaded, hash_rotary_embeddings(chosen.rotary_embeddings))
            assert found.rotary_embeddings == chosen.rotary_embeddings
        assert match_frequencies(loaded, "ab" * 32) is loaded

    def test_what_goes_on_beyond_the_choice_is_refused(self, name):
        loaded = make_loaded(MODELS[name]())
        chosen = choose_frequencies(loaded, NUM_PROMPT)
        prompt = make_token_ids(NUM_PROMPT)
        cache = prefill(chosen, prompt[:NUM_CONTEXT], capacity=200)
        if name in LONGROPE:  # there is no third set of frequencies
            assert chosen.length_limit is None
        else:
            assert generate_answer(chosen, cache, NUM_CONTEXT, prompt, 1).token_ids
            with pytest.raises(InputError, match=r"takes 64: .*prefill with a larger `max_total_tokens`"):
                generate_answer(chosen, cache, NUM_CONTEXT, prompt, 2)
        with pytest.raises(InputError, match=rf"takes {SWITCH}: .*prefill with a larger `max_total_tokens`"):
            generate_answer(loaded, cache, NUM_CONTEXT, prompt, 1)


@pytest.mark.parametrize("name", LONGROPE)
def test_greedy_answers_are_those_of_generate(name):
    loaded = make_loaded(MODELS[name]())
    prompt = make_token_ids(NUM_PROMPT)
    with quiet_transformers():
        expected = loaded.model.generate(prompt.long()[None], max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0)[
            0, NUM_PROMPT:
        ]
    chosen = choose_frequencies(loaded, NUM_PROMPT + NUM_NEW)
    cache = prefill(chosen, prompt[:NUM_CONTEXT], 16, capacity=NUM_PROMPT + NUM_NEW)
    answer = generate_answer(chosen, cache, NUM_CONTEXT, prompt, NUM_NEW, 16)
    assert list(answer.token_ids) == expected.tolist()
    assert answer.num_forward_tokens == NUM_PROMPT - NUM_CONTEXT + NUM_NEW - 1
    assert list(generate_from_text(chosen, prompt, NUM_NEW).token_ids) == expected.tolist()
    # The cache of the context was used, and still is what it was.
    set_length(cache, NUM_CONTEXT)
    assert compare_with_text(chosen, prompt, cache, num_decoded_tokens=NUM_CONTEXT).kl < 1e-6


def test_an_answer_with_dynamic_frequencies_keeps_those_of_the_chosen_length():
    """transformers gives every new token those of its own length; here all of an answer has one set."""
    loaded = make_loaded(MODELS["llama with dynamic NTK"]())
    prompt = make_token_ids(NUM_PROMPT)
    chosen = choose_frequencies(loaded, NUM_PROMPT + NUM_NEW)
    cache = prefill(chosen, prompt[:NUM_CONTEXT], 16, capacity=NUM_PROMPT + NUM_NEW)
    answer = generate_answer(chosen, cache, NUM_CONTEXT, prompt, NUM_NEW, 16)
    assert answer.token_ids == generate_from_text(chosen, prompt, NUM_NEW).token_ids
    text = torch.cat([prompt, torch.tensor(answer.token_ids, dtype=torch.int32)])
    assert len(text) == chosen.total_tokens
    # One pass of the model over a text of the chosen length has the same frequencies.
    assert plain_logits(loaded, text).argmax(-1)[NUM_PROMPT - 1 : -1].tolist() == list(answer.token_ids)


def test_lengths_are_eight_per_octave():
    assert [round_total(n) for n in (1, 15, 16, 17, 48, 49, 64, 65, 9000, 1 << 20)] == [
        1, 15, 16, 18, 48, 52, 64, 72, 9216, 1 << 20,
    ]  # fmt: skip


def test_a_model_whose_frequencies_are_always_the_same_is_left_alone():
    loaded = make_loaded(CONFIGS["llama"])
    assert choose_frequencies(loaded, 100_000) is loaded
    with pytest.raises(InputError, match="`max_total_tokens` must be at most"):
        choose_frequencies(loaded, 1 << 30)


class TestScripts:
    @pytest.fixture(params=["phi-3 with longrope", "llama with dynamic NTK"])
    def model_id(self, request, tmp_path) -> Path:
        return save_model(MODELS[request.param](), tmp_path / "model")

    @pytest.fixture
    def context(self, tmp_path) -> Path:
        """A text of 40 tokens."""
        tokenizer = load_tokenizer()
        ids = tokenizer("and there was light upon the face of the waters " * 20)["input_ids"]
        (tmp_path / "0.txt").write_text(tokenizer.decode(ids[1:NUM_CONTEXT]))
        return tmp_path / "0.txt"

    @pytest.mark.parametrize("script", [run_decoding_disk, run_decoding_remote], ids=lambda script: script.__name__)
    @pytest.mark.parametrize("flags", [[], ["--max_total_tokens", "100"]], ids=["default", "given"])
    def test_a_question_crosses_the_length_that_the_context_does_not(
        self, model_id, context, tmp_path, script, flags, refuse
    ):
        kv = str(tmp_path / "data" / "test_kv_0.pkl")
        model = ["--model_id", str(model_id), "--path_to_context", str(context)]
        prefill_argv = [*model, "--save_dir", str(tmp_path / "data"), "--dtype", "bfloat16", "--quiet", *flags]
        assert main.main(prefill_argv) == 0
        assert main.main(prefill_argv) == 0  # there already
        error = refuse(main.main, [*prefill_argv, "--max_total_tokens", "48"], 7)
        assert "was made with another rotary embedding" in error
        recorded = load_kv_cache(kv)[1].rotary_embeddings
        assert recorded[0].inv_freq[-1] < 10000 ** (-7 / 8) / 1.5
        config = tmp_path / "lossless.json"
        config.write_text('{"method": "lossless"}')
        encoded, store = str(tmp_path / "encoded"), str(tmp_path / "store")
        encode = ["--path_to_kv", kv, "--output_path", encoded, "--quantization_config", str(config), "--quiet"]
        assert run_encoding.main(encode) == 0
        publish = ["--path_to_kv", kv, "--path_to_encoded_kv", encoded, "--path_to_store", store, "--quiet"]
        assert run_publishing.main(publish) == 0
        is_remote = script is run_decoding_remote
        argv = [*model, "--path_to_encoded_kv", store if is_remote else encoded, *(flags if is_remote else [])]
        question = ["--question", " upon the face of the waters" * 3, "--max_new_tokens", "6"]
        report = tmp_path / "report.json"
        assert script.main([*argv, *question, "--verify", "--quiet", "--json", str(report)]) == 0
        found = json.loads(report.read_text())
        assert found["greedy_match"] and found["kl"] < 0.001 and (is_remote or found["bit_exact"])
        if flags and "dynamic" in json.loads((model_id / "config.json").read_text())["rope_parameters"]["rope_type"]:
            question[3] = "90"
            error = refuse(script.main, [*argv, *question], 3)
            assert "takes 104: " in error and "prefill with a larger" in error and "max_total_tokens" in error
