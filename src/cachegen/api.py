"""The door for Python: a transformers cache into small files, and back into a cache to generate from.

It does what `run_encoding.py` and `run_decoding_disk.py` do, with the same functions and into the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cachegen.coder.cpu import default_num_threads
from cachegen.config import parse_coder
from cachegen.device import choose_kernels
from cachegen.errors import InputError, MismatchError
from cachegen.format import Coder
from cachegen.format.headers import DocumentHeader
from cachegen.kv_cache import ContextMetadata, KVCache, describe_difference, from_planes
from cachegen.methods import default_config, load_config, make_encoder, method_of, read_config
from cachegen.methods.base import MethodConfig
from cachegen.pipeline.chunking import DEFAULT_CHUNK_SIZE, plan_chunks
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from cachegen.pipeline.kept import KeptEncoding
from cachegen.pipeline.limits import check_length
from cachegen.pipeline.model import LoadedModel, identify_model
from cachegen.pipeline.model_cache import allocate_cache, planes_of_cache, set_length, to_dynamic_cache, view_kv_cache
from cachegen.pipeline.prefill import measure_plane_shapes, recompute_first_tokens
from cachegen.pipeline.profiles import profile_finder

if TYPE_CHECKING:
    from cachegen.pipeline.model import PreTrainedModel
    from cachegen.pipeline.model_cache import DynamicCache

__all__ = ["CompressedCache", "StoredCache", "compress", "load"]

# Of a clone; an installed package has neither, and configs and profiles are given by path.
_CLONE = Path(__file__).resolve().parents[2]
_MAX_TOKEN_ID = (1 << 31) - 1


class _Measured:
    """What the files of a document are compared with.

    Attributes:
        num_tokens: of the cache.
        num_values: numbers in the cache: keys and values of all layers.
        num_bytes: of the files.
    """

    def __init__(self, header: DocumentHeader, num_bytes: int) -> None:
        self.num_tokens: int = sum(header.chunk_tokens)
        self.num_values: int = self.num_tokens * header.values_per_token
        self.num_bytes: int = num_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits of the files per number of the cache, everything counted; the cache itself has 16 or 32."""
        return 8 * self.num_bytes / self.num_values

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: {self.num_tokens:,} tokens, {self.num_bytes:,} bytes, "
            f"{self.bits_per_value:.3f} bits per value>"
        )


