"""The door to calibration: the profile of the script, from texts, token ids or caches, and what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import run_calibration
from cachegen import api
from cachegen.errors import BitstreamError, InputError, MismatchError, OutputError
from cachegen.kv_cache import save_kv_cache
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.fingerprint import compute_fingerprint, compute_memory_fingerprint
from cachegen.pipeline.model import load_model, quiet_transformers
from cachegen.pipeline.model_cache import planes_of_cache
from cachegen.pipeline.prefill import prefill_context
from tests.fixtures import REPOSITORY, read_folder
from tests.fixtures.caches import are_equal
from tests.fixtures.models import (
    TINY_LLAMA,
    change_weights,
    load_tokenizer,
    make_named,
    make_token_ids,
    run_model,
    save_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXTS = [make_token_ids(80, seed=number) for number in range(3)]
QUICK: dict[str, Any] = {"fisher_tokens": 16, "fisher_samples": 1, "device": "cpu", "num_threads": 1}
FINE = {"method": "transform", "step_log": -48}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_model(TINY_LLAMA, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()


@pytest.fixture(scope="module")
def profile(model) -> Profile:
    return api.calibrate(model, CONTEXTS, **QUICK)


def are_same(a: Profile, b: Profile) -> bool:
    return a.curve == b.curve and all(
        x.synthesis.equal(y.synthesis) and x.scale_logs.equal(y.scale_logs) and x.mean.equal(y.mean)
        for x, y in zip(a.groups, b.groups, strict=True)
    )


def test_it_is_the_profile_of_the_script(profile, model_folder, tmp_path):
    loaded = load_model(str(model_folder), device=torch.device("cpu"), dtype=torch.float32)
    for number, ids in enumerate(CONTEXTS):
        cache, metadata = prefill_context(loaded, torch.cat([ids, ids[:1]]))
        save_kv_cache(tmp_path / f"test_kv_{number}.pkl", cache, metadata)
    output = tmp_path / "profile"
    argv = ["--path_to_kv", tmp_path, "--model_id", model_folder, "--output_path", output, "--quiet"]
    small = ["--fisher_tokens", 16, "--fisher_samples", 1, "--device", "cpu", "--threads", 1]
    assert run_calibration.main([str(flag) for flag in argv + small]) == 0
    written = load_profile(output, for_encoding=True)
    assert are_same(written, profile)
    assert set(written.calibration) == set(profile.calibration)
    assert profile.calibration["num_contexts"] == 2 and profile.calibration["num_held_out_contexts"] == 1


def test_texts_ids_and_caches_give_the_same(model, tmp_path):
    text = (REPOSITORY / "9k_prompts" / "0.txt").read_text(encoding="utf-8")
    texts = [text[:400], text[400:900]]
    ids = [load_tokenizer()(part)["input_ids"] for part in texts]
    caches = [(run_model(model, torch.tensor(part)), part) for part in ids]
    expected = api.calibrate(model, texts, tokenizer=load_tokenizer(), **QUICK)
    assert are_same(api.calibrate(model, [torch.tensor(part)[None] for part in ids], **QUICK), expected)
    assert are_same(api.calibrate(model, caches, **QUICK), expected)
    assert are_same(api.calibrate(model, ids, **QUICK), expected)
    with torch.inference_mode():
        assert are_same(api.calibrate(model, ids, **QUICK), expected)


def test_a_profile_serves_as_it_is_saved_and_loaded(profile, model, tmp_path):
    profile.save(tmp_path / "profile")
    read = load_profile(tmp_path / "profile", for_encoding=True)
    assert (read.profile_hash, read.num_bytes) == (profile.profile_hash, profile.num_bytes) and are_same(read, profile)
    prompt = torch.cat([CONTEXTS[0], CONTEXTS[1][:3]]).long()[None]
    output = run_model(model, CONTEXTS[0])
    decoded = []
    for given in (profile, tmp_path / "profile"):
        api.compress(output, CONTEXTS[0], model, FINE, profile=given).save(tmp_path / "encoded")
        decoded.append(planes_of_cache(api.load(tmp_path / "encoded", profile=given).to_cache(model, prompt)))
    assert are_equal(*decoded)
    original = planes_of_cache(output.past_key_values)
    errors = [(a - b).square().mean() / b.var() for a, b in zip(decoded[0].planes, original.planes, strict=True)]
    assert max(errors) < 0.5  # of random tokens, most of which does not matter to the model
    with pytest.raises(MismatchError, match="the profile's model_fingerprint"):
        other = make_named("llama").model
        api.compress(run_model(other, CONTEXTS[0]), CONTEXTS[0], other, FINE, profile=profile)


def test_the_profile_of_an_unchanged_checkpoint_is_the_checkpoints_and_serves_any_dtype(profile, model, model_folder):
    assert profile.model_fingerprint == compute_fingerprint(str(model_folder))
    assert profile.calibration["model_id"] == str(model_folder)
    with quiet_transformers():
        halves = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    assert api.compress(run_model(halves, CONTEXTS[0]), CONTEXTS[0], halves, FINE, profile=profile).num_tokens == 80


def test_the_profile_of_a_model_in_memory_is_only_its_own(model):
    changed = change_weights(model)
    profile = api.calibrate(changed, CONTEXTS, no_curve=True, **QUICK)
    assert profile.model_fingerprint == compute_memory_fingerprint(changed) and profile.curve == ()
    assert profile.calibration["num_contexts"] == 3
    api.compress(run_model(changed, CONTEXTS[0]), CONTEXTS[0], changed, FINE, profile=profile)
    with pytest.raises(MismatchError, match="the profile's model_fingerprint"):
        api.compress(run_model(model, CONTEXTS[0]), CONTEXTS[0], model, FINE, profile=profile)


def test_another_profile_is_replaced_only_when_told(profile, model, tmp_path):
    profile.save(tmp_path)
    before = read_folder(tmp_path)
    profile.save(tmp_path)
    other = api.calibrate(model, CONTEXTS, seed=1, no_curve=True, **QUICK)
    with pytest.raises(OutputError, match="another profile is there; give another folder, or `overwrite`"):
        other.save(tmp_path)
    assert read_folder(tmp_path) == before
    other.save(tmp_path, overwrite=True)
    assert load_profile(tmp_path).profile_hash == other.profile_hash


def test_the_bundled_profile_is_saved_as_it_was(tmp_path):
    folder = REPOSITORY / "models" / "tiny-mistral" / "profile"
    load_profile(folder, for_encoding=True).save(tmp_path)
    for name, content in read_folder(tmp_path).items():
        assert content == (folder / name).read_bytes(), name


@pytest.mark.parametrize("name", ["synthesis.zlib", "analysis.safetensors", "profile.json"])
def test_a_damaged_profile_is_refused_by_its_files_name(profile, model, tmp_path, name):
    profile.save(tmp_path / "profile")
    api.compress(run_model(model, CONTEXTS[0]), CONTEXTS[0], model, FINE, profile=profile).save(tmp_path / "encoded")
    content = (tmp_path / "profile" / name).read_bytes()
    (tmp_path / "profile" / name).write_bytes(content[:-20])
    with pytest.raises(BitstreamError, match=name):
        api.compress(run_model(model, CONTEXTS[0]), CONTEXTS[0], model, FINE, profile=tmp_path / "profile")
    if name != "analysis.safetensors":
        with pytest.raises(BitstreamError, match=name):
            api.load(tmp_path / "encoded", profile=tmp_path / "profile")
    shutil.rmtree(tmp_path / "profile")
    with pytest.raises(InputError, match="no such file"):
        api.load(tmp_path / "encoded", profile=tmp_path / "profile")
    with pytest.raises(InputError, match="no profile there is"):
        api.load(tmp_path / "encoded")


def test_a_profile_says_what_it_is_in_a_line(profile):
    assert repr(profile).startswith(f"<Profile {profile.profile_hash[:12]}: 2 layers, ")
    assert f" of 64 channels, {profile.num_bytes:,} bytes to decode>" in repr(profile)


@pytest.mark.parametrize(
    ("contexts", "arguments", "error", "message"),
    [
        ([], {}, InputError, "a context that nothing was fitted on"),
        (CONTEXTS[:1], {}, InputError, "a context that nothing was fitted on"),
        (
            [CONTEXTS[0][:30]],
            {"no_curve": True, "layers_per_group": 2},
            InputError,
            "26 tokens to fit on are fewer than the 64 channels",
        ),
        ([*CONTEXTS[:2], [5]], {}, InputError, "context 2: a context needs at least 6 tokens"),
        ([Path("a.txt")], {}, TypeError, "`token_ids` must be a tensor or a sequence of integers, got PosixPath"),
        (CONTEXTS[:1] * 2, {}, MismatchError, "context 1: the same context as context 0"),
        (["a text"], {}, ValueError, "`tokenizer` must be given"),
        ("a text", {}, TypeError, "put a single one into a list"),
        (CONTEXTS[0], {}, TypeError, "put a single one into a list"),
        ([CONTEXTS[0].float()], {}, TypeError, "`token_ids` must be integers"),
        (CONTEXTS, {"weights": "some"}, ValueError, "`weights` must be one of"),
        (CONTEXTS, {"fisher_tokens": 0}, ValueError, "`fisher_tokens` must be at least 1"),
        (CONTEXTS, {"finest_step": 0}, ValueError, "`finest_step` must be"),
        (CONTEXTS, {"seed": -1}, ValueError, "`seed` must be at least 0"),
    ],
)
def test_what_cannot_be_calibrated_on_is_named(model, contexts, arguments, error, message):
    with pytest.raises(error, match=message):
        api.calibrate(model, contexts, **{**QUICK, **arguments})


def test_caches_that_are_not_the_models_are_named(model):
    cache = run_model(model, CONTEXTS[0])
    with pytest.raises(MismatchError, match="context 0: the cache holds 80 tokens, its token ids are 79"):
        api.calibrate(model, [(cache, CONTEXTS[0][:-1])], **QUICK)
    with pytest.raises(MismatchError, match="the cache is not of"):
        api.calibrate(model, [(run_model(make_named("llama").model, CONTEXTS[0]), CONTEXTS[0])], **QUICK)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        api.calibrate(copy.deepcopy(model).train(), CONTEXTS, **QUICK)


def test_bars_are_shown_where_they_are_asked_for(model, capsys):
    api.calibrate(model, CONTEXTS, progress=True, **QUICK)
    assert "calibrating" in capsys.readouterr().err
    api.calibrate(model, CONTEXTS, **QUICK)
    assert capsys.readouterr().err == ""
