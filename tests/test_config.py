"""Configurations: what is read, what is refused, and that messages name the field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachegen.config import ModelConfig, load_model_config, parse_coder
from cachegen.errors import ConfigError, InputError, MismatchError
from cachegen.format import Coder, PlaneLayout
from cachegen.methods import check_config, load_config, method_named
from cachegen.methods.absmax.config import AbsmaxConfig, LayerGroup
from cachegen.methods.transform.config import TransformConfig

CONFIG = Path(__file__).resolve().parents[1] / "config"
CACHEGEN = {
    "key_first_layers": 10,
    "key_second_layers": 20,
    "key_first_bins": 32,
    "key_second_bins": 16,
    "key_third_bins": 8,
    "value_first_layers": 2,
    "value_first_bins": 64,
    "value_second_bins": 4,
}


@pytest.fixture
def write(tmp_path):
    """Write a config and return its path."""

    def write_config(content: object) -> Path:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_config


def document_of(method: str, planes: Sequence[PlaneLayout] = ()) -> Any:
    """What a config looks at in a tables file's header."""
    found = method_named(method)
    assert found is not None
    return SimpleNamespace(method=found.number, planes=planes, num_layers=len(planes) // 2)


def bins_of(path: Path, num_layers: int) -> tuple[list[int], list[int]]:
    """Bins of keys and of values, by layer."""
    bins = [group.num_bins for group in load_config(path).groups_of_planes(num_layers)]
    return bins[0::2], bins[1::2]


# --- quantization configs ---------------------------------------------------------------------------------------------


def test_layer_groups_cover_layers_in_order(write) -> None:
    keys, values = bins_of(write(CACHEGEN), 32)
    assert keys == [32] * 10 + [16] * 10 + [8] * 12
    assert values == [64] * 2 + [4] * 30


def test_numbers_may_be_strings(write) -> None:
    as_strings = {name: str(value) for name, value in CACHEGEN.items()}
    read = load_config(write(as_strings))
    assert read == load_config(write(CACHEGEN))
    assert load_config(write(CACHEGEN | {"key_first_bins": " 32 "})) == read


@pytest.mark.parametrize("num_layers", [1, 2, 3, 10, 11, 20, 21])
def test_boundaries_beyond_the_layers_are_clipped(write, num_layers: int) -> None:
    keys, values = bins_of(write(CACHEGEN), num_layers)
    assert keys == ([32] * 10 + [16] * 10 + [8] * 12)[:num_layers]
    assert values == ([64] * 2 + [4] * 30)[:num_layers]


def test_equal_boundaries_leave_a_group_empty(write) -> None:
    keys, _ = bins_of(write(CACHEGEN | {"key_first_layers": 0, "key_second_layers": 0}), 3)
    assert keys == [8] * 3


@pytest.mark.parametrize(
    ("fields", "num_layers", "message"),
    [
        ({"key_third_layers": 30}, 32, "no key group covers layers 30 to 31: raise key_third_layers"),
        ({"value_second_layers": "5"}, 7, "no value group covers layers 5 to 6: raise value_second_layers"),
    ],
)
def test_uncovered_layer_is_refused(write, fields: dict, num_layers: int, message: str) -> None:
    config = load_config(write(CACHEGEN | fields))
    with pytest.raises(ConfigError, match=message):
        config.groups_of_planes(num_layers)


def test_last_boundary_may_stand_at_the_end(write) -> None:
    keys, values = bins_of(write(CACHEGEN | {"key_third_layers": 32, "value_second_layers": 40}), 32)
    assert (len(keys), len(values)) == (32, 32)


@pytest.mark.parametrize("name", [name for name in CACHEGEN if name.endswith("_bins")])
@pytest.mark.parametrize("value", [2, 3, 5, 255, 257, 258, 0, "6 ", "33", "1000"])
def test_odd_and_out_of_range_bins_are_refused(write, name: str, value: object) -> None:
    if value == "6 ":
        load_config(write(CACHEGEN | {name: value}))
    else:
        with pytest.raises(ConfigError, match=rf"config\.json: {name} must be (even|4 to 256), got"):
            load_config(write(CACHEGEN | {name: value}))


@pytest.mark.parametrize("name", CACHEGEN)
@pytest.mark.parametrize(
    "value",
    [True, False, None, 16.0, 16.5, "16.0", "-16", "+16", "0x10", "1_6", "", " ", [], {}, "９" * 30, "9" * 5000, "²"],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_not_an_integer_is_refused(write, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {name} must be an integer, got"):
        load_config(write(CACHEGEN | {name: value}))


@pytest.mark.parametrize("name", CACHEGEN)
def test_missing_field_is_named(write, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {name} is missing"):
        load_config(write({field: value for field, value in CACHEGEN.items() if field != name}))


@pytest.mark.parametrize("value", [-1, 32769, 10**30])
def test_boundary_out_of_range_is_refused(write, value: int) -> None:
    with pytest.raises(ConfigError, match="key_first_layers must be 0 to 32768, got"):
        load_config(write(CACHEGEN | {"key_first_layers": value}))


def test_descending_boundaries_are_refused(write) -> None:
    with pytest.raises(ConfigError, match="key_second_layers must not be below the boundary before it, got 9"):
        load_config(write(CACHEGEN | {"key_second_layers": 9}))


@pytest.mark.parametrize(
    "content",
    [
        CACHEGEN | {"key_frist_bins": 16},
        CACHEGEN | {"bits": 8},
        {"method": "uniform", "bits": 8, "key_first_bins": 16},
        {"method": "uniform", "bits": 8, "": 1},
    ],
)
def test_unknown_fields_are_refused(write, content: dict) -> None:
    with pytest.raises(ConfigError, match=r"unknown field .* \(known: "):
        load_config(write(content))


@pytest.mark.parametrize("method", ["CACHEGEN", "", None, 1, ["cachegen"], "cachegen-delta"])
def test_unknown_methods_are_refused(write, method: object) -> None:
    with pytest.raises(ConfigError, match="method must be one of cachegen, uniform, transform, lossless, got"):
        load_config(write(CACHEGEN | {"method": method}))


def test_method_defaults_to_cachegen_with_coder_rans(write) -> None:
    read = load_config(write(CACHEGEN))
    assert (read.method, read.coder) == ("cachegen", Coder.RANS)
    assert read == load_config(write(CACHEGEN | {"method": "cachegen", "description": "the default"}))


@pytest.mark.parametrize("bits", [2, 3, 8, "4"])
def test_uniform_has_one_group_and_defaults_to_packed(write, bits: object) -> None:
    read = load_config(write({"method": "uniform", "bits": bits}))
    assert (read.method, read.coder) == ("uniform", Coder.PACKED)
    assert read.groups_of_planes(3) == [LayerGroup(None, 1 << int(bits), "bits")] * 6


@pytest.mark.parametrize("bits", [1, 9, 0, "16"])
def test_uniform_bits_out_of_range_are_refused(write, bits: object) -> None:
    with pytest.raises(ConfigError, match="bits must be 2 to 8, got"):
        load_config(write({"method": "uniform", "bits": bits}))


@pytest.mark.parametrize(("name", "coder"), [("rans", Coder.RANS), ("packed", Coder.PACKED)])
def test_coder_is_read_by_name(write, name: str, coder: Coder) -> None:
    assert load_config(write(CACHEGEN | {"coder": name})).coder is coder
    assert parse_coder(name, "--coder") is coder


@pytest.mark.parametrize("name", ["arithmetic", "RANS", "", None, 1, True])
def test_unknown_coders_are_refused(write, name: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: coder must be one of rans, ac, packed, got"):
        load_config(write(CACHEGEN | {"coder": name}))


@pytest.mark.parametrize("load", [load_config, load_model_config])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"layers": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "must be a JSON object"),
        ("16", "must be a JSON object"),
    ],
    ids=["empty", "cut", "deep", "digits", "array", "number"],
)
def test_what_is_not_a_json_object_is_refused(write, load, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        load(write(content))


@pytest.mark.parametrize("load", [load_config, load_model_config])
def test_text_that_is_not_utf8_is_refused(tmp_path, load) -> None:
    (tmp_path / "config.json").write_bytes(b'{"layers": "\xff"}')
    with pytest.raises(ConfigError, match="not JSON"):
        load(tmp_path / "config.json")


@pytest.mark.parametrize("load", [load_config, load_model_config])
def test_missing_and_unreadable_files_are_input_errors(tmp_path, load) -> None:
    with pytest.raises(InputError, match=r"absent.json: no such config file"):
        load(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


# --- transform configs ------------------------------------------------------------------------------------------------

TRANSFORM = {"method": "transform", "profile": "profile", "step_log": 16}


def test_transform_config_is_read(write, tmp_path) -> None:
    read = load_config(write(TRANSFORM))
    assert read == TransformConfig(str(tmp_path / "profile"), 16, None, None, 1)
    assert (read.method, read.coder) == ("transform", Coder.RANS)
    read = load_config(write(TRANSFORM | {"levels": "3", "description": "three", "step_log": -1024}))
    assert (read.num_levels, read.step_log) == (3, -1024)


@pytest.mark.parametrize(("name", "value"), [("target_bits", 0.5), ("target_bits", 2), ("target_kl", 1e-4)])
def test_a_target_takes_the_place_of_the_step(write, name: str, value: float) -> None:
    read = load_config(write({"method": "transform", "profile": "p", name: value}))
    assert (getattr(read, name), read.step_log) == (value, None)


def test_the_profile_is_found_from_the_configs_folder(write, tmp_path) -> None:
    assert load_config(write(TRANSFORM | {"profile": "/a/b"})).profile == "/a/b"
    assert load_config(write(TRANSFORM | {"profile": "../x"})).profile == str(tmp_path / "../x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profile": None}, "profile must be a profile's folder, got"),
        ({"profile": ""}, "profile must be a profile's folder, got"),
        ({"profile": 3}, "profile must be a profile's folder, got"),
        ({"step_log": None}, "give exactly one of step_log, target_bits and target_kl"),
        ({"target_bits": 1.0}, "give exactly one of step_log, target_bits and target_kl"),
        ({"step_log": None, "target_bits": 1.0, "target_kl": 0.1}, "give exactly one of"),
        ({"step_log": True}, "step_log must be an integer, got true"),
        ({"step_log": 0.5}, "step_log must be an integer, got 0.5"),
        ({"step_log": 1025}, "step_log must be -1024 to 1024, got 1025"),
        ({"step_log": -1025}, "step_log must be -1024 to 1024, got -1025"),
        ({"step_log": None, "target_bits": 0}, "target_bits must be a number above 0, got 0"),
        ({"step_log": None, "target_bits": -1.5}, "target_bits must be a number above 0, got -1.5"),
        ({"step_log": None, "target_kl": "0.1"}, 'target_kl must be a number above 0, got "0.1"'),
        ({"step_log": None, "target_kl": True}, "target_kl must be a number above 0, got true"),
        ({"step_log": None, "target_kl": float("nan")}, "not JSON"),
        ({"step_log": None, "target_kl": float("inf")}, "not JSON"),
        ({"levels": 0}, "levels must be 1 to 4, got 0"),
        ({"levels": 5}, "levels must be 1 to 4, got 5"),
        ({"levels": 1.5}, "levels must be an integer, got 1.5"),
        ({"coder": "rans"}, "unknown field coder"),
        ({"bits": 8}, "unknown field bits"),
    ],
)
def test_bad_transform_configs_are_refused_by_field(write, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        load_config(write(TRANSFORM | fields))


def test_a_transform_config_refuses_files_of_other_methods(write) -> None:
    config = load_config(write(TRANSFORM))
    check_config(config, document_of("transform"), "tables.cgt")
    with pytest.raises(MismatchError, match=r"tables\.cgt: method is cachegen, but .*config\.json says transform"):
        check_config(config, document_of("cachegen"), "tables.cgt")


# --- mismatches name the field ----------------------------------------------------------------------------------------


def planes_of(path: Path, num_layers: int) -> list[PlaneLayout]:
    groups = load_config(path).groups_of_planes(num_layers)
    return [PlaneLayout(8, 128, group.num_bins, 0) for group in groups]


def test_planes_of_the_same_config_pass(write) -> None:
    path = write(CACHEGEN)
    check_config(load_config(path), document_of("cachegen", planes_of(path, 32)), "tables.cgt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_first_bins": 16}, r"tables\.cgt: key_first_bins is 32 \(layer 0\), but .*config\.json says 16"),
        ({"key_third_bins": 16}, r"key_third_bins is 8 \(layer 20\), but .* says 16"),
        ({"value_first_layers": 3}, r"value_first_bins is 4 \(layer 2\), but .* says 64"),
        ({"value_second_bins": 6}, r"value_second_bins is 4 \(layer 2\), but .* says 6"),
    ],
)
def test_other_bins_are_refused_by_field(write, fields: dict, message: str) -> None:
    planes = planes_of(write(CACHEGEN), 32)
    other = load_config(write(CACHEGEN | fields))
    with pytest.raises(MismatchError, match=message):
        check_config(other, document_of("cachegen", planes), "tables.cgt")


