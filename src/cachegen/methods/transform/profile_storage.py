"""A profile's files.

A profile is a folder: `profile.json`, `synthesis.zlib`, which every decoder needs, and `analysis.safetensors`, which
only encoders read. The matrices of groups of layers are compressed one by one, and stay so until they are wanted. The
JSON holds the SHA-256 of both, and its own SHA-256 is the profile's hash, which stands in every chunk. Nothing in the
folder can run. docs/profile.md is the specification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cachegen.errors import BitstreamError
from cachegen.fields import Fields, parse_fields, refuse_file
from cachegen.format import MAX_LAYERS
from cachegen.kv_cache import read_rotary_embeddings
from cachegen.methods.profile_files import (
    MAX_PROFILE_BYTES,
    PROFILE_NAME,
    ReadFile,
    check_hash,
    folder_reader,
    pack_record,
    read_plane_shapes,
    write_files,
)
from cachegen.methods.transform.integer_rows import (
    MAX_CHANNEL_EXPONENT,
    MAX_ROW_EXPONENT,
    DeflatedRows,
    deflate,
    inflate_pieces,
)
from cachegen.methods.transform.profile import CurvePoint, Profile, TransformGroup
from cachegen.rotation import pack_rotations, read_rotations

SYNTHESIS_NAME = "synthesis.zlib"
ANALYSIS_NAME = "analysis.safetensors"
FILE_FORMAT = "cachegen-profile"
FILE_VERSION = 1

_MAX_HEADER_BYTES = 1 << 20  # of a safetensors file: the names and shapes of its tensors
_MAX_STREAM_OVERHEAD = 1 << 12  # of what zlib cannot compress, beside the room for vectors
_MAX_CURVE_POINTS = 1 << 10
_MAX_COMPONENTS = (1 << 16) - 1
_MAX_SCALE_LOG = 1 << 14


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
    stored: list[TransformGroup] = []
    vectors: dict[str, torch.Tensor] = {}
    streams: list[bytes] = []
    analysis: dict[str, torch.Tensor] = {}
    for index, group in enumerate(profile.groups):
        if group.analysis is None:
            raise ValueError(f"`analysis` of group {index} is needed to save a profile")
        rows = group.integer_rows()
        saved = dataclasses.replace(
            group,
            mean=group.mean.float().contiguous(),
            stored_synthesis=rows,
            scale_logs=group.scale_logs.to(torch.int16).contiguous(),
            analysis=group.analysis.half().contiguous(),
            channel_exponents=rows.channel_exponents,
        )
        saved = dataclasses.replace(saved, stored_variances=saved.variances)
        stored.append(saved)
        vectors |= {
            f"mean.{index}": saved.mean,
            f"variances.{index}": saved.variances,
            f"scale_logs.{index}": saved.scale_logs,
            f"row_exponents.{index}": rows.row_exponents,
            f"channel_exponents.{index}": rows.channel_exponents,
        }
        streams.append(rows.deflate(compression))
        analysis[f"analysis.{index}"] = cast("torch.Tensor", saved.analysis)
    packed_vectors = deflate(save_tensors(vectors), compression)
    contents = {SYNTHESIS_NAME: b"".join([packed_vectors, *streams]), ANALYSIS_NAME: save_tensors(analysis)}
    record = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "model_fingerprint": profile.model_fingerprint,
        "rotary_embeddings": [
            {**dataclasses.asdict(rotary), "inv_freq": list(rotary.inv_freq)} for rotary in profile.rotary_embeddings
        ],
        **({} if profile.plane_rotations is None else {"plane_rotations": pack_rotations(profile.plane_rotations)}),
        "plane_shapes": [list(shape) for shape in profile.plane_shapes],
        "vectors_bytes": len(packed_vectors),
        "groups": [
            {
                "first_layer": group.first_layer,
                "num_layers": group.num_layers,
                "num_components": group.num_components,
                "matrix_bytes": len(stream),
            }
            for group, stream in zip(profile.groups, streams, strict=True)
        ],
        "curve": [dataclasses.asdict(point) for point in profile.curve],
        "calibration": profile.calibration,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    text, profile_hash = pack_record(record)
    complete = dataclasses.replace(
        profile,
        groups=tuple(stored),
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
        layouts = _parse_layouts(fields, profile)
        hashes = {name: fields.object("sha256").hash(name) for name in (SYNTHESIS_NAME, ANALYSIS_NAME)}
        content = read(SYNTHESIS_NAME, _MAX_HEADER_BYTES + sum(layout.max_bytes for layout in layouts))
        check_hash(f"{place}/{SYNTHESIS_NAME}", content, hashes[SYNTHESIS_NAME])
        num_bytes = len(content)
        vectors_bytes = fields.integer("vectors_bytes", 1, num_bytes)
        groups = _read_groups(f"{place}/{SYNTHESIS_NAME}", memoryview(content), vectors_bytes, layouts)
        if for_encoding:
            content = read(ANALYSIS_NAME, _MAX_HEADER_BYTES + sum(layout.max_bytes for layout in layouts))
            check_hash(f"{place}/{ANALYSIS_NAME}", content, hashes[ANALYSIS_NAME])
            analysis = _load_tensors(f"{place}/{ANALYSIS_NAME}", content)
            groups = [_add_analysis(group, analysis, f"analysis.{index}") for index, group in enumerate(groups)]
    except BitstreamError as error:
        raise error if error.path else error.at(path) from error
    return dataclasses.replace(
        profile,
        groups=tuple(groups),
        profile_hash=hashlib.sha256(text).hexdigest(),
        num_bytes=len(text) + num_bytes,
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


@dataclass(frozen=True)
class _GroupLayout:
    """What profile.json says of a group.

    Attributes:
        num_bytes: of the zlib stream of its matrix.
    """

    first_layer: int
    num_layers: int
    num_channels: int
    num_components: int
    num_bytes: int

    @property
    def max_bytes(self) -> int:
        """That its tensors may take, as the file has them or in memory."""
        return 2 * self.num_channels * (self.num_components + 8) + _MAX_STREAM_OVERHEAD


def _parse_layouts(fields: Fields, profile: Profile) -> list[_GroupLayout]:
    """Return what there is of each group; they cover all layers in order."""
    layouts: list[_GroupLayout] = []
    next_layer = 0
    for group in fields.objects("groups", 0, MAX_LAYERS):
        left = profile.num_layers - next_layer
        if not left or group.integer("first_layer", 0, MAX_LAYERS) != next_layer:
            raise fields.error("groups", "do not cover the layers, each once and in order")
        num_layers = group.integer("num_layers", 1, left)
        num_channels = profile.channels_of(next_layer, num_layers)
        num_components = group.integer("num_components", 1, min(num_channels, _MAX_COMPONENTS))
        layout = _GroupLayout(next_layer, num_layers, num_channels, num_components, 0)
        num_bytes = group.integer("matrix_bytes", 1, layout.max_bytes)
        layouts.append(dataclasses.replace(layout, num_bytes=num_bytes))
        next_layer += num_layers
    if next_layer != profile.num_layers:
        raise fields.error("groups", "do not cover the layers, each once and in order")
    return layouts


def _read_groups(
    path: str, content: memoryview, vectors_bytes: int, layouts: Sequence[_GroupLayout]
) -> list[TransformGroup]:
    """Return the groups, without their analysis matrices."""
    if vectors_bytes + sum(layout.num_bytes for layout in layouts) != len(content):
        raise BitstreamError(f"do not sum to the {len(content)} bytes of {SYNTHESIS_NAME}", field="matrix_bytes")
    max_bytes = _MAX_HEADER_BYTES + 16 * sum(layout.num_channels for layout in layouts)
    try:
        vectors = _load_tensors(path, b"".join(inflate_pieces(content[:vectors_bytes], max_bytes)))
    except BitstreamError as error:
        raise error.at(path) from error
    groups: list[TransformGroup] = []
    begin = vectors_bytes
    for index, layout in enumerate(layouts):
        stream = content[begin : begin + layout.num_bytes]
        begin += layout.num_bytes
        groups.append(_parse_group(index, layout, vectors, stream, path))
    return groups


def _parse_group(
    index: int, layout: _GroupLayout, vectors: dict[str, torch.Tensor], stream: memoryview, path: str
) -> TransformGroup:
    exponents: list[torch.Tensor] = []
    for name, length, limit in (
        ("row_exponents", layout.num_components, MAX_ROW_EXPONENT),
        ("channel_exponents", layout.num_channels, MAX_CHANNEL_EXPONENT),
    ):
        exponents.append(_tensor(vectors, f"{name}.{index}", torch.int8, (length,)))
        if exponents[-1].int().abs().max() > limit:
            raise BitstreamError(f"must lie within {limit} of 0", field=f"{name}.{index}")
    logs = _tensor(vectors, f"scale_logs.{index}", torch.int16, (layout.num_components,))
    if (logs[1:] > logs[:-1]).any() or logs.int().abs().max() > _MAX_SCALE_LOG:
        raise BitstreamError("must not increase, and lie within 2^14", field=f"scale_logs.{index}")
    mean, variances = (
        _tensor(vectors, f"{name}.{index}", torch.float32, (layout.num_channels,)) for name in ("mean", "variances")
    )
    if (variances < 0).any():
        raise BitstreamError("must not be negative", field=f"variances.{index}")
    shape = torch.Size((layout.num_components, layout.num_channels))
    rows = DeflatedRows(stream, shape, *exponents, path=path, field=f"synthesis.{index}")
    return TransformGroup(
        layout.first_layer, layout.num_layers, mean, rows, logs, None, exponents[1], stored_variances=variances
    )


def _add_analysis(group: TransformGroup, tensors: dict[str, torch.Tensor], name: str) -> TransformGroup:
    analysis = _tensor(tensors, name, torch.float16, (group.num_channels, group.num_components))
    return dataclasses.replace(group, analysis=analysis)


def _tensor(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if name not in tensors:
        raise BitstreamError("is missing", field=name)
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise BitstreamError(f"must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}", field=name)
    if dtype.is_floating_point and not torch.isfinite(tensor).all():
        raise BitstreamError("holds NaN or infinity", field=name)
    return tensor


def _load_tensors(path: str, content: bytes) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(content)
    except Exception as error:  # a library's own errors over a dtype or a shape that it does not know
        raise BitstreamError(f"not a safetensors file ({str(error)[:120]})", path=path) from error
