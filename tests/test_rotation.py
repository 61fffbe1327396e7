"""How planes are turned: found for every family, kept in files, and worth what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import main
from cachegen.calibration.calibrate import CalibrationContext, calibrate
from cachegen.calibration.settings import CalibrationSettings
from cachegen.errors import BitstreamError
from cachegen.fields import Fields, refuse_file
from cachegen.kv_cache import ContextMetadata, KVCache, from_planes, hash_planes, load_kv_cache, save_kv_cache
from cachegen.methods import open_document
from cachegen.methods.lossless.codec import LosslessEncoder
from cachegen.methods.rotary import Turns
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile, pack_profile, save_profile
from cachegen.pipeline import rotation as rotation_module
from cachegen.pipeline.prefill import prefill_context, tokenize
from cachegen.pipeline.rotation import FoundRotations, choose_rotation, find_rotations
from cachegen.rotation import PlaneRotations, Rotation, pack_rotations, read_rotations
from tests.fixtures import REPOSITORY
from tests.fixtures.models import CONFIGS, SMALL_SIZES, load_bundled, make_loaded, make_token_ids, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FOUR: dict[str, Any] = {**SMALL_SIZES, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {k: v for k, v in SMALL_SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
MLA: dict[str, Any] = {
    **SMALL_SIZES,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
GEMMA_4 = {
    **SMALL_SIZES,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": SMALL_SIZES["vocab_size"],
}


def bases(base: float, num_pairs: int, pairing: Any = "halves") -> Rotation:
    """The rotation of a rotary embedding without scaling."""
    return Rotation(tuple(base ** (-i / num_pairs) for i in range(num_pairs)), pairing)


TURNED, INTERLEAVED = bases(10000, 8), bases(10000, 8, "interleaved")
# Of each family: its config, and how the keys of its layers are turned; MLA keeps what turns in place of the values.
FAMILIES: dict[str, tuple[Callable[[], Any], list[Rotation | None]]] = {
    "llama": (lambda: CONFIGS["llama"], [TURNED] * 3),
    "gemma-3 (other frequencies per layer)": (
        lambda: CONFIGS["gemma3 with local and global layers"],
        [TURNED, bases(1e6, 8), TURNED],
    ),
    "gemma-4 (other head sizes, too)": (
        lambda: transformers.Gemma4TextConfig(**GEMMA_4),
        [TURNED, TURNED, Rotation(tuple(1e6 ** (-i / 16) if i < 4 else 0.0 for i in range(16)))],
    ),
    "modernbert-decoder": (
        lambda: transformers.ModernBertDecoderConfig(
            **SMALL_SIZES, layer_types=["full_attention", "sliding_attention", "sliding_attention"]
        ),
        [bases(160_000, 8), TURNED, TURNED],
    ),
    "smollm3 (layers without)": (
        lambda: transformers.SmolLM3Config(**FOUR, no_rope_layers=[1, 0, 1, 1]),
        [bases(2e6, 8), None, bases(2e6, 8), bases(2e6, 8)],
    ),
    "command-r": (lambda: transformers.CohereConfig(**SMALL_SIZES), [bases(500_000, 8, "interleaved")] * 3),
    "command-r7b": (lambda: transformers.Cohere2Config(**FOUR), [INTERLEAVED] * 3 + [None]),
    "llama-4": (
        lambda: transformers.Llama4TextConfig(
            **FOUR, intermediate_size_mlp=64, num_local_experts=2, no_rope_layers=[1, 1, 1, 0]
        ),
        [bases(500_000, 8, "interleaved")] * 3 + [None],
    ),
    "exaone-4": (
        lambda: transformers.Exaone4Config(**FOUR, sliding_window=16, sliding_window_pattern=4),
        [TURNED] * 3 + [None],
    ),
    "glm-4 (half of the dims)": (
        lambda: transformers.Glm4Config(**SMALL_SIZES, partial_rotary_factor=0.5),
        [bases(10000, 4, "interleaved")] * 3,
    ),
    "ernie-4.5": (lambda: transformers.Ernie4_5Config(**SMALL_SIZES), [bases(500_000, 8, "interleaved")] * 3),
    "helium": (lambda: transformers.HeliumConfig(**SMALL_SIZES), [bases(100_000, 8, "interleaved")] * 3),
    "phi": (lambda: transformers.PhiConfig(**HEADS, num_key_value_heads=4), [bases(10000, 4)] * 3),
    "pythia": (lambda: transformers.GPTNeoXConfig(**HEADS, rotary_pct=0.25), [bases(10000, 2)] * 3),
    "gpt-j (a table of angles)": (
        lambda: transformers.GPTJConfig(
            vocab_size=SMALL_SIZES["vocab_size"],
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=8,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        [bases(10000, 4, "interleaved")] * 2,
    ),
    "nanochat (backwards)": (
        lambda: transformers.NanoChatConfig(**SMALL_SIZES),
        [Rotation(tuple(-number for number in TURNED.inv_freq))] * 3,
    ),
    "gpt-oss (sinks)": (
        lambda: transformers.GptOssConfig(
            **SMALL_SIZES,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        [TURNED] * 3,
    ),
    "falcon (alibi)": (
        lambda: transformers.FalconConfig(
            vocab_size=SMALL_SIZES["vocab_size"],
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        [None] * 2,
    ),
    "gpt-2": (lambda: CONFIGS["gpt2 with learned positions"], [None] * 2),
    "deepseek-v3": (lambda: transformers.DeepseekV3Config(**MLA), [bases(10000, 4)] * 3),
    "deepseek-v2": (lambda: transformers.DeepseekV2Config(**MLA), [bases(10000, 4, "interleaved")] * 3),
}


def near(found: Rotation | None, expected: Rotation | None) -> bool:
    """Whether rotations are the same, but for the last bits of their frequencies."""
    if found is None or expected is None:
        return found is expected
    same = dataclasses.replace(found, inv_freq=expected.inv_freq) == expected
    return same and found.inv_freq == pytest.approx(expected.inv_freq, rel=1e-5)


class TestFinding:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_finds_how_a_family_turns_its_keys(self, family):
        make_config, expected = FAMILIES[family]
        loaded = make_loaded(make_config())
        found = find_rotations(loaded)
        assert found.describe_doubt() is None
        saved, metadata = prefill_context(loaded, make_token_ids(40))
        assert metadata.plane_rotations == found.planes
        rotations = metadata.rotations_of(saved)
        turning, others = rotations[0::2], rotations[1::2]
        if "deepseek" in family:
            turning, others = others, turning
        assert all(map(near, turning, expected)) and len(turning) == len(expected)
        assert set(others) == {None}

    def test_a_model_is_searched_once(self, monkeypatch):
        loaded = make_loaded(CONFIGS["llama"])
        found = find_rotations(loaded)
        monkeypatch.setattr(rotation_module, "_cache_one_token", lambda loaded: pytest.fail("searched again"))
        assert find_rotations(loaded) is found

    def test_a_model_without_rotary_embeddings_is_not_run(self, monkeypatch):
        monkeypatch.setattr(rotation_module, "_cache_one_token", lambda loaded: pytest.fail("run"))
        assert find_rotations(make_loaded(CONFIGS["gpt2 with learned positions"])) == FoundRotations(None)

    def test_layers_that_nothing_makes_constant_are_named_and_left_as_they_are(self):
        loaded = make_loaded(CONFIGS["llama"])
        change_keys(loaded, layer=1)
        found = find_rotations(loaded)
        assert found.planes is not None and [near(r, TURNED) for r in found.planes[0::2]] == [True, False, True]
        assert found.planes[2] is None and found.unknown_layers == (1,)
        doubt = found.describe_doubt()
        assert doubt is not None and "layers 1 are turned could not be found; they are coded as they are" in doubt

    def test_a_model_that_defeats_the_search_falls_back_to_its_first_rotary_embedding(self):
        loaded = make_loaded(CONFIGS["llama"])
        for layer in range(3):
            change_keys(loaded, layer)
        found = find_rotations(loaded)
        assert found.planes is None and found.is_by_rule
        saved, metadata = prefill_context(loaded, make_token_ids(40))
        assert [near(rotation, TURNED) for rotation in metadata.rotations_of(saved)] == [True, False] * 3

    def test_a_script_says_what_could_not_be_found(self, tmp_path, monkeypatch, capsys):
        model_id = save_model(CONFIGS["llama"], tmp_path / "model")
        (tmp_path / "0.txt").write_text("and there was light")
        argv = ["--model_id", str(model_id), "--path_to_context", str(tmp_path / "0.txt"), "--save_dir", str(tmp_path)]
        monkeypatch.setattr(rotation_module, "choose_rotation", lambda *_: (None, False))
        assert main.main(argv) == 0
        assert "they are coded as turned by its first rotary embedding" in capsys.readouterr().err
        assert main.main(argv) == 0  # nothing is prefilled, nothing is said
        assert "rotary" not in capsys.readouterr().err

    def test_of_frequencies_those_are_kept_that_fit_best(self):
        turns = Turns(128, 0, CPU)
        right = bases(10000, 8)
        slower = tuple(number / 4 if i > 4 else number for i, number in enumerate(right.inv_freq))
        vectors = torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(0)).expand(128, 2, 20)
        vectors = turns.apply(vectors, right)
        for order in ((right.inv_freq, slower), (slower, right.inv_freq)):
            chosen = choose_rotation(vectors.bfloat16().float(), dict.fromkeys(order, 1.0), turns)
            assert chosen == (right, True)


def change_keys(loaded: Any, layer: int) -> None:
    """Let a layer's keys depend on the position in a way that is no rotation."""
    projection = loaded.model.model.layers[layer].self_attn.k_proj

    def grow(module, arguments, output):
        return output * torch.linspace(1, 3, output.shape[1])[:, None]

    projection.register_forward_hook(grow)


