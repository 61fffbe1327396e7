"""What calibration learnt about a model: the transform's bases, its components' scales, and the measured curve.

A profile is a folder: `profile.json`, `synthesis.safetensors.zlib`, which every decoder needs, and
`analysis.safetensors`, which only encoders read. The JSON holds the SHA-256 of both, and its own SHA-256 is the
profile's hash, which stands in every chunk. Nothing in the folder can run. docs/profile.md is the specification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cachegen.errors import BitstreamError, InputError
from cachegen.fields import Fields, parse_fields, refuse_file
from cachegen.format import MAX_LAYERS
from cachegen.kv_cache import (
    RotaryEmbedding,
    hash_rotary_embeddings,
    read_rotary_embeddings,
    rotations_by_rule,
)
from cachegen.methods.profile_files import (
    MAX_PROFILE_BYTES,
    PROFILE_NAME,
    ReadFile,
    check_hash,
    check_same_model,
    folder_reader,
    pack_record,
    read_plane_shapes,
    refuse_other,
    write_files,
)
from cachegen.rotation import PlaneRotations, pack_rotations, read_rotations

SYNTHESIS_NAME = "synthesis.safetensors.zlib"
ANALYSIS_NAME = "analysis.safetensors"
FILE_FORMAT = "cachegen-profile"
FILE_VERSION = 1
SCALE_LOGS_PER_OCTAVE = 16
"""Scales and steps are compared as integers: 16 times their binary logarithm, rounded."""

_MAX_HEADER_BYTES = 1 << 20  # of a safetensors file: the names and shapes of its tensors
_MAX_CURVE_POINTS = 1 << 10
_MAX_COMPONENTS = (1 << 16) - 1
_MAX_SCALE_LOG = 1 << 14
MAX_INTEGER = (1 << 15) - 1
"""Of a synthesis matrix."""
MAX_ROW_EXPONENT, MAX_CHANNEL_EXPONENT = 80, 30
"""Of the powers of two that an integer is multiplied by: fp32 has all products exactly."""


@dataclass(frozen=True)
class IntegerRows:
    """A synthesis matrix as a file has it, in half the memory: integers of 16 bits, times powers of two.

    Attributes:
        integers: int16 `[num_components, num_channels]`.
        row_exponents, channel_exponents: int8, logarithms of the powers of two.
    """

    integers: torch.Tensor
    row_exponents: torch.Tensor
    channel_exponents: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape

    def multiply(self) -> torch.Tensor:
        """Return the matrix in fp32, which has it exactly."""
        made = self.integers.float()
        made *= torch.exp2(self.row_exponents.float())[:, None]
        made *= torch.exp2(self.channel_exponents.float())
        return made


@dataclass(frozen=True)
class TransformGroup:
    """Consecutive layers whose keys and values are transformed together, per token.

    Per token the vector x is, layer after layer, the keys and the values with their rotations undone. It is
    coded as components c = (x - mean) @ analysis and rebuilt as mean + c @ synthesis.

    Attributes:
        first_layer, num_layers: the group's layers.
        mean: fp32 `[num_channels]`, of the vectors.
        stored_synthesis: the matrix `synthesis`; of a profile that only decodes as the file has it.
        scale_logs: int16 `[num_components]`, not increasing: 16 log2 of each component's standard deviation.
        analysis: fp16 `[num_channels, num_components]`; None where only decoding was asked for.
        channel_exponents: int8 `[num_channels]`, the logarithms of the channels' powers of two; None: all zero.
    """

    first_layer: int
    num_layers: int
    mean: torch.Tensor
    stored_synthesis: torch.Tensor | IntegerRows
    scale_logs: torch.Tensor
    analysis: torch.Tensor | None = None
    channel_exponents: torch.Tensor | None = None

    @property
    def synthesis(self) -> torch.Tensor:
        """The synthesis matrix, fp32 `[num_components, num_channels]`; of a profile that only decodes made anew.

        Of a saved profile it is integers of 16 bits, times a power of two for each component and one for each channel.
        """
        stored = self.stored_synthesis
        return stored.multiply() if isinstance(stored, IntegerRows) else stored

    @property
    def num_components(self) -> int:
        return self.stored_synthesis.shape[0]

    @property
    def num_channels(self) -> int:
        return self.stored_synthesis.shape[1]


@dataclass(frozen=True)
class CurvePoint:
    """One measured point: what a quantization step costs and gives.

    Attributes:
        step_log: 16 log2 of the step.
        bits_per_value: of whole documents, every byte but the profile's counted.
        kl: in nats per token, mean over the measured contexts.
    """

    step_log: int
    bits_per_value: float
    kl: float


@dataclass(frozen=True)
class Profile:
    """A model's profile.

    Attributes:
        model_fingerprint: SHA-256 in hex, as in a KV cache file.
        rotary_embeddings: the model's.
        plane_shapes: (num_kv_heads, head_dim) of the keys and the values of layer 0, of layer 1, ...
        groups: in layer order, covering all layers.
        curve: in descending order of step; empty where nothing was measured.
        calibration: what the profile was made from, for people.
        profile_hash: SHA-256 in hex of profile.json.
        num_bytes: of the files that decoding needs.
        plane_rotations: what is undone in each plane; None: as `rotations_by_rule` says.
    """

    model_fingerprint: str
    rotary_embeddings: tuple[RotaryEmbedding, ...]
    plane_shapes: tuple[tuple[int, int], ...]
    groups: tuple[TransformGroup, ...]
    curve: tuple[CurvePoint, ...]
    calibration: dict[str, Any]
    profile_hash: str = ""
    num_bytes: int = 0
    plane_rotations: PlaneRotations | None = None

    @property
    def rotations(self) -> PlaneRotations:
        """What is undone in each plane."""
        if self.plane_rotations is not None:
            return self.plane_rotations
        return rotations_by_rule(self.rotary_embeddings, [dim for _, dim in self.plane_shapes])

    @property
    def plane_means(self) -> list[torch.Tensor]:
        """The mean of each plane with its rotation undone, fp32 `[num_kv_heads, head_dim]`."""
        means = torch.cat([group.mean for group in self.groups])
        parts = torch.split(means, [heads * dim for heads, dim in self.plane_shapes])
        return [part.view(shape) for part, shape in zip(parts, self.plane_shapes, strict=True)]

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What documents of the profile compute of it alone and share, as long as it lives."""
        return {}

    @property
    def rope_hash(self) -> str:
        """SHA-256 in hex of the rotary embeddings; see `hash_rotary_embeddings`."""
        return hash_rotary_embeddings(self.rotary_embeddings)

    @property
    def num_layers(self) -> int:
        return len(self.plane_shapes) // 2

    def __repr__(self) -> str:
        components = sum(group.num_components for group in self.groups)
        channels = sum(group.num_channels for group in self.groups)
        return (
            f"<{type(self).__name__} {self.profile_hash[:12]}: {self.num_layers} layers, {components:,} components of "
            f"{channels:,} channels, {self.num_bytes:,} bytes to decode>"
        )

    def channels_of(self, first_layer: int, num_layers: int) -> int:
        """Return the channels of keys and values of consecutive layers together."""
        planes = self.plane_shapes[2 * first_layer : 2 * (first_layer + num_layers)]
        return sum(heads * dim for heads, dim in planes)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the profile's files into a folder, each whole or not at all.

        Args:
            folder: is made if need be; `compress` and `load` take it as `profile`, the scripts as `--profile`.
            overwrite: replace another profile that is there.

        Raises:
            OutputError: another profile is there, or the folder cannot be written.
        """
        if not overwrite:
            refuse_other(folder, self.profile_hash)
        save_profile(folder, self)

    def describe(self) -> dict[str, object]:
        """Return what there is to say of it, for people."""
        curve = self.curve
        return {
            "method": "transform",
            "profile_hash": self.profile_hash,
            "model_id": self.calibration.get("model_id"),
            "model_fingerprint": self.model_fingerprint,
            "can_encode": all(group.analysis is not None for group in self.groups),
            "num_layers": self.num_layers,
            "num_groups": len(self.groups),
            "num_components": sum(group.num_components for group in self.groups),
            "num_channels": sum(group.num_channels for group in self.groups),
            "bytes": self.num_bytes,
            "finest_bits_per_value": curve[-1].bits_per_value if curve else None,
            "finest_kl": curve[-1].kl if curve else None,
        }

    def choose_step(self, *, bits_per_value: float | None = None, kl: float | None = None) -> int:
        """Return the largest step that keeps a target, by interpolation in the measured curve.

        Args:
            bits_per_value: the target; the step is the smallest that costs at most so many bits.
            kl: the target instead, in nats per token; the step is the largest that keeps at most this divergence.

        Returns:
            16 log2 of the step.

        Raises:
            InputError: the profile has no curve.
            ValueError: not exactly one target is given, or it is not positive.
        """
        if (bits_per_value is None) == (kl is None):
            raise ValueError("exactly one of `bits_per_value` and `kl` must be given")
        if len(self.curve) < 2:
            raise InputError("the profile has no measured curve to choose a step from; make it with run_calibration.py")
        target = bits_per_value if bits_per_value is not None else kl
        if target is None or not target > 0:
            raise ValueError(f"the target must be positive, got {target}")
        costs = [(p.bits_per_value if bits_per_value is not None else p.kl, p.step_log) for p in self.curve]
        costs.sort(key=lambda cost: cost[1])
        step = _interpolate(math.log(target), [math.log(max(c, 1e-12)) for c, _ in costs], [s for _, s in costs])
        # Fewer bits: a larger step; a smaller divergence: a smaller one.
        return math.ceil(step) if bits_per_value is not None else math.floor(step)

    def expect(self, step_log: int) -> CurvePoint | None:
        """Return the interpolated curve at a step; None where the profile has no curve or the step lies outside."""
        points = sorted(self.curve, key=lambda point: point.step_log)
        for low, high in itertools.pairwise(points):
            if low.step_log <= step_log <= high.step_log:
                share = (step_log - low.step_log) / max(high.step_log - low.step_log, 1)

                def between(a: float, b: float, share: float = share) -> float:
                    return math.exp((1 - share) * math.log(max(a, 1e-12)) + share * math.log(max(b, 1e-12)))

                return CurvePoint(step_log, between(low.bits_per_value, high.bits_per_value), between(low.kl, high.kl))
        return None


def save_profile(folder: str | os.PathLike[str], profile: Profile, *, compression: int = 9) -> Profile:
    """Write a profile's three files, `profile.json` last, each whole or not at all.

    Args:
        compression: zlib's level, 0 to 9; which bytes it gives depends on the library, but for level 0.

    Returns:
        The profile with its hash and size filled in.

    Raises:
        OutputError: a file cannot be written.
    """
    contents, complete = pack_profile(profile, compression)
    write_files(folder, contents)
    return complete


def pack_profile(profile: Profile, compression: int = 9) -> tuple[dict[str, bytes], Profile]:
    """Return a profile's files by their names, `profile.json` last, and the profile as those who read them have it."""
    synthesis: dict[str, torch.Tensor] = {}
    analysis: dict[str, torch.Tensor] = {}
    for index, group in enumerate(profile.groups):
        if group.analysis is None:
            raise ValueError(f"`analysis` of group {index} is needed to save a profile")
        synthesis[f"mean.{index}"] = group.mean.float().contiguous()
        of_channels = group.channel_exponents
        if of_channels is None:
            of_channels = torch.zeros(group.num_channels, dtype=torch.int8)
        integers, exponents = round_rows(group.synthesis, of_channels)
        # All high bytes before all low ones, and those of small integers zero: that compresses better.
        low = integers.to(torch.int8)  # modulo 2^8
        synthesis[f"synthesis_high.{index}"] = ((integers - low) >> 8).to(torch.int8)  # the same
        synthesis[f"synthesis_low.{index}"] = low
        synthesis[f"row_exponents.{index}"] = exponents
        synthesis[f"channel_exponents.{index}"] = of_channels.to(torch.int8).contiguous()
        synthesis[f"scale_logs.{index}"] = group.scale_logs.to(torch.int16).contiguous()
        analysis[f"analysis.{index}"] = group.analysis.half().contiguous()
    # Runs of zeros, and else a code for each byte: nothing here repeats.
    compressor = zlib.compressobj(compression, strategy=zlib.Z_RLE)
    contents = {
        SYNTHESIS_NAME: compressor.compress(save_tensors(synthesis)) + compressor.flush(),
        ANALYSIS_NAME: save_tensors(analysis),
    }
    record = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "model_fingerprint": profile.model_fingerprint,
        "rotary_embeddings": [
            {**dataclasses.asdict(rotary), "inv_freq": list(rotary.inv_freq)} for rotary in profile.rotary_embeddings
        ],
        **({} if profile.plane_rotations is None else {"plane_rotations": pack_rotations(profile.plane_rotations)}),
        "plane_shapes": [list(shape) for shape in profile.plane_shapes],
        "groups": [
            {"first_layer": g.first_layer, "num_layers": g.num_layers, "num_components": g.num_components}
            for g in profile.groups
        ],
        "curve": [dataclasses.asdict(point) for point in profile.curve],
        "calibration": profile.calibration,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    text, profile_hash = pack_record(record)
    groups = tuple(
        dataclasses.replace(
            group,
            mean=synthesis[f"mean.{index}"],
            stored_synthesis=_join_rows(synthesis, index).multiply(),
            scale_logs=synthesis[f"scale_logs.{index}"],
            analysis=analysis[f"analysis.{index}"],
            channel_exponents=synthesis[f"channel_exponents.{index}"],
        )
        for index, group in enumerate(profile.groups)
    )
    complete = dataclasses.replace(
        profile,
        groups=groups,
        profile_hash=profile_hash,
        num_bytes=len(text) + len(contents[SYNTHESIS_NAME]),
    )
    return {**contents, PROFILE_NAME: text}, complete


