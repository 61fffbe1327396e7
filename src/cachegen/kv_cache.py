"""The KV cache of one context, and the file that holds it between prefill and encoding.

A file is what `torch.save` writes for a plain dictionary of tensors, numbers and strings, and is read with
`weights_only=True`: nothing in it can run. The tensors are memory-mapped, so that a cache larger than memory can be
encoded chunk by chunk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cachegen import _native
from cachegen.errors import BitstreamError, InputError, UnsupportedVersionError
from cachegen.fields import Fields, refuse_file
from cachegen.files import atomic_write
from cachegen.format import MAX_CHANNELS, MAX_HEADS, MAX_LAYERS
from cachegen.kv_archive import check_archive
from cachegen.rotation import PlaneRotations, Rotation, pack_rotations, read_rotations
from cachegen.states import States, check_states, pack_states
from cachegen.windows import Windows, first_visible_tokens, pack_windows, read_windows

FILE_FORMAT = "cachegen-kv"
FILE_VERSION = 2
MAX_ROTARY_EMBEDDINGS = 1 << 10
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HASHED_TOKENS = 1024
_SHORTAGE = re.compile("|".join(os.strerror(n) for n in (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)))


@dataclass(frozen=True)
class RotaryEmbedding:
    """The rotary position embedding that the keys of a cache carry.

    Attributes:
        name: the module's name in the model, for models with more than one.
        rope_type: the name transformers gives the scaling rule ("default", "llama3", "yarn", ...).
        inv_freq: inverse frequencies in radians per token, head_dim / 2 of them, fp32 values.
        attention_scaling: factor on the cosines and sines.
    """

    name: str
    rope_type: str
    inv_freq: tuple[float, ...]
    attention_scaling: float


def hash_rotary_embeddings(rotary_embeddings: Sequence[RotaryEmbedding]) -> str:
    """Hash names, types, frequencies and scalings, the numbers to three significant digits.

    The last bits of the frequencies differ between the devices that compute them; another base or scaling shows in the
    first three digits.

    Returns:
        SHA-256 in hex.
    """
    digest = hashlib.sha256()
    for rotary in rotary_embeddings:
        numbers = " ".join(f"{number:.2e}" for number in (*rotary.inv_freq, rotary.attention_scaling))
        digest.update(f"{rotary.name}\0{rotary.rope_type}\0{numbers}\0".encode())
    return digest.hexdigest()


def rotations_by_rule(rotary_embeddings: Sequence[RotaryEmbedding], head_dims: Sequence[int]) -> PlaneRotations:
    """Return what is undone where nothing better was found: the first rotary embedding, as halves, in all keys.

    Args:
        head_dims: of each plane; keys with fewer dims than the rotary embedding has are taken as they are.
    """
    first: Rotation | None = None
    if rotary_embeddings and rotary_embeddings[0].inv_freq:
        first = Rotation(rotary_embeddings[0].inv_freq, attention_scaling=rotary_embeddings[0].attention_scaling)
    return tuple(
        first if first is not None and index % 2 == 0 and first.fits(head_dim) else None
        for index, head_dim in enumerate(head_dims)
    )


@dataclass(frozen=True)
class ContextMetadata:
    """What a cache was computed from; every field is a gate at decoding.

    Attributes:
        model_id: the Hugging Face id or folder that was loaded; for people, not compared.
        model_fingerprint: SHA-256 in hex of the model's config, tokenizer and weights.
        token_ids: int32 `[num_tokens]`, the tokens whose keys and values the cache holds.
        rotary_embeddings: empty for a model without rotary position embedding.
        block_size: tokens per prefill step; part of the result, since blocks change float rounding.
        cache_hash: `hash_planes` of the cache, as its file records it; None for a cache that no file holds. What reads
            all values anyway compares them with it.
        weight_bits: that the model's weights were rounded to on loading, 8 or 4; None where they were not.
        plane_rotations: how each plane is turned; None: as `rotations_by_rule` says. No gate: it only says how to code.
        windows: how far back each layer's tokens attend; None where nobody knows. No gate either.
        states: recurrent states at the end of the context, on the CPU; nothing for a model without.
    """

    model_id: str
    model_fingerprint: str
    token_ids: torch.Tensor
    rotary_embeddings: tuple[RotaryEmbedding, ...]
    block_size: int
    cache_hash: str | None = None
    weight_bits: int | None = None
    plane_rotations: PlaneRotations | None = None
    windows: Windows | None = None
    states: States = field(default_factory=dict)

    def first_visible(self, num_tokens: int) -> tuple[int, ...]:
        """Return, per layer, the first of the context's first `num_tokens` tokens that any behind them attends to.

        Returns:
            Nothing where that is the first one in every layer, or nobody knows.
        """
        found = first_visible_tokens(self.windows or (), num_tokens)
        return found if any(found) else ()

    def rotations_of(self, cache: KVCache) -> PlaneRotations:
        """Return how each plane of the context's cache is turned."""
        if self.plane_rotations is not None:
            return self.plane_rotations
        return rotations_by_rule(self.rotary_embeddings, [plane.shape[2] for plane in cache.planes])

    @property
    def rope_hash(self) -> str:
        """SHA-256 in hex of the rotary embeddings; see `hash_rotary_embeddings`."""
        return hash_rotary_embeddings(self.rotary_embeddings)


