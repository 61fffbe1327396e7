"""Blocks of a KV cache, as an engine's tensors, to blobs and back: any method, each block by itself.

A block is encoded as a document of one chunk. Where a profile says how keys turn, the block's position is found first
(`positions`) and the chunk has that place in a document whose other chunks do not exist. What cannot be coded, or would
not become smaller, is stored as it is, and counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachegen.coder.cpu import default_num_threads
from cachegen.config import load_config_fields
from cachegen.errors import BitstreamError, CacheGenError, ConfigError, InputError, MismatchError, StoreError
from cachegen.fields import Fields, refuse_config
from cachegen.format import MAX_CHUNK_TOKENS
from cachegen.format.framing import Buffer
from cachegen.integrations.blobs import (
    BLOB_VERSION,
    CODED,
    RAW,
    Identity,
    Section,
    max_blob_bytes,
    pack_blob,
    raw_section_bytes,
    read_blob,
)
from cachegen.integrations.counters import Counters
from cachegen.integrations.layouts import Layout, bytes_of, hash_layout
from cachegen.integrations.positions import find_position
from cachegen.kv_cache import SUPPORTED_DTYPES, ContextMetadata, KVCache
from cachegen.methods import (
    DEFAULT_METHOD,
    default_config,
    load_profile,
    make_encoder,
    method_named,
    open_document,
    read_config,
)
from cachegen.methods.base import ErrorMeasure, MethodConfig
from cachegen.methods.profile_files import AnyProfile

logger = logging.getLogger(__name__)

SOURCE = "serde cachegen"
"""Names the configuration in messages."""
MAX_CONTEXT_TOKENS = 1 << 17
"""The default for `max_context_tokens`."""
MAX_RELATIVE_ERROR = 0.5
"""Mean error over mean size of a block's values, beyond which a profile is not of such values."""
_OWN_FIELDS = {"config", "head_dim", "fused", "first_channels", "threads", "max_context_tokens"}
_CHECKED_TOKENS = 32
_NO_FINGERPRINT = "0" * 64


class PlacedCache(KVCache):
    """Tokens that begin somewhere in a context: those before them count, and are not there."""

    position = 0

    @classmethod
    def at(cls, cache: KVCache, position: int) -> PlacedCache:
        """Return a cache's tokens as those from `position` on."""
        placed = cls(cache.keys, cache.values)
        placed.position = position
        return placed

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[0] + self.position

    def slice(self, start: int, stop: int) -> KVCache:
        """Return tokens that are there."""
        return KVCache(self.keys, self.values).slice(start - self.position, stop - self.position)


@dataclass(frozen=True)
class BlockSettings:
    """How blocks are coded, checked; see `read_settings`.

    Attributes:
        method: its name.
        config: with its files in memory; None is method `cachegen` as for 7B models, whatever the number of layers.
        profile: None where the method has none, or makes its tables of each block.
        layout: how tensors become planes.
        num_threads: of one block.
        max_context_tokens: a position beyond is not looked for.
        codec_hash: SHA-256 of all that decoding must agree on, 32 raw bytes.
    """

    method: str
    config: MethodConfig | None
    profile: AnyProfile | None
    layout: Layout
    num_threads: int
    max_context_tokens: int
    codec_hash: bytes
    source: str = SOURCE


