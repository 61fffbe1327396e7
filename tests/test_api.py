"""The door for Python: what the scripts write and read, from and to caches of transformers, and what is refused."""

from __future__ import annotations

import copy
import doctest
import pydoc
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaModel, StaticCache

import cachegen
from cachegen import api
from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError, OutputError
from cachegen.format import Coder
from cachegen.kv_cache import KVCache
from cachegen.methods import default_config, load_config, make_encoder, method_of
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.chunking import plan_chunks
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from cachegen.pipeline.generate import generate_answer
from cachegen.pipeline.model import quiet_transformers
from cachegen.pipeline.model_cache import allocate_cache, planes_of_cache, set_length, view_kv_cache
from cachegen.pipeline.prefill import prefill_context, recompute_first_tokens
from cachegen.pipeline.profiles import profile_finder
from tests.fixtures import BUNDLED_MODEL, REPOSITORY, read_folder
from tests.fixtures.caches import are_equal
from tests.fixtures.models import (
    CONFIGS,
    change_weights,
    generate_ids,
    llama,
    load_bundled,
    load_plain,
    make_loaded,
    make_named,
    make_token_ids,
    run_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG_FOLDER = REPOSITORY / "config"
NUM_TOKENS = 60
IDS = make_token_ids(NUM_TOKENS)
PROMPT = torch.cat([IDS, make_token_ids(7, seed=1)]).long()[None]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files of the small Llama's cache of IDS, in chunks of 25 tokens."""
    api.compress(run_model(llama(), IDS), IDS, llama(), chunk_tokens=25).save(tmp_path / "encoded")
    return tmp_path / "encoded"


# --- the same as the scripts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["quantization_tiny", "uniform_8bit", "transform_tiny", "transform_tiny_levels"])
def test_the_files_are_those_of_the_scripts(tmp_path, config):
    loaded = load_bundled()
    cache, metadata = prefill_context(loaded, PROMPT[0])
    path = CONFIG_FOLDER / f"{config}.json"
    encoder = make_encoder(load_config(path), cache, metadata, plan_chunks(cache.num_tokens, None, 25))
    encode_document(encoder, tmp_path / "scripts")
    for name, given in {"by_name": config, "by_path": path, "as_object": load_config(path)}.items():
        compressed = api.compress(cache, PROMPT[0, :-1], loaded, given, chunk_tokens=25, block_size=512)
        compressed.save(tmp_path / name)
        assert read_folder(tmp_path / name) == read_folder(tmp_path / "scripts")


@pytest.mark.parametrize("config", ["quantization_tiny", "transform_tiny"])
def test_answers_are_those_of_the_decoded_folder(tmp_path, config):
    loaded, path = load_bundled(), tmp_path / "encoded"
    cached_ids = PROMPT[0, :NUM_TOKENS]
    api.compress(run_model(loaded.model, cached_ids), cached_ids, loaded, config).save(path)

    encoded = EncodedFolder(path, 1, find_profile=profile_finder(None, [REPOSITORY / "models"]))
    cache = allocate_cache(loaded.cache_layout, encoded.plane_shapes, PROMPT.shape[1] + 8, encoded.dtype)
    encoded.decode_into(view_kv_cache(cache, NUM_TOKENS), cached_ids, encoded.select_chunks(None))
    set_length(cache, NUM_TOKENS)
    num_sinks = method_of(encoded.document.header).num_sink_tokens
    recompute_first_tokens(loaded, cache, PROMPT[0], num_sinks, NUM_TOKENS)
    expected = copy.deepcopy(view_kv_cache(cache, NUM_TOKENS))
    answer = generate_answer(loaded, cache, NUM_TOKENS, PROMPT[0], 8)

    decoded = api.load(path).to_cache(loaded, PROMPT)
    assert decoded.get_seq_length() == NUM_TOKENS
    assert are_equal(planes_of_cache(decoded), expected)
    assert generate_ids(loaded.model, decoded, PROMPT) == list(answer.token_ids)


def test_files_of_the_scripts_are_read_with_a_model_of_the_scripts_or_of_that_checkpoint(tmp_path):
    cache, metadata = prefill_context(load_bundled(), PROMPT[0])
    config = load_config(CONFIG_FOLDER / "quantization_tiny.json")
    encode_document(make_encoder(config, cache, metadata, (cache.num_tokens,)), tmp_path)
    stored = api.load(tmp_path)
    assert stored.to_cache(load_bundled(), PROMPT).get_seq_length() == stored.num_tokens == PROMPT.shape[1] - 1
    assert generate_ids(load_plain(), stored.to_cache(load_plain(), PROMPT), PROMPT) == generate_ids(
        load_plain(), stored.to_cache(load_bundled(), PROMPT), PROMPT
    )
    with pytest.raises(MismatchError, match="model_fingerprint"):
        stored.to_cache(change_weights(load_plain()), PROMPT)


def test_transform_takes_a_model_of_transformers_by_its_checkpoints_profile(tmp_path):
    output = run_model(load_plain(), IDS)
    for name, model in {"plain": load_plain(), "scripts": load_bundled()}.items():
        api.compress(output, IDS, model, "transform_tiny").save(tmp_path / name)
    assert read_folder(tmp_path / "plain") == read_folder(tmp_path / "scripts")
    assert api.load(tmp_path / "plain").to_cache(load_plain(), PROMPT).get_seq_length() == NUM_TOKENS
    with pytest.raises(MismatchError, match="the profile's model_fingerprint"):
        api.compress(output, IDS, change_weights(load_plain()), "transform_tiny")


def test_a_profile_may_be_given_beside_the_config(tmp_path):
    folder = Path(BUNDLED_MODEL) / "profile"
    given = {
        "folder": folder,
        "path": str(folder),
        "profile": load_profile(folder, for_encoding=True),
    }
    config = {"method": "transform", "target_kl": 0.002}
    api.compress(run_model(load_plain(), IDS), IDS, load_plain(), "transform_tiny").save(tmp_path / "expected")
    for name, profile in given.items():
        api.compress(run_model(load_plain(), IDS), IDS, load_plain(), config, profile=profile).save(tmp_path / name)
        assert read_folder(tmp_path / name) == read_folder(tmp_path / "expected"), name
        assert api.load(tmp_path / name, profile=profile).to_cache(load_plain(), IDS).get_seq_length() == NUM_TOKENS
    with pytest.raises(ConfigError, match="`profile` is not for method cachegen"):
        api.compress(run_model(load_plain(), IDS), IDS, load_plain(), profile=folder)
    with pytest.raises(ValueError, match="without its analysis"):
        api.compress(run_model(load_plain(), IDS), IDS, load_plain(), config, profile=load_profile(folder))


def test_without_a_profile_a_cache_gets_one_of_its_own_where_that_pays(tmp_path):
    ids, config = make_token_ids(700), {"method": "transform", "target_kl": 0.03}
    cache = run_model(load_plain(), ids)
    own = api.compress(cache, ids, load_plain(), config)
    assert own.own_profile is not None and own.num_bytes < api.compress(cache, ids, load_plain()).num_bytes
    own.save(tmp_path / "own")
    stored = api.load(tmp_path / "own")
    assert stored.num_bytes == own.num_bytes and stored.bits_per_value == own.bits_per_value
    assert stored.to_cache(load_plain(), ids).get_seq_length() == len(ids)
    with pytest.warns(UserWarning, match="60 tokens are too few .* method cachegen instead"):
        short = api.compress(run_model(load_plain(), IDS), IDS, load_plain(), config)
    assert short.own_profile is None and short.num_tokens == NUM_TOKENS


@pytest.mark.parametrize("num_layers, name", [(32, "quantization_7b"), (6, "quantization_tiny")])
def test_the_default_config_is_the_originals_in_proportion(num_layers, name):
    assert default_config(num_layers) == load_config(CONFIG_FOLDER / f"{name}.json")


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_default_config_covers_models_of_few_layers(num_layers):
    config: Any = default_config(num_layers)
    assert len(config.groups_of_planes(num_layers)) == 2 * num_layers


# --- caches in --------------------------------------------------------------------------------------------------------


def test_every_kind_of_cache_gives_the_same_files(tmp_path):
    output = run_model(llama(), IDS)
    static = StaticCache(config=llama().config, max_cache_len=NUM_TOKENS + 10)
    run_model(llama(), IDS, past_key_values=static)
    kinds = {
        "output": output,
        "dynamic": output.past_key_values,
        "static": static,
        "planes": planes_of_cache(output.past_key_values),
    }
    for name, cache in kinds.items():
        api.compress(cache, IDS, llama()).save(tmp_path / name)
        assert read_folder(tmp_path / name) == read_folder(tmp_path / "output"), name


@pytest.mark.parametrize("ids", [IDS.tolist(), IDS.long(), IDS.long()[None]])
def test_token_ids_may_be_a_list_or_a_tensor_of_one_or_two_dimensions(folder, tmp_path, ids):
    api.compress(run_model(llama(), IDS), ids, llama(), chunk_tokens=25).save(tmp_path / "other")
    assert read_folder(tmp_path / "other") == read_folder(folder)
    assert api.load(folder).to_cache(llama(), ids).get_seq_length() == NUM_TOKENS


def test_a_cache_with_gradients_is_compressed_and_left_as_it_was():
    output = llama()(IDS.long()[None])
    before = copy.deepcopy(planes_of_cache(output.past_key_values))
    compressed = api.compress(output, IDS, llama())
    assert compressed.num_tokens == NUM_TOKENS
    assert are_equal(planes_of_cache(output.past_key_values), before)
    assert output.past_key_values.layers[0].keys.requires_grad


def test_what_generate_returns_holds_all_tokens_but_the_last():
    with quiet_transformers():
        output = llama().generate(IDS.long()[None], max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True)
    assert api.compress(output, output.sequences[:, :-1], llama()).num_tokens == NUM_TOKENS + 4


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_every_kind_answer_from_a_fine_encoding_as_from_their_cache(tmp_path, name):
    model = make_named(name).model
    output = run_model(model, IDS, past_key_values=DynamicCache())
    api.compress(output, IDS, model, {"method": "uniform", "bits": 8}, keep_all_tokens=True).save(tmp_path)
    decoded = api.load(tmp_path).to_cache(model, PROMPT)
    differences = [
        (found - expected).abs().max() / expected.abs().max()
        for found, expected in zip(
            planes_of_cache(decoded).planes, planes_of_cache(output.past_key_values).planes, strict=True
        )
    ]
    assert max(differences) < 1 / 250
    assert len(generate_ids(model, decoded, PROMPT, min_new_tokens=8)) == 8
    assert decoded.get_seq_length() == PROMPT.shape[1] + 7


# --- caches out -------------------------------------------------------------------------------------------------------


def test_a_decoded_cache_holds_the_tokens_exactly_and_grows(folder):
    cache = api.load(folder).to_cache(llama())
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == NUM_TOKENS
    generate_ids(llama(), cache, PROMPT, min_new_tokens=8)
    assert cache.get_seq_length() == PROMPT.shape[1] + 7


def test_a_decoded_cache_serves_copies_and_beams(folder):
    cache = api.load(folder).to_cache(llama())
    greedy = generate_ids(llama(), copy.deepcopy(cache), PROMPT)
    assert generate_ids(llama(), copy.deepcopy(cache), PROMPT) == greedy
    cache.batch_repeat_interleave(2)
    assert len(generate_ids(llama(), cache, PROMPT, num_beams=2, min_new_tokens=8)) == 8


def test_cropped_by_a_token_it_continues_the_context_itself(folder):
    cache = api.load(folder).to_cache(llama())
    expected = DynamicCache()
    for index, layer in enumerate(copy.deepcopy(cache).layers):
        expected.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], index)
    cache.crop(-1)
    context = IDS.long()[None]
    assert generate_ids(llama(), cache, context) == generate_ids(llama(), expected, context)


