"""The configs of methods `cachegen` and `uniform`: how many bins the quantizer has, per layer group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachegen.config import read_coder
from cachegen.errors import ConfigError, MismatchError
from cachegen.fields import Fields, refuse_config
from cachegen.format import Coder
from cachegen.methods.absmax.headers import AbsmaxDocumentHeader
from cachegen.methods.base import MethodConfig

NUMBERS = {"cachegen": 1, "uniform": 2}
"""How files call the two methods."""

_COMMON_FIELDS = {"method", "coder", "description"}
_CACHEGEN_FIELDS = {
    f"{kind}_{place}_{what}"
    for kind, places in (("key", ("first", "second", "third")), ("value", ("first", "second")))
    for place in places
    for what in ("layers", "bins")
}


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
class AbsmaxConfig(MethodConfig):
    """How the values of every plane are quantized, and with which coder the symbols are written.

    Attributes:
        method: "cachegen" or "uniform".
        key_groups, value_groups: in layer order.
        coder: the default for this config.
    """

    method: str
    key_groups: tuple[LayerGroup, ...]
    value_groups: tuple[LayerGroup, ...]
    coder: Coder
    source: str = field(default="", compare=False)

    @property
    def number(self) -> int:
        """How files call the method."""
        return NUMBERS[self.method]

    def with_flags(self, flags: Mapping[str, Any]) -> AbsmaxConfig:
        """See `MethodConfig.with_flags`; there are none but the coder."""
        own = dict(flags)
        coder = own.pop("coder", None)
        self.refuse_flags(own)
        return dataclasses.replace(self, coder=coder) if coder is not None else self

    def groups_of_planes(self, num_layers: int) -> list[LayerGroup]:
        """Return the group of every plane: keys and values of layer 0, of layer 1, ...

        Raises:
            ConfigError: a layer is covered by no group.
        """
        by_kind: list[list[LayerGroup]] = []
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

    def check_document(self, header: AbsmaxDocumentHeader, path: object) -> None:
        """See `MethodConfig.check_document`."""
        groups = self.groups_of_planes(header.num_layers)
        for index, (plane, group) in enumerate(zip(header.planes, groups, strict=True)):
            if plane.num_bins != group.num_bins:
                raise MismatchError(
                    f"{path}: {group.field} is {plane.num_bins} (layer {index // 2}), "
                    f"but {self.source} says {group.num_bins}"
                )


def read_cachegen(fields: Fields, source: str) -> AbsmaxConfig:
    """Read a config of method `cachegen`; see `Method.read_config`."""
    fields.refuse_unknown(_COMMON_FIELDS | _CACHEGEN_FIELDS)
    key_groups = _read_groups(fields, "key", ("first", "second", "third"))
    value_groups = _read_groups(fields, "value", ("first", "second"))
    return AbsmaxConfig("cachegen", key_groups, value_groups, read_coder(fields, Coder.RANS), source)


def read_uniform(fields: Fields, source: str) -> AbsmaxConfig:
    """Read a config of method `uniform`; see `Method.read_config`."""
    fields.refuse_unknown(_COMMON_FIELDS | {"bits"})
    bits = fields.integer("bits", 2, 8)
    groups = (LayerGroup(None, 1 << bits, "bits"),)
    return AbsmaxConfig("uniform", groups, groups, read_coder(fields, Coder.PACKED), source)


def default_config(num_layers: int) -> AbsmaxConfig:
    """Return the original's setting for 7B models, its layer groups in proportion to the number of layers.

    Keys have 32 bins, from 10 of 32 layers on 16; values have 32 bins, from 2 of 32 layers on 16. With 32 layers it is
    config/quantization_7b.json.

    Args:
        num_layers: of the model, at least 1.
    """

    def layers(of_32: int) -> int:
        return max(1, round(num_layers * of_32 / 32))

    content = {
        "key_first_layers": layers(10),
        "key_second_layers": layers(20),
        "key_first_bins": 32,
        "key_second_bins": 16,
        "key_third_bins": 16,
        "value_first_layers": layers(2),
        "value_first_bins": 32,
        "value_second_bins": 16,
    }
    source = "the default config"
    return read_cachegen(Fields(content, refuse_config(source)), source)


def _read_bins(fields: Fields, name: str) -> int:
    num_bins = fields.integer(name, 4, 256)
    if num_bins % 2:
        raise fields.error(name, f"must be even, got {num_bins}")
    return num_bins


def _read_groups(fields: Fields, kind: str, places: Sequence[str]) -> tuple[LayerGroup, ...]:
    """Read the layer groups of keys or values: the boundaries of all but the last group, and everyone's bins.

    The last group has a boundary only where the file gives one; without it, it takes all the rest.
    """
    groups: list[LayerGroup] = []
    previous = 0
    for place in places:
        boundary, bins = f"{kind}_{place}_layers", f"{kind}_{place}_bins"
        end = None
        if place != places[-1] or boundary in fields:
            end = fields.integer(boundary, 0, 1 << 15)
            if end < previous:
                raise fields.error(boundary, f"must not be below the boundary before it, got {end}")
            previous = end
        groups.append(LayerGroup(end, _read_bins(fields, bins), bins))
    return tuple(groups)
