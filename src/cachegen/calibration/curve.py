"""What quantization steps cost and give: bits and KL divergence of whole documents, measured on saved caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cachegen.calibration.calibrate import CalibrationContext, plane_shapes_of
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.kv_cache import hash_token_prefixes
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.methods.transform.profile import SCALE_LOGS_PER_OCTAVE, CurvePoint, Profile
from cachegen.pipeline.chunking import plan_chunks
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import allocate_cache, fill_cache, set_length, view_kv_cache
from cachegen.pipeline.verify import compare_caches

CURVE_POINTS = 8
CURVE_OCTAVES = 6


def plan_steps(finest_step: float) -> list[int]:
    """Return the curve's steps as 16 log2: eight, descending, over the six octaves from `finest_step` up."""
    finest = round(SCALE_LOGS_PER_OCTAVE * torch.tensor(finest_step, dtype=torch.float64).log2().item())
    octaves = SCALE_LOGS_PER_OCTAVE * CURVE_OCTAVES
    return [finest + round(octaves * i / (CURVE_POINTS - 1)) for i in reversed(range(CURVE_POINTS))]


def measure_curve(
    loaded: LoadedModel,
    profile: Profile,
    contexts: Sequence[CalibrationContext],
    step_logs: Sequence[int],
    *,
    num_threads: int,
    kernels: Kernels = CPU,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[CurvePoint, ...]:
    """Encode and decode contexts at each step, and compare what the model predicts of their last tokens.

    Args:
        loaded: the model; the caches are compared in the dtype it computes in.
        profile: saved and loaded again, for encoding.
        contexts: best those that nothing was fitted on.
        step_logs: 16 log2 of the steps.
        kernels: `cachegen.coder.cpu`, or a `cachegen.coder.cuda.CudaKernels`.
        progress: called with 1 for each context done at a step.

    Returns:
        A point per step: every byte of documents in chunks of the default size, and the mean of the contexts' KL.
    """
    points = []
    for step_log in step_logs:
        num_bytes = num_values = 0
        kl = 0.0
        for context in contexts:
            document_bytes, divergence = measure_document(
                loaded, profile, context, step_log, num_threads=num_threads, kernels=kernels
            )
            num_bytes, num_values = num_bytes + document_bytes, num_values + context.cache.num_values
            kl += divergence / len(contexts)
            progress(1)
        # A divergence of zero is rounding of sums; it may come out below.
        points.append(CurvePoint(step_log, 8 * num_bytes / num_values, max(kl, 0.0)))
    return tuple(points)


def measure_document(
    loaded: LoadedModel,
    profile: Profile,
    context: CalibrationContext,
    step_log: int,
    *,
    num_threads: int,
    kernels: Kernels = CPU,
) -> tuple[int, float]:
    """Return the bytes of one document at one step and the KL divergence it causes."""
    cache, metadata = context.cache, context.metadata
    chunk_tokens = plan_chunks(cache.num_tokens, None, None)
    encoder = TransformEncoder(
        cache, metadata, profile, chunk_tokens, step_log=step_log, num_threads=num_threads, kernels=kernels
    )
    caches = [
        allocate_cache(loaded.cache_layout, plane_shapes_of(cache), cache.num_tokens, loaded.dtype) for _ in range(2)
    ]
    reference, decoded = caches
    fill_cache(reference, cache)
    output = view_kv_cache(decoded, cache.num_tokens)
    num_bytes, start = len(encoder.tables_file), 0
    for index, count in enumerate(chunk_tokens):
        content = b"".join(encoder.encode_chunk(index, 1))
        num_bytes += len(content)
        encoder.document.decode(
            [content],
            output.slice(start, start + count),
            first_token=start,
            token_hash=bytes.fromhex(hash_token_prefixes(metadata.token_ids, [start + count])[0]),
            num_threads=num_threads,
            kernels=kernels,
        )
        start += count
    set_length(decoded, cache.num_tokens)
    fidelity = compare_caches(
        loaded,
        metadata.token_ids,
        reference,
        decoded,
        num_reference_tokens=cache.num_tokens,
        num_decoded_tokens=cache.num_tokens,
    )
    return num_bytes, fidelity.kl
