"""Small files back into a cache to generate from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cachegen.api.arguments import CLONE
from cachegen.api.decoding import decode_cache
from cachegen.api.measured import Measured
from cachegen.api.streaming import CacheStore
from cachegen.coder.cpu import default_num_threads
from cachegen.device import choose_kernels
from cachegen.errors import InputError
from cachegen.format.files import TABLES_NAME
from cachegen.methods import load_profile
from cachegen.methods.profile_files import AnyProfile
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.profiles import profile_finder
from cachegen.store.index import STORE_INFO_NAME
from cachegen.store.store import Store, open_store
from cachegen.streaming.load_report import LoadResult
from cachegen.streaming.policy import Objective

if TYPE_CHECKING:
    from cachegen.pipeline.model import PreTrainedModel
    from cachegen.pipeline.model_cache import DynamicCache


class StoredCache(Measured):
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

        transformers calls that `cache` from 5.24 on, and takes both. `generate` wants the ids of all tokens, those of
        the context first, and at least one more than the cache holds. Without that one more, transformers gives a wrong
        answer and no error: to continue the context itself, let the cache end before its last token
        (`cache.crop(-1)`). A cache that was compressed without what windows hide refuses that. `generate` appends to
        the cache: call `to_cache` for each answer, or give it a `copy.deepcopy`.

        Args:
            model: the one that computed the cache, with the same weights in the same dtype. Files of the scripts name a
                model by its checkpoint: it must be loaded from there and not changed since. What transformers names
                otherwise than the checkpoint's files do (some mixtures of experts) is only recognized as what
                `cachegen.pipeline.model.load_model` returned.
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
        return decode_cache(self._folder, model, token_ids)


def load(
    place: str | os.PathLike[str] | Store,
    *,
    level: int | None = None,
    profile: str | os.PathLike[str] | AnyProfile | None = None,
    slo: float | None = None,
    target_kl: float | None = None,
    report: Callable[[LoadResult], object] | None = None,
    device: str = "auto",
    num_threads: int | None = None,
) -> StoredCache | CacheStore:
    """Open a folder of compressed files, or a store of many; `to_cache` gives a cache to generate from.

    Args:
        place: a folder of `CompressedCache.save` or of `run_encoding.py`; or a store of `publish` or of
            `run_publishing.py`: its folder or URL (`http://host:port/path`, `https://`, `s3://bucket/path`, `gs://`,
            `az://`), or what `cachegen.store.store.open_store` returned, to which timeouts and redirects are told.
        level: decode levels 1 to this one; None is all that there are. Of a store: take every chunk at this level,
            whatever the objective.
        profile: for method `transform`: what `calibrate` returned, or the folder that it was saved in. None finds the
            one that the files name: beside them, in the store, or beside a clone's models.
        slo: of a store: the objective for the time to the first token, in seconds from the call of `to_cache`, with
            which the loader chooses levels and what to compute instead; None is 1.
        target_kl: of a store: expected loss that is good enough, in nats per token, so that nothing waits to get below
            it; None is 0, as good as the objective allows.
        report: of a store: called after each load with what it took and gave, a
            `cachegen.streaming.load_report.LoadResult`.
        device: where to decode: "cpu", "cuda", or "auto" for CUDA where it can.
        num_threads: of the CPU; None takes all processors.

    Returns:
        A `StoredCache` of a folder of files, which knows its sizes; a `CacheStore` of a store, of which nothing is read
        before `to_cache` is told model and prompt. Both have `to_cache(model, prompt)`.

    Raises:
        InputError: a file or the profile is missing, or nothing of ours is there.
        BitstreamError: the tables file or the profile is truncated or corrupt. (Of the chunk files and of a store
            `to_cache` says it.)
        ConfigError: there is no such level, or the URL is not a store's.
        MismatchError: the profile is not the one that the files name.
        BackendUnavailableError: CUDA, or the package obstore, which URLs need, was asked for and is not there.
        ValueError: an argument is out of range, or is for stores and the place is none.

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
    choice = choose_kernels(device)
    threads = num_threads or default_num_threads()
    if isinstance(place, Store) or _is_store(place):
        named = load_profile(profile) if isinstance(profile, (str, os.PathLike)) else profile
        return CacheStore(
            place if isinstance(place, Store) else open_store(place),
            choice,
            threads,
            level=level,
            profile=named,
            slo=Objective.deadline_seconds if slo is None else slo,
            target_kl=Objective.target_loss if target_kl is None else target_kl,
            report=report,
        )
    for name, value in (("slo", slo), ("target_kl", target_kl), ("report", report)):
        if value is not None:
            raise ValueError(f"`{name}` is for stores, and {os.fspath(place)} is none")
    if not (Path(place) / TABLES_NAME).exists():
        raise InputError(f"{os.fspath(place)}: holds neither compressed files ({TABLES_NAME}) nor a store")
    find_profile = profile_finder(profile, (place, CLONE / "models"))
    return StoredCache(EncodedFolder(place, threads, choice.kernels, find_profile=find_profile, level=level))


def _is_store(place: str | os.PathLike[str]) -> bool:
    """Tell whether a place is a URL, or a folder with a store in it."""
    if "://" in os.fspath(place):
        return True
    folder = Path(place)
    return (folder / STORE_INFO_NAME).is_file() and not (folder / TABLES_NAME).exists()