def load_profile(folder: str | os.PathLike[str], *, for_encoding: bool = False) -> Profile:
    """Read a profile; see `read_profile`.

    Raises:
        InputError: there is none.
        BitstreamError, UnsupportedVersionError: as `read_profile`.
    """
    return read_profile(folder_reader(folder), os.fspath(folder), for_encoding=for_encoding)


def read_profile(read: ReadFile, place: str, *, for_encoding: bool = False) -> Profile:
    """Read a profile from wherever its files are.

    Args:
        read: returns a file by its name, or fails where it has more bytes than are given.
        place: what holds them, for messages.
        for_encoding: read the analysis matrices as well.

    Raises:
        CacheGenError: whatever `read` raises.
        BitstreamError: a file is corrupt or not a profile's.
        UnsupportedVersionError: it was written by a later release.
    """
    path = f"{place}/{PROFILE_NAME}"
    text = read(PROFILE_NAME, MAX_PROFILE_BYTES)
    fields = parse_fields(text, refuse_file(path))
    fields.check_format("format", FILE_FORMAT, "a profile for method transform")
    fields.check_version("version", FILE_VERSION)
    try:
        profile = _parse(fields)
        layers = _parse_layers(fields, profile)
        hashes = {name: fields.object("sha256").hash(name) for name in (SYNTHESIS_NAME, ANALYSIS_NAME)}
        num_values = [
            profile.channels_of(first, count) * (num_components + 8) for first, count, num_components in layers
        ]
        max_bytes = 2 * sum(num_values) + _MAX_HEADER_BYTES
        content = read(SYNTHESIS_NAME, max_bytes)
        check_hash(f"{place}/{SYNTHESIS_NAME}", content, hashes[SYNTHESIS_NAME])
        num_bytes = len(content)
        inflated = _inflate(f"{place}/{SYNTHESIS_NAME}", content, max_bytes)
        del content  # a profile may be as large as a cache
        synthesis = _load_tensors(f"{place}/{SYNTHESIS_NAME}", inflated)
        del inflated
        analysis: dict[str, torch.Tensor] = {}
        if for_encoding:
            content = read(ANALYSIS_NAME, max_bytes)
            check_hash(f"{place}/{ANALYSIS_NAME}", content, hashes[ANALYSIS_NAME])
            analysis = _load_tensors(f"{place}/{ANALYSIS_NAME}", content)
        groups = tuple(
            _parse_group(index, *group, profile, synthesis, analysis if for_encoding else None)
            for index, group in enumerate(layers)
        )
    except BitstreamError as error:
        raise error if error.path else error.at(path) from error
    return dataclasses.replace(
        profile,
        groups=groups,
        profile_hash=hashlib.sha256(text).hexdigest(),
        num_bytes=len(text) + num_bytes,
    )


