"""The compared schemes: every byte is counted, and what they decode is what their formulas say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import run_encoding
from cachegen.comparison.schemes import SavedCache, UncompressedScheme, choose_schemes, make_schemes
from cachegen.comparison.schemes.absmax import CacheGenScheme, UniformScheme
from cachegen.comparison.schemes.anchor_delta import GROUP_BINS, GROUP_TOKENS, AnchorDeltaScheme
from cachegen.comparison.schemes.base import SymbolCoder, pack_bits, unpack_bits
from cachegen.comparison.schemes.blocks import BlockScheme
from cachegen.comparison.schemes.grouped import GroupedScheme, KiviScheme
from cachegen.comparison.schemes.pca import PcaScheme, _allocate, _group_bits, _measure_groups
from cachegen.comparison.schemes.rotary import rotate_keys
from cachegen.comparison.schemes.rotated import SHRINKS, HadamardScheme, SpectralScheme
from cachegen.errors import ConfigError
from cachegen.kv_cache import KVCache, RotaryEmbedding, rotations_by_rule, save_kv_cache
from cachegen.methods import load_config
from tests.fixtures.absmax import quantize_and_dequantize
from tests.fixtures.caches import are_equal, make_cache, make_metadata

FREQUENCIES = tuple(10000 ** (-i / 32) for i in range(32))
ROTARY = RotaryEmbedding("rotary_emb", "default", FREQUENCIES, 1.0)


def make_saved(num_tokens: int, seed: int) -> SavedCache:
    """Three layers of two heads of 64 dims, bf16, smooth along tokens as a model's caches are."""
    cache = make_cache(num_tokens, num_layers=3, num_kv_heads=2, head_dim=64, dtype=torch.float32, seed=seed)
    planes = [(plane + plane.roll(1, 0) + plane.mean(0)).bfloat16() for plane in cache.planes]
    metadata = make_metadata(num_tokens, seed=seed, rotary_embeddings=(ROTARY,))
    return SavedCache(KVCache(planes[0::2], planes[1::2]), metadata)


CALIBRATION = [make_saved(300, seed=1), make_saved(250, seed=2)]
SAVED = make_saved(341, seed=3)


@pytest.fixture(scope="module")
def fitted() -> dict:
    schemes = {scheme.name: scheme for scheme in make_schemes()}
    for scheme in schemes.values():
        scheme.fit(CALIBRATION)
    return schemes


def squared_error(a: KVCache, b: KVCache) -> float:
    return sum(float((x.float() - y.float()).square().sum()) for x, y in zip(a.planes, b.planes, strict=True))


def test_the_exact_scheme_loses_nothing(fitted) -> None:
    recoded = fitted["lossless"].recode(SAVED, "exact")
    assert are_equal(recoded.cache, SAVED.cache)
    assert 0 < recoded.bytes_of["lossless"].tables < recoded.bytes_of["lossless"].encoded
    counts = [np.unique(plane.view(torch.uint16).numpy(), return_counts=True)[1] for plane in SAVED.cache.planes]
    bits = sum(float((count * np.log2(count.sum() / count)).sum()) for count in counts)
    assert recoded.bytes_of["lossless-order-0"].encoded == round(bits / 8)


@pytest.mark.parametrize("name", [scheme.name for scheme in make_schemes() if scheme.name != "lossless"])
def test_a_finer_setting_costs_more_and_errs_less(fitted, name) -> None:
    scheme = fitted[name]
    settings = [setting for setting in scheme.settings if "per token" not in setting]
    recoded = [scheme.recode(SAVED, setting) for setting in settings]
    errors = [squared_error(r.cache, SAVED.cache) for r in recoded]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    for method in recoded[0].bytes_of:
        sizes = [r.bytes_of[method].encoded for r in recoded]
        assert sizes == sorted(sizes) and method.startswith(name)


@pytest.mark.parametrize("name", [scheme.name for scheme in make_schemes()])
def test_a_scheme_gives_the_same_each_time_and_leaves_its_input_alone(fitted, name) -> None:
    again = next(scheme for scheme in make_schemes() if scheme.name == name)
    again.fit(CALIBRATION)
    before = [plane.clone() for plane in SAVED.cache.planes]
    first, second = (scheme.recode(SAVED, scheme.settings[0]) for scheme in (fitted[name], again))
    assert are_equal(first.cache, second.cache) and first.bytes_of == second.bytes_of
    assert all(map(torch.equal, before, SAVED.cache.planes))