def test_without_token_ids_the_same_is_decoded(folder):
    stored = api.load(folder)
    found, expected = (planes_of_cache(stored.to_cache(llama(), ids)) for ids in (None, IDS))
    assert are_equal(found, expected)


def test_where_first_tokens_are_computed_token_ids_are_needed(tmp_path):
    loaded = load_bundled()
    api.compress(run_model(loaded.model, IDS), IDS, loaded, "transform_tiny").save(tmp_path)
    with pytest.raises(ValueError, match="`token_ids` must be given: the first 4 tokens"):
        api.load(tmp_path).to_cache(loaded)


def test_threads_decode_one_folder_at_once(folder):
    stored = api.load(folder)
    expected = planes_of_cache(stored.to_cache(llama(), IDS))
    with ThreadPoolExecutor(4) as threads:
        for cache in threads.map(lambda _: stored.to_cache(llama(), IDS), range(12)):
            assert are_equal(planes_of_cache(cache), expected)


def test_levels_decode_from_the_first_to_the_one_that_is_named(tmp_path):
    loaded = load_bundled()
    compressed = api.compress(run_model(loaded.model, IDS), IDS, loaded, "transform_tiny_levels")
    compressed.save(tmp_path)
    sizes = [api.load(tmp_path, level=level).num_bytes for level in (1, 2)]
    assert sizes[0] < sizes[1] <= compressed.num_bytes == api.load(tmp_path).num_bytes
    assert api.load(tmp_path, level=1).to_cache(loaded, IDS).get_seq_length() == NUM_TOKENS
    with pytest.raises(ConfigError, match="`level` 9 asked for"):
        api.load(tmp_path, level=9)