def read_settings(options: Mapping[str, Any], source: str = SOURCE) -> BlockSettings:
    """Read what a user's JSON object says.

    Args:
        options: `method` and its fields as in a quantization config (config/README.md), or `config`: such a config as
            an object or a path. Beside that `profile` (a folder), `head_dim`, `fused`, `first_channels` (see `Layout`),
            `threads` and `max_context_tokens`.
        source: what messages call it.

    Raises:
        ConfigError: naming the field that is wrong.
        InputError, BitstreamError: a file is missing or corrupt, or the profile cannot do what is asked.
    """
    fields = Fields(dict(options), refuse_config(source), reads_digits=True)
    content = _read_content(fields, options, source)
    name = content.get("method", DEFAULT_METHOD)
    config: MethodConfig | None = None
    folder = content.pop("profile", None)
    if set(content) - {"method", "description"} or name != DEFAULT_METHOD:
        config = read_config({**content, "method": name}, source)
    profile = None
    if folder is not None:
        if not isinstance(folder, str) or config is None:
            raise ConfigError(f"{source}: profile must be a folder, and the method must be one that takes it")
        profile = load_profile(folder, for_encoding=True)
        config = config.with_flags({"profile": profile})
    if config is not None and config.needs_profile:
        raise ConfigError(f"{source}: method {name} needs a profile: a folder of run_calibration.py")
    layout = Layout(
        plane_shapes=None if profile is None else profile.plane_shapes,
        head_dim=fields.integer("head_dim", 1, 1 << 16) if "head_dim" in fields else None,
        is_fused=fields.flag("fused") if "fused" in fields else False,
        first_channels=fields.integer("first_channels", 1, 1 << 16) if "first_channels" in fields else None,
    )
    agreed = {
        "version": BLOB_VERSION,
        "config": {**content, "method": name, "description": None},
        "profile": None if profile is None else profile.profile_hash,
        "layout": [layout.head_dim, layout.is_fused, layout.first_channels],
    }
    settings = BlockSettings(
        method=str(name),
        config=config,
        profile=profile,
        layout=layout,
        num_threads=fields.integer("threads", 1, 1 << 10) if "threads" in fields else default_num_threads(),
        max_context_tokens=(
            fields.integer("max_context_tokens", 1, MAX_CHUNK_TOKENS)
            if "max_context_tokens" in fields
            else MAX_CONTEXT_TOKENS
        ),
        codec_hash=hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).digest(),
        source=source,
    )
    if profile is not None:
        _try_profile(settings, profile)
    return settings