# --- uniform and cachegen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "setting", "method", "config", "coder"),
    [
        (UniformScheme(), "8-bit", "uniform", "uniform_8bit", "packed"),
        (UniformScheme(), "4-bit", "uniform-rans", "uniform_4bit", "rans"),
        (CacheGenScheme(), "32/16 bins", "cachegen", "quantization_tiny", "rans"),
        (CacheGenScheme(), "64/32 bins", "cachegen", "quantization_tiny_fine", "rans"),
    ],
)
def test_bytes_and_values_are_those_of_the_files(tmp_path, scheme, setting, method, config, coder) -> None:
    six_layers = make_cache(200, num_layers=6, num_kv_heads=2, head_dim=8)
    metadata = make_metadata(200)
    save_kv_cache(tmp_path / "kv.pkl", six_layers, metadata)
    argv = ["--path_to_kv", tmp_path / "kv.pkl", "--output_path", tmp_path / "out", "--num_chunks", 1, "--coder", coder]
    argv += ["--quantization_config", f"config/{config}.json", "--quiet"]
    assert run_encoding.main([str(argument) for argument in argv]) == 0
    saved = SavedCache(six_layers, metadata)
    scheme.fit([saved])
    recoded = scheme.recode(saved, setting)
    files = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".cgc", ".cgt")]
    assert recoded.bytes_of[method].encoded == sum(path.stat().st_size for path in files)
    assert are_equal(recoded.cache, quantize_and_dequantize(six_layers, load_config(f"config/{config}.json")))


def test_the_originals_tables_are_counted_at_16_bits_an_entry(fitted) -> None:
    recoded = fitted["cachegen"].recode(SAVED, "32/16 bins")
    fine_planes, coarse_planes = 2, 4  # keys and values of layer 0; the other two layers
    assert recoded.bytes_of["cachegen-original"].tables == 128 * 2 * (fine_planes * 33 + coarse_planes * 17)
    assert recoded.bytes_of["cachegen-profile"].tables == 0 < recoded.bytes_of["cachegen-profile"].profile


# --- tables known beforehand ------------------------------------------------------------------------------------------


def test_a_symbol_coder_writes_what_calibration_never_saw() -> None:
    generator = np.random.default_rng(0)
    coder = SymbolCoder.fit(generator.normal(0, 20, (3, 5000)).round().astype(np.int64))
    integers = generator.normal(0, 20, (3, 77)).round().astype(np.int64)
    decoded, num_bytes = coder.recode(integers)
    assert np.array_equal(decoded, integers)
    integers[1, 5], integers[2, 76] = 3000, -3000
    decoded, with_escapes = coder.recode(integers)
    assert np.array_equal(decoded, integers)
    assert num_bytes + 12 <= with_escapes <= num_bytes + 20


