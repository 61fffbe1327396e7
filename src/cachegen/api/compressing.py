"""A cache into small files."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cachegen.api.arguments import (
    CLONE,
    check_cache,
    choose_config,
    read_cache,
    read_model_states,
    read_token_ids,
    read_visible_cache,
)
from cachegen.api.decoding import decode_cache
from cachegen.api.measured import Measured
from cachegen.calibration.choose_profile import choose_profile
from cachegen.coder.cpu import default_num_threads
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.config import parse_coder
from cachegen.device import choose_kernels
from cachegen.errors import InputError, MismatchError
from cachegen.format import Coder
from cachegen.kv_cache import ContextMetadata
from cachegen.methods import make_encoder, method_named
from cachegen.methods.base import MethodConfig
from cachegen.methods.profile_files import AnyProfile
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import ANALYSIS_NAME, pack_profile
from cachegen.pipeline.chunking import DEFAULT_CHUNK_SIZE, plan_chunks
from cachegen.pipeline.decode import EncodedFiles
from cachegen.pipeline.document_files import MemoryFiles
from cachegen.pipeline.encode import encode_document, order_levels
from cachegen.pipeline.images import refuse_images
from cachegen.pipeline.kept import KeptEncoding
from cachegen.pipeline.model import LoadedModel, identify_model
from cachegen.pipeline.rotation import find_rotations
from cachegen.pipeline.windows import find_windows
from cachegen.store.catalog import EncodedLevel, publish_document
from cachegen.store.store import WRITING, Store, open_store
from cachegen.windows import first_visible_tokens

if TYPE_CHECKING:
    from cachegen.pipeline.model import PreTrainedModel
    from cachegen.pipeline.model_cache import DynamicCache


class CompressedCache(Measured):
    """A compressed cache in memory, from `compress`; the cache it was made from is not needed any more.

    `save` and `publish` keep it, and `to_cache` decodes it where it is. `PrefixCache` holds many.

    Attributes:
        num_tokens: of the cache.
        num_values: numbers in the cache: keys and values of all layers.
        num_bytes: of all files that `save` writes.
        encoding, metadata: the files, and what they were made from.
        own_profile: a profile that was made of this cache alone, which belongs to the files.
    """

    def __init__(
        self,
        encoding: KeptEncoding,
        metadata: ContextMetadata,
        own_profile: Profile | None = None,
        *,
        profile: AnyProfile | None = None,
        kernels: Kernels = CPU,
        num_threads: int = 1,
    ) -> None:
        """Keep the files.

        Args:
            profile: that the files name, if any; `own_profile` where they have one.
            kernels, num_threads: to decode with.
        """
        self._own_profile_bytes = 0 if own_profile is None else own_profile.num_bytes
        super().__init__(encoding.document.header, encoding.num_bytes + self._own_profile_bytes)
        self.encoding, self.metadata, self.own_profile = encoding, metadata, own_profile
        self._profile, self._kernels, self._num_threads = profile, kernels, num_threads

    def to_cache(
        self, model: PreTrainedModel | LoadedModel, token_ids: torch.Tensor | Sequence[int] | None = None
    ) -> DynamicCache:
        """Decode into a new cache, as `StoredCache.to_cache` does from files."""
        return self.decode(model, token_ids)

    def count_shared_chunks(self, token_ids: torch.Tensor) -> tuple[int, int]:
        """Return how many first chunks hold exactly the first tokens of a text, and how many tokens these are.

        Args:
            token_ids: int32 `[num_tokens]`.

        Returns:
            None of either where the cache can only be used whole and the text shares a part of it only.
        """
        header, mine = self.encoding.document.header, self.metadata.token_ids
        num_compared = min(len(mine), len(token_ids))
        differing = torch.nonzero(mine[:num_compared] != token_ids[:num_compared])
        num_shared = int(differing[0]) if len(differing) else num_compared
        stops = [stop for stop in itertools.accumulate(header.chunk_tokens) if stop <= num_shared]
        if not stops or (header.is_whole_only and len(stops) < len(header.chunk_tokens)):
            return 0, 0
        return len(stops), stops[-1]

    def decode(
        self,
        model: PreTrainedModel | LoadedModel,
        token_ids: torch.Tensor | Sequence[int] | None = None,
        num_chunks: int | None = None,
    ) -> DynamicCache:
        """Decode the first chunks only; see `to_cache`.

        Args:
            num_chunks: None for all.

        Raises:
            ConfigError: the cache can only be used whole, and a part of it was asked for.
        """
        profile = self._profile
        encoded = EncodedFiles(
            MemoryFiles(self.encoding.list_files(), self._own_profile_bytes),
            self._num_threads,
            self._kernels,
            find_profile=None if profile is None else lambda _: profile,
        )
        return decode_cache(encoded, model, token_ids, num_chunks)

    def list_levels(self) -> list[tuple[int, EncodedLevel]]:
        """Return bytes of the chunks and the level itself, to be published."""
        files = {} if self.own_profile is None else pack_profile(self.own_profile)[0]
        files.pop(ANALYSIS_NAME, None)
        return [(size, dataclasses.replace(level, profile=files)) for size, level in self.encoding.list_levels()]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the files, each whole or not at all; those of this very cache that are there already stay.

        Args:
            folder: is made if need be. `load` reads it; so do the scripts where `compress` was given a `LoadedModel`.
            overwrite: replace the files of another cache or configuration.

        Raises:
            OutputError: the folder holds something else, another process writes into it, or it cannot be written.
        """
        encode_document(self.encoding, folder, overwrite=overwrite, own_profile=self.own_profile)