def test_other_method_is_refused(write) -> None:
    config = load_config(write(CACHEGEN))
    with pytest.raises(MismatchError, match=r"method is uniform, but .*config\.json says cachegen"):
        check_config(config, document_of("uniform"), "tables.cgt")


MODEL = {"model_id": "a/model", "layers": 2, "channels": "1024", "kv_heads": 8, "head_dim": 128}


def test_model_config_is_read(write) -> None:
    assert load_model_config(write(MODEL)) == ModelConfig(2, 1024, 8, 128)
    assert load_model_config(write({"layers": "3"})) == ModelConfig(3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 3}, r"tables\.cgt: layers is 2, but .*config\.json says 3"),
        ({"channels": 512}, "channels is 1024, but .* says 512"),
        ({"kv_heads": 4}, "kv_heads is 8, but .* says 4"),
        ({"head_dim": 64}, "head_dim is 128, but .* says 64"),
    ],
)
def test_another_models_shape_is_refused_by_field(write, fields: dict, message: str) -> None:
    shapes = [(8, 128)] * 4
    load_model_config(write(MODEL)).check_shapes(shapes, "tables.cgt")
    with pytest.raises(MismatchError, match=message):
        load_model_config(write(MODEL | fields)).check_shapes(shapes, "tables.cgt")