class CompressedCache(_Measured):
    """A compressed cache in memory, from `compress`; the cache it was made from is not needed any more.

    Attributes:
        num_tokens: of the cache.
        num_values: numbers in the cache: keys and values of all layers.
        num_bytes: of all files that `save` writes.
    """

    def __init__(self, encoding: KeptEncoding) -> None:
        super().__init__(encoding.document.header, encoding.num_bytes)
        self._encoding = encoding

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the files, each whole or not at all; those of this very cache that are there already stay.

        Args:
            folder: is made if need be. `load` reads it; so do the scripts where `compress` was given a `LoadedModel`.
            overwrite: replace the files of another cache or configuration.

        Raises:
            OutputError: the folder holds something else, another process writes into it, or it cannot be written.
        """
        encode_document(self._encoding, folder, overwrite=overwrite)


class StoredCache(_Measured):
    """A compressed cache on disk, from `load`.

    Attributes:
        num_tokens: of the cache that `to_cache` returns.
        num_values: numbers in it: keys and values of all layers.
        num_bytes: of the files that are decoded.
        dtype: of the cache.
    """

    def __init__(self, folder: EncodedFolder) -> None:
        super().__init__(folder.document.header, folder.num_bytes)
        self._folder = folder
        self.dtype: torch.dtype = folder.dtype

    def to_cache(
        self, model: PreTrainedModel | LoadedModel, token_ids: torch.Tensor | Sequence[int] | None = None
    ) -> DynamicCache:
        """Decode into a new cache, which `model.generate` takes as `past_key_values`.

        `generate` wants the ids of all tokens, those of the context first, and at least one more than the cache holds.
        Without that one more, transformers gives a wrong answer and no error: to continue the context itself, let the
        cache end before its last token (`cache.crop(-1)`). It appends to the cache: call `to_cache` for each answer, or
        give it a `copy.deepcopy`.

        Args:
            model: the one that computed the cache, with the same weights in the same dtype. For files of the scripts it
                must come from `cachegen.pipeline.model.load_model`: they name a model by its checkpoint's files, and
                `compress` one that it is given as a transformers model by what is in memory.
            token_ids: integers `[num_tokens]` or `[1, num_tokens]` that begin with those of the context, such as the
                whole prompt; they are compared with what was compressed. None compares nothing: then the caller knows
                that it is the right context. With method `transform` they must be given, since the first tokens are
                computed from them.

        Returns:
            A cache of one sequence of exactly `num_tokens` tokens, each layer on its layer's device.

        Raises:
            MismatchError: the model is another one, or the tokens are.
            InputError: a file is missing, or the model cannot be used; see `compress`.
            BitstreamError: a file is truncated or corrupt.
            ValueError: `token_ids` are needed and not given, or have another shape; `model` is in training mode.
        """
        loaded = identify_model(model)
        folder = self._folder
        num_sinks = method_of(folder.document.header).num_sink_tokens
        ids = None if token_ids is None else _read_token_ids(token_ids)
        if ids is None and num_sinks:
            raise ValueError(f"`token_ids` must be given: the first {num_sinks} tokens are computed from them")
        if ids is not None and len(ids) < self.num_tokens:
            raise MismatchError(
                f"{folder.path}: caches {self.num_tokens} tokens, `token_ids` has {len(ids)}: it is another context"
            )
        folder.check_model(loaded)
        cache = allocate_cache(folder.plane_shapes, self.num_tokens, folder.dtype, loaded.layer_devices)
        folder.decode_into(view_kv_cache(cache, self.num_tokens), ids, folder.select_chunks(None))
        set_length(cache, self.num_tokens)
        if ids is not None:
            recompute_first_tokens(loaded, cache, ids, num_sinks, self.num_tokens)
        return to_dynamic_cache(cache)


def compress(
    cache: Any,
    token_ids: torch.Tensor | Sequence[int],
    model: PreTrainedModel | LoadedModel,
    config: str | os.PathLike[str] | Mapping[str, Any] | MethodConfig | None = None,
    *,
    chunk_tokens: int = DEFAULT_CHUNK_SIZE,
    coder: str | Coder | None = None,
    block_size: int | None = None,
    device: str = "auto",
    num_threads: int | None = None,
) -> CompressedCache:
    """Compress the cache of a context.

    The files keep a hash of the tokens and of the model, so that no other context and no other model is ever answered
    from them.

    Args:
        cache: keys and values of one sequence: a transformers cache such as `DynamicCache`, what `model(...)` or
            `model.generate(..., return_dict_in_generate=True)` returned, or a `cachegen.kv_cache.KVCache`. In fp16,
            bf16 or fp32, on any device; it is not changed.
        token_ids: integers `[num_tokens]` or `[1, num_tokens]`: exactly the tokens whose keys and values the cache
            holds. (`generate` caches all but the last token of its result.)
        model: the transformers model that computed the cache, in evaluation mode; or a `LoadedModel` of
            `cachegen.pipeline.model.load_model`, which makes the files those of the scripts.
        config: how finely. A path of a quantization config, the name of one in a clone's `config` folder
            ("quantization_7b"), its content as a dictionary (`{"method": "uniform", "bits": 8}`), or what
            `cachegen.methods.load_config` returned. None is method `cachegen` with 32 and 16 bins, as for 7B models.
        chunk_tokens: tokens per file, at least 1.
        coder: "rans", "packed" or "ac"; None takes the config's.
        block_size: tokens per prefill step that the cache was computed with, 1 to 2^32 - 1; kept in the files. None
            is one step for all.
        device: where to encode: "cpu", "cuda", or "auto" for CUDA where it can.
        num_threads: of the CPU; None takes all processors.

    Returns:
        The compressed cache, in memory.

    Raises:
        MismatchError: cache, tokens and model do not belong together: another number of tokens, another dtype, other
            shapes; or a profile is of another model.
        InputError: a file is missing; the cache is empty, is a batch, holds NaN or infinity or lacks tokens (a sliding
            window has dropped them); or the model's state is more than keys and values of every token.
        ConfigError: the config or a name in it is wrong.
        BackendUnavailableError: CUDA was asked for and is not there.
        TypeError, ValueError: an argument is of another type or shape, or the model is in training mode.

    Example:
        >>> import tempfile, torch, cachegen
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        >>> context = torch.randint(256, (1, 600))
        >>> compressed = cachegen.compress(model(context), context, model)
        >>> compressed.num_tokens, compressed.bits_per_value < 8
        (600, True)
        >>> folder = tempfile.TemporaryDirectory()
        >>> compressed.save(folder.name)
        >>> cachegen.load(folder.name).num_bytes == compressed.num_bytes
        True
        >>> folder.cleanup()
    """
    if chunk_tokens < 1:
        raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}")
    kernels = choose_kernels(device).kernels
    planes = _read_cache(cache)
    ids = _read_token_ids(token_ids)
    if len(ids) != planes.num_tokens:
        raise MismatchError(
            f"the cache holds {planes.num_tokens} tokens, `token_ids` has {len(ids)}: give the ids of those it holds"
        )
    block_size = planes.num_tokens if block_size is None else block_size
    if not 0 < block_size < 1 << 32:
        raise ValueError(f"`block_size` must be 1 to 2^32 - 1, got {block_size}")
    loaded = identify_model(model)
    _check_cache(planes, loaded)
    chosen = _choose_config(config, planes.num_layers)
    if coder is not None:
        name = coder.name.lower() if isinstance(coder, Coder) else coder
        chosen = chosen.with_flags({"coder": parse_coder(name, "coder")})
    metadata = ContextMetadata(loaded.model_id, loaded.fingerprint, ids, loaded.rotary_embeddings, block_size)
    threads = num_threads or default_num_threads()
    chunks = plan_chunks(planes.num_tokens, None, chunk_tokens)
    encoder = make_encoder(chosen, planes, metadata, chunks, num_threads=threads, kernels=kernels)
    return CompressedCache(KeptEncoding(encoder, threads))


def load(
    folder: str | os.PathLike[str],
    *,
    level: int | None = None,
    profile: str | os.PathLike[str] | None = None,
    device: str = "auto",
    num_threads: int | None = None,
) -> StoredCache:
    """Open a folder of `CompressedCache.save` or of `run_encoding.py`; `to_cache` decodes it.

    Args:
        folder: with a tables file and chunk files.
        level: decode levels 1 to this one; None is all that there are.
        profile: the profile's folder, for method `transform`; None finds the one that the files name, beside a
            clone's models.
        device: where to decode: "cpu", "cuda", or "auto" for CUDA where it can.
        num_threads: of the CPU; None takes all processors.

    Raises:
        InputError: a file or the profile is missing.
        BitstreamError: the tables file is truncated or corrupt. (Of the chunk files `to_cache` says it.)
        ConfigError: there is no such level.
        MismatchError: the profile is not the one that the files name.
        BackendUnavailableError: CUDA was asked for and is not there.

    Example:
        >>> import tempfile, torch, cachegen
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        >>> context, question = torch.randint(256, (1, 100)), torch.randint(256, (1, 5))
        >>> folder = tempfile.TemporaryDirectory()
        >>> cachegen.compress(model(context), context, model).save(folder.name)
        >>> prompt = torch.cat([context, question], dim=1)
        >>> cache = cachegen.load(folder.name).to_cache(model, prompt)
        >>> cache.get_seq_length()
        100
        >>> answer = model.generate(prompt, past_key_values=cache, max_new_tokens=3, min_new_tokens=3)
        >>> answer.shape
        torch.Size([1, 108])
        >>> folder.cleanup()
    """
    find_profile = profile_finder(profile, (_CLONE / "models",))
    kernels = choose_kernels(device).kernels
    threads = num_threads or default_num_threads()
    return StoredCache(EncodedFolder(folder, threads, kernels, find_profile=find_profile, level=level))


def _read_cache(cache: Any) -> KVCache:
    """Return a cache's planes on the CPU, as views where they are there already."""
    if not isinstance(cache, KVCache):
        if hasattr(cache, "past_key_values"):
            cache = cache.past_key_values
            if cache is None:
                raise InputError("the model's output has no cache: call the model with use_cache=True")
        cache = planes_of_cache(cache)
    return from_planes([plane.detach().cpu() for plane in cache.planes])