def compress(
    cache: Any,
    token_ids: torch.Tensor | Sequence[int],
    model: PreTrainedModel | LoadedModel,
    config: str | os.PathLike[str] | Mapping[str, Any] | MethodConfig | None = None,
    *,
    profile: str | os.PathLike[str] | AnyProfile | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_SIZE,
    coder: str | Coder | None = None,
    block_size: int | None = None,
    keep_all_tokens: bool = False,
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
            `cachegen.pipeline.model.load_model`, which makes the files those of the scripts. The files name a
            transformers model by its weights and config as they are in memory; with a profile of its checkpoint, by
            that: then it must be loaded from there and not changed since.
        config: how finely. A path of a quantization config, the name of one in a clone's `config` folder
            ("quantization_7b"), its content as a dictionary (`{"method": "uniform", "bits": 8}`), or what
            `cachegen.methods.load_config` returned. None is method `cachegen` with 32 and 16 bins, as for 7B models.
        profile: what `calibrate` returned, or the folder that it was saved in. For method `transform`, None takes the
            one that the config names, else that of a `LoadedModel` in a clone's models, else makes one of this cache,
            which is part of the files. Where that would not pay, the method is `cachegen`, with a warning.
        chunk_tokens: tokens per file, at least 1.
        coder: "rans", "packed" or "ac"; None takes the config's.
        block_size: tokens per prefill step that the cache was computed with, 1 to 2^32 - 1; kept in the files. None
            is one step for all.
        keep_all_tokens: keep also what no later token attends to, in layers with a sliding window or chunks. Without it
            the files of a context that is longer than the windows are smaller and can only be used whole: not for a
            prompt that begins with a part of it, nor cropped.
        device: where to encode: "cpu", "cuda", or "auto" for CUDA where it can.
        num_threads: of the CPU; None takes all processors.

    Returns:
        The compressed cache, in memory.

    Raises:
        MismatchError: cache, tokens and model do not belong together: another number of tokens, another dtype, other
            shapes; or a profile is of another model.
        InputError: a file is missing; `token_ids` have one that stands for an image; the cache is empty, is a batch,
            holds NaN or infinity or lacks tokens that are to be kept or that a profile would be made of (a sliding
            window has dropped them); or the model is not supported, or has recurrent states
            that the cache has not.
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
    planes, num_missing = (read_cache(cache), ()) if keep_all_tokens else read_visible_cache(cache)
    ids = read_token_ids(token_ids)
    if len(ids) != planes.num_tokens:
        raise MismatchError(
            f"the cache holds {planes.num_tokens} tokens, `token_ids` has {len(ids)}: give the ids of those it holds"
        )
    block_size = planes.num_tokens if block_size is None else block_size
    if not 0 < block_size < 1 << 32:
        raise ValueError(f"`block_size` must be 1 to 2^32 - 1, got {block_size}")
    chosen = choose_config(config, planes.num_layers, profile)
    if coder is not None:
        name = coder.name.lower() if isinstance(coder, Coder) else coder
        chosen = chosen.with_flags({"coder": parse_coder(name, "`coder`")})
    if not chosen.needs_profile:
        chosen = chosen.read_files()
    loaded = identify_model(model, chosen.model_fingerprint)
    planes = check_cache(planes, loaded)
    refuse_images(loaded, ids, "`token_ids`")
    method = method_named(chosen.method)
    # Finding them takes a pass through the model.
    rotations = find_rotations(loaded).planes if method is not None and method.undoes_rotations else None
    windows = find_windows(loaded.text_config)
    metadata = ContextMetadata(
        loaded.model_id,
        loaded.fingerprint,
        ids,
        loaded.rotary_embeddings,
        block_size,
        plane_rotations=rotations,
        windows=windows,
        states=read_model_states(cache, loaded),
    )
    first_stored = () if keep_all_tokens else first_visible_tokens(windows, planes.num_tokens)
    _check_missing(num_missing, first_stored, chosen)
    threads = num_threads or default_num_threads()
    chunks = plan_chunks(planes.num_tokens, None, chunk_tokens)
    picked = choose_profile(
        chosen,
        planes,
        metadata,
        chunks,
        kernels,
        places=(CLONE / "models",),
        num_threads=threads,
        first_stored=first_stored,
    )
    if picked.config.method != chosen.method:
        warnings.warn(picked.note, stacklevel=2)
    encoder = make_encoder(
        picked.config, planes, metadata, chunks, num_threads=threads, kernels=kernels, first_stored=first_stored
    )
    _check_missing(num_missing, encoder.document.header.first_stored, chosen)
    return CompressedCache(
        KeptEncoding(encoder, threads),
        metadata,
        picked.own,
        # With files read and a profile chosen, it is no path any more.
        profile=picked.own or getattr(picked.config, "profile", None),
        kernels=kernels,
        num_threads=threads,
    )


def _check_missing(num_missing: Sequence[int], first_stored: Sequence[int], config: MethodConfig) -> None:
    """Refuse a cache that lacks tokens which will be stored, or of which a profile would be made.

    Args:
        num_missing: per layer, first tokens that it lacks; may be empty.
        first_stored: as in `DocumentHeader`.
    """
    for layer, missing in enumerate(num_missing):
        first = first_stored[layer] if first_stored else 0
        if missing > first:
            raise InputError(
                f"the cache's layer {layer} lacks its first {missing} tokens, but those from {first} on are to be "
                "stored: call the model with past_key_values=DynamicCache(), which keeps them all"
            )
    if any(num_missing) and config.needs_profile:
        raise InputError(
            "the cache lacks tokens that a sliding window has dropped, of which a profile would be made: give "
            "`profile`, or call the model with past_key_values=DynamicCache(), which keeps them all"
        )


def publish(
    place: str | os.PathLike[str] | Store,
    compressed: CompressedCache | Sequence[CompressedCache],
    *,
    kl: Sequence[float] | None = None,
) -> None:
    """Put a compressed cache into a store, for `load` to stream from.

    Whoever reads meanwhile sees the whole document or none of it. One that was published before of the same model and
    context is superseded.

    Args:
        place: a folder, which is made if need be and which any web server can serve, a URL that takes writes
            (`s3://bucket/path`, `gs://...`, `az://...`), or what `cachegen.store.store.open_store` returned, best with
            that module's `WRITING` as `retry`.
        compressed: several of one cache, in the same chunks, become levels, among which `load` chooses by the link. One
            of method `transform` may have several by itself, each refining the one before.
        kl: the loss to expect of each level, in nats per token. None takes what the profile says of method
            `transform`; levels of other methods are then weighed by their bits.

    Raises:
        MismatchError: the levels are of different caches or in different chunks.
        ConfigError: `kl` does not fit the levels, or the URL is not a store's.
        OutputError: the store cannot be written.
        BackendUnavailableError: the package obstore, which URLs need, is not there.

    Example:
        >>> import tempfile, torch, cachegen
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        >>> context, question = torch.randint(256, (1, 300)), torch.randint(256, (1, 5))
        >>> cache = model(context).past_key_values
        >>> levels = [cachegen.compress(cache, context, model, {"method": "uniform", "bits": n}) for n in (4, 8)]
        >>> folder = tempfile.TemporaryDirectory()
        >>> cachegen.publish(folder.name, levels)
        >>> prompt = torch.cat([context, question], dim=1)
        >>> cachegen.load(folder.name).to_cache(model, prompt).get_seq_length()
        300
        >>> folder.cleanup()
    """
    several = [compressed] if isinstance(compressed, CompressedCache) else list(compressed)
    if not several:
        raise ValueError("`compressed` must have at least one compressed cache")
    for one in several:
        if not isinstance(one, CompressedCache):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers have no types)
            raise TypeError(f"`compressed` must be what `compress` returned, got {type(one).__name__}")
    levels = order_levels([one.list_levels() for one in several], kl)
    store = place if isinstance(place, Store) else open_store(place, retry=WRITING, create=True)
    publish_document(store, levels, several[0].metadata)