def check_profile(profile: Profile, model_fingerprint: str, rope_hash: str, source: str) -> None:
    """Refuse a profile of another model.

    Raises:
        MismatchError: naming the field that differs.
    """
    check_same_model(
        source,
        ("model_fingerprint", profile.model_fingerprint, model_fingerprint),
        ("rope_hash", profile.rope_hash, rope_hash),
    )


def _parse(fields: Fields) -> Profile:
    """Check the JSON's own fields; the groups' tensors come later."""
    shapes = read_plane_shapes(fields)
    rotary_embeddings = read_rotary_embeddings(fields)
    plane_rotations = read_rotations(fields, [dim for _, dim in shapes])
    for rotary in rotary_embeddings[:1] if plane_rotations is None else ():
        if rotary.attention_scaling == 0:
            raise fields.error("attention_scaling", "must not be 0")
        if any(2 * len(rotary.inv_freq) > dim for _, dim in shapes[0::2]):
            raise fields.error("inv_freq", "more frequencies than a head has pairs")
    curve = tuple(
        CurvePoint(
            point.integer("step_log", -_MAX_SCALE_LOG, _MAX_SCALE_LOG),
            point.number("bits_per_value"),
            point.number("kl"),
        )
        for point in fields.objects("curve", 0, _MAX_CURVE_POINTS)
    )
    fingerprint, calibration = fields.hash("model_fingerprint"), fields.object("calibration").content
    return Profile(
        fingerprint,
        rotary_embeddings,
        shapes,
        (),
        curve,
        dict(calibration),
        plane_rotations=plane_rotations,
    )