# --- sizes and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", [None, "packed", Coder.AC])
def test_sizes_are_those_of_the_files(tmp_path, coder):
    output = run_model(llama(), IDS)
    compressed = api.compress(output, IDS, llama(), coder=coder, chunk_tokens=16)
    compressed.save(tmp_path)
    num_bytes = sum(map(len, read_folder(tmp_path).values()))
    num_values = planes_of_cache(output.past_key_values).num_values
    stored = api.load(tmp_path)
    assert compressed.num_bytes == stored.num_bytes == num_bytes
    assert compressed.num_values == stored.num_values == num_values
    assert compressed.bits_per_value == stored.bits_per_value == 8 * num_bytes / num_values
    assert repr(compressed) == repr(stored).replace("Stored", "Compressed")
    assert f"60 tokens, {num_bytes:,} bytes" in repr(stored)


def test_saving_again_repairs_and_another_caches_folder_is_refused(folder):
    files = read_folder(folder)
    compressed = api.compress(run_model(llama(), IDS), IDS, llama(), chunk_tokens=25)
    chunk = folder / "chunk_00001.L1.cgc"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    compressed.save(folder)
    assert read_folder(folder) == files
    other = api.compress(run_model(llama(), IDS[:50]), IDS[:50], llama(), chunk_tokens=25)
    with pytest.raises(OutputError, match="another cache or configuration"):
        other.save(folder)
    assert read_folder(folder) == files
    other.save(folder, overwrite=True)
    assert api.load(folder).num_tokens == 50


