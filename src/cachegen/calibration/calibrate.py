"""From a few saved caches of a model to its profile: Fisher information, covariance, basis."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

import cachegen
from cachegen.calibration.basis import diagonal_of, fit_basis, weigh
from cachegen.calibration.fisher import accumulate_fisher, add_outer_products
from cachegen.calibration.settings import CalibrationSettings
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.files import open_file, write_file
from cachegen.kv_cache import ContextMetadata, KVCache, hash_planes, hash_token_prefixes, load_kv_cache
from cachegen.methods.transform.profile import Profile, TransformGroup
from cachegen.methods.transform.transform import BLOCK_TOKENS, SINK_TOKENS, join_planes
from cachegen.pipeline.model import LoadedModel
from cachegen.rotation import pack_rotations
from cachegen.windows import Windows

MAX_GROUP_CHANNELS = 8192
"""Of a group of layers, unless told otherwise: its covariance then takes 537 MB."""
TOKENS_PER_CHANNEL = 1.4
"""To fit on, at least, unless told otherwise: so many were seen to suffice (docs/rate_distortion.md)."""
LEAST_VARIANCE = 1e-12
"""Of a plane, for its weight."""
FISHER_NAME = "fisher.safetensors"
MIN_TOKENS = SINK_TOKENS + 2
"""Of a context to calibrate on."""

Progress = Callable[[int], object]


@dataclass(frozen=True)
class CalibrationContext:
    """One cache to calibrate on, if it is a saved one with its tensors memory-mapped.

    Attributes:
        path: its file, or what it is called in messages.
        metadata: the cache's.
    """

    path: Path | str
    cache: KVCache
    metadata: ContextMetadata

    @property
    def token_hash(self) -> str:
        """SHA-256 in hex of the tokens."""
        return hash_token_prefixes(self.metadata.token_ids, [self.cache.num_tokens])[0]

    def check_values(self) -> None:
        """Read all values and see that they are those that were saved, if they were.

        Raises:
            BitstreamError: they are not.
        """
        if self.metadata.cache_hash is not None and hash_planes(self.cache) != self.metadata.cache_hash:
            problem = "its values are not what was saved, the file is damaged: run main.py again"
            raise BitstreamError(problem, path=self.path, field="cache_hash")


def open_contexts(path: Path) -> list[CalibrationContext]:
    """Open the caches of one model: a KV cache file, or a folder's test_kv_N.pkl in numeric order.

    Raises:
        InputError: there are none.
        BitstreamError: one is corrupt.
        MismatchError: they are of different models, shapes or dtypes, or two hold the same tokens.
    """
    if path.is_dir():
        numbers = {file: file.stem.removeprefix("test_kv_") for file in path.glob("test_kv_*.pkl")}
        files = sorted(
            (file for file, number in numbers.items() if number.isascii() and number.isdigit()),
            key=lambda file: (int(numbers[file]), file.name),
        )
        if not files:
            raise InputError(f"{path}: no KV cache files test_kv_N.pkl in this folder; write some with main.py")
    else:
        files = [path]
    contexts = [CalibrationContext(file, *load_kv_cache(file)) for file in files]
    check_together(contexts)
    return contexts


def check_together(contexts: Sequence[CalibrationContext]) -> None:
    """Refuse caches that no one profile could be made of.

    Raises:
        MismatchError: they are of different models, shapes or dtypes, or two hold the same tokens.
    """
    first = contexts[0]
    paths_of_tokens: dict[str, Path | str] = {}
    for context in contexts:
        for field, found, expected in (
            ("model_fingerprint", context.metadata.model_fingerprint[:12], first.metadata.model_fingerprint[:12]),
            ("rope_hash", context.metadata.rope_hash[:12], first.metadata.rope_hash[:12]),
            ("shapes", plane_shapes_of(context.cache), plane_shapes_of(first.cache)),
            ("dtype", context.cache.dtype, first.cache.dtype),
            ("plane_rotations", *(_name_rotations(of.metadata) for of in (context, first))),
        ):
            if found != expected:
                raise MismatchError(
                    f"{context.path}: its {field} differs from that of {first.path} ({found}, {expected}): "
                    "give caches of one model"
                )
        twin = paths_of_tokens.setdefault(context.token_hash, context.path)
        if twin is not context.path:
            raise MismatchError(f"{context.path}: the same context as {twin}; remove one of them")


def _name_rotations(metadata: ContextMetadata) -> str:
    rotations = None if metadata.plane_rotations is None else pack_rotations(metadata.plane_rotations)
    return hashlib.sha256(json.dumps(rotations).encode()).hexdigest()[:12]


def split_contexts(contexts: Sequence[CalibrationContext]) -> tuple[list[CalibrationContext], list[CalibrationContext]]:
    """Split contexts into those to fit on and those to measure the curve on: every fourth, or the last of fewer.

    Raises:
        InputError: there are fewer than two.
    """
    if len(contexts) < 2:
        raise InputError("the curve needs a context that nothing was fitted on: give two contexts, or `no_curve`")
    held_out = set(range(3, len(contexts), 4)) or {len(contexts) - 1}
    fitted_on = [context for index, context in enumerate(contexts) if index not in held_out]
    return fitted_on, [contexts[index] for index in sorted(held_out)]


def check_model(contexts: Sequence[CalibrationContext], fingerprint: str, model_id: str) -> None:
    """Refuse caches of another model.

    Raises:
        MismatchError: their fingerprint is not the model's.
    """
    found = contexts[0].metadata.model_fingerprint
    if found != fingerprint:
        raise MismatchError(
            f"{contexts[0].path}: its model_fingerprint is {found[:12]}, but {model_id} has {fingerprint[:12]}: "
            "give the model that made the caches (`model_id`)"
        )


def check_tokens(contexts: Sequence[CalibrationContext], settings: CalibrationSettings) -> int:
    """Return how many tokens there are to fit on.

    Raises:
        InputError: there are fewer than channels in a group of layers, or a context has a single one.
    """
    shapes = plane_shapes_of(contexts[0].cache)
    outline = Profile("", (), shapes, (), (), {})
    planned = plan_calibration(contexts, settings)
    num_channels = max(outline.channels_of(*group) for group in planned)
    num_tokens = count_tokens(contexts)
    if num_tokens < num_channels:
        raise InputError(
            f"{contexts[0].path}: the {num_tokens} tokens to fit on are fewer than the {num_channels} channels of a "
            "group of layers: give more contexts, or fewer `layers_per_group`"
        )
    for context in contexts:
        if context.cache.num_tokens < MIN_TOKENS:
            raise InputError(f"{context.path}: a context needs at least {MIN_TOKENS} tokens to be calibrated on")
    return num_tokens


def plane_shapes_of(cache: KVCache) -> tuple[tuple[int, int], ...]:
    """Return (num_kv_heads, head_dim) of each plane."""
    return tuple((plane.shape[1], plane.shape[2]) for plane in cache.planes)


def count_tokens(contexts: Sequence[CalibrationContext]) -> int:
    """Return how many tokens there are to fit on."""
    return sum(max(context.cache.num_tokens - SINK_TOKENS, 0) for context in contexts)


def plan_calibration(contexts: Sequence[CalibrationContext], settings: CalibrationSettings) -> list[tuple[int, int]]:
    """Return (first layer, number of layers) of each group to be fitted, in order; see `CalibrationSettings`."""
    max_channels = min(MAX_GROUP_CHANNELS, int(count_tokens(contexts) / TOKENS_PER_CHANNEL))
    shapes, windows = plane_shapes_of(contexts[0].cache), contexts[0].metadata.windows
    return plan_groups(shapes, settings.layers_per_group, windows, max_channels)


def plan_groups(
    plane_shapes: Sequence[tuple[int, int]],
    layers_per_group: int | None = None,
    windows: Windows | None = None,
    max_channels: int = MAX_GROUP_CHANNELS,
) -> list[tuple[int, int]]:
    """Return (first layer, number of layers) of each group, in order.

    Args:
        layers_per_group: None for as few and as equal groups as have at most `max_channels` each, or a single layer.
        windows: of the layers. A group is stored from the earliest token on that any of its layers must have, so the
            layers of one have one window.
    """
    widths = [heads * dim for heads, dim in plane_shapes]
    channels = [key + value for key, value in zip(widths[0::2], widths[1::2], strict=True)]
    groups: list[tuple[int, int]] = []
    first = 0
    for _, run in itertools.groupby(windows or [None] * len(channels)):
        count = len(list(run))
        if layers_per_group is None:
            starts = _split_evenly(channels[first : first + count], max_channels)
        else:
            starts = list(range(0, count, layers_per_group))
        groups += [(first + start, end - start) for start, end in itertools.pairwise([*starts, count])]
        first += count
    return groups


def _split_evenly(channels: Sequence[int], max_channels: int) -> list[int]:
    """Return where to begin groups of layers, as few as have at most so many channels, or a single layer."""
    count = len(channels)
    for num_groups in range(1, count):
        starts = [count * group // num_groups for group in range(num_groups)]
        groups = itertools.pairwise([*starts, count])
        if all(end - start == 1 or sum(channels[start:end]) <= max_channels for start, end in groups):
            return starts
    return list(range(count))


def calibrate(
    contexts: Sequence[CalibrationContext],
    loaded: LoadedModel | None,
    settings: CalibrationSettings,
    *,
    device: torch.device,
    work_folder: Path,
    progress: Progress = lambda _: None,
) -> Profile:
    """Make a profile without a curve.

    Args:
        contexts: those to fit on.
        loaded: the model; may be None where the weights are "none".
        device: of sums and eigenvectors.
        work_folder: keeps the Fisher information between runs, should this one be interrupted.
        progress: called with 1 for each context whose gradients or covariance are done.

    Raises:
        InputError: as `check_tokens`, or the caches or gradients are not finite.
    """
    metadata, shapes = contexts[0].metadata, plane_shapes_of(contexts[0].cache)
    rotary = metadata.rotary_embeddings
    layer_groups = plan_calibration(contexts, settings)
    outline = Profile(metadata.model_fingerprint, rotary, shapes, (), (), {}, plane_rotations=metadata.plane_rotations)
    num_channels = [outline.channels_of(*group) for group in layer_groups]
    num_tokens = check_tokens(contexts, settings)
    fisher: list[torch.Tensor] | None = None
    if settings.weights != "none":
        if loaded is None:
            raise ValueError(f"`loaded` is needed for weights {settings.weights!r}")
        fisher = _measure_fisher(loaded, contexts, layer_groups, num_channels, settings, device, work_folder, progress)
        # One unit for all groups, so that one step costs all of them the same. It keeps matrices well within fp16.
        unit = sum(diagonal_of(total).sum().item() for total in fisher) / sum(num_channels)
        if not unit > 0:
            raise InputError("the model's predictions do not depend on its cache: the gradients are zero or NaN")
        for total in fisher:
            total /= unit
    if fisher is None:
        for context in contexts:
            context.check_values()
    means, covariances = measure_covariances(contexts, layer_groups, num_channels, device, progress)
    groups: list[TransformGroup] = []
    for index, (first_layer, num_layers) in enumerate(layer_groups):
        planes = shapes[2 * first_layer : 2 * (first_layer + num_layers)]
        basis = fit_basis(
            covariances[index],
            weigh(fisher[index], settings.weights) if fisher is not None else weigh_planes(planes, covariances[index]),
            finest_step=settings.finest_step,
            max_components=settings.max_components,
        )
        mean = means[index].float().cpu()
        matrices = (basis.synthesis, basis.scale_logs, basis.analysis, basis.channel_exponents)
        groups.append(TransformGroup(first_layer, num_layers, mean, *matrices))
    calibration = {
        "cachegen": cachegen.__version__,
        "model_id": metadata.model_id,
        "num_contexts": len(contexts),
        "num_tokens": num_tokens,
        "token_hashes": [context.token_hash for context in contexts],
        "settings": asdict(settings),
    }
    return replace(outline, groups=tuple(groups), calibration=calibration)


def weigh_planes(plane_shapes: Sequence[tuple[int, int]], covariance: torch.Tensor) -> torch.Tensor:
    """Return weights for values of which nothing is known but their size: one over the mean variance of the plane.

    Args:
        plane_shapes: (num_kv_heads, head_dim) of each plane of the group.
        covariance: fp64 `[num_channels, num_channels]`.

    Returns:
        fp64 `[num_channels]`.
    """
    parts = covariance.diagonal().split([heads * dim for heads, dim in plane_shapes])
    return 1 / torch.cat([part.mean().clamp_min(LEAST_VARIANCE).expand(len(part)) for part in parts])


def _measure_fisher(
    loaded: LoadedModel,
    contexts: Sequence[CalibrationContext],
    layer_groups: Sequence[tuple[int, int]],
    num_channels: Sequence[int],
    settings: CalibrationSettings,
    device: torch.device,
    work_folder: Path,
    progress: Progress,
) -> list[torch.Tensor]:
    """Return the sum of outer products per group, or its diagonal, going on where an interrupted run stopped."""
    path = work_folder / FISHER_NAME
    for context in contexts:
        context.check_values()  # before an hour is spent on them
    identities = [f"{context.token_hash} {context.metadata.cache_hash}" for context in contexts]
    key = {
        "model_fingerprint": loaded.fingerprint,
        "layer_groups": [list(group) for group in layer_groups],
        "dtype": str(loaded.dtype),
        "device": device.type,
        "first_token": SINK_TOKENS,
        "settings": [settings.fisher_tokens, settings.fisher_samples, settings.seed],
        "plane_rotations": _name_rotations(contexts[0].metadata),
    }
    shapes = [[n] if settings.weights == "diagonal" else [n, n] for n in num_channels]
    totals, done = _load_fisher(path, key, shapes, device)
    if done != identities[: len(done)]:
        totals, done = None, []
    if totals is None:
        totals = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    progress(len(done))
    for context in contexts[len(done) :]:
        try:
            accumulate_fisher(
                loaded,
                context.cache,
                context.metadata,
                layer_groups,
                totals,
                num_forced=settings.fisher_tokens,
                num_samples=settings.fisher_samples,
                seed=settings.seed,
                first_token=SINK_TOKENS,
            )
        except InputError as error:
            raise InputError(f"{context.path}: {error}") from error
        if not all(torch.isfinite(total).all() for total in totals):
            raise InputError(f"{context.path}: its gradients hold NaN or infinity; the cache or the model is damaged")
        done.append(identities[len(done)])
        tensors = {f"fisher.{index}": total.cpu() for index, total in enumerate(totals)}
        metadata = {"key": json.dumps(key), "done": json.dumps(done), "sha256": _hash_totals(totals)}
        write_file(path, save_tensors(tensors, metadata))
        progress(1)
    return totals


def _load_fisher(
    path: Path, key: dict[str, Any], shapes: Sequence[list[int]], device: torch.device
) -> tuple[list[torch.Tensor] | None, list[str]]:
    """Return what an interrupted run has summed up and the contexts it has done.

    Nothing is taken from a file of other settings, or one that is not whole.
    """
    try:
        open_file(path).close()  # not a pipe, which the library would wait at
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != json.dumps(key):
                return None, []
            totals = [file.get_tensor(f"fisher.{index}").to(device) for index in range(len(shapes))]
            done = json.loads(metadata["done"])
    except (InputError, OSError, SafetensorError, KeyError, ValueError):
        return None, []
    if metadata.get("sha256") != _hash_totals(totals):
        return None, []
    if [(list(total.shape), total.dtype) for total in totals] != [(shape, torch.float64) for shape in shapes]:
        return None, []
    return totals, done


def _hash_totals(totals: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for total in totals:
        digest.update(total.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def measure_covariances(
    contexts: Sequence[CalibrationContext],
    layer_groups: Sequence[tuple[int, int]],
    num_channels: Sequence[int],
    device: torch.device,
    progress: Progress = lambda _: None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return mean and covariance per group, fp64, over all tokens but the first ones of each context."""
    sums = [torch.zeros(n, dtype=torch.float64, device=device) for n in num_channels]
    products = [torch.zeros(n, n, dtype=torch.float64, device=device) for n in num_channels]
    num_tokens = 0
    for context in contexts:
        rotations = context.metadata.rotations_of(context.cache)
        for start in range(SINK_TOKENS, context.cache.num_tokens, BLOCK_TOKENS):
            block = context.cache.slice(start, min(start + BLOCK_TOKENS, context.cache.num_tokens))
            for (first_layer, num_layers), total, product in zip(layer_groups, sums, products, strict=True):
                planes = slice(2 * first_layer, 2 * (first_layer + num_layers))
                vectors = join_planes(block.planes[planes], rotations[planes], start, device)
                total += vectors.sum(0, dtype=torch.float64)
                add_outer_products(product, vectors)
        sinks = context.cache.slice(0, SINK_TOKENS).planes
        if not all(torch.isfinite(tensor).all() for tensor in (*sums, *sinks)):
            raise InputError(f"{context.path}: the cache holds NaN or infinity")
        num_tokens += max(context.cache.num_tokens - SINK_TOKENS, 0)
        progress(1)
    means = [total / num_tokens for total in sums]
    covariances = [
        product / num_tokens - torch.outer(mean, mean) for product, mean in zip(products, means, strict=True)
    ]
    return means, covariances
