"""Bytes against quality: every context, recoded by every scheme at every setting, against its uncompressed cache.

All but the last 256 tokens of a context are encoded. Those 256 are forced through the model on the decoded and on the
uncompressed cache, and the predictions compared; then, with the 256 recomputed on the decoded cache, it is asked all
questions of the context. Each result is a file of its own, written whole, so that a run can be interrupted and resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from cachegen.comparison.datasets import PromptContext, tokenize_context
from cachegen.comparison.retrieval import count_packed_tokens, expect_answers, score_retrieval
from cachegen.comparison.schemes import ByteCount, SavedCache, Scheme
from cachegen.errors import BitstreamError, CacheGenError, InputError, MismatchError
from cachegen.files import read_file, write_file
from cachegen.kv_archive import is_damaged_kv_file
from cachegen.kv_cache import KVCache, hash_planes, hash_token_prefixes, load_kv_cache, save_kv_cache
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import allocate_cache, set_length, view_kv_cache
from cachegen.pipeline.prefill import extend_cache, prefill_context
from cachegen.pipeline.verify import compare_caches, count_verified_tokens

# A result is measured anew when this changes: with the measurement itself.
MEASUREMENT_VERSION = 1
MAX_ROW_BYTES = 1 << 20
ROWS_FOLDER = "rows"


@dataclass(frozen=True)
class Result:
    """One context, one scheme, one setting.

    Attributes:
        key: hash of all that the result depends on.
        context: the context's name.
        num_values: scalars of the encoded part of the cache.
        bytes_of: per method name.
        cache_hashes: of the uncompressed cache, then of those that the scheme was fitted on.
        fidelity: fields of `Fidelity`.
        retrieval: fields of `RetrievalScore`; None: not asked yet.
    """

    key: str
    context: str
    scheme: str
    setting: str
    num_values: int
    bytes_of: Mapping[str, ByteCount]
    cache_hashes: Sequence[str]
    fidelity: Mapping[str, float]
    retrieval: Mapping[str, int] | None


@dataclass(frozen=True)
class Study:
    """What is measured, and where its files are.

    Attributes:
        loaded: the model that is asked; in fp32 it shows differences that bf16's rounding hides (a KL of about 1e-4 on
            the bundled model, whatever the difference). Caches keep the dtype of the checkpoint.
        load_for_prefill: loads the model in the checkpoint's dtype; called if a saved cache is missing.
        contexts: the test contexts.
        calibration: the contexts that profiles are made from.
        schemes: not fitted yet.
        output: folder of the results.
        kv_folder: folder of the saved caches, `test/test_kv_N.pkl` and `calibration/test_kv_N.pkl`; those that are
            missing are computed and saved there.
        with_retrieval: whether to ask questions.
        block_size: tokens per prefill step.
    """

    loaded: LoadedModel
    load_for_prefill: Callable[[], LoadedModel]
    contexts: Sequence[PromptContext]
    calibration: Sequence[PromptContext]
    schemes: Sequence[Scheme]
    output: Path
    kv_folder: Path
    with_retrieval: bool
    block_size: int


def measure(study: Study, report: Callable[[str], None]) -> list[Result]:
    """Measure what is not measured yet.

    Args:
        report: called with a line for each result.

    Returns:
        All results, in the order of contexts, schemes and settings.
    """
    tasks = [(scheme, setting) for scheme in study.schemes for setting in scheme.settings]
    profiles = _Profiles(study)
    results: list[Result] = []
    for context in study.contexts:
        token_ids = tokenize_context(study.loaded, context)
        cache_hashes = [
            _saved_cache_hash(study, c, kind)
            for c, kind in [(context, "test"), *((c, "calibration") for c in study.calibration)]
        ]
        keys = {scheme.name: _result_key(study, profiles, context, token_ids, scheme) for scheme in study.schemes}
        found = [_read_result(_row_path(study, context, *task), keys[task[0].name], cache_hashes) for task in tasks]
        if not all(result and (result.retrieval or not study.with_retrieval) for result in found):
            bench = _Bench(study, context, token_ids)
            for index, (scheme, setting) in enumerate(tasks):
                known = found[index]
                if known is None or (known.retrieval is None and study.with_retrieval):
                    profiles.fit(scheme)
                    result = bench.measure(scheme, setting, keys[scheme.name], known, profiles.cache_hashes)
                    _write_result(_row_path(study, context, scheme, setting), result)
                    found[index] = result
                    report(_describe(result))
        results += [result for result in found if result is not None]
    return results


class _Profiles:
    """Loads the calibration caches when the first scheme needs them, and fits each scheme once."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._fitted: set[str] = set()
        self._caches: list[SavedCache] = []
        digest = hashlib.sha256()
        for context in study.calibration:
            digest.update(tokenize_context(study.loaded, context).numpy().tobytes())
        self.identity = digest.hexdigest()

    @property
    def cache_hashes(self) -> list[str]:
        """Of the caches that schemes are fitted on, once one is."""
        return [str(saved.metadata.cache_hash) for saved in self._caches]

    def fit(self, scheme: Scheme) -> None:
        if scheme.name in self._fitted:
            return
        if not self._caches:
            self._caches = list(load_caches(self._study, self._study.calibration, "calibration"))
        scheme.fit(self._caches)
        self._fitted.add(scheme.name)