def test_damage_and_absence_are_named(folder, tmp_path):
    chunk = folder / "chunk_00001.L1.cgc"
    content = chunk.read_bytes()
    stored = api.load(folder)
    chunk.write_bytes(content[:-8] + b"\0" * 8)
    with pytest.raises(BitstreamError, match=re.escape(chunk.name)):
        stored.to_cache(llama())
    chunk.unlink()
    with pytest.raises(InputError, match=re.escape(chunk.name)):
        stored.to_cache(llama())
    with pytest.raises(InputError, match=re.escape(chunk.name)):
        api.load(folder)
    with pytest.raises(InputError, match=r"nowhere: holds neither compressed files \(tables.cgt\) nor a store"):
        api.load(tmp_path / "nowhere")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: change_weights(llama()), "model_fingerprint"),
        (lambda: copy.deepcopy(llama()).bfloat16(), "dtype"),
        (lambda: make_named("mistral with a sliding window").model, "model_fingerprint"),
        (lambda: make_named("llama"), "model_fingerprint"),
    ],
    ids=["other weights", "other dtype", "other architecture", "known by its files"],
)
def test_another_model_is_refused(folder, make, field):
    with pytest.raises(MismatchError, match=field):
        api.load(folder).to_cache(make(), IDS)


def test_another_context_is_refused(folder):
    stored = api.load(folder)
    with pytest.raises(MismatchError, match="caches 60 tokens, `token_ids` has 59"):
        stored.to_cache(llama(), IDS[:-1])
    other = IDS.clone()
    other[-1] += 1
    with pytest.raises(MismatchError, match="token_hash"):
        stored.to_cache(llama(), other)