class TestFiles:
    ROTATIONS: PlaneRotations = (TURNED, None, Rotation((1.0, -0.5), "interleaved", 3, 1.25), TURNED)

    def test_they_come_back(self):
        packed = pack_rotations(self.ROTATIONS)
        assert packed["planes"] == [0, None, 1, 0] and len(packed["rotations"]) == 2
        fields = Fields({"plane_rotations": packed}, refuse_file())
        assert read_rotations(fields, [16, 16, 7, 16]) == self.ROTATIONS
        assert read_rotations(Fields({}, refuse_file()), [16]) is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"planes": [0, None, 1]}, "one per plane, 4"),
            ({"planes": [0, None, 2, 0]}, "null or the number of a rotation"),
            ({"planes": [0, None, True, 0]}, "null or the number of a rotation"),
            ({"planes": [0, 1, 0, 0]}, "more dims than the plane's heads"),
            ({"rotations": 5}, "must be a list"),
            ({"rotations": [{"pairing": "halves"}]}, "must be an object of pairing, offset"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message):
        packed = pack_rotations(self.ROTATIONS) | change
        with pytest.raises(BitstreamError, match=message):
            read_rotations(Fields({"plane_rotations": packed}, refuse_file()), [16, 6, 16, 16])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"pairing": "thirds"}, "one of halves, interleaved"),
            ({"pairing": []}, "one of halves, interleaved"),
            ({"offset": -1}, "0 to 65535"),
            ({"inv_freq": []}, "a list of 1 to 65535"),
            ({"inv_freq": ["1"]}, "a finite number"),
            ({"attention_scaling": 0}, "must not be 0"),
        ],
    )
    def test_rotations_are_checked(self, change, message):
        packed = pack_rotations(self.ROTATIONS)
        packed["rotations"][1] |= change
        with pytest.raises(BitstreamError, match=message):
            read_rotations(Fields({"plane_rotations": packed}, refuse_file()), [16, 16, 16, 16])