def test_a_symbol_coder_costs_about_the_entropy() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(0, 3, (4, 20000)).round().astype(np.int64)
    entropy = sum(
        -np.log2(np.unique(row, return_counts=True)[1] / 20000) @ np.unique(row, return_counts=True)[1]
        for row in samples
    )
    assert SymbolCoder.fit(samples).recode(samples)[1] * 8 == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_packed_bits_are_read_again(num_bits) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << num_bits, (5, 13))
    packed = pack_bits(codes, num_bits)
    assert len(packed) == -(-65 * num_bits // 8)
    assert np.array_equal(unpack_bits(packed, num_bits, codes.shape), codes)


# --- the others -------------------------------------------------------------------------------------------------------


def test_anchor_deltas_err_by_half_a_step(fitted) -> None:
    scheme: AnchorDeltaScheme = fitted["cachegen-delta"]
    for setting in scheme.settings:
        recoded = scheme.recode(SAVED, setting)
        for index, (plane, decoded) in enumerate(zip(SAVED.cache.planes, recoded.cache.planes, strict=True)):
            error = (plane.float() - decoded.float()).abs()
            rounding = plane.float().abs().max() / 128  # of bf16
            is_delta = torch.arange(341) % GROUP_TOKENS != 0
            assert error[is_delta].max() <= scheme._step(setting, index, 3) / 2 + rounding
            assert error[~is_delta].max() <= plane.float().abs().max() / 254 + rounding


def test_anchor_deltas_bins_grow_by_thirds_of_the_layers() -> None:
    scheme = AnchorDeltaScheme()
    scheme._deviations = [1.0] * 24
    steps = [scheme._step("bins x1/4", 2 * layer, 12) for layer in range(12)]
    assert steps == [bins / 4 for bins in GROUP_BINS for _ in range(4)]


@pytest.mark.parametrize("setting", GroupedScheme.settings)
def test_grouped_integers_err_by_half_a_scale_and_keep_the_last_tokens(fitted, setting) -> None:
    recoded = fitted["grouped"].recode(SAVED, setting)
    num_quantized = (341 - 128) // 64 * 64
    num_bits = int(setting[0])
    for index, (plane, decoded) in enumerate(zip(SAVED.cache.planes, recoded.cache.planes, strict=True)):
        assert torch.equal(plane[num_quantized:], decoded[num_quantized:])
        rows = plane[:num_quantized].float().flatten(1)
        error = (rows - decoded[:num_quantized].float().flatten(1)).abs()
        if index % 2 == 0 and "per token" not in setting:
            rows, error = rows.T, error.T
        groups = rows.reshape(-1, 64)
        spans = groups.amax(1) - groups.amin(1)
        bound = spans / ((1 << num_bits) - 1) * 0.51 + groups.abs().amax(1) / 128
        assert (error.reshape(-1, 64).amax(1) <= bound).all()
    values, groups = 6 * 128 * num_quantized, 6 * 128 * num_quantized // 64
    assert recoded.bytes_of["grouped"].encoded == values * num_bits // 8 + 4 * groups + 6 * 128 * 2 * (
        341 - num_quantized
    )


def test_grouped_integers_refuse_channels_that_fill_no_group() -> None:
    saved = SavedCache(make_cache(300, head_dim=8), make_metadata(300))
    with pytest.raises(ConfigError, match="multiple of 64"):
        GroupedScheme().fit([saved])


def test_kivi_has_groups_of_32(fitted) -> None:
    num_quantized = (341 - 128) // 32 * 32
    recoded = fitted["kivi"].recode(SAVED, "2-bit")
    num_values = 6 * 128 * num_quantized
    exempt_bytes = 6 * 128 * 2 * (341 - num_quantized)
    assert recoded.bytes_of["kivi"].encoded == num_values * 2 // 8 + num_values // 32 * 4 + exempt_bytes
    group = SAVED.cache.keys[0][32:64, 1, 5].float().numpy()  # of one channel
    zero = np.float16(group.min())
    scale = np.float16((group.max() - np.float32(zero)) / 3)
    codes = np.rint((group - np.float32(zero)) / np.float32(scale)).clip(0, 3)
    expected = torch.from_numpy(codes * np.float32(scale) + np.float32(zero)).bfloat16()
    assert torch.equal(recoded.cache.keys[0][32:64, 1, 5], expected)


# --- llama.cpp's types ------------------------------------------------------------------------------------------------


def recode_block_plainly(block: list[float], cache_type: str) -> list[float]:
    """One block of 32, a value at a time, in fp32."""
    f32 = np.float32
    if cache_type == "q8_0":
        scale = f32(max(abs(x) for x in block)) / f32(127)
        inverse = f32(1) / scale if scale else f32(0)
        products = [float(f32(x) * inverse) for x in block]
        codes = [int(abs(p) + 0.5) * (1 if p >= 0 else -1) for p in products]
        return [float(f32(np.float16(scale)) * f32(code)) for code in codes]
    largest = f32(0)
    for x in block:
        if abs(f32(x)) > abs(largest):
            largest = f32(x)
    scale = largest / f32(-8)
    inverse = f32(1) / scale if scale else f32(0)
    codes = [min(15, int(f32(x) * inverse + f32(8.5))) for x in block]
    return [float(f32(np.float16(scale)) * f32(code - 8)) for code in codes]