@dataclass
class KVCache:
    """Keys and values of one context, one pair of tensors per layer.

    Attributes:
        keys: `[num_tokens, num_kv_heads, head_dim]` per layer, keys with their rotary embedding applied.
        values: the same for values; heads and dims may differ from the keys', and between layers.

    All tensors have one dtype (fp16, bf16 or fp32) and one number of tokens; strides are free. There are as many heads
    and dims at most as the formats of encoded files can hold.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def __post_init__(self) -> None:
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"`keys` and `values` must have one tensor per layer, got {len(self.keys)} and {len(self.values)}"
            )
        for tensor in self.planes:
            if tensor.ndim != 3 or 0 in tensor.shape[1:]:
                raise ValueError(f"a plane must be [num_tokens, num_kv_heads, head_dim], got {list(tensor.shape)}")
            if max(tensor.shape[1:]) > MAX_HEADS or tensor.shape[1] * tensor.shape[2] > MAX_CHANNELS:
                raise ValueError(
                    f"a plane must have at most {MAX_HEADS} heads and dims and {MAX_CHANNELS} channels, "
                    f"got {list(tensor.shape)}"
                )
            if tensor.shape[0] != self.num_tokens:
                raise ValueError(f"all planes must have {self.num_tokens} tokens, got {tensor.shape[0]}")
            if tensor.dtype not in SUPPORTED_DTYPES or tensor.dtype != self.dtype:
                raise ValueError(f"all planes must be one of fp16, bf16 and fp32, got {self.dtype} and {tensor.dtype}")

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def planes(self) -> list[torch.Tensor]:
        """The 2 x num_layers tensors in file order: keys then values of layer 0, of layer 1, ..."""
        return [tensor for pair in zip(self.keys, self.values, strict=True) for tensor in pair]

    @property
    def num_values(self) -> int:
        """The count of scalars in all planes."""
        return sum(tensor.numel() for tensor in self.planes)

    def select(self, layers: Sequence[int]) -> KVCache:
        """Return some layers as views of the same memory."""
        return KVCache([self.keys[layer] for layer in layers], [self.values[layer] for layer in layers])

    def slice(self, start: int, stop: int) -> KVCache:
        """Return tokens `start` to `stop` as views of the same memory."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"`start`, `stop` must lie within {self.num_tokens} tokens, got {start}, {stop}")
        return KVCache([k[start:stop] for k in self.keys], [v[start:stop] for v in self.values])


def from_planes(planes: Sequence[torch.Tensor]) -> KVCache:
    """Build a cache from its planes, in the order of `KVCache.planes`."""
    return KVCache(list(planes[0::2]), list(planes[1::2]))