@pytest.mark.parametrize("num_ids", [NUM_TOKENS - 1, NUM_TOKENS + 1])
def test_a_cache_of_another_length_is_refused(num_ids):
    with pytest.raises(MismatchError, match=f"holds 60 tokens, `token_ids` has {num_ids}"):
        api.compress(run_model(llama(), IDS), PROMPT[0, :num_ids], llama())


def test_a_cache_of_another_model_is_refused():
    cache = planes_of_cache(run_model(llama(), IDS).past_key_values)
    with pytest.raises(MismatchError, match="2 layers are there, the cache has 3"):
        api.compress(cache, IDS, make_loaded(LlamaConfig(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 2})))
    halves = KVCache([plane.half() for plane in cache.keys], [plane.half() for plane in cache.values])
    with pytest.raises(MismatchError, match="float16"):
        api.compress(halves, IDS, llama())


def test_caches_that_cannot_be_compressed_are_refused():
    windowed = make_named("mistral with a sliding window").model
    with pytest.raises(
        InputError, match=r"holds 15 of 60 tokens: call the model with past_key_values=DynamicCache\(\)"
    ):
        api.compress(run_model(windowed, IDS), IDS, windowed, keep_all_tokens=True)
    with torch.inference_mode():
        batch = llama()(IDS.long()[None].repeat(2, 1))
    with pytest.raises(InputError, match="2 sequences"):
        api.compress(batch, IDS, llama())
    with pytest.raises(InputError, match="empty"):
        api.compress(DynamicCache(), IDS, llama())
    with pytest.raises(InputError, match="use_cache=True"):
        api.compress(llama()(IDS.long()[None], use_cache=False), IDS, llama())
    with pytest.raises(TypeError, match="got tuple"):
        api.compress((), IDS, llama())
    cache = planes_of_cache(run_model(llama(), IDS).past_key_values)
    cache.keys[1] = cache.keys[1].clone()
    cache.keys[1][3] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        api.compress(cache, IDS, llama())


def test_a_table_of_positions_that_is_too_short_is_refused():
    gpt2 = make_named("gpt2 with learned positions").model
    cache = planes_of_cache(run_model(gpt2, IDS).past_key_values)
    planes = [plane.repeat(10, 1, 1) for plane in cache.planes]
    with pytest.raises(InputError, match="600 tokens, but"):
        api.compress(KVCache(planes[0::2], planes[1::2]), IDS.repeat(10), gpt2)


