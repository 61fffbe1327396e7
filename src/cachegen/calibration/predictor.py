"""A profile of method `lossless` from a few caches of a language model; the model itself is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cachegen.calibration.calibrate import CalibrationContext
from cachegen.errors import InputError, MismatchError
from cachegen.format.headers import PlaneShape
from cachegen.methods.lossless.fit import fit_shared_model
from cachegen.methods.lossless.predictor import Predictor, group_by_window, pack_predictor


def make_predictor(
    contexts: Sequence[CalibrationContext],
    *,
    notes: Mapping[str, Any],
    progress: Callable[[int], object] = lambda _: None,
) -> Predictor:
    """Fit a predictor, as it is saved, and as those who read it have it.

    Args:
        contexts: from `open_contexts`, at least one.
        notes: what else to note of how it was made, as JSON values.
        progress: called with 1 for each context whose values were checked.

    Raises:
        InputError: the caches have more than 16 bits per value.
        BitstreamError: a cache's values are not those that were saved.
        MismatchError: the caches are turned in different ways.
    """
    cache, metadata = contexts[0].cache, contexts[0].metadata
    if cache.dtype.itemsize != 2:
        dtype = str(cache.dtype).removeprefix("torch.")
        raise InputError(f"method lossless codes caches of 16 bits per value, these are {dtype}")
    rotations = metadata.rotations_of(cache)
    for context in contexts:
        context.check_values()
        if context.metadata.rotations_of(context.cache) != rotations:
            raise MismatchError(
                f"{context.path}: its keys are turned otherwise than those of {contexts[0].path}: prefill all contexts "
                "with one `max_total_tokens`"
            )
        progress(1)
    windows = metadata.windows if metadata.windows is not None and any(metadata.windows) else None
    packed = b""
    for layers in group_by_window(windows, cache.num_layers):
        of_planes = tuple(rotations[plane] for layer in layers for plane in (2 * layer, 2 * layer + 1))
        packed += fit_shared_model([context.cache.select(layers) for context in contexts], of_planes).pack()
    calibration = {
        "model_id": metadata.model_id,
        "num_contexts": len(contexts),
        "num_tokens": sum(context.cache.num_tokens for context in contexts),
        "token_hashes": [context.token_hash for context in contexts],
        **notes,
    }
    planes = tuple(PlaneShape(plane.shape[1], plane.shape[2]) for plane in cache.planes)
    fields = (metadata.model_fingerprint, planes, cache.dtype, packed, calibration)
    return pack_predictor(Predictor(*fields, windows=windows))[1]