@pytest.mark.parametrize(
    ("setting", "key_type", "value_type", "bytes_per_two_blocks"),
    [("q8_0", "q8_0", "q8_0", 34 + 34), ("K8V4", "q8_0", "q4_0", 34 + 18), ("q4_0", "q4_0", "q4_0", 18 + 18)],
)
def test_blocks_are_those_of_a_plain_computation(setting, key_type, value_type, bytes_per_two_blocks) -> None:
    saved = make_saved(9, seed=5)
    saved.cache.values[1][3, 0, :32] = 0  # a block without a scale
    recoded = BlockScheme().recode(saved, setting)
    for kind, planes, decoded in (
        (key_type, saved.cache.keys, recoded.cache.keys),
        (value_type, saved.cache.values, recoded.cache.values),
    ):
        for plane, output in zip(planes, decoded, strict=True):
            blocks = plane.float().reshape(-1, 32).tolist()
            expected = torch.tensor([recode_block_plainly(block, kind) for block in blocks]).reshape(plane.shape)
            assert torch.equal(output, expected.bfloat16())
    num_blocks = 3 * 9 * 4  # layers, tokens, blocks of a row; of keys, and as many of values
    assert recoded.bytes_of["llama.cpp"].encoded == num_blocks * bytes_per_two_blocks


def test_blocks_refuse_channels_that_fill_none() -> None:
    saved = SavedCache(make_cache(5, num_kv_heads=1, head_dim=8), make_metadata(5))
    with pytest.raises(ConfigError, match="multiple of 32"):
        BlockScheme().recode(saved, "q8_0")


# --- rotations --------------------------------------------------------------------------------------------------------


def recode_vector_plainly(vector: np.ndarray, rotation: np.ndarray, num_bits: int, shrink: float) -> np.ndarray:
    rotated = vector @ rotation
    shift = float(np.float16(rotated.min() * shrink))
    scale = float(np.float16((rotated.max() * shrink - shift) / (2**num_bits - 1)))
    codes = [min(max(round((x - shift) / scale), 0), 2**num_bits - 1) for x in rotated]
    return np.array([code * scale + shift for code in codes]) @ rotation.T


HADAMARD = np.array([[(-1) ** bin(i & j).count("1") for j in range(64)] for i in range(64)]) / 8