def _read_content(fields: Fields, options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of the quantization config, and perhaps `profile`."""
    content = {name: value for name, value in options.items() if name not in _OWN_FIELDS}
    if "config" not in fields:
        return content
    others = sorted(set(content) - {"method", "profile"})
    if others:
        raise ConfigError(f"{source}: {others[0]} belongs into config, where there is one")
    given = fields.value("config")
    found = dict(load_config_fields(given).content if isinstance(given, str) else fields.object("config").content)
    if content.get("method", found.get("method", DEFAULT_METHOD)) != found.get("method", DEFAULT_METHOD):
        raise ConfigError(f"{source}: method is {content['method']}, config says {found.get('method', DEFAULT_METHOD)}")
    return {**found, **content, "method": found.get("method", DEFAULT_METHOD)}


def _try_profile(settings: BlockSettings, profile: AnyProfile) -> None:
    """Encode a block of zeros, so that what is wrong shows now, and what all blocks share is there for the first."""
    dtype = getattr(profile, "dtype", torch.bfloat16)  # of a profile that is for one
    shapes = profile.plane_shapes
    planes = [torch.zeros(_CHECKED_TOKENS, heads, dim, dtype=dtype) for heads, dim in shapes]
    _encode(settings, KVCache(planes[0::2], planes[1::2]), 0, 0)


def _encode(
    settings: BlockSettings, cache: KVCache, position: int, num_exact: int
) -> tuple[list[Buffer], ErrorMeasure]:
    """Return the tables file and the chunk file of each level of a block's tokens, and what all of them lose.

    Args:
        num_exact: first tokens that are not coded.
    """
    profile, num_tokens = settings.profile, cache.num_tokens
    metadata = ContextMetadata(
        model_id="",
        model_fingerprint=_NO_FINGERPRINT if profile is None else profile.model_fingerprint,
        # Which tokens they are the engine's key says.
        token_ids=torch.zeros(position + num_tokens, dtype=torch.int32),
        rotary_embeddings=getattr(profile, "rotary_embeddings", ()),
        block_size=num_tokens,
        plane_rotations=(None,) * (2 * cache.num_layers) if profile is None else profile.rotations,
    )
    encoder = make_encoder(
        settings.config or default_config(cache.num_layers),
        PlacedCache.at(cache, position),
        metadata,
        [position, num_tokens] if position else [num_tokens],
        num_threads=settings.num_threads,
        first_stored=[num_exact] * cache.num_layers if num_exact else (),
    )
    index = encoder.num_chunks - 1
    files = [b"".join(encoder.encode_chunk(index, level)) for level in encoder.levels]
    return [encoder.tables_file, *files], encoder.read_error(index, encoder.levels[-1], [files[-1]])


class BlockCodec:
    """Encodes and decodes blocks; from several threads at a time.

    Attributes:
        counters: of blobs `encoded`, `decoded`; of bytes `raw_bytes`, `blob_bytes` (encoded ones) and `decoded_bytes`;
            of tensors `coded` and `raw:reason`: `dtype`, `layout`, `values` (NaN and infinity), `config`, `larger`,
            `position` (none fits, and the method would lose much) or `unlike` (it would lose more than half); of blocks
            whose `position_unknown`; and `seconds:encode`, `seconds:decode`, of all threads together.
    """

    def __init__(self, settings: BlockSettings, counters: Counters | None = None) -> None:
        self._settings = settings
        self.counters = counters or Counters()
        self._reported: set[str] = set()
        self._means = None if settings.profile is None else settings.profile.plane_means
        method = method_named(settings.method)
        self._num_sinks = 0 if method is None else method.num_sink_tokens

    def identify(self, key: bytes, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> Identity:
        """Return what a blob of an object must say that it is; `key` is any bytes that name the object."""
        return Identity(hashlib.sha256(key).digest(), hash_layout(shapes, dtypes), self._settings.codec_hash)

    def max_blob_bytes(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
        """Return the length that no blob of such an object exceeds: its own bytes and some for the heads."""
        numbers = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        return max_blob_bytes(numbers)

    def encode(self, key: bytes, tensors: Sequence[torch.Tensor], position: int | None = None) -> bytearray:
        """Return the blob of an object.

        Args:
            tensors: on the CPU, contiguous; not changed.
            position: of the first token in its context, where that is known; None looks for it in the keys.
        """
        start = time.perf_counter()
        sections = [self._encode_tensor(tensor, position) for tensor in tensors]
        identity = self.identify(key, [t.shape for t in tensors], [t.dtype for t in tensors])
        blob = pack_blob(identity, sections)
        self.counters.add(encoded=1, raw_bytes=sum(tensor.nbytes for tensor in tensors), blob_bytes=len(blob))
        self.counters.add_for("seconds", "encode", time.perf_counter() - start)
        return blob

    def decode(self, key: bytes, content: Buffer, tensors: Sequence[torch.Tensor]) -> None:
        """Write the values of a blob into an object's tensors.

        Args:
            content: the blob, and perhaps bytes behind it.
            tensors: on the CPU, contiguous, of the shapes and dtypes that were encoded. They hold no usable values
                where this fails.

        Raises:
            BitstreamError: the blob is damaged, cut off, or none of ours.
            MismatchError: it is of another key, shape, dtype, method, configuration or profile.
        """
        start = time.perf_counter()
        identity = self.identify(key, [t.shape for t in tensors], [t.dtype for t in tensors])
        sections = read_blob(content, identity)
        if len(sections) != len(tensors):
            raise BitstreamError(f"must be {len(tensors)}, got {len(sections)}", field="sections")
        for section, tensor in zip(sections, tensors, strict=True):
            if section.kind == RAW:
                _copy_bytes(section.parts[0], tensor)
            else:
                self._decode_tensor(section, tensor)
        self.counters.add(decoded=1, decoded_bytes=sum(tensor.nbytes for tensor in tensors))
        self.counters.add_for("seconds", "decode", time.perf_counter() - start)

    def _encode_tensor(self, tensor: torch.Tensor, position: int | None) -> Section:
        section = self._code_tensor(tensor, position)
        if section is not None and section.num_bytes >= raw_section_bytes(tensor.nbytes):
            self._report("larger", "coded it would be larger")
            section = None
        if section is None:
            return Section(RAW, [bytes_of(tensor)])
        self.counters.add(coded=1)
        return section

    def _code_tensor(self, tensor: torch.Tensor, known: int | None) -> Section | None:
        """Return a tensor's coded section; None, reported, where it cannot be coded."""
        if tensor.dtype not in SUPPORTED_DTYPES:
            self._report("dtype", f"{str(tensor.dtype).removeprefix('torch.')} is not coded")
            return None
        try:
            cache = self._settings.layout.view(tensor)
        except InputError as error:
            self._report("layout", str(error))
            return None
        found = self._find_position(cache, known)
        position = found or 0
        num_exact = self._num_sinks if position == 0 and cache.num_tokens > self._num_sinks else 0
        exact = tensor.narrow(-2, 0, num_exact).contiguous()
        try:
            files, error = _encode(self._settings, cache, position, num_exact)
        except CacheGenError as problem:
            self._report("values" if isinstance(problem, InputError) else "config", str(problem))
            return None
        if self._settings.profile is not None and error.mean:
            # A profile keeps only what it expects to matter: of what is unlike all that it knows, most would be lost.
            if found is None:
                self._report("position", "no position fits the keys: is the profile this model's?")
                return None
            usual = sum(plane.abs().mean().item() for plane in cache.planes) / len(cache.planes)
            if error.mean > MAX_RELATIVE_ERROR * usual:
                problem = f"{error.mean / usual:.2f} of the values would be lost: is the profile this model's?"
                self._report("unlike", problem)
                return None
        return Section(CODED, [bytes_of(exact), *files], num_exact, position)

    def _decode_tensor(self, section: Section, tensor: torch.Tensor) -> None:
        cache = self._settings.layout.view(tensor)
        exact, tables, *files = section.parts
        profile = self._settings.profile
        document = open_document(
            tables,
            num_threads=self._settings.num_threads,
            find_profile=None if profile is None else lambda _: profile,
        )
        document.prepare()
        document.decode(
            files,
            cache,
            first_token=section.position,
            token_hash=None,
            num_threads=self._settings.num_threads,
        )
        if section.num_exact > cache.num_tokens:
            raise BitstreamError("more tokens are exact than there are", field="num_exact")
        _copy_bytes(exact, tensor.narrow(-2, 0, section.num_exact))

    def _find_position(self, cache: KVCache, known: int | None) -> int | None:
        """Return a block's position, 0 where none is needed; None, counted, where none fits."""
        profile = self._settings.profile
        if profile is None or self._means is None:
            return 0
        if known is not None:
            return known
        found = find_position(cache, self._means, profile.rotations, self._settings.max_context_tokens)
        if found is None:
            self.counters.add(position_unknown=1)
        return found

    def _report(self, reason: str, problem: str) -> None:
        """Count a tensor that is stored as it is; the first of a reason is logged."""
        self.counters.add_for("raw", reason)
        if reason not in self._reported:
            self._reported.add(reason)
            logger.warning(
                "%s: stored as it is, and so are others like it (raw:%s): %s", self._settings.source, reason, problem
            )


def miss_reason(error: Exception) -> str:
    """Return why a block was not loaded, as the counters name it.

    `foreign` (of something else), `damaged`, `absent`, `late`, `outage` (the store fails) or `failed` (anything else).
    """
    if isinstance(error, StoreError):
        return "absent" if error.is_missing else "late" if error.is_too_slow else "outage"
    return (
        "foreign" if isinstance(error, MismatchError) else "damaged" if isinstance(error, BitstreamError) else "failed"
    )


def _copy_bytes(content: Buffer, tensor: torch.Tensor) -> None:
    """Write bytes as a tensor's values."""
    if len(content) != tensor.nbytes:
        raise BitstreamError(f"{len(content)} bytes for {tensor.nbytes} are there", field="length")
    if len(content):
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(tensor.dtype)
        tensor.copy_(values.view(tensor.shape))