class _Bench:
    """One context: its uncompressed cache, what that answers, and a cache to decode into."""

    def __init__(self, study: Study, context: PromptContext, token_ids: torch.Tensor) -> None:
        self._study, self._context, self._token_ids = study, context, token_ids
        self._start = len(token_ids) - count_verified_tokens(len(token_ids))
        saved = next(iter(load_caches(study, [context], "test")))
        self._saved = saved
        capacity = len(token_ids) + count_packed_tokens(study.loaded, context.questions)
        self._reference = self._allocate(saved.cache, capacity)
        self._decoded = self._allocate(saved.cache, capacity)
        _fill(self._reference, saved.cache)
        self._expected = None

    def measure(self, scheme: Scheme, setting: str, key: str, known: Result | None, fitted_on: Sequence[str]) -> Result:
        """Recode the cache and compare; with a known result only ask the questions."""
        study, encoded = self._study, self._saved.slice(self._start)
        recoded = scheme.recode(encoded, setting)
        _fill(self._decoded, recoded.cache)
        fidelity = known.fidelity if known else self._compare()
        return Result(
            key=key,
            context=self._context.name,
            scheme=scheme.name,
            setting=setting,
            num_values=encoded.cache.num_values,
            bytes_of=recoded.bytes_of,
            cache_hashes=[str(self._saved.metadata.cache_hash), *fitted_on],
            fidelity=fidelity,
            retrieval=self._ask() if study.with_retrieval else None,
        )

    def _compare(self) -> Mapping[str, float]:
        fidelity = compare_caches(
            self._study.loaded,
            self._token_ids,
            self._reference,
            self._decoded,
            num_reference_tokens=len(self._token_ids) - 1,
            num_decoded_tokens=self._start,
            block_size=self._study.block_size,
        )
        return asdict(fidelity)

    def _ask(self) -> Mapping[str, int]:
        loaded, token_ids = self._study.loaded, self._token_ids
        if self._expected is None:
            self._expected = expect_answers(loaded, self._reference, token_ids, self._context.questions)
            set_length(self._reference, len(token_ids) - 1)
        set_length(self._decoded, self._start)
        extend_cache(loaded, self._decoded, token_ids[self._start : -1], self._study.block_size)
        return asdict(score_retrieval(loaded, self._decoded, token_ids, self._expected))

    def _allocate(self, like: KVCache, capacity: int) -> Cache:
        shapes = [(plane.shape[1], plane.shape[2]) for plane in like.planes]
        return allocate_cache(shapes, capacity, self._study.loaded.dtype, self._study.loaded.layer_devices)