def _parse_layers(fields: Fields, profile: Profile) -> list[tuple[int, int, int]]:
    """Return first layer, number of layers and of components of each group; they cover all layers in order."""
    layers: list[tuple[int, int, int]] = []
    next_layer = 0
    for group in fields.objects("groups", 0, MAX_LAYERS):
        left = profile.num_layers - next_layer
        if not left or group.integer("first_layer", 0, MAX_LAYERS) != next_layer:
            raise fields.error("groups", "do not cover the layers, each once and in order")
        num_layers = group.integer("num_layers", 1, left)
        limit = min(profile.channels_of(next_layer, num_layers), _MAX_COMPONENTS)
        layers.append((next_layer, num_layers, group.integer("num_components", 1, limit)))
        next_layer += num_layers
    if next_layer != profile.num_layers:
        raise fields.error("groups", "do not cover the layers, each once and in order")
    return layers


def _parse_group(
    index: int,
    first_layer: int,
    num_layers: int,
    num_components: int,
    profile: Profile,
    synthesis: dict[str, torch.Tensor],
    analysis: dict[str, torch.Tensor] | None,
) -> TransformGroup:
    num_channels = profile.channels_of(first_layer, num_layers)
    for name in ("synthesis_high", "synthesis_low"):
        _tensor(synthesis, f"{name}.{index}", torch.int8, [num_components, num_channels])
    for name, length, limit in (
        ("row_exponents", num_components, MAX_ROW_EXPONENT),
        ("channel_exponents", num_channels, MAX_CHANNEL_EXPONENT),
    ):
        exponents = _tensor(synthesis, f"{name}.{index}", torch.int8, [length])
        if exponents.int().abs().max() > limit:
            raise BitstreamError(f"must lie within {limit} of 0", field=f"{name}.{index}")
    rows = _join_rows(synthesis, index)
    for name in ("synthesis_high", "synthesis_low"):
        del synthesis[f"{name}.{index}"]
    group = TransformGroup(
        first_layer,
        num_layers,
        _tensor(synthesis, f"mean.{index}", torch.float32, [num_channels]).clone(),  # no view of the file
        rows if analysis is None else rows.multiply(),
        _tensor(synthesis, f"scale_logs.{index}", torch.int16, [num_components]).clone(),
        None
        if analysis is None
        else _tensor(analysis, f"analysis.{index}", torch.float16, [num_channels, num_components]),
        rows.channel_exponents,
    )
    logs = group.scale_logs
    if (logs[1:] > logs[:-1]).any() or logs.int().abs().max() > _MAX_SCALE_LOG:
        raise BitstreamError("must not increase, and lie within 2^14", field=f"scale_logs.{index}")
    return group