# --- what they are worth ----------------------------------------------------------------------------------------------

STEP = 1.0


@cache
def bundled() -> tuple[KVCache, ContextMetadata]:
    """A cache of the bundled model, and what it was computed from."""
    loaded = load_bundled()
    ids = tokenize(loaded, (REPOSITORY / "9k_prompts" / "0.txt").read_text("utf-8"))[:2500]
    saved, metadata = prefill_context(loaded, ids)
    assert metadata.plane_rotations is None  # its rotary embedding, as halves, in all keys
    return saved, metadata


def turn_again(rotations: PlaneRotations) -> KVCache:
    """The bundled model's cache, as if its planes were turned by `rotations`."""
    saved, metadata = bundled()
    turns = Turns(saved.num_tokens, 0, CPU)
    return from_planes(
        [
            turns.apply(turns.undo(plane.float(), own), other).to(plane.dtype)
            for plane, own, other in zip(saved.planes, metadata.rotations_of(saved), rotations, strict=True)
        ]
    )


def count_transform_bytes(saved: KVCache, metadata: ContextMetadata) -> int:
    """All bytes of a cache in method transform, with a profile that was made of it; its tables among them."""
    settings = CalibrationSettings(weights="none", layers_per_group=2, finest_step=STEP)
    metadata = dataclasses.replace(metadata, cache_hash=hash_planes(saved))
    context = CalibrationContext("cache", saved, metadata)
    made = calibrate([context], None, settings, device=CPU, work_folder=REPOSITORY / "none")
    _, profile = pack_profile(made, compression=0)
    encoder = TransformEncoder(saved, metadata, profile, [saved.num_tokens], step_log=0)
    return len(encoder.tables_file) + sum(map(len, encoder.encode_chunk(0)))


