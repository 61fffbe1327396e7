"""Models for images with text alone: what stands for an image is refused, what was seen before is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cachegen
from cachegen.errors import InputError
from cachegen.pipeline.images import on_text_alone
from cachegen.pipeline.model import LoadedModel, load_model
from cachegen.pipeline.model_cache import view_kv_cache
from cachegen.pipeline.prefill import prefill, prefill_context, run_model, tokenize
from tests.fixtures.models import make_named, make_token_ids
from tests.zoo.checkpoints import make_ids, save_specimen
from tests.zoo.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE_TOKEN = 500


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedModel:
    """A tiny Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("model")
    save_specimen(FAMILIES["Qwen2.5-VL"], folder)
    return load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def seen(loaded) -> Any:
    """The module that remembers an image, which took 7 positions more than tokens."""
    module = loaded.model.model
    module.rope_deltas = torch.tensor([[7]])
    yield module
    module.rope_deltas = None


def test_a_text_is_computed_alike_whatever_images_came_before(loaded, seen):
    ids = make_ids(40)
    behind = run_model(loaded, prefill(loaded, ids[:30], 8, capacity=40), ids[30:], 10)
    seen.rope_deltas = None
    expected = run_model(loaded, prefill(loaded, ids[:30], 8, capacity=40), ids[30:], 10)
    assert torch.equal(behind, expected)


def test_what_is_remembered_is_given_back(loaded, seen):
    remembered = seen.rope_deltas
    prefill(loaded, make_ids(10), 4)
    assert seen.rope_deltas is remembered
    with pytest.raises(KeyError), on_text_alone(loaded.model):
        assert seen.rope_deltas is None
        raise KeyError
    assert seen.rope_deltas is remembered


def test_a_cache_that_is_loaded_is_continued_as_a_text(loaded, seen, tmp_path):
    ids = make_ids(40)
    planes = view_kv_cache(prefill(loaded, ids), 40)
    cachegen.compress(planes, ids, loaded, {"method": "uniform", "bits": 8}).save(tmp_path / "encoded")
    cachegen.load(tmp_path / "encoded").to_cache(loaded, ids)
    assert seen.rope_deltas is None


def test_a_token_that_stands_for_an_image_is_refused_before_anything_is_computed(loaded, monkeypatch):
    ids = make_ids(40)
    planes = view_kv_cache(prefill(loaded, ids), 40)
    ids[20] = IMAGE_TOKEN
    with pytest.raises(InputError, match="`token_ids`: token 500 stands for an image"):
        cachegen.compress(planes, ids, loaded, {"method": "uniform", "bits": 8})
    monkeypatch.setattr(loaded.model, "forward", lambda **_: pytest.fail("the model has run"))
    with pytest.raises(InputError, match="token 500 stands for an image, a video or a sound: only text is supported"):
        prefill_context(loaded, ids)


def test_a_text_with_such_a_token_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.config, "image_token_id", int(tokenize(make_named("llama"), "a register")[1]))
    with pytest.raises(InputError, match=r"the text: token [0-9]+ stands for an image"):
        tokenize(loaded, "a register")


def test_models_for_text_have_no_such_tokens():
    assert prefill_context(make_named("llama"), make_token_ids(600, seed=3))[0].num_tokens == 599