def _read_token_ids(token_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Return token ids as int32 `[num_tokens]` on the CPU."""
    ids = torch.as_tensor(token_ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"`token_ids` must be integers, got {ids.dtype}")
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"`token_ids` must be [num_tokens] or [1, num_tokens], got {list(ids.shape)}")
    if ids.min() < 0 or ids.max() > _MAX_TOKEN_ID:
        raise ValueError(f"`token_ids` must be 0 to {_MAX_TOKEN_ID}, got {int(ids.min())} to {int(ids.max())}")
    return ids.detach().to(device="cpu", dtype=torch.int32)


def _check_cache(cache: KVCache, loaded: LoadedModel) -> None:
    """Refuse a cache that the model cannot have computed, or could not go on from.

    Raises:
        MismatchError: it has another dtype or other shapes.
        InputError: it has more tokens than may pass through the model.
    """
    if cache.dtype != loaded.dtype:
        raise MismatchError(f"the cache is {cache.dtype}, but {loaded.model_id} computes in {loaded.dtype}")
    shapes = [(plane.shape[1], plane.shape[2]) for plane in cache.planes]
    difference = describe_difference(measure_plane_shapes(loaded), shapes)
    if difference is not None:
        raise MismatchError(f"the cache is not of {loaded.model_id}: {difference}")
    check_length(loaded, cache.num_tokens, "the cache")


def _choose_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | MethodConfig | None, num_layers: int
) -> MethodConfig:
    """Return the config that `compress` was asked for."""
    if config is None:
        return default_config(num_layers)
    if isinstance(config, MethodConfig):
        return config
    if isinstance(config, Mapping):
        return read_config(config, "config")
    path = Path(config)
    is_name = path.parent == Path() and not path.suffix and not path.exists()
    return load_config(_CLONE / "config" / f"{path}.json" if is_name else path)
