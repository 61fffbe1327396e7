"""Configurations: JSON in, checked, out as frozen dataclasses that own every default.

A quantization config says how values become symbols, per layer group; a model config says what shape a model's cache
has. config/README.md is the schema. Numbers may be given as JSON numbers or as strings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachegen.errors import ConfigError, MismatchError
from cachegen.files import read_file
from cachegen.format import Coder, Method, PlaneLayout
from cachegen.transform_format import MAX_LEVELS, MAX_STEP_LOG, PlaneShape

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that share a number of bins.

    Attributes:
        end_layer: the first layer after the group; None: all the rest.
        num_bins: even, 4 to 256.
        field: the config's name for `num_bins`.
    """

    end_layer: int | None
    num_bins: int
    field: str


@dataclass(frozen=True)
class QuantizationConfig:
    """How the values of every plane are quantized, and with which coder the symbols are written.

    Attributes:
        key_groups, value_groups: in layer order.
        coder: the default for this config; --coder overrides it.
    """

    method: Method
    key_groups: tuple[LayerGroup, ...]
    value_groups: tuple[LayerGroup, ...]
    coder: Coder
    source: str = field(default="", compare=False)

    def groups_of_planes(self, num_layers: int) -> list[LayerGroup]:
        """Return the group of every plane: keys and values of layer 0, of layer 1, ...

        Raises:
            ConfigError: a layer is covered by no group.
        """
        by_kind = []
        for kind, groups in (("key", self.key_groups), ("value", self.value_groups)):
            of_layer: list[LayerGroup] = []
            for group in groups:
                end = num_layers if group.end_layer is None else min(group.end_layer, num_layers)
                of_layer += [group] * (end - len(of_layer))
            if len(of_layer) < num_layers:
                raise ConfigError(
                    f"{self.source}: no {kind} group covers layers {len(of_layer)} to {num_layers - 1}: "
                    f"raise {groups[-1].field.replace('bins', 'layers')} or leave it out"
                )
            by_kind.append(of_layer)
        return [group for pair in zip(*by_kind, strict=True) for group in pair]

    def check_planes(self, method: Method, planes: Sequence[PlaneLayout] | Sequence[PlaneShape], path: object) -> None:
        """Refuse a file that was quantized otherwise.

        Raises:
            MismatchError: naming the first field that differs.
        """
        if method != self.method:
            raise MismatchError(
                f"{path}: method is {method.name.lower()}, but {self.source} says {self.method.name.lower()}"
            )
        for index, (plane, group) in enumerate(zip(planes, self.groups_of_planes(len(planes) // 2), strict=True)):
            if isinstance(plane, PlaneLayout) and plane.num_bins != group.num_bins:
                raise MismatchError(
                    f"{path}: {group.field} is {plane.num_bins} (layer {index // 2}), "
                    f"but {self.source} says {group.num_bins}"
                )


@dataclass(frozen=True)
class TransformConfig:
    """How method `transform` codes a cache: with which profile, how finely, in how many levels.

    Attributes:
        profile: the profile's folder.
        step_log: 16 log2 of level 1's step; None where a target chooses it.
        target_bits: bits per value that level 1 may cost, by the profile's curve.
        target_kl: nats per token that level 1 may lose, by the profile's curve.
        num_levels: 1 to 4; each divides the step of the one before by three.
    """

    profile: str
    step_log: int | None
    target_bits: float | None
    target_kl: float | None
    num_levels: int = 1
    source: str = field(default="", compare=False)

    method = Method.TRANSFORM
    coder = Coder.RANS

    def __post_init__(self) -> None:
        if [self.step_log, self.target_bits, self.target_kl].count(None) != 2:
            raise ConfigError(f"{self.source}: give exactly one of step_log, target_bits and target_kl")

    def check_planes(self, method: Method, planes: Sequence[object], path: object) -> None:
        """Refuse a file of another method.

        Raises:
            MismatchError: it is.
        """
        if method != self.method:
            raise MismatchError(f"{path}: method is {method.name.lower()}, but {self.source} says transform")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model's cache; fields that the file leaves out are None and not compared."""

    layers: int
    channels: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    source: str = field(default="", compare=False)

    def check_planes(self, planes: Sequence[PlaneLayout] | Sequence[PlaneShape], path: object) -> None:
        """Refuse a file of a model of another shape.

        Raises:
            MismatchError: naming the first field that differs.
        """
        found = [("layers", self.layers, len(planes) // 2)]
        for plane in planes:
            found += [
                ("channels", self.channels, plane.num_channels),
                ("kv_heads", self.kv_heads, plane.num_kv_heads),
                ("head_dim", self.head_dim, plane.head_dim),
            ]
        for name, expected, actual in found:
            if expected is not None and expected != actual:
                raise MismatchError(f"{path}: {name} is {actual}, but {self.source} says {expected}")


_COMMON_FIELDS = {"method", "coder", "description"}
_CACHEGEN_FIELDS = {
    f"{kind}_{place}_{what}"
    for kind, places in (("key", ("first", "second", "third")), ("value", ("first", "second")))
    for place in places
    for what in ("layers", "bins")
}
_TRANSFORM_FIELDS = {"profile", "levels", "step_log", "target_bits", "target_kl"}
_MODEL_FIELDS = {"description", "model_id", "layers", "channels", "kv_heads", "head_dim"}


def load_quantization_config(path: str | os.PathLike[str]) -> QuantizationConfig | TransformConfig:
    """Read a quantization config; its method decides which kind it is.

    Raises:
        InputError: there is no such file.
        ConfigError: the file is not such a config, naming the field.
    """
    content = _load_object(path)
    method = content.get("method", "cachegen")
    if method == "cachegen":
        _refuse_unknown(path, content, _COMMON_FIELDS | _CACHEGEN_FIELDS)
        key_groups = _read_groups(path, content, "key", ("first", "second", "third"))
        value_groups = _read_groups(path, content, "value", ("first", "second"))
        return QuantizationConfig(
            Method.CACHEGEN, key_groups, value_groups, _read_coder(path, content, Coder.RANS), str(path)
        )
    if method == "uniform":
        _refuse_unknown(path, content, _COMMON_FIELDS | {"bits"})
        bits = _read_integer(path, content, "bits", 2, 8)
        groups = (LayerGroup(None, 1 << bits, "bits"),)
        return QuantizationConfig(Method.UNIFORM, groups, groups, _read_coder(path, content, Coder.PACKED), str(path))
    if method == "transform":
        _refuse_unknown(path, content, {"method", "description"} | _TRANSFORM_FIELDS)
        return _read_transform(path, content)
    raise ConfigError(f'{path}: method must be "cachegen", "uniform" or "transform", got {_shown(method)}')


def load_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a model config.

    Raises:
        InputError: there is no such file.
        ConfigError: the file is not such a config, naming the field.
    """
    content = _load_object(path)
    _refuse_unknown(path, content, _MODEL_FIELDS)
    optional = {
        name: _read_integer(path, content, name, 1, 1 << 16)
        for name in ("channels", "kv_heads", "head_dim")
        if name in content
    }
    return ModelConfig(layers=_read_integer(path, content, "layers", 1, 1 << 15), source=str(path), **optional)


def _shown(value: Any) -> str:
    """Return a value for a message, of one line's length."""
    return json.dumps(value)[:80]


def _load_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    hint = "config/README.md lists those that come with cachegen"
    text = read_file(path, MAX_CONFIG_BYTES, kind="config file", hint=hint)
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return content


def _refuse_unknown(path: object, content: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise ConfigError(f"{path}: unknown field {_shown(unknown[0])[1:-1]} (known: {', '.join(sorted(known))})")


def _read_integer(path: object, content: dict[str, Any], name: str, low: int, high: int) -> int:
    if name not in content:
        raise ConfigError(f"{path}: field {name} is missing")
    value = content[name]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    # No field has more digits; Python refuses to convert thousands of them.
    is_digits = isinstance(value, str) and len(value) <= 20 and value.strip().isdecimal()
    if not is_number and not is_digits:
        raise ConfigError(f"{path}: {name} must be an integer, got {_shown(value)}")
    if not low <= int(value) <= high:
        raise ConfigError(f"{path}: {name} must be {low} to {high}, got {_shown(value)}")
    return int(value)


def _read_bins(path: object, content: dict[str, Any], name: str) -> int:
    num_bins = _read_integer(path, content, name, 4, 256)
    if num_bins % 2:
        raise ConfigError(f"{path}: {name} must be even, got {num_bins}")
    return num_bins


def _read_groups(path: object, content: dict[str, Any], kind: str, places: Sequence[str]) -> tuple[LayerGroup, ...]:
    """Read the layer groups of keys or values: the boundaries of all but the last group, and everyone's bins.

    The last group has a boundary only where the file gives one; without it, it takes all the rest.
    """
    groups: list[LayerGroup] = []
    previous = 0
    for place in places:
        boundary, bins = f"{kind}_{place}_layers", f"{kind}_{place}_bins"
        end = None
        if place != places[-1] or boundary in content:
            end = _read_integer(path, content, boundary, 0, 1 << 15)
            if end < previous:
                raise ConfigError(f"{path}: {boundary} must not be below the boundary before it, got {end}")
            previous = end
        groups.append(LayerGroup(end, _read_bins(path, content, bins), bins))
    return tuple(groups)


def _read_transform(path: str | os.PathLike[str], content: dict[str, Any]) -> TransformConfig:
    profile = content.get("profile")
    if not isinstance(profile, str) or not profile:
        raise ConfigError(f"{path}: field profile must name a profile's folder")
    step_log = content.get("step_log")
    if step_log is not None and (not isinstance(step_log, int) or isinstance(step_log, bool)):
        raise ConfigError(f"{path}: step_log must be an integer, got {_shown(step_log)}")
    if step_log is not None and abs(step_log) > MAX_STEP_LOG:
        raise ConfigError(f"{path}: step_log must be within {MAX_STEP_LOG} of 0, got {step_log}")
    return TransformConfig(
        # As files beside the config: it may be used from any folder.
        profile=str(Path(path).parent / profile),
        step_log=step_log,
        target_bits=_read_target(path, content, "target_bits"),
        target_kl=_read_target(path, content, "target_kl"),
        num_levels=_read_integer(path, content, "levels", 1, MAX_LEVELS) if "levels" in content else 1,
        source=str(path),
    )


def _read_target(path: object, content: dict[str, Any], name: str) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
        raise ConfigError(f"{path}: {name} must be a number above 0, got {_shown(value)}")
    return float(value)


def _read_coder(path: object, content: dict[str, Any], default: Coder) -> Coder:
    name = content.get("coder", default.name.lower())
    return parse_coder(name, f"{path}: coder")


def parse_coder(name: Any, what: str) -> Coder:
    """Return the coder of that name.

    Raises:
        ConfigError: there is none; the message begins with `what`.
    """
    for coder in Coder:
        if name == coder.name.lower():
            return coder
    raise ConfigError(f"{what} must be one of {', '.join(c.name.lower() for c in Coder)}, got {_shown(name)}")