def _tensor(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if name not in tensors:
        raise BitstreamError("is missing", field=name)
    tensor = tensors[name]
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        raise BitstreamError(f"must be {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}", field=name)
    if dtype.is_floating_point and not torch.isfinite(tensor).all():
        raise BitstreamError("holds NaN or infinity", field=name)
    return tensor


def round_rows(synthesis: torch.Tensor, channel_exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a synthesis matrix, over the channels' powers of two, as integers and a power of two for each row.

    Rows that are integers of 16 bits times a power of two already come out as they are.

    Args:
        synthesis: `[num_components, num_channels]`.
        channel_exponents: `[num_channels]`.

    Returns:
        int32 within `MAX_INTEGER` of 0, `[num_components, num_channels]`, and int8 `[num_components]`: the exponents.
    """
    rows = synthesis.double() * torch.exp2(-channel_exponents.double())
    largest = rows.abs().amax(1).clamp_min(2.0 ** (15 - MAX_ROW_EXPONENT))
    exponents = (largest / MAX_INTEGER).log2().ceil().clamp(-MAX_ROW_EXPONENT, MAX_ROW_EXPONENT)
    integers = (rows * torch.exp2(-exponents)[:, None]).round().clamp(-MAX_INTEGER, MAX_INTEGER).to(torch.int32)
    for _ in range(15):
        # Halve rows of even integers: fewer digits say the same.
        is_even = ((integers & 1) == 0).all(1) & (integers != 0).any(1) & (exponents < MAX_ROW_EXPONENT)
        integers = torch.where(is_even[:, None], integers >> 1, integers)
        exponents = exponents + is_even
    return integers, exponents.to(torch.int8)


def _join_rows(synthesis: dict[str, torch.Tensor], index: int) -> IntegerRows:
    """Return a group's synthesis matrix from the tensors of the file."""
    integers = synthesis[f"synthesis_high.{index}"].to(torch.int16)
    integers <<= 8
    integers += synthesis[f"synthesis_low.{index}"]  # modulo 2^16
    of_rows, of_channels = (synthesis[f"{name}_exponents.{index}"].clone() for name in ("row", "channel"))
    return IntegerRows(integers, of_rows, of_channels)


def _inflate(path: str, content: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(content, max_bytes)
    except zlib.error as error:
        raise BitstreamError(f"is not compressed data ({error})", path=path) from None
    if not inflater.eof or inflater.unused_data:
        raise BitstreamError(f"holds more than the {max_bytes} bytes that {PROFILE_NAME} announces", path=path)
    return inflated


def _load_tensors(path: str, content: bytes) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(content)
    except Exception as error:  # a library's own errors over a dtype or a shape that it does not know
        raise BitstreamError(f"not a safetensors file ({str(error)[:120]})", path=path) from error


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[int]) -> float:
    """Piecewise-linear y at x over points in any monotone order; the ends beyond them are extended flat."""
    points = sorted(zip(xs, ys, strict=True))
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
