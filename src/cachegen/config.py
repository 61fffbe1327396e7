"""Reading config files: JSON in, checked field by field, and the model config, which says what shape a cache has.

What a quantization config says is the business of its method; see `cachegen.methods.load_config`. config/README.md is
the schema. Numbers may be given as JSON numbers or as strings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from cachegen.errors import ConfigError, MismatchError
from cachegen.fields import Fields, parse_fields, refuse_config, shown
from cachegen.files import read_file
from cachegen.format import Coder

MAX_CONFIG_BYTES = 1 << 20
CODER_NAMES = tuple(coder.name.lower() for coder in Coder)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model's cache; fields that the file leaves out are None and not compared."""

    layers: int
    channels: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    source: str = field(default="", compare=False)

    def check_shapes(self, shapes: Sequence[tuple[int, int]], path: object) -> None:
        """Refuse a file of a model of another shape.

        Args:
            shapes: (num_kv_heads, head_dim) of every plane.
            path: the file, for messages.

        Raises:
            MismatchError: naming the first field that differs.
        """
        found = [("layers", self.layers, len(shapes) // 2)]
        for num_kv_heads, head_dim in shapes:
            found += [
                ("channels", self.channels, num_kv_heads * head_dim),
                ("kv_heads", self.kv_heads, num_kv_heads),
                ("head_dim", self.head_dim, head_dim),
            ]
        for name, expected, actual in found:
            if expected is not None and expected != actual:
                raise MismatchError(f"{path}: {name} is {actual}, but {self.source} says {expected}")


_MODEL_SIZES = ("channels", "kv_heads", "head_dim")
_MODEL_FIELDS = {"description", "model_id", "layers", *_MODEL_SIZES}


def load_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a model config.

    Raises:
        InputError: there is no such file.
        ConfigError: the file is not such a config, naming the field.
    """
    fields = load_config_fields(path)
    fields.refuse_unknown(_MODEL_FIELDS)
    optional = {name: fields.integer(name, 1, 1 << 16) for name in _MODEL_SIZES if name in fields}
    return ModelConfig(layers=fields.integer("layers", 1, 1 << 15), source=str(path), **optional)


def load_config_fields(path: str | os.PathLike[str]) -> Fields:
    """Read a config file's JSON object.

    Raises:
        InputError: there is no such file.
        ConfigError: it holds something else.
    """
    hint = "config/README.md lists those that come with cachegen"
    content = read_file(path, MAX_CONFIG_BYTES, kind="config file", hint=hint)
    return parse_fields(content, refuse_config(path), reads_digits=True)


def read_coder(fields: Fields, default: Coder) -> Coder:
    """Return the coder that a config names, or the default.

    Raises:
        ConfigError: there is no such coder.
    """
    if "coder" not in fields:
        return default
    return Coder[fields.choice("coder", CODER_NAMES).upper()]


def parse_coder(name: str, what: str) -> Coder:
    """Return the coder of that name.

    Raises:
        ConfigError: there is none; the message begins with `what`.
    """
    if name not in CODER_NAMES:
        raise ConfigError(f"{what} must be one of {', '.join(CODER_NAMES)}, got {shown(name)}")
    return Coder[name.upper()]
