"""models/tiny-mistral/profile is the bundled model's, whole, and was made of 9k_prompts/calibration only."""

from __future__ import annotations

import pytest
import torch

from cachegen.kv_cache import hash_token_prefixes
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.fingerprint import compute_fingerprint
from tests.fixtures import BUNDLED_MODEL, REPOSITORY
from tests.fixtures.models import load_tokenizer

FOLDER = REPOSITORY / "models" / "tiny-mistral" / "profile"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(FOLDER, for_encoding=True)


def test_it_is_the_bundled_models(profile):
    assert profile.model_fingerprint == compute_fingerprint(BUNDLED_MODEL)
    assert profile.plane_shapes == ((2, 64),) * 12 and len(profile.rotary_embeddings) == 1


def test_its_matrices_invert_each_other(profile):
    for group in profile.groups:
        product = group.synthesis.double() @ group.analysis.double()
        torch.testing.assert_close(product, torch.eye(len(product), dtype=torch.float64), atol=0.02, rtol=0)


def test_along_its_curve_bits_rise_and_divergence_falls(profile):
    assert len(profile.curve) == 8
    for coarse, fine in zip(profile.curve, profile.curve[1:], strict=False):
        assert coarse.step_log > fine.step_log
        assert coarse.bits_per_value < fine.bits_per_value and coarse.kl > fine.kl


def test_it_was_made_and_measured_on_calibration_prompts_only(profile):
    hashes = set()
    for path in (REPOSITORY / "9k_prompts/calibration").glob("*.txt"):
        ids = torch.tensor(load_tokenizer()(path.read_text("utf-8"), verbose=False)["input_ids"], dtype=torch.int32)
        hashes |= set(hash_token_prefixes(ids[:-1], [len(ids) - 1]))
    fitted_on = profile.calibration["token_hashes"]
    held_out = profile.calibration["held_out_token_hashes"]
    assert {*fitted_on, *held_out} == hashes and len(fitted_on) + len(held_out) == len(hashes) == 12
