"""Reading config files: JSON in, checked field by field, and the model config, which says what shape a cache has.

What a quantization config says is the business of its method; see `cachegen.methods.load_config`. config/README.md is
the schema. Numbers may be given as JSON numbers or as strings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachegen.errors import ConfigError, MismatchError
from cachegen.files import read_file
from cachegen.format import Coder

MAX_CONFIG_BYTES = 1 << 20


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


_MODEL_FIELDS = {"description", "model_id", "layers", "channels", "kv_heads", "head_dim"}


def load_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a model config.

    Raises:
        InputError: there is no such file.
        ConfigError: the file is not such a config, naming the field.
    """
    content = load_object(path)
    refuse_unknown(path, content, _MODEL_FIELDS)
    optional = {
        name: read_integer(path, content, name, 1, 1 << 16)
        for name in ("channels", "kv_heads", "head_dim")
        if name in content
    }
    return ModelConfig(layers=read_integer(path, content, "layers", 1, 1 << 15), source=str(path), **optional)


def shown(value: Any) -> str:
    """Return a value for a message, of one line's length."""
    return json.dumps(value)[:80]


def load_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file's JSON object.

    Raises:
        InputError: there is no such file.
        ConfigError: it holds something else.
    """
    hint = "config/README.md lists those that come with cachegen"
    text = read_file(path, MAX_CONFIG_BYTES, kind="config file", hint=hint)
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return content


def refuse_unknown(path: object, content: Mapping[str, Any], known: set[str]) -> None:
    """Refuse a config with a field that is none of `known`.

    Raises:
        ConfigError: naming the field.
    """
    unknown = sorted(set(content) - known)
    if unknown:
        raise ConfigError(f"{path}: unknown field {shown(unknown[0])[1:-1]} (known: {', '.join(sorted(known))})")


def read_integer(path: object, content: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """Return an integer field, given as a number or as its digits.

    Raises:
        ConfigError: it is missing, something else, or not within `low` to `high`.
    """
    if name not in content:
        raise ConfigError(f"{path}: field {name} is missing")
    value = content[name]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    # No field has more digits; Python refuses to convert thousands of them.
    is_digits = isinstance(value, str) and len(value) <= 20 and value.strip().isdecimal()
    if not is_number and not is_digits:
        raise ConfigError(f"{path}: {name} must be an integer, got {shown(value)}")
    if not low <= int(value) <= high:
        raise ConfigError(f"{path}: {name} must be {low} to {high}, got {value}")
    return int(value)


def read_coder(path: object, content: Mapping[str, Any], default: Coder) -> Coder:
    """Return the coder that a config names, or the default.

    Raises:
        ConfigError: there is no such coder.
    """
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
    raise ConfigError(f"{what} must be one of {', '.join(c.name.lower() for c in Coder)}, got {shown(name)}")