def describe_difference(shapes: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> str | None:
    """Say where planes' shapes are not those of a cache; None where they are the same.

    Args:
        shapes, expected: (num_kv_heads, head_dim) of keys and values of layer 0, of layer 1, ...
    """
    if len(shapes) != len(expected):
        return f"{len(shapes) // 2} layers are there, the cache has {len(expected) // 2}"
    for index, (found, wanted) in enumerate(zip(shapes, expected, strict=True)):
        if tuple(found) != tuple(wanted):
            kind = "values" if index % 2 else "keys"
            return (
                f"the {kind} of layer {index // 2} are {found[0]} x {found[1]}, the cache's {wanted[0]} x {wanted[1]}"
            )
    return None


def hash_planes(cache: KVCache, num_threads: int = 1, *, first_stored: Sequence[int] = ()) -> str:
    """Hash a cache's dtype, shapes and values at the speed of memory.

    It tells caches apart and finds damage. It is no defence against someone who makes two caches of one hash on
    purpose: a changed block of tokens goes unnoticed in one of 2^32 cases.

    Args:
        first_stored: per layer, the first token that counts, as if the layer held no others; empty for all of them.

    Returns:
        SHA-256 in hex of one line per plane, in file order: its dtype, its shape, and the CRC-32C in hex of each 1024
        tokens, whose values are little-endian bytes, token after token.
    """
    planes = cache.planes
    if first_stored:
        planes = [plane[first_stored[index // 2] :] for index, plane in enumerate(planes)]
    # All at once where they can be read where they are; else copied one by one.
    is_whole = not first_stored and all(map(_is_readable, planes))
    groups = [planes] if is_whole else [[plane] for plane in planes]
    checksums = [found for group in groups for found in _checksum_blocks(group, num_threads)]
    dtype = str(cache.dtype).removeprefix("torch.")
    lines = (
        f"{dtype} {' '.join(map(str, plane.shape))}: {' '.join(f'{checksum:08x}' for checksum in of_plane)}\n"
        for plane, of_plane in zip(planes, checksums, strict=True)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_readable(plane: torch.Tensor) -> bool:
    """Tell whether native code can read a plane where it is: on the CPU, head by head."""
    return plane.device.type == "cpu" and plane.stride(2) == 1


def _checksum_blocks(planes: Sequence[torch.Tensor], num_threads: int) -> list[list[int]]:
    """Return, per plane, the CRC-32C of each 1024 tokens."""
    readable = [plane if _is_readable(plane) else plane.cpu().contiguous() for plane in planes]
    places = [
        (
            plane.data_ptr(),
            plane.stride(0) * plane.itemsize,
            plane.stride(1) * plane.itemsize,
            plane.shape[1],
            plane.shape[2] * plane.itemsize,
        )
        for plane in readable
    ]
    return _native.checksum_tokens(places, planes[0].shape[0], _HASHED_TOKENS, num_threads).tolist()


def check_planes(cache: KVCache, metadata: ContextMetadata, num_threads: int = 1) -> bytes:
    """Read all values of a cache and see that they are those its file was written with.

    Returns:
        `hash_planes` of the cache, 32 raw bytes.

    Raises:
        BitstreamError: they are not.
    """
    found = hash_planes(cache, num_threads)
    if metadata.cache_hash not in (None, found):
        raise BitstreamError(
            "the KV cache's values are not what was saved, the file is damaged: prefill the context again",
            field="cache_hash",
        )
    return bytes.fromhex(found)


def hash_token_prefixes(token_ids: torch.Tensor, stops: Sequence[int]) -> list[str]:
    """Hash the tokens from the first to each of `stops`.

    Args:
        token_ids: `[num_tokens]`, any integer dtype.
        stops: ascending token counts.

    Returns:
        SHA-256 in hex of the ids as little-endian int32, one per stop. A prefix hash names all that a chunk's keys
        and values depend on, and chains: equal hashes mean equal text up to there.
    """
    ids = token_ids.to(torch.int32).numpy().astype("<i4")
    digest, hashes, start = hashlib.sha256(), [], 0
    for stop in stops:
        digest.update(ids[start:stop].tobytes())
        hashes.append(digest.hexdigest())
        start = stop
    return hashes


def save_kv_cache(
    path: str | os.PathLike[str], cache: KVCache, metadata: ContextMetadata, *, replace: bool = True
) -> None:
    """Write a cache and its metadata, `hash_planes` among it, whole or not at all.

    Args:
        replace: as `atomic_write`.

    Raises:
        OutputExistsError: as `atomic_write`.
        OutputError: the file cannot be written.
    """
    content = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "model_id": metadata.model_id,
        "model_fingerprint": metadata.model_fingerprint,
        "token_ids": metadata.token_ids.to(torch.int32).contiguous(),
        "token_hash": hash_token_prefixes(metadata.token_ids, [len(metadata.token_ids)])[0],
        "rope_hash": metadata.rope_hash,
        "rotary_embeddings": [
            {
                "name": rotary.name,
                "rope_type": rotary.rope_type,
                "inv_freq": list(rotary.inv_freq),
                "attention_scaling": rotary.attention_scaling,
            }
            for rotary in metadata.rotary_embeddings
        ],
        "block_size": metadata.block_size,
        "cache_hash": hash_planes(cache),
        "keys": cache.keys,
        "values": cache.values,
    }
    if metadata.plane_rotations is not None:
        content["plane_rotations"] = pack_rotations(metadata.plane_rotations)
    if metadata.windows is not None and any(metadata.windows):
        content["windows"] = pack_windows(metadata.windows)
    if metadata.weight_bits is not None:
        content["weight_bits"] = metadata.weight_bits
    if metadata.states:
        content["states"] = dict(metadata.states)
        content["states_hash"] = _hash_states(metadata.states)
    with atomic_write(path, replace=replace) as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # torch's zip writer, left with half a file, complains over whatever stopped the writing.
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise OSError(f"torch.save failed, is the disk full? ({str(error).splitlines()[0]})") from error


def load_kv_cache(path: str | os.PathLike[str]) -> tuple[KVCache, ContextMetadata]:
    """Read a file of `save_kv_cache`, its tensors memory-mapped.

    Every field is checked but the values: they are read when they are used, and who needs them whole compares
    `hash_planes` of the cache with the metadata's `cache_hash`. What the file says about itself takes at most
    40 times as much memory as it takes in the file.

    Returns:
        The cache (on the CPU) and its metadata.

    Raises:
        InputError: there is no such file, it is no regular one, or it cannot be read.
        BitstreamError: the file is not one of ours, or not whole. Nothing in it was executed.
        UnsupportedVersionError: it was written by another release.
    """
    path = Path(path)
    with check_archive(path) as stream:
        content = _load(path, stream.fileno())
        file_bytes = os.fstat(stream.fileno()).st_size
    try:
        return _parse(content, file_bytes)
    except BitstreamError as error:
        raise error.at(path) from error


def _load(path: Path, descriptor: int) -> object:
    """Let torch read the file that was checked, whatever has its name by now."""
    # By the name that the system has for what is open: torch takes none whose bytes are not UTF-8.
    name = f"/dev/fd/{descriptor}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a corrupt pickle's protocol, before it is refused
            return torch.load(name if os.path.exists(name) else path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:
        if (shortage := _SHORTAGE.search(str(error))) is not None:  # torch's own error for what is not the file's fault
            raise InputError(f"{path}: cannot be read: {shortage[0]}") from error
        # A corrupt pickle can make torch's unpickler fail in any way: IndexError, TypeError, AssertionError, ...
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise BitstreamError(f"not a KV cache file of main.py, nothing of it was run ({reason})", path=path) from error


def read_rotary_embeddings(fields: Fields) -> tuple[RotaryEmbedding, ...]:
    """Read the field `rotary_embeddings` of a file: a list of objects with the fields of `RotaryEmbedding`.

    Raises:
        BitstreamError: naming the field.
    """
    embeddings = []
    for record in fields.objects("rotary_embeddings", 0, MAX_ROTARY_EMBEDDINGS):
        record.require(("name", "rope_type", "inv_freq", "attention_scaling"))
        embeddings.append(
            RotaryEmbedding(
                name=record.label("name"),
                rope_type=record.label("rope_type"),
                inv_freq=record.numbers("inv_freq", 0, MAX_CHANNELS),
                attention_scaling=record.number("attention_scaling"),
            )
        )
    return tuple(embeddings)


def _parse(content: object, file_bytes: int) -> tuple[KVCache, ContextMetadata]:
    """Check every field of a loaded file, trusting none."""
    if type(content) is not dict or type(content.get("format")) is not str or content["format"] != FILE_FORMAT:
        raise BitstreamError("not a KV cache file of main.py")
    version = content.get("version")
    if type(version) is not int:
        raise BitstreamError("must be an integer", field="version")
    if version != FILE_VERSION:
        number = version if abs(version) < 1 << 64 else "a huge number"
        raise UnsupportedVersionError(
            f"version {number} is not supported, this release reads {FILE_VERSION}: prefill again with main.py",
            field="version",
        )
    fields = Fields(content, refuse_file())
    keys, values = (fields.items(name, 1, MAX_LAYERS) for name in ("keys", "values"))
    token_ids = fields.value("token_ids")
    states = check_states(fields.value("states")) if "states" in fields else {}
    tensors_of = {"token_ids": [token_ids], "keys": keys, "values": values, "states": states.values()}
    for name, tensors in tensors_of.items():
        for tensor in tensors:
            _check_tensor(tensor, name)
    # Planes may be views of one storage, and a file may name one span of bytes as several storages: neither may make
    # more of the file than it is.
    num_bytes = sum(tensor.numel() * tensor.element_size() for of_field in tensors_of.values() for tensor in of_field)
    if num_bytes > file_bytes:
        raise BitstreamError("the tensors are larger than the file", field="keys, values, token_ids, states")
    try:
        cache = KVCache(list(map(_with_contiguous_heads, keys)), list(map(_with_contiguous_heads, values)))
    except ValueError as error:
        raise BitstreamError(str(error), field="keys, values") from error
    if token_ids.dtype != torch.int32 or list(token_ids.shape) != [cache.num_tokens]:
        raise BitstreamError("one int32 per token of the cache is expected", field="token_ids")
    metadata = ContextMetadata(
        model_id=fields.text("model_id"),
        model_fingerprint=fields.hash("model_fingerprint"),
        token_ids=token_ids,
        rotary_embeddings=read_rotary_embeddings(fields),
        block_size=fields.integer("block_size", 1, (1 << 32) - 1),
        cache_hash=fields.hash("cache_hash"),
        weight_bits=_read_weight_bits(fields),
        plane_rotations=read_rotations(fields, [plane.shape[2] for plane in cache.planes]),
        windows=read_windows(fields, cache.num_layers),
        states=states,
    )
    if hash_token_prefixes(token_ids, [cache.num_tokens]) != [fields.hash("token_hash")]:
        raise BitstreamError("does not match the token ids", field="token_hash")
    if metadata.rope_hash != fields.hash("rope_hash"):
        raise BitstreamError("does not match the rotary embeddings", field="rope_hash")
    if states and fields.hash("states_hash") != _hash_states(states):
        raise BitstreamError(
            "does not match the states, the file is damaged: prefill the context again", field="states_hash"
        )
    return cache, metadata


def _read_weight_bits(fields: Fields) -> int | None:
    if "weight_bits" not in fields:
        return None
    return fields.check("weight_bits", lambda value: type(value) is int and value in (4, 8), "4 or 8")


def _hash_states(states: States) -> str:
    return hashlib.sha256(pack_states(states)).hexdigest()


def _check_tensor(tensor: object, field: str) -> None:
    """Refuse all but a plain tensor whose elements lie within its storage, each in a place of its own."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise BitstreamError("a plane is not a plain tensor", field=field)
    if tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise BitstreamError("a plane is not a plain tensor", field=field)
    span = 1  # elements from the first to the last one of the dims so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < span:
                raise BitstreamError("elements of a plane share their place", field=field)
            span += (size - 1) * stride
    num_stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() == 0 or tensor.storage_offset() + span > num_stored:
        raise BitstreamError("a plane is empty or larger than its storage", field=field)
    if tensor.data_ptr() % tensor.element_size():
        raise BitstreamError("a plane does not begin at a multiple of its element's size", field=field)


def _with_contiguous_heads(plane: torch.Tensor) -> torch.Tensor:
    """Copy a plane only where its head dims do not lie side by side, which the coders' kernels need."""
    return plane if plane.stride(-1) == 1 else plane.clone(memory_format=torch.contiguous_format)
