"""Bytes against quality: every context, recoded by every scheme at every setting, against its uncompressed cache.

All but the last tokens of a context are encoded: the last 256 (protocol `tail`) or its second half (`half`). Those are
forced through the model on the decoded and on the uncompressed cache, and the predictions compared; then, with them
recomputed on the decoded cache, it is asked the questions of the context. What the model writes by itself from where
the decoded cache ends can be compared, too. Each result is a file of its own, written whole, so that a run can be
interrupted and resumed.
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

from cachegen.comparison.continuation import count_same_tokens, write_continuation
from cachegen.comparison.datasets import PromptContext, tokenize_context
from cachegen.comparison.retrieval import (
    WrittenAnswer,
    count_packed_tokens,
    count_written_tokens,
    expect_answers,
    score_retrieval,
    write_answers,
)
from cachegen.comparison.schemes import ByteCount, SavedCache, Scheme, UncompressedScheme
from cachegen.errors import BitstreamError, CacheGenError, InputError, MismatchError
from cachegen.files import read_file, write_file
from cachegen.kv_archive import is_damaged_kv_file
from cachegen.kv_cache import hash_planes, hash_token_prefixes, load_kv_cache, save_kv_cache
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import allocate_cache, fill_cache, preserve_tokens, set_length
from cachegen.pipeline.prefill import extend_cache, prefill_context
from cachegen.pipeline.verify import Comparison, compare_with_predictions, count_verified_tokens, predict_from

# A result is measured anew when this changes: with the measurement itself.
MEASUREMENT_VERSION = 1
MAX_ROW_BYTES = 1 << 24
ROWS_FOLDER = "rows"
PROTOCOLS = ("tail", "half")
"""What is encoded: all but the last 256 tokens, or the first half."""


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
        kl_of_tokens: KL of each scored token, in nats.
        nll: of the scored text: summed negative log-likelihood in nats, `reference` and `decoded`, its `tokens` and
            its `bytes` in UTF-8.
        retrieval: fields of `RetrievalScore`; None: not asked yet.
        answers: of each question in the model's own words, its `metric`, the `score` and the `reference` score, which
            is the uncompressed cache's; None: not written yet.
        continued: how many `tokens` the uncompressed cache wrote greedily from where the encoded part ends, and how
            many of them are the `same` before the first that the decoded cache writes otherwise; None: not written yet.
    """

    key: str
    context: str
    protocol: str
    scheme: str
    setting: str
    num_values: int
    bytes_of: Mapping[str, ByteCount]
    cache_hashes: Sequence[str]
    fidelity: Mapping[str, float]
    kl_of_tokens: Sequence[float]
    nll: Mapping[str, float]
    retrieval: Mapping[str, int] | None
    answers: Sequence[Mapping[str, Any]] | None
    continued: Mapping[str, int] | None = None


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
        with_retrieval: whether to ask questions whose right answers are to be written exactly.
        block_size: tokens per prefill step.
        protocol: one of `PROTOCOLS`.
        with_answers: whether to let the model answer in its own words.
        continued_tokens: how many tokens to let the model write from where the encoded part ends; 0: none.
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
    protocol: str = "tail"
    with_answers: bool = False
    continued_tokens: int = 0

    def has_all(self, result: Result | None) -> bool:
        """Tell whether a result has all that is measured."""
        return (
            result is not None
            and (result.retrieval is not None or not self.with_retrieval)
            and (result.answers is not None or not self.with_answers)
            and self.has_continued(result)
        )

    def has_continued(self, result: Result) -> bool:
        """Tell whether a result has a continuation of as many tokens as are asked for."""
        return not self.continued_tokens or (result.continued or {}).get("tokens") == self.continued_tokens


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
        if not all(map(study.has_all, found)):
            bench = _Bench(study, context, token_ids)
            for index, (scheme, setting) in enumerate(tasks):
                known = found[index]
                if not study.has_all(known):
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
    """One context: its uncompressed cache, what that predicts and answers, and a cache to decode into."""

    def __init__(self, study: Study, context: PromptContext, token_ids: torch.Tensor) -> None:
        self._study, self._context, self._token_ids = study, context, token_ids
        num_scored = count_verified_tokens(len(token_ids)) if study.protocol == "tail" else (len(token_ids) + 1) // 2
        self._start = len(token_ids) - num_scored
        self._saved = next(iter(load_caches(study, [context], "test")))
        num_questions_tokens = count_packed_tokens(study.loaded, context.questions) if study.with_retrieval else 0
        if study.with_answers:
            num_questions_tokens = max(num_questions_tokens, count_written_tokens(study.loaded, context.questions))
        self._capacity = max(len(token_ids) + num_questions_tokens, self._start + 1 + study.continued_tokens)
        self._reference = self._allocate(study.loaded, self._capacity)
        fill_cache(self._reference, self._saved.cache)
        self._decoded = self._allocate(study.loaded, self._capacity)
        self._tail_bytes = len(study.loaded.tokenizer.decode(token_ids[self._start + 1 :]).encode())
        self._predictions = None
        self._expected = None
        self._answers: list[WrittenAnswer] | None = None
        self._continuation: torch.Tensor | None = None

    def measure(self, scheme: Scheme, setting: str, key: str, known: Result | None, fitted_on: Sequence[str]) -> Result:
        """Recode the cache and compare; with a known result only ask what was not asked."""
        study, encoded = self._study, self._saved.slice(self._start)
        recoded = scheme.recode(encoded, setting)
        loaded, decoded = study.loaded, self._decoded
        if isinstance(scheme, UncompressedScheme):
            loaded = study.load_for_prefill()
            decoded = self._allocate(loaded, self._capacity)
        fill_cache(decoded, recoded.cache)
        if known is None:
            comparison = self._compare(loaded, decoded)
            fidelity, kl_of_tokens = asdict(comparison.fidelity), comparison.kl_of_tokens
            nll = {
                "reference": comparison.nll_reference,
                "decoded": comparison.nll_decoded,
                "tokens": comparison.num_followers,
                "bytes": self._tail_bytes,
            }
        else:
            fidelity, kl_of_tokens, nll = known.fidelity, known.kl_of_tokens, known.nll
        continued = known.continued if known else None
        if study.continued_tokens and (known is None or not study.has_continued(known)):
            continued = self._continue(loaded, decoded)
        retrieval, answers = (known.retrieval, known.answers) if known else (None, None)
        has_all_tokens = False
        if study.with_retrieval and retrieval is None:
            self._extend(loaded, decoded)
            has_all_tokens = True
            retrieval = self._ask(loaded, decoded)
        if study.with_answers and answers is None:
            if not has_all_tokens:
                self._extend(loaded, decoded)
            answers = self._let_answer(loaded, decoded)
        return Result(
            key=key,
            context=self._context.name,
            protocol=study.protocol,
            scheme=scheme.name,
            setting=setting,
            num_values=encoded.cache.num_values,
            bytes_of=recoded.bytes_of,
            cache_hashes=[str(self._saved.metadata.cache_hash), *fitted_on],
            fidelity=fidelity,
            kl_of_tokens=kl_of_tokens,
            nll=nll,
            retrieval=retrieval,
            answers=answers,
            continued=continued,
        )

    def _compare(self, loaded: LoadedModel, decoded: Cache) -> Comparison:
        block_size = self._study.block_size
        if self._predictions is None:
            self._predictions = predict_from(
                self._study.loaded,
                self._token_ids,
                self._reference,
                start=self._start,
                num_held_tokens=len(self._token_ids) - 1,
                block_size=block_size,
            )
        return compare_with_predictions(
            loaded,
            self._token_ids,
            self._predictions,
            decoded,
            num_decoded_tokens=self._start,
            block_size=block_size,
        )

    def _continue(self, loaded: LoadedModel, decoded: Cache) -> Mapping[str, int]:
        prompt = self._token_ids[: self._start + 1]
        if self._continuation is None:
            with preserve_tokens(self._reference, self._start, len(self._token_ids) - 1):
                num_tokens = self._study.continued_tokens
                self._continuation = write_continuation(self._study.loaded, self._reference, prompt, num_tokens)
        same = count_same_tokens(loaded, decoded, prompt, self._continuation)
        return {"tokens": len(self._continuation), "same": same}

    def _extend(self, loaded: LoadedModel, decoded: Cache) -> None:
        """Recompute what was not encoded on the decoded cache."""
        set_length(decoded, self._start)
        extend_cache(loaded, decoded, self._token_ids[self._start : -1], self._study.block_size)

    def _ask(self, loaded: LoadedModel, decoded: Cache) -> Mapping[str, int]:
        if self._expected is None:
            questions = self._context.questions
            self._expected = expect_answers(self._study.loaded, self._reference, self._token_ids, questions)
            set_length(self._reference, len(self._token_ids) - 1)
        return asdict(score_retrieval(loaded, decoded, self._token_ids, self._expected))

    def _let_answer(self, loaded: LoadedModel, decoded: Cache) -> list[Mapping[str, Any]]:
        questions = self._context.questions
        if self._answers is None:
            self._answers = write_answers(self._study.loaded, self._reference, self._token_ids, questions)
            set_length(self._reference, len(self._token_ids) - 1)
        answers = write_answers(loaded, decoded, self._token_ids, questions)
        return [
            {"metric": question.metric, "score": answer.score, "reference": reference.score}
            for question, answer, reference in zip(questions, answers, self._answers, strict=True)
        ]

    def _allocate(self, loaded: LoadedModel, capacity: int) -> Cache:
        shapes = [(plane.shape[1], plane.shape[2]) for plane in self._saved.cache.planes]
        return allocate_cache(loaded.cache_layout, shapes, capacity, loaded.dtype)


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
    if study.protocol != "tail":
        parts.append(study.protocol)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _row_path(study: Study, context: PromptContext, scheme: Scheme, setting: str) -> Path:
    name = f"{scheme.name}_{setting}".replace(" ", "-").replace("/", "-")
    folder = ROWS_FOLDER if study.protocol == "tail" else f"{ROWS_FOLDER}_{study.protocol}"
    return study.output / folder / context.stem / f"{name}.json"


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
    if result.answers:
        written, reference = (sum(answer[field] for answer in result.answers) for field in ("score", "reference"))
        text += f", answers score {written:g}, uncompressed {reference:g}"
    if result.continued:
        text += f", the same for {result.continued['same']} of {result.continued['tokens']} tokens"
    return text