def turned_otherwise(kind: str) -> PlaneRotations:
    own = bundled()[1].rotations_of(bundled()[0])
    assert own[0] is not None
    local = dataclasses.replace(own[0], inv_freq=tuple(number / 8 for number in own[0].inv_freq))
    keys = {
        "interleaved": [dataclasses.replace(own[0], pairing="interleaved")] * 6,
        "none": [None] * 6,
        "other frequencies per layer": [own[0] if layer % 3 == 2 else local for layer in range(6)],
    }[kind]
    return tuple(rotation for key in keys for rotation in (key, None))


@pytest.mark.parametrize("kind", ["interleaved", "none", "other frequencies per layer"])
def test_a_cache_costs_the_same_however_it_is_turned(kind, record_property):
    saved, metadata = bundled()
    rotations = turned_otherwise(kind)
    turned = turn_again(rotations)
    right = count_transform_bytes(saved, metadata)
    found = count_transform_bytes(turned, dataclasses.replace(metadata, plane_rotations=rotations))
    by_rule = count_transform_bytes(turned, metadata)
    record_property("bytes", {"right": right, "found": found, "by the rule": by_rule})
    print(f"{kind}: {right} bytes as the model turns it, {found} with its rotation, {by_rule} by the rule")
    assert abs(found / right - 1) < 0.01 and by_rule > 1.05 * right


@pytest.mark.parametrize("family", ["gemma-4 (other head sizes, too)", "deepseek-v2", "glm-4 (half of the dims)"])
def test_planes_of_any_rotation_and_head_size_calibrate_and_code(family, tmp_path):
    loaded = make_loaded(FAMILIES[family][0]())
    paths = [tmp_path / f"{index}.pkl" for index in range(2)]
    for index, path in enumerate(paths):
        save_kv_cache(path, *prefill_context(loaded, make_token_ids(400, seed=index)))
    contexts = [CalibrationContext(path, *load_kv_cache(path)) for path in paths]
    for weights in ("fisher", "none"):
        settings = CalibrationSettings(weights=weights, fisher_tokens=64, fisher_samples=1, finest_step=0.01)
        made = calibrate(contexts, loaded, settings, device=CPU, work_folder=tmp_path)
    save_profile(tmp_path / "profile", made)
    profile = load_profile(tmp_path / "profile", for_encoding=True)
    saved, metadata = contexts[0].cache, contexts[0].metadata
    assert profile.rotations == metadata.rotations_of(saved)
    assert decode_error(saved, metadata, profile) < 0.02

    halves = from_planes([plane.to(torch.bfloat16) for plane in saved.planes])
    encoder = LosslessEncoder(halves, dataclasses.replace(metadata, cache_hash=None), [saved.num_tokens])
    output = from_planes([torch.empty_like(plane) for plane in halves.planes])
    document = open_document(encoder.tables_file)
    document.decode([b"".join(encoder.encode_chunk(0))], output, first_token=0, token_hash=None)
    assert all(map(torch.equal, output.planes, halves.planes))


def decode_error(saved: KVCache, metadata: ContextMetadata, profile: Profile) -> float:
    """How far a finely coded cache lies from what it was, as a share of its root mean square."""
    encoder = TransformEncoder(saved, metadata, profile, [saved.num_tokens], step_log=-96)
    output = from_planes([torch.zeros_like(plane) for plane in saved.planes])
    document = open_document(encoder.tables_file, find_profile=lambda _: profile)
    document.decode([b"".join(encoder.encode_chunk(0))], output, first_token=0, token_hash=None)
    found, wanted = (torch.cat([plane[4:].flatten() for plane in planes.planes]) for planes in (output, saved))
    return ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()
