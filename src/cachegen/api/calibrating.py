"""What a model's profile is made of, given in Python."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from cachegen.api.arguments import check_cache, read_cache, read_token_ids
from cachegen.calibration.basis import WEIGHTS, Weights
from cachegen.calibration.calibrate import (
    MIN_TOKENS,
    CalibrationContext,
    check_together,
    check_tokens,
    split_contexts,
)
from cachegen.calibration.complete import Bar, make_no_bar, make_profile
from cachegen.calibration.settings import CalibrationSettings
from cachegen.coder.cpu import default_num_threads
from cachegen.device import choose_kernels, resolve_device
from cachegen.errors import InputError, MismatchError
from cachegen.kv_cache import ContextMetadata, from_planes, hash_planes, load_kv_cache, save_kv_cache
from cachegen.methods.transform.profile import Profile
from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE
from cachegen.pipeline.hybrids import refuse_states
from cachegen.pipeline.model import LoadedModel, identify_checkpoint, identify_model
from cachegen.pipeline.model_cache import view_kv_cache
from cachegen.pipeline.prefill import prefill
from cachegen.pipeline.rotation import find_rotations
from cachegen.pipeline.windows import find_windows
from cachegen.versions import collect_versions

if TYPE_CHECKING:
    from cachegen.pipeline.model import PreTrainedModel


def calibrate(
    model: PreTrainedModel | LoadedModel,
    contexts: Sequence[str | torch.Tensor | Sequence[int] | tuple[Any, torch.Tensor | Sequence[int]]],
    *,
    tokenizer: Any = None,
    layers_per_group: int | None = None,
    weights: Weights = CalibrationSettings.weights,
    fisher_tokens: int = CalibrationSettings.fisher_tokens,
    fisher_samples: int = CalibrationSettings.fisher_samples,
    seed: int = CalibrationSettings.seed,
    finest_step: float = CalibrationSettings.finest_step,
    max_components: int | None = None,
    no_curve: bool = False,
    device: str = "auto",
    num_threads: int | None = None,
    progress: bool = False,
) -> Profile:
    """Make a model's profile, which method `transform` needs: once per model, never per context.

    Best on text like what will be compressed, with many more tokens than a group of layers has channels (fewer are
    refused), and never on the text that is to be measured. It takes a prefill of each context, and a few passes forward
    and back.

    Args:
        model: a transformers model in evaluation mode, best in float32 for its gradients, or a `LoadedModel` of
            `cachegen.pipeline.model.load_model`. Where the model is still what its checkpoint's files say, the profile
            is the checkpoint's: it serves the scripts, and the model in any dtype.
        contexts: of different texts, each a string, token ids (integers `[num_tokens]` or `[1, num_tokens]`), or a
            tuple of a cache and the ids of its tokens, as for `compress`. What is prefilled here lies in a temporary
            folder meanwhile.
        tokenizer: of the model, for strings; a `LoadedModel` has its own.
        layers_per_group: layers transformed together; None takes as many as have 8192 channels together, and 1.4
            tokens to fit on for each, at least one.
        weights: "fisher" weighs quality by the Fisher information, "diagonal" by its diagonal, "none" not at all, which
            needs no gradients.
        fisher_tokens: tokens of each context whose predictions are differentiated.
        fisher_samples: labels drawn for each of these tokens.
        seed: of the labels.
        finest_step: the smallest quantization step to be prepared for; components too small for it are left out.
        max_components: per group at most; None sets no further limit.
        no_curve: fit on all contexts and do not measure bits and KL at eight steps, which configs with `target_kl` or
            `target_bits` need. Otherwise every fourth context, at least one, is held out for that.
        device: where to sum and to encode: "cpu", "cuda", or "auto" for CUDA where it can. The model stays where it is.
        num_threads: of the CPU; None takes all processors.
        progress: show progress bars on stderr.

    Returns:
        The profile, to `save`, or for `compress` and `load` as it is.

    Raises:
        InputError: there are too few contexts or tokens, the caches or the gradients are not finite, or as `compress`.
        MismatchError: a cache is not the model's or not of its tokens, or two contexts are the same.
        BackendUnavailableError: CUDA was asked for and is not there.
        TypeError, ValueError: an argument is of another type or out of range, or the model is in training mode.

    Example:
        >>> import torch, cachegen
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        >>> texts = [torch.randint(256, (400,)) for _ in range(3)]
        >>> profile = cachegen.calibrate(model, texts[:2], fisher_tokens=64)
        >>> config = {"method": "transform", "target_kl": 0.01}
        >>> compressed = cachegen.compress(model(texts[2][None]), texts[2], model, config, profile=profile)
        >>> compressed.num_tokens
        400
    """
    for name, value, least in (
        ("layers_per_group", layers_per_group, 1),
        ("fisher_tokens", fisher_tokens, 1),
        ("fisher_samples", fisher_samples, 1),
        ("max_components", max_components, 1),
        ("seed", seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}")
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if not 0 < finest_step < float("inf"):
        raise ValueError(f"`finest_step` must be a number above 0, got {finest_step}")
    if isinstance(contexts, (str, torch.Tensor)):
        raise TypeError("`contexts` must be a sequence of contexts: put a single one into a list")
    settings = CalibrationSettings(
        layers_per_group, weights, fisher_tokens, fisher_samples, seed, finest_step, max_components
    )
    sums_device, kernels = resolve_device(device), choose_kernels("cpu" if no_curve else device).kernels
    # In a caller's inference mode there would be no gradients.
    with torch.inference_mode(False), tempfile.TemporaryDirectory(prefix="cachegen-") as folder:
        in_memory = identify_model(model)
        loaded = identify_checkpoint(in_memory) or in_memory
        if weights != "none" or not no_curve:
            refuse_states(loaded, "calibration with weights or a curve")
        opened = [
            _open_context(context, f"context {index}", loaded, tokenizer, Path(folder) / f"{index}.pkl")
            for index, context in enumerate(contexts)
        ]
        fitted_on, held_out = (opened, []) if no_curve and opened else split_contexts(opened)
        check_together(opened)
        check_tokens(fitted_on, settings)
        return make_profile(
            fitted_on,
            held_out,
            loaded,
            settings,
            device=sums_device,
            work_folder=Path(folder),
            num_threads=num_threads or default_num_threads(),
            kernels=kernels,
            notes={"dtype": str(loaded.dtype).removeprefix("torch."), "versions": collect_versions()},
            make_bar=_make_bar if progress else make_no_bar,
        )


def _open_context(context: Any, name: str, loaded: LoadedModel, tokenizer: Any, path: Path) -> CalibrationContext:
    """Return a context with its cache, prefilled into a file if none was given."""
    pair = cast("tuple[Any, ...]", context) if isinstance(context, tuple) else ()
    if len(pair) == 2 and not isinstance(pair[0], int):
        given, token_ids = pair
        # What a caller computed in inference mode takes no gradients; a copy does.
        cache = from_planes([plane.clone() if plane.is_inference() else plane for plane in read_cache(given).planes])
        ids = read_token_ids(token_ids)
        if len(ids) != cache.num_tokens:
            raise MismatchError(f"{name}: the cache holds {cache.num_tokens} tokens, its token ids are {len(ids)}")
        cache = check_cache(cache, loaded)
        return CalibrationContext(name, cache, _describe(loaded, ids, cache.num_tokens, hash_planes(cache)))
    if isinstance(context, str):
        tokenizer = tokenizer if tokenizer is not None else loaded.tokenizer
        if tokenizer is None:
            raise ValueError("`tokenizer` must be given: a context is a string, and a transformers model has none")
        context = tokenizer(context, verbose=False)["input_ids"]
    ids = read_token_ids(cast("torch.Tensor | Sequence[int]", context))
    if len(ids) < MIN_TOKENS:
        raise InputError(f"{name}: a context needs at least {MIN_TOKENS} tokens to be calibrated on")
    cache = view_kv_cache(prefill(loaded, ids), len(ids))
    save_kv_cache(path, cache, _describe(loaded, ids, DEFAULT_BLOCK_SIZE))
    return CalibrationContext(name, *load_kv_cache(path))


def _describe(
    loaded: LoadedModel, ids: torch.Tensor, block_size: int, cache_hash: str | None = None
) -> ContextMetadata:
    return ContextMetadata(
        loaded.model_id,
        loaded.fingerprint,
        ids,
        loaded.rotary_embeddings,
        block_size,
        cache_hash=cache_hash,
        plane_rotations=find_rotations(loaded).planes,
        windows=find_windows(loaded.text_config),
    )


def _make_bar(label: str, total: int) -> AbstractContextManager[Bar]:
    from tqdm import tqdm

    return tqdm(total=total, unit="context", desc=label, file=sys.stderr)