def load_caches(study: Study, contexts: Sequence[PromptContext], kind: str) -> Iterator[SavedCache]:
    """Load the saved caches of contexts, prefilling and saving those that are missing or damaged.

    Raises:
        MismatchError: a saved cache is of another model or text, or prefilled in other blocks.
    """
    for context in contexts:
        path = study.kv_folder / kind / f"test_kv_{context.stem}.pkl"
        token_ids = tokenize_context(study.loaded, context)
        if not _is_whole(path):
            save_kv_cache(path, *prefill_context(study.load_for_prefill(), token_ids, study.block_size))
        saved = SavedCache(*load_kv_cache(path))
        if saved.metadata.model_fingerprint != study.loaded.fingerprint:
            raise MismatchError(f"{path}: is of another model than {study.loaded.model_id}; choose another `kv_folder`")
        if not torch.equal(saved.metadata.token_ids, token_ids[:-1]):
            raise MismatchError(f"{path}: is of another text than {context.name}; choose another `kv_folder`")
        if saved.metadata.block_size != study.block_size:
            blocks = f"blocks of {saved.metadata.block_size} tokens, not {study.block_size}"
            raise MismatchError(f"{path}: was prefilled in {blocks}; choose another `kv_folder`")
        yield saved


def _is_whole(path: Path) -> bool:
    """Tell whether a saved cache is there and whole; a damaged one is to be written again.

    Raises:
        CacheGenError: it is a file of something else.
    """
    if not path.exists():
        return False
    try:
        cache, metadata = load_kv_cache(path)
    except BitstreamError:
        if is_damaged_kv_file(path):
            return False
        raise
    return hash_planes(cache) == metadata.cache_hash


def _saved_cache_hash(study: Study, context: PromptContext, kind: str) -> str | None:
    """Return what a saved cache's file says of its values; None where there is no such file, or it is damaged."""
    path = study.kv_folder / kind / f"test_kv_{context.stem}.pkl"
    try:
        return load_kv_cache(path)[1].cache_hash
    except CacheGenError:
        return None


def _fill(cache: Cache, kv: KVCache) -> None:
    """Write `kv` into the first tokens of `cache` and set its length to them."""
    for target, plane in zip(view_kv_cache(cache, kv.num_tokens).planes, kv.planes, strict=True):
        target.copy_(plane)
    set_length(cache, kv.num_tokens)


def _result_key(
    study: Study, profiles: _Profiles, context: PromptContext, token_ids: torch.Tensor, scheme: Scheme
) -> str:
    parts = [
        MEASUREMENT_VERSION,
        study.loaded.fingerprint,
        str(study.loaded.dtype),
        study.block_size,
        hash_token_prefixes(token_ids, [len(token_ids)])[0],
        [[question.text, question.answer] for question in context.questions],
        profiles.identity,
        scheme.identity,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _row_path(study: Study, context: PromptContext, scheme: Scheme, setting: str) -> Path:
    name = f"{scheme.name}_{setting}".replace(" ", "-").replace("/", "-")
    return study.output / ROWS_FOLDER / context.stem / f"{name}.json"


def _write_result(path: Path, result: Result) -> None:
    content = asdict(result)
    write_file(path, (json.dumps({**content, "sha256": _hash_content(content)}, indent=1) + "\n").encode())


def _hash_content(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_result(path: Path, key: str, cache_hashes: Sequence[str | None]) -> Result | None:
    """Read a result; None if there is none, one of another measurement, or one that has changed since.

    Args:
        cache_hashes: of the saved caches that are there; None for one that would be computed.
    """
    try:
        content: dict[str, Any] = json.loads(read_file(path, MAX_ROW_BYTES).decode("utf-8"))
        if content.pop("sha256") != _hash_content(content):
            return None
        content["bytes_of"] = {name: ByteCount(**count) for name, count in content["bytes_of"].items()}
        result = Result(**content)
    except (InputError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if len(result.cache_hashes) != len(cache_hashes):
        return None
    is_of_these = all(now in (None, then) for now, then in zip(cache_hashes, result.cache_hashes, strict=True))
    return result if result.key == key and is_of_these else None


def _describe(result: Result) -> str:
    method, count = next(iter(result.bytes_of.items()))
    text = f"{result.context} {method} {result.setting}: {8 * count.encoded / result.num_values:.3f} bits per value"
    text += f", KL {result.fidelity['kl']:.5f}"
    if result.retrieval:
        text += f", right {result.retrieval['right']} of {result.retrieval['questions']}"
    return text
