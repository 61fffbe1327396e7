"""The profile of method `lossless`: what it saves, that every bit comes back, where it is found, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import cachegen
import run_calibration
import run_decoding_disk
import run_encoding
import run_publishing
from cachegen.calibration.calibrate import CalibrationContext
from cachegen.calibration.predictor import make_predictor
from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError
from cachegen.inspection import inspect
from cachegen.kv_cache import RotaryEmbedding, from_planes, load_kv_cache
from cachegen.methods import load_config, load_profile, make_encoder, open_document
from cachegen.methods.lossless.predictor import PREDICTOR_NAME, Predictor, load_predictor, pack_predictor
from cachegen.methods.profile_files import PROFILE_NAME
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.profiles import profile_finder
from cachegen.store.profiles import fetch_profile
from cachegen.store.store import open_store
from cachegen.windows import Window
from tests.fixtures.caches import allocate_like, are_equal, make_correlated_cache, make_metadata, save_cache

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config/lossless.json"
SHAPES = [(2, 16), (2, 16), (1, 8), (3, 8)]
ROTARY = RotaryEmbedding("rotary_emb", "default", (1.0, 0.3, 0.01), 1.0)


def make_context(num_tokens: int, seed: int, **changes) -> CalibrationContext:
    # Of one kind whatever the seed: parts of one long cache.
    whole = make_correlated_cache(SHAPES, 6000, changes.pop("dtype", torch.bfloat16), 0)
    start = 1500 * (seed % 4)
    cache = from_planes([plane.clone() for plane in whole.slice(start, start + num_tokens).planes])
    metadata = make_metadata(num_tokens, seed=seed, rotary_embeddings=(changes.pop("rotary", ROTARY),))
    return CalibrationContext(f"cache {seed}", cache, dataclasses.replace(metadata, **changes))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make_predictor([make_context(1500, seed) for seed in range(3)], notes={})


def encode(context: CalibrationContext, predictor: Predictor | None):
    config = load_config(CONFIG).with_flags({"profile": predictor} if predictor else {})
    return make_encoder(config, context.cache, context.metadata, [context.cache.num_tokens])


def total_bytes(encoder) -> int:
    return len(encoder.tables_file) + sum(map(len, encoder.encode_chunk(0)))


def test_every_bit_comes_back_and_a_document_is_smaller_than_with_a_model_of_its_own(predictor):
    context = make_context(400, 7)
    shared, own = encode(context, predictor), encode(context, None)
    assert len(shared.tables_file) < 1000 < len(own.tables_file)
    assert total_bytes(shared) < 0.9 * total_bytes(own)
    document = open_document(shared.tables_file, find_profile=lambda _: predictor)
    output = make_correlated_cache(SHAPES, 400, torch.bfloat16, 99)
    document.decode([b"".join(shared.encode_chunk(0))], output, first_token=0, token_hash=None)
    assert are_equal(output, context.cache)


WINDOWS = (Window("sliding", 100), None)


@pytest.mark.parametrize(("num_tokens", "chunks"), [(400, (150, 150, 100)), (90, (60, 30))])
@pytest.mark.parametrize("windows", [WINDOWS, None])
def test_layers_of_one_window_predict_each_other_and_hold_the_same_tokens(tmp_path, windows, num_tokens, chunks):
    windowed = make_predictor([make_context(1500, seed, windows=windows) for seed in range(2)], notes={})
    windowed.save(tmp_path)
    assert load_predictor(tmp_path) == windowed and windowed.windows == windows
    assert windowed.layer_groups == ([(0,), (1,)] if windows else [(0, 1)])
    context = make_context(num_tokens, 7, windows=WINDOWS)
    first_visible = context.metadata.first_visible(num_tokens)
    assert first_visible == ((301, 0) if num_tokens == 400 else ())
    config = load_config(CONFIG).with_flags({"profile": windowed})
    encoder = make_encoder(config, context.cache, context.metadata, chunks, first_stored=first_visible)
    # Without windows, the profile's layers predict each other: all of them are stored.
    assert encoder.document.header.first_stored == (first_visible if windows else ())
    document = open_document(encoder.tables_file, find_profile=lambda _: windowed)
    output, start = allocate_like(context.cache), 0
    for index, count in enumerate(chunks):
        content = b"".join(encoder.encode_chunk(index))
        document.decode([content], output.slice(start, start + count), first_token=start, token_hash=None)
        start += count
    expected = [plane.clone() for plane in context.cache.planes]
    for plane in expected[:2]:
        plane[: encoder.document.header.first_stored[0] if encoder.document.header.first_stored else 0] = 0
    assert are_equal(output, from_planes(expected))


def test_a_document_whose_groups_do_not_begin_together_is_refused(predictor):
    context = make_context(400, 7)
    header = encode(context, predictor).document.header
    content = dataclasses.replace(header, first_stored=(5, 6)).pack()
    with pytest.raises(BitstreamError, match="first_stored: the layers of one window of the profile"):
        open_document(content, find_profile=lambda _: predictor).prepare()


def test_fitting_is_on_every_context():
    """A channel that only the second context has must not be coded as a constant."""
    contexts = [make_context(500, seed) for seed in (1, 2)]
    for plane in contexts[0].cache.planes:
        plane.zero_()
    both, first = (make_predictor(part, notes={}) for part in (contexts, contexts[:1]))
    assert total_bytes(encode(make_context(400, 7), both)) < 0.8 * total_bytes(encode(make_context(400, 7), first))


def test_files_come_back_and_are_the_same_each_time(predictor, tmp_path):
    predictor.save(tmp_path / "a")
    found = load_profile(tmp_path / "a")
    assert found == predictor and found.num_bytes == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    again = make_predictor([make_context(1500, seed) for seed in range(3)], notes={})
    assert again.profile_hash == predictor.profile_hash
    again.save(tmp_path / "a")


def test_a_cache_of_another_model_dtype_or_shape_is_refused(predictor):
    for context, field in (
        (make_context(100, 5, model_fingerprint="1" * 64), "model_fingerprint"),
        (make_context(100, 5, dtype=torch.float16), "dtype"),
    ):
        with pytest.raises(MismatchError, match=f"profile's {field} is"):
            encode(context, predictor)
    narrow = dataclasses.replace(predictor, planes=predictor.planes[:2])
    with pytest.raises(MismatchError, match="profile's planes is"):
        encode(make_context(100, 5), narrow)


def test_a_document_is_only_decoded_with_its_own_profile(predictor):
    context = make_context(100, 5)
    encoder = encode(context, predictor)
    other = make_predictor([make_context(300, 8)], notes={})
    with pytest.raises(MismatchError, match="give `profile` its folder"):
        open_document(encoder.tables_file, find_profile=lambda _: other)
    transform = load_profile(ROOT / "models/tiny-mistral/profile")
    with pytest.raises(MismatchError, match="give `profile` its folder"):
        open_document(encoder.tables_file, find_profile=lambda _: transform)
    with pytest.raises(InputError, match="needs the profile"):
        open_document(encoder.tables_file).prepare()


def test_profiles_of_the_two_methods_are_not_mixed_up(predictor, tmp_path):
    predictor.save(tmp_path)
    transform = load_config(ROOT / "config/transform.json").with_flags({"profile": str(tmp_path)})
    with pytest.raises(BitstreamError, match="a profile for method transform"):
        transform.read_files()
    lossless = load_config(CONFIG).with_flags({"profile": str(ROOT / "models/tiny-mistral/profile")})
    with pytest.raises(BitstreamError, match="a profile for method lossless"):
        lossless.read_files()
    with pytest.raises(ConfigError, match="not one for method transform"):
        load_config(ROOT / "config/transform.json").with_flags({"profile": predictor})


def add_plane(shape: bytes):
    return lambda content: content.replace(b'"plane_shapes": [', b'"plane_shapes": [' + shape + b", ")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PREDICTOR_NAME, lambda content: content[:-1], "has changed"),
        (PREDICTOR_NAME, None, "no such file"),
        (PROFILE_NAME, lambda content: content.replace(b'"bfloat16"', b'"float32"'), "dtype"),
        (PROFILE_NAME, lambda content: content.replace(b'"version": 1', b'"version": 2'), "version"),
        (PROFILE_NAME, add_plane(b"[0, 1]"), "1 to"),
        (PROFILE_NAME, add_plane(b"[2, 1]"), "two shapes"),
        (PROFILE_NAME, add_plane(b"[65535, 65535]"), "at most"),
        (PROFILE_NAME, lambda content: content[:40], "JSON"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(predictor, tmp_path, name, change, message):
    predictor.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    if change is None:
        (tmp_path / name).unlink()
    else:
        assert change(content) != content
        (tmp_path / name).write_bytes(change(content))
    with pytest.raises((BitstreamError, InputError), match=message) as caught:
        load_predictor(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_of_other_planes_is_refused_when_it_is_used(predictor):
    """Its hash is right, so a stranger may have made it."""
    files, _ = pack_predictor(predictor)
    record = json.loads(files[PROFILE_NAME])
    assert record["plane_shapes"] == [list(shape) for shape in SHAPES]
    broken = dataclasses.replace(predictor, packed=predictor.packed[:50])
    with pytest.raises(BitstreamError, match="model"):
        encode(make_context(100, 5), broken).encode_chunk(0)


def test_contexts_that_do_not_go_together_are_refused():
    with pytest.raises(MismatchError, match="turned otherwise"):
        other = make_context(100, 2, rotary=dataclasses.replace(ROTARY, inv_freq=(0.5,)))
        make_predictor([make_context(100, 1), other], notes={})
    with pytest.raises(InputError, match="16 bits per value"):
        make_predictor([make_context(100, 1, dtype=torch.float32)], notes={})
    damaged = make_context(100, 1, cache_hash="0" * 64)
    with pytest.raises(BitstreamError, match="damaged"):
        make_predictor([damaged], notes={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for seed in range(3):
        save_cache(folder / f"kv/test_kv_{seed}.pkl", 300, seed=seed, dtype=torch.bfloat16)
    argv = ["--method", "lossless", "--path_to_kv", str(folder / "kv"), "--quiet"]
    assert run_calibration.main([*argv, "--output_path", str(folder / "profile")]) == 0
    return folder


def encode_file(folder: Path, output: Path, *flags: str) -> int:
    argv = ["--path_to_kv", str(folder / "kv/test_kv_1.pkl"), "--quantization_config", str(CONFIG), "--quiet"]
    return run_encoding.main([*argv, "--output_path", str(output), *flags])


def test_files_name_the_profile_and_decode_with_it_alone(folder, tmp_path):
    assert encode_file(folder, tmp_path / "out", "--profile", str(folder / "profile")) == 0
    record = inspect(str(tmp_path / "out"))
    assert record["profile_hash"] == load_predictor(folder / "profile").profile_hash
    saved, metadata = load_kv_cache(folder / "kv/test_kv_1.pkl")
    for profile in (folder / "profile", load_predictor(folder / "profile")):
        opened = EncodedFolder(tmp_path / "out", 1, find_profile=profile_finder(profile, ()))
        decoded = allocate_like(saved)
        opened.decode_into(decoded, metadata.token_ids, opened.document.header.chunk_tokens)
        assert are_equal(decoded, saved)
    with pytest.raises(InputError, match="give its folder with `profile`"):
        cachegen.load(tmp_path / "out")


def test_a_profile_for_files_without_one_is_refused(folder, tmp_path, capsys):
    assert encode_file(folder, tmp_path / "out") == 0
    argv = ["--path_to_encoded_kv", str(tmp_path / "out"), "--model_id", str(ROOT / "models/tiny-mistral")]
    assert run_decoding_disk.main([*argv, "--profile", str(folder / "profile"), "--path_to_context", str(CONFIG)]) == 2
    assert "was encoded without a profile" in capsys.readouterr().err


def test_a_profile_that_is_there_is_not_replaced_by_itself(folder, capsys):
    argv = ["--method", "lossless", "--path_to_kv", str(folder / "kv"), "--output_path", str(folder / "profile")]
    assert run_calibration.main(argv) == 7
    assert "holds a profile already" in capsys.readouterr().err
    (folder / "profile" / PREDICTOR_NAME).write_bytes(b"damaged")
    assert run_calibration.main(argv) == 0
    assert "was damaged: it is made again" in capsys.readouterr().err


def test_files_with_and_without_a_profile_are_not_taken_for_each_other(folder, tmp_path, capsys):
    assert encode_file(folder, tmp_path / "out") == 0
    assert encode_file(folder, tmp_path / "out", "--profile", str(folder / "profile")) == 7
    assert "another cache or configuration" in capsys.readouterr().err


def test_a_store_has_it_for_clients(folder, tmp_path):
    assert encode_file(folder, tmp_path / "out", "--profile", str(folder / "profile")) == 0
    argv = ["--path_to_encoded_kv", str(tmp_path / "out"), "--path_to_kv", str(folder / "kv/test_kv_1.pkl")]
    argv += ["--path_to_store", str(tmp_path / "store"), "--profile", str(folder / "profile"), "--quiet"]
    assert run_publishing.main(argv) == 0
    predictor = load_predictor(folder / "profile")
    assert fetch_profile(open_store(str(tmp_path / "store")), predictor.profile_hash) == predictor