def test_models_that_cannot_be_used_are_refused():
    output = run_model(llama(), IDS)
    training = copy.deepcopy(llama()).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        api.compress(output, IDS, training)
    with pytest.raises(TypeError, match="transformers model"):
        api.compress(output, IDS, torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="no head"):
        api.compress(output, IDS, LlamaModel(llama().config).eval())
    with torch.device("meta"):
        elsewhere = AutoModelForCausalLM.from_config(llama().config, dtype=torch.float32).eval()
    with pytest.raises(InputError, match="not in memory"):
        api.compress(output, IDS, elsewhere)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"chunk_tokens": 0}, ValueError, "`chunk_tokens` must be at least 1"),
        ({"block_size": 0}, ValueError, "`block_size` must be"),
        ({"coder": "zip"}, ConfigError, "`coder` must be one of"),
        ({"device": "gpu"}, ConfigError, "gpu"),
        ({"config": "no-such-config"}, InputError, r"no such config: names are .*uniform_4bit, uniform_8bit\)"),
        ({"config": {"method": "zip"}}, ConfigError, "config: method must be one of"),
        ({"config": {"method": "uniform", "bits": 9}}, ConfigError, "config: bits must be 2 to 8"),
        ({"token_ids": IDS.float()}, TypeError, "`token_ids` must be integers"),
        ({"token_ids": None}, TypeError, "`token_ids` must be a tensor or a sequence of integers, got NoneType"),
        ({"token_ids": {"input_ids": [1]}}, TypeError, "`token_ids` must be a tensor or .* got dict"),
        ({"token_ids": IDS.repeat(2, 1)}, ValueError, "`token_ids` must be"),
        ({"token_ids": -IDS}, ValueError, "`token_ids` must be 0 to"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        api.compress(run_model(llama(), IDS), **{"token_ids": IDS, "model": llama(), **arguments})


def test_without_a_clone_names_of_configs_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("cachegen.api.arguments.CLONE", tmp_path)
    with pytest.raises(InputError, match=r"uniform_8bit: no such config: .* installed without them; give a path, or"):
        api.compress(run_model(llama(), IDS), IDS, llama(), "uniform_8bit")


# --- what people read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compress", "load", "publish", "calibrate", "PrefixCache"])
def test_the_examples_of_the_docstrings_run(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(cachegen, name), name)
    assert len(test.examples) > 5
    results = doctest.DocTestRunner(verbose=False).run(test)
    assert results.failed == 0


def test_help_shows_both_functions_with_their_docstrings():
    text = pydoc.plain(pydoc.render_doc(cachegen))
    assert "Compress the cache of a context." in text and "Open a folder of" in text
    assert "Put a compressed cache into a store" in text and "class CacheStore" in text
    assert set(cachegen.__all__) <= set(dir(cachegen))
    with pytest.raises(AttributeError, match="no attribute 'decompress'"):
        _ = cachegen.decompress


def run_example(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"))
    return capsys.readouterr().out.splitlines()


def test_every_example_that_needs_no_engine_has_a_test():
    names = {path.stem for path in (REPOSITORY / "examples").glob("*.py")}
    assert names == {"compress_and_answer", "many_questions", "stream_from_store"}


def test_the_example_answers_as_from_the_text(capsys):
    lines = [line for line in run_example("compress_and_answer", capsys) if line.startswith("register")]
    assert len(lines) == 2
    for line, value in zip(lines, ("91115", "18950"), strict=True):
        assert line.count(value) == 2, line


def test_the_example_of_many_questions_answers_all_of_them(capsys):
    lines = run_example("many_questions", capsys)
    assert {"from the files: 7 of 7 right", "from the text: 7 of 7 right"} <= set(lines)


def test_the_example_of_streaming_answers_and_misses(capsys):
    lines = run_example("stream_from_store", capsys)
    assert len([line for line in lines if line.startswith("  register already-together: 18950")]) == 2
    assert len([line for line in lines if re.fullmatch(r"  tokens \d+ to \d+: level 1, [0-9,]+ bytes", line)]) >= 8
    assert lines[-1] == "nothing of this prompt there: True"


def run_blocks(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a page's Python, one block after the other, as in the root of a clone; what it prints."""
    for name in ("models", "9k_prompts"):
        (folder / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    return capsys.readouterr().out


def test_the_python_of_the_readme_answers_the_question(tmp_path, monkeypatch, capsys):
    sizes, answer = run_blocks(REPOSITORY / "README.md", tmp_path, monkeypatch, capsys).splitlines()[:2]
    assert float(sizes.split()[1]) < 4 and answer.split()[0].startswith("91115")


def test_the_python_of_its_page_answers_the_question_every_way(tmp_path, monkeypatch, capsys):
    printed = run_blocks(REPOSITORY / "docs" / "python.md", tmp_path, monkeypatch, capsys)
    assert printed.count("91115") == 4 and "for this model: True" in printed
    bits = [float(line.split()[1]) for line in printed.splitlines() if re.fullmatch(r"\d+ \d\.\d+", line)]
    assert len(bits) == 2 and bits[1] < 1 < 4 < bits[0]