def test_hadamard_is_a_plain_computation() -> None:
    recoded = HadamardScheme().recode(SAVED, "4-bit")
    for token, head in ((0, 0), (17, 1), (340, 0)):
        vector = SAVED.cache.keys[1][token, head].double().numpy()
        expected = recode_vector_plainly(vector, HADAMARD, 4, 1.0)
        np.testing.assert_allclose(recoded.cache.keys[1][token, head].float(), expected, rtol=0.01, atol=0.01)
    assert recoded.bytes_of["hadamard"].encoded == 6 * 341 * 2 * (64 * 4 // 8 + 4)


def test_hadamard_refuses_a_head_that_is_no_power_of_two() -> None:
    with pytest.raises(ConfigError, match="power of two, got 24"):
        HadamardScheme().recode(SavedCache(make_cache(5, head_dim=24), make_metadata(5)), "4-bit")


def test_spectral_is_a_plain_computation_between_sinks_and_window(fitted) -> None:
    scheme: SpectralScheme = fitted["spectral"]
    recoded = scheme.recode(SAVED, "2-bit")
    for index, (plane, decoded) in enumerate(zip(SAVED.cache.planes, recoded.cache.planes, strict=True)):
        assert torch.equal(plane[:4], decoded[:4]) and torch.equal(plane[-128:], decoded[-128:])
        rotation, shrink = scheme._rotations[index][1].astype(float), float(scheme._shrinks["2-bit"][index][1, 0])
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(64), atol=0.01)
        assert min(abs(shrink - s) for s in SHRINKS) < 1e-6
        expected = recode_vector_plainly(plane[50, 1].double().numpy(), rotation, 2, shrink)
        np.testing.assert_allclose(decoded[50, 1].float(), expected, rtol=0.01, atol=0.02)
    count = recoded.bytes_of["spectral"]
    assert count.encoded == 6 * 2 * ((341 - 132) * (64 * 2 // 8 + 4) + 132 * 64 * 2)
    assert count.profile == 6 * 2 * (64 * 64 * 2 + 1)


def test_spectral_axes_are_those_of_the_calibration_caches(fitted) -> None:
    scheme: SpectralScheme = fitted["spectral"]
    vectors = torch.cat([saved.cache.values[2][4:, 0] for saved in CALIBRATION]).double().numpy()
    axes = scheme._rotations[5][0] @ HADAMARD.T  # takes Hadamard off again
    moments = axes.T @ (vectors.T @ vectors) @ axes
    variances = np.diag(moments)
    assert np.abs(moments - np.diag(variances)).max() < 0.01 * variances.max()
    assert (np.diff(variances) <= 0.01 * variances.max()).all()


# --- which are measured -----------------------------------------------------------------------------------------------


def test_the_uncompressed_cache_is_16_bits() -> None:
    recoded = UncompressedScheme().recode(SAVED, UncompressedScheme.settings[0])
    assert are_equal(recoded.cache, SAVED.cache)
    assert recoded.bytes_of["uncompressed"].encoded == 2 * SAVED.cache.num_values


def test_schemes_and_settings_are_chosen_in_the_tables_order() -> None:
    chosen = choose_schemes(make_schemes(), ["kivi", "uniform=8-bit,4-bit"])
    assert [(s.name, s.settings) for s in chosen] == [("uniform", ("4-bit", "8-bit")), ("kivi", KiviScheme.settings)]


@pytest.mark.parametrize("settings", [("1 bit",), ("0.5 bit", "4 bit")])
def test_a_chosen_setting_gives_what_it_gives_among_all(fitted, settings) -> None:
    (chosen,) = choose_schemes(make_schemes(), [f"pca={','.join(settings)}"])
    chosen.fit(CALIBRATION)
    for setting in settings:
        a, b = (scheme.recode(SAVED, setting) for scheme in (chosen, fitted["pca"]))
        assert are_equal(a.cache, b.cache) and a.bytes_of == b.bytes_of


@pytest.mark.parametrize(
    ("wanted", "words"), [("nothing", "no scheme nothing"), ("uniform=9-bit", "uniform has no setting '9-bit'")]
)
def test_a_scheme_or_setting_that_is_not_there_is_refused(wanted, words) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_schemes(make_schemes(), [wanted])


# --- PCA and rotary embeddings ----------------------------------------------------------------------------------------


def test_pca_keeps_the_first_four_tokens(fitted) -> None:
    recoded = fitted["pca"].recode(SAVED, "0.5 bit")
    for plane, decoded in zip(SAVED.cache.planes, recoded.cache.planes, strict=True):
        assert torch.equal(plane[:4], decoded[:4]) and not torch.equal(plane[4:], decoded[4:])


def test_pca_allocates_what_is_asked_and_cuts_all_components() -> None:
    generator = np.random.default_rng(0)
    samples = (generator.normal(size=(200, 64)) * np.geomspace(10, 0.1, 64)).astype(np.float32)
    errors = [_measure_groups(samples), _measure_groups(samples / 4)]
    costs = []
    for target in (1.0, 2.0, 4.0):
        plans = _allocate(errors, target)
        for plan in plans:
            assert [start for start, _, _ in plan] + [64] == [0] + [stop for _, stop, _ in plan]
        costs.append(sum(_group_bits(*group) for plan in plans for group in plan) / 128)
    assert all(0.8 * target <= cost <= target for cost, target in zip(costs, (1.0, 2.0, 4.0), strict=True))


def test_rotation_is_the_models_and_its_inverse() -> None:
    keys = SAVED.cache.keys[0].float()
    metadata = make_metadata(341, rotary_embeddings=(RotaryEmbedding("r", "yarn", FREQUENCIES, 1.2),))
    (rotation,) = rotations_by_rule(metadata.rotary_embeddings, [keys.shape[2]])
    rotated = rotate_keys(keys, rotation, undo=False)
    angles = torch.arange(341.0)[:, None] * torch.tensor(FREQUENCIES)
    cosines, sines = (1.2 * torch.cat([f(angles)] * 2, dim=1)[None] for f in (torch.cos, torch.sin))
    expected, _ = apply_rotary_pos_emb(keys.transpose(0, 1)[None], keys.transpose(0, 1)[None], cosines, sines)
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate_keys(rotated, rotation, undo=True), keys, rtol=1e-4, atol=1e-4)


def test_keys_that_do_not_turn_stay() -> None:
    keys = SAVED.cache.keys[0]
    assert torch.equal(rotate_keys(keys, None, undo=True), keys.float())


def test_every_scheme_has_names_of_its_own(fitted) -> None:
    methods = [m for scheme in fitted.values() for m in scheme.recode(SAVED, scheme.settings[0]).bytes_of]
    assert len(methods) == len(set(methods))
    assert isinstance(fitted["pca"], PcaScheme)
