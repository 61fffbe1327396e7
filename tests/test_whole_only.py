"""Documents without what windows hide: the right answer from the whole, and from no part of it an answer at all."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import main
import run_decoding_disk
import run_decoding_remote
import run_encoding
import run_publishing
from cachegen import api
from cachegen.api.loading import StoredCache
from cachegen.errors import ConfigError, InputError, MismatchError, StoreError
from cachegen.kv_cache import load_kv_cache
from cachegen.methods import make_encoder, read_config
from cachegen.methods.base import Encoder
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import (
    allocate_cache,
    is_whole_only,
    keep_whole,
    planes_of_cache,
    set_length,
    to_dynamic_cache,
    view_kv_cache,
)
from cachegen.pipeline.prefill import measure_plane_shapes, prefill_context, recompute_first_tokens
from cachegen.store.store import Store, open_store
from cachegen.streaming.client import choose_policy, find_for_model, finish_cache, make_loader
from cachegen.streaming.load_report import LoadResult
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import Objective, PrefillSpeed, Speeds
from cachegen.windows import Window
from tests.fixtures.caches import make_metadata
from tests.fixtures.models import CONFIGS, generate_ids, make_named, make_token_ids, run_model, save_model
from tests.fixtures.transform import make_profile
from tests.zoo.checkpoints import Specimen, make_ids, save_specimen
from tests.zoo.checks import EXACT_TOLERANCE, difference, predict_from, predict_plainly
from tests.zoo.families import FAMILIES
from tests.zoo.sizes import WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY_NAMES = ("Mistral 7B v0.1", "Gemma 2", "Gemma 3, text", "GPT-OSS", "Llama 4, text")
CONFIG_OF = {
    "rans": {"method": "uniform", "bits": 8},
    "ac": {"method": "uniform", "bits": 8, "coder": "ac"},
    "packed": {"method": "uniform", "bits": 8, "coder": "packed"},
    "lossless": {"method": "lossless"},
}
METHODS = (*CONFIG_OF, "transform")
QUANTIZED_TOLERANCE = 0.06
"""Difference of logits, relative to their spread; 8 bits make 0.036."""

# --- every family and method ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def specimen(request, tmp_path_factory, one_thread) -> Iterator[Specimen]:
    family = FAMILIES[request.param]
    if not family.is_known:
        pytest.skip(f"this transformers has no {family.class_name}")
    yield save_specimen(family, tmp_path_factory.mktemp("model"))


def make_any_encoder(method: str, cache, metadata, chunks: Sequence[int], first_stored: Sequence[int]) -> Encoder:
    if method != "transform":
        config = read_config(CONFIG_OF[method], "test")
        return make_encoder(config, cache, metadata, chunks, first_stored=first_stored)
    shapes = [(plane.shape[1], plane.shape[2]) for plane in cache.planes]
    profile = make_profile(shapes, [1] * cache.num_layers, model_fingerprint=metadata.model_fingerprint)
    profile = dataclasses.replace(profile, rotary_embeddings=metadata.rotary_embeddings)
    return TransformEncoder(cache, metadata, profile, chunks, step_log=-80, first_stored=first_stored)


def decode_by(loaded: LoadedModel, encoder: Encoder, folder: Path, prompt: torch.Tensor) -> Any:
    """A cache with room for the prompt, from an encoder's files."""
    encode_document(encoder, folder)
    profile = getattr(encoder.document, "profile", None)
    encoded = EncodedFolder(folder, 1, find_profile=lambda _: profile)
    encoded.check_model(loaded)
    num_tokens = encoded.document.header.num_cache_tokens
    cache = allocate_cache(loaded.cache_layout, encoded.plane_shapes, len(prompt), encoded.dtype)
    encoded.decode_into(view_kv_cache(cache, num_tokens), prompt, encoded.select_chunks(None))
    set_length(cache, num_tokens)
    recompute_first_tokens(loaded, cache, prompt, 0 if profile is None else 4, num_tokens)
    return cache


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_those_from_the_document_of_all_tokens(specimen: Specimen, tmp_path, method):
    loaded = specimen.half if method == "lossless" else specimen.exact
    for num_context in (WINDOW + 1, 2 * WINDOW + 8, 3 * WINDOW + 1):
        prompt = make_ids(num_context + 14)
        cache, metadata = prefill_context(loaded, prompt[:num_context], block_size=7)
        num_cached = num_context - 1
        first_stored = metadata.first_visible(num_cached)
        assert any(first_stored)
        chunks = [11] * (num_cached // 11) + [num_cached % 11] * (num_cached % 11 > 0)
        logits = []
        for name, first in (("all", ()), ("some", first_stored)):
            encoder = make_any_encoder(method, cache, metadata, chunks, first)
            decoded = decode_by(loaded, encoder, tmp_path / f"{name} {num_context}", prompt)
            logits.append(predict_from(loaded, decoded, num_cached, prompt))
        assert difference(*logits) < EXACT_TOLERANCE
        assert logits[0].argmax(-1).equal(logits[1].argmax(-1))


def test_a_model_that_looks_back_further_is_refused(specimen: Specimen, tmp_path):
    loaded, prompt = specimen.exact, make_ids(2 * WINDOW + 9)
    cache, metadata = prefill_context(loaded, prompt)
    # Of 40 tokens, a window of 15 shows one less than one of 16, and a chunk of 20 none, where one of 16 shows 8.
    sizes = {"sliding": WINDOW - 1, "chunked": 20}
    windows = tuple(window and Window(window.kind, sizes[window.kind]) for window in metadata.windows or ())
    shorter = dataclasses.replace(metadata, windows=windows)
    first_stored = shorter.first_visible(cache.num_tokens)
    encoder = make_any_encoder("rans", cache, metadata, (cache.num_tokens,), first_stored)
    with pytest.raises(MismatchError, match=r"first_stored is \d+ in layer \d, but .* attends to token \d+ there"):
        decode_by(loaded, encoder, tmp_path, prompt)


# --- the door for Python ----------------------------------------------------------------------------------------------

WINDOWED = ("mistral with a sliding window", "gemma3 with local and global layers")
IDS = make_token_ids(60)
PROMPT = torch.cat([IDS, make_token_ids(7, seed=1)]).long()[None]
LOSSLESS_LIKE = {"method": "uniform", "bits": 8}


@pytest.mark.parametrize("name", WINDOWED)
def test_a_cache_with_dropped_tokens_gives_the_same_files_as_one_with_all(tmp_path, name):
    model = make_named(name).model
    whole, dropped = run_model(model, IDS, past_key_values=DynamicCache()), run_model(model, IDS)
    assert dropped.past_key_values.layers[0].keys.shape[2] == 15
    for folder, output in (("whole", whole), ("dropped", dropped)):
        api.compress(output, IDS, model, LOSSLESS_LIKE).save(tmp_path / folder)
    for path in (tmp_path / "whole").iterdir():
        # Attention sums in another order where tokens were dropped: almost the same, so files differ in few bytes.
        assert abs(path.stat().st_size - (tmp_path / "dropped" / path.name).stat().st_size) < 64
    answers = [
        generate_ids(model, api.load(tmp_path / f).to_cache(model, PROMPT), PROMPT) for f in ("whole", "dropped")
    ]
    assert answers[0] == answers[1] == generate_ids(model, whole.past_key_values, PROMPT)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_files_are_smaller_and_answer_alike(tmp_path, name):
    model = make_named(name).model
    output = run_model(model, IDS, past_key_values=DynamicCache())
    sizes, answers = [], []
    for keeps_all in (False, True):
        compressed = api.compress(output, IDS, model, LOSSLESS_LIKE, keep_all_tokens=keeps_all)
        compressed.save(tmp_path / str(keeps_all))
        sizes.append(compressed.num_bytes)
        answers.append(generate_ids(model, api.load(tmp_path / str(keeps_all)).to_cache(model, PROMPT), PROMPT))
    assert sizes[0] < sizes[1] and answers[0] == answers[1]


def test_a_decoded_cache_cannot_be_cropped_into_nor_stored_as_if_it_were_whole(tmp_path):
    model = make_named(WINDOWED[1]).model
    output = run_model(model, IDS, past_key_values=DynamicCache())
    api.compress(output, IDS, model, LOSSLESS_LIKE).save(tmp_path / "some")
    cache = api.load(tmp_path / "some").to_cache(model, PROMPT)
    with pytest.raises(ValueError, match="the cache can only be used whole, 60 tokens"):
        cache.crop(-1)
    with pytest.raises(InputError, match="holds 15 of 60 tokens"):
        planes_of_cache(cache)
    with pytest.raises(InputError, match="holds 15 of 60 tokens"):
        api.compress(cache, IDS, model, LOSSLESS_LIKE, keep_all_tokens=True)
    again = api.compress(cache, IDS, model, LOSSLESS_LIKE)
    again.save(tmp_path / "again")
    answer = generate_ids(model, copy.deepcopy(cache), PROMPT)
    assert generate_ids(model, api.load(tmp_path / "again").to_cache(model, PROMPT), PROMPT) == answer
    generate_ids(model, cache, PROMPT, min_new_tokens=8)
    cache.crop(60 - cache.get_seq_length())  # what was generated may go
    assert cache.get_seq_length() == 60 and generate_ids(model, cache, PROMPT) == answer


def test_a_decoded_cache_takes_no_memory_for_what_is_missing_and_serves_beams(tmp_path):
    model = make_named(WINDOWED[1]).model
    output = run_model(model, IDS, past_key_values=DynamicCache())
    api.compress(output, IDS, model, LOSSLESS_LIKE).save(tmp_path)
    cache = api.load(tmp_path).to_cache(model, PROMPT)
    assert [layer.keys.shape[2] for layer in cache.layers] == [15, 60, 15]
    assert [layer.keys.untyped_storage().nbytes() for layer in cache.layers][::2] == [2 * 15 * 16 * 4] * 2
    assert [layer.get_seq_length() for layer in cache.layers] == [60] * 3 and cache.get_seq_length() == 60
    api.compress(output, IDS, model, LOSSLESS_LIKE, keep_all_tokens=True).save(tmp_path / "all")
    answers = []
    for decoded in (cache, api.load(tmp_path / "all").to_cache(model, PROMPT)):
        decoded.batch_repeat_interleave(2)
        answers.append(generate_ids(model, decoded, PROMPT, num_beams=2, min_new_tokens=8))
    assert answers[0] == answers[1]
    cache.reset()
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * 3


def test_layers_of_one_window_are_alike_whatever_is_stored_of_each(tmp_path):
    loaded = make_named(WINDOWED[1])
    output = run_model(loaded.model, IDS, past_key_values=DynamicCache())
    cache = planes_of_cache(output.past_key_values)
    profile = make_profile([(2, 16)] * 6, [2, 1], model_fingerprint=loaded.fingerprint)
    profile = dataclasses.replace(profile, rotary_embeddings=loaded.rotary_embeddings)
    metadata = make_metadata(60, token_ids=IDS, model_fingerprint=loaded.fingerprint)
    metadata = dataclasses.replace(metadata, rotary_embeddings=loaded.rotary_embeddings)
    # The first two layers are a group: one with a window, and one without, so that both are stored.
    encoder = TransformEncoder(cache, metadata, profile, (60,), step_log=-112, first_stored=(45, 0, 45))
    assert encoder.document.header.first_stored == (0, 0, 45)
    encode_document(encoder, tmp_path)
    decoded = StoredCache(EncodedFolder(tmp_path, 1, find_profile=lambda _: profile)).to_cache(loaded, PROMPT)
    assert [layer.keys.shape[2] for layer in decoded.layers] == [15, 60, 15]
    expected = generate_ids(loaded.model, output.past_key_values, PROMPT)
    assert generate_ids(loaded.model, decoded, PROMPT) == expected


def test_a_cache_that_ends_with_a_chunk_of_attention_holds_none_of_it(tmp_path):
    family = FAMILIES["Llama 4, text"]
    if not family.is_known:
        pytest.skip(f"this transformers has no {family.class_name}")
    loaded = save_specimen(family, tmp_path / "model").exact
    ids = make_ids(2 * WINDOW)
    prompt = torch.cat([ids, make_ids(WINDOW + 5, seed=1)])
    api.compress(run_model(loaded.model, ids), ids, loaded, LOSSLESS_LIKE).save(tmp_path / "encoded")
    cache = api.load(tmp_path / "encoded").to_cache(loaded, prompt)
    assert {layer.keys.shape[2] for layer in cache.layers} == {0, 2 * WINDOW} and cache.get_seq_length() == 2 * WINDOW
    whole = api.compress(run_model(loaded.model, ids, past_key_values=DynamicCache()), ids, loaded, LOSSLESS_LIKE)
    whole.save(tmp_path / "whole")
    expected = predict_plainly(loaded.model, prompt)[2 * WINDOW :]
    for folder in ("encoded", "whole"):
        cache = api.load(tmp_path / folder).to_cache(loaded, prompt)
        with torch.inference_mode():
            found = loaded.model(prompt[None, 2 * WINDOW :], past_key_values=cache, use_cache=True).logits[0]
        assert difference(expected, found) < 2 * QUANTIZED_TOLERANCE


def test_a_cache_of_all_tokens_is_as_ever(tmp_path):
    model = make_named(WINDOWED[0]).model
    output = run_model(model, IDS, past_key_values=DynamicCache())
    api.compress(output, IDS, model, LOSSLESS_LIKE, keep_all_tokens=True).save(tmp_path)
    cache = api.load(tmp_path).to_cache(model, PROMPT)
    cache.crop(-1)
    assert planes_of_cache(cache).num_tokens == 59


def test_a_cache_within_its_window_can_be_cropped(tmp_path):
    model = make_named(WINDOWED[0]).model
    api.compress(run_model(model, IDS[:15]), IDS[:15], model, LOSSLESS_LIKE).save(tmp_path)
    cache = api.load(tmp_path).to_cache(model, IDS[:20])
    cache.crop(-1)
    assert cache.get_seq_length() == 14


def test_a_profile_is_not_made_of_a_cache_that_lacks_tokens(tmp_path):
    model = make_named(WINDOWED[0]).model
    with pytest.raises(InputError, match="of which a profile would be made"):
        api.compress(run_model(model, IDS), IDS, model, {"method": "transform", "step_log": 8})


@pytest.mark.parametrize("name", WINDOWED)
def test_a_profile_of_the_document_alone_has_groups_of_one_window(tmp_path, name):
    model, ids = make_named(name).model, make_token_ids(900)
    output = run_model(model, ids, past_key_values=DynamicCache())
    compressed = api.compress(output, ids, model, {"method": "transform", "step_log": 8}, chunk_tokens=300)
    assert compressed.own_profile is not None
    header = compressed.encoding.document.header
    assert set(header.first_stored) - {0} == {885}
    for group in compressed.own_profile.groups:
        layers = slice(group.first_layer, group.first_layer + group.num_layers)
        assert len(set(header.first_stored[layers])) == 1
    compressed.save(tmp_path)
    prompt = torch.cat([ids, make_token_ids(7, seed=1)]).long()[None]
    assert len(generate_ids(model, api.load(tmp_path).to_cache(model, prompt), prompt, min_new_tokens=8)) == 8


def test_a_length_within_what_was_decoded_is_refused():
    loaded = make_named(WINDOWED[0])
    cache = allocate_cache(loaded.cache_layout, measure_plane_shapes(loaded), 8, loaded.dtype)
    set_length(cache, 6)
    keep_whole(cache, 6, ())
    assert not is_whole_only(cache)
    keep_whole(cache, 6, (2, 0, 1))
    assert is_whole_only(cache)
    with pytest.raises(ValueError, match="must be 0 or at least 6, got 5"):
        set_length(cache, 5)
    set_length(cache, 8)
    assert [layer.least_length for layer in to_dynamic_cache(cache).layers] == [6, 6, 6]
    set_length(cache, 0)  # what follows is computed
    assert not is_whole_only(cache)
    set_length(cache, 5)


# --- stores -----------------------------------------------------------------------------------------------------------

CHUNK_TOKENS = 60
LONG = make_token_ids(300)
LONG_PROMPT = torch.cat([LONG, make_token_ids(9, seed=1)])
MODEL = "gemma3 with local and global layers"


@pytest.fixture(scope="module")
def compressed(one_thread) -> api.CompressedCache:
    """300 tokens in chunks of 60: the windows of 16 show the last quarter of the last chunk."""
    loaded = make_named(MODEL)
    output = run_model(loaded.model, LONG, past_key_values=DynamicCache())
    return api.compress(output, LONG, loaded, LOSSLESS_LIKE, chunk_tokens=CHUNK_TOKENS)


@pytest.fixture
def store(tmp_path, compressed) -> Store:
    api.publish(tmp_path / "store", compressed)
    return open_store(tmp_path / "store")


def damage(store: Store, chunk: int) -> None:
    """Change a byte of the file of a chunk."""
    (manifest,) = (json.loads(path.read_bytes()) for path in Path(store.url).rglob("documents/*/*/*.json"))
    path = Path(store.url) / manifest["chunks"][chunk]["files"][0]["name"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def load_by(store: Store, policy: str, level: int | None = None, *, minds: bool = True) -> tuple[Any, LoadResult]:
    """Load the document by a policy; `minds` is whether the loader knows that it can only be used whole."""
    loaded = make_named(MODEL)
    document = find_for_model(store, loaded, LONG_PROMPT, num_threads=1)
    assert document.is_whole_only
    cache = allocate_cache(loaded.cache_layout, measure_plane_shapes(loaded), len(LONG_PROMPT), loaded.dtype)
    speeds = Speeds(PrefillSpeed(1e5))
    arguments = (document, loaded, cache, LONG_PROMPT, choose_policy(document, policy, level))
    loader = make_loader(*arguments, Objective(0.001 if policy == "cachegen" else 1e-6), speeds)
    loader._is_whole_only = minds
    with loader:
        result = loader.run()
    finish_cache(loaded, cache, document, result)
    return cache, result


def wrongness(cache: Any) -> float:
    """How far predictions behind the context are from those of one pass over the text."""
    loaded = make_named(MODEL)
    prompt = LONG_PROMPT.long()
    found = predict_from(loaded, cache, len(LONG), prompt)
    return difference(predict_plainly(loaded.model, prompt)[len(LONG) :], found)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("damaged", [None, 0, 2, 4])
def test_every_policy_gives_the_right_answer_whatever_is_damaged(store, policy, damaged):
    if damaged is not None:
        damage(store, damaged)
    cache, result = load_by(store, policy)
    assert wrongness(cache) < QUANTIZED_TOLERANCE
    sources = [chunk.source for chunk in result.chunks]
    assert sources == sorted(sources, reverse=True)  # text first, then the store
    if damaged is not None:
        assert sources[: damaged + 1] == ["text"] * (damaged + 1)


@pytest.mark.parametrize("damaged", [2, 4])
def test_a_chunk_that_is_damaged_is_computed_after_all_before_it(store, damaged):
    damage(store, damaged)
    cache, result = load_by(store, "ours", level=1)
    assert [chunk.source for chunk in result.chunks] == ["text"] * (damaged + 1) + ["store"] * (4 - damaged)
    assert len(result.problems) == 1 and wrongness(cache) < QUANTIZED_TOLERANCE
    # The tests can tell: what is computed behind chunks that were loaded lacks keys.
    assert wrongness(load_by(store, "ours", level=1, minds=False)[0]) > 5 * QUANTIZED_TOLERANCE


def test_a_loaded_cache_that_lacks_tokens_can_only_be_used_whole(store):
    cache, _ = load_by(store, "ours", level=1)
    with pytest.raises(ValueError, match="must be 0 or at least 300"):
        set_length(cache, 299)
    cache, result = load_by(store, "text")
    assert {chunk.source for chunk in result.chunks} == {"text"}
    set_length(cache, 299)


def test_a_text_that_shares_a_part_only_is_told_to_compute_it(tmp_path):
    loaded = make_named(MODEL)
    ids = make_token_ids(300)
    output = run_model(loaded.model, ids, past_key_values=DynamicCache())
    for folder, keeps_all in (("some", False), ("all", True)):
        kept = api.compress(output, ids, loaded, LOSSLESS_LIKE, chunk_tokens=100, keep_all_tokens=keeps_all)
        api.publish(tmp_path / folder, kept)
    other = torch.cat([ids[:280], make_token_ids(40, seed=5)])
    with pytest.raises(StoreError, match=r"only 2 of its 3 chunks are of this context, and it can only be") as caught:
        api.load(tmp_path / "some").to_cache(loaded, other)
    assert caught.value.is_missing and "\n" not in str(caught.value)
    assert api.load(tmp_path / "all").to_cache(loaded, other).get_seq_length() == 200
    whole = torch.cat([ids, other[:5]])
    cache = api.load(tmp_path / "some", level=1).to_cache(loaded, whole)
    with pytest.raises(ValueError, match="can only be used whole"):
        cache.crop(-1)
    document = find_for_model(open_store(tmp_path / "some"), loaded, whole, num_threads=1)
    document.limit_chunks(3)
    with pytest.raises(ConfigError, match="`num_chunks` 2 asked for, but the document can only be used whole"):
        document.limit_chunks(2)


def test_a_document_that_ends_earlier_takes_over_the_pointers_of_one_that_is_of_use_to_fewer_texts(tmp_path):
    loaded = make_named(MODEL)
    ids = make_token_ids(600)
    output = run_model(loaded.model, ids, past_key_values=DynamicCache())

    def publish(num_tokens: int, *, keeps_all: bool = False) -> None:
        cache = copy.deepcopy(output.past_key_values)
        if num_tokens < 600:
            cache.crop(num_tokens - 600)
        arguments = (cache, ids[:num_tokens], loaded, LOSSLESS_LIKE)
        api.publish(tmp_path / "store", api.compress(*arguments, chunk_tokens=100, keep_all_tokens=keeps_all))

    def find(text: torch.Tensor) -> int:
        return find_for_model(open_store(tmp_path / "store"), loaded, text, num_threads=1).num_tokens

    publish(600)
    text, question = torch.cat([ids[:400], make_token_ids(50, seed=7)]), make_token_ids(5, seed=8)
    with pytest.raises(StoreError, match="can only be used whole"):
        find(text)
    publish(300)
    assert find(text) == 300 and find(torch.cat([ids, question])) == 600
    # Its beginning is longer in the document of 600 tokens, which is of no use; the shorter one is found behind it.
    assert find(torch.cat([ids[:580], question, question])) == 300
    publish(590, keeps_all=True)
    assert find(text) == 400 and find(torch.cat([ids[:350], question, question])) == 300


# --- scripts ----------------------------------------------------------------------------------------------------------

TEXT = "The windows of this model are short, and so is what it remembers of a text. " * 3


@pytest.fixture(scope="module")
def prefilled(tmp_path_factory, one_thread) -> Path:
    """A folder with a windowed model, a context and its cache."""
    folder = tmp_path_factory.mktemp("prefilled")
    save_model(CONFIGS["mistral with a sliding window"], folder / "model")
    (folder / "0.txt").write_text(TEXT)
    flags = ["--model_id", str(folder / "model"), "--path_to_context", str(folder / "0.txt"), "--quiet"]
    assert main.main([*flags, "--save_dir", str(folder)]) == 0
    return folder


def encode(folder: Path, output: Path, capsys, *flags: str) -> dict[str, Any]:
    argv = ["--path_to_kv", str(folder / "test_kv_0.pkl"), "--output_path", str(output), "--chunk_size", "20"]
    config = ["--quantization_config", str(Path(run_encoding.__file__).parent / "config" / "uniform_8bit.json")]
    capsys.readouterr()
    assert run_encoding.main([*argv, *config, "--json", "-", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def answer_argv(folder: Path, encoded: Path) -> list[str]:
    model, context = str(folder / "model"), str(folder / "0.txt")
    return ["--path_to_encoded_kv", str(encoded), "--model_id", model, "--path_to_context", context]


def test_the_saved_cache_has_all_tokens_and_says_its_windows(prefilled):
    cache, metadata = load_kv_cache(prefilled / "test_kv_0.pkl")
    assert metadata.windows == (Window("sliding", 16),) * 3
    assert metadata.first_visible(cache.num_tokens) == (cache.num_tokens - 15,) * 3
    assert all(plane.abs().amax((1, 2)).min() > 0 for plane in cache.planes)


def test_scripts_leave_out_what_is_not_visible_and_answer_as_from_the_text(prefilled, tmp_path, capsys):
    some = encode(prefilled, tmp_path / "some", capsys)
    every = encode(prefilled, tmp_path / "all", capsys, "--keep_all_tokens")
    num_tokens = some["num_tokens"]
    assert some["invisible_bytes"] == every["invisible_bytes"] == 2 * 3 * 2 * 32 * (num_tokens - 15)
    assert (some["left_out_bytes"], every["left_out_bytes"]) == (some["invisible_bytes"], 0)
    assert (some["is_whole_only"], every["is_whole_only"]) == (True, False)
    assert some["encoded_bytes"] < every["encoded_bytes"] / 2
    records = []
    for name in ("some", "all"):
        argv = [*answer_argv(prefilled, tmp_path / name), "--verify", "--json", "-", "--question", " And?"]
        assert run_decoding_disk.main(argv) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert all(record["greedy_match"] for record in records)
    assert records[0]["answers"] == records[1]["answers"]
    assert records[0]["kl"] < 0.01 and records[0]["verified_tokens"] < records[1]["verified_tokens"]


def test_a_line_says_what_is_left_out(prefilled, tmp_path, capsys):
    argv = ["--path_to_kv", str(prefilled / "test_kv_0.pkl"), "--output_path", str(tmp_path / "encoded")]
    assert run_encoding.main(argv) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not visible")]
    assert " % of it, " in line and line.endswith("left out: the document can only be used whole")
    assert run_encoding.main([*argv, "--overwrite", "--keep_all_tokens"]) == 0
    assert "kept all the same" in capsys.readouterr().out


def test_an_encoding_with_the_other_setting_is_not_already_there(prefilled, tmp_path, refuse):
    argv = ["--path_to_kv", prefilled / "test_kv_0.pkl", "--output_path", tmp_path / "encoded", "--quiet"]
    assert run_encoding.main(list(map(str, argv))) == 0
    line = refuse(run_encoding.main, [*argv, "--keep_all_tokens"], 7)
    assert "holds the encoding of another cache or configuration" in line
    assert run_encoding.main(list(map(str, [*argv, "--keep_all_tokens", "--overwrite"]))) == 0
    refuse(run_encoding.main, argv, 7)


def test_what_the_chunks_do_not_cover_is_computed_behind_what_they_show(prefilled, tmp_path, capsys):
    record = encode(prefilled, tmp_path / "encoded", capsys, "--recompute_last", "9")
    assert record["is_whole_only"] and record["num_uncovered_tokens"] == 9
    argv = [*answer_argv(prefilled, tmp_path / "encoded"), "--verify", "--json", "-"]
    assert run_decoding_disk.main(argv) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["greedy_match"] and record["kl"] < 0.01


def test_a_part_of_it_is_refused_in_one_line(prefilled, tmp_path, capsys, refuse):
    encode(prefilled, tmp_path / "encoded", capsys)
    line = refuse(run_decoding_disk.main, [*answer_argv(prefilled, tmp_path / "encoded"), "--num_chunks", 1], 2)
    assert "--num_chunks 1 asked for, but the document can only be used whole" in line


def test_over_a_store_it_is_answered_as_from_the_text(prefilled, tmp_path, capsys, refuse):
    encode(prefilled, tmp_path / "encoded", capsys)
    kv = ["--path_to_kv", str(prefilled / "test_kv_0.pkl")]
    argv = ["--path_to_encoded_kv", str(tmp_path / "encoded"), "--path_to_store", str(tmp_path / "store"), *kv]
    assert run_publishing.main([*argv, "--quiet"]) == 0
    remote = answer_argv(prefilled, tmp_path / "store")
    for flags in (["--level", "1"], ["--policy", "cachegen"], ["--slo", "1e-6"]):
        capsys.readouterr()
        assert run_decoding_remote.main([*remote, "--verify", "--json", "-", *flags]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["greedy_match"] and record["kl"] < 0.01
    line = refuse(run_decoding_remote.main, [*remote, "--num_chunks", 1], 2)
    assert "can only be used whole" in line