def test_fields_that_a_model_config_leaves_out_are_not_compared(write) -> None:
    load_model_config(write({"layers": 1})).check_shapes([(3, 5), (1, 2)], "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "layers is missing"),
        ({"layers": 0}, "layers must be 1 to 32768, got 0"),
        ({"layers": True}, "layers must be an integer, got true"),
        ({"layers": 2, "channels": 1.5}, "channels must be an integer, got 1.5"),
        ({"layers": 2, "head_dim": None}, "head_dim must be an integer, got null"),
        ({"layers": 2, "heads": 8}, "unknown field heads"),
    ],
)
def test_bad_model_configs_are_refused_by_field(write, content: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model_config(write(content))


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.json")), ids=lambda path: path.name)
def test_shipped_configs_are_read(path: Path) -> None:
    if "layers" in json.loads(path.read_text("utf-8")):
        load_model_config(path)
    else:
        config = load_config(path)
        if isinstance(config, AbsmaxConfig):
            config.groups_of_planes(32)


@pytest.mark.parametrize(("size", "num_layers"), [("7b", 32), ("34b", 60), ("70b", 80)])
def test_original_settings_of_larger_models(size: str, num_layers: int) -> None:
    keys, values = bins_of(CONFIG / f"quantization_{size}.json", num_layers)
    assert keys == [32] * 10 + [16] * (num_layers - 10)
    assert values == [32] * 2 + [16] * (num_layers - 2)
