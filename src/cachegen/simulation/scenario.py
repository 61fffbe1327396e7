"""What a simulation runs on: documents and speeds, from the files that state them and where they come from."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cachegen.errors import ConfigError, MismatchError
from cachegen.fields import Fields, parse_fields, refuse_config
from cachegen.files import read_file
from cachegen.format import MAX_CHUNKS
from cachegen.streaming.policy import ChunkLevels, DecodeSpeed, PrefillSpeed, Speeds

BYTES_PER_FP16 = 2
MAX_JSON_BYTES = 16 << 20
_MAX_LEVELS_OF_A_CODEC = 1000
_MAX_COUNT = 1 << 53


@dataclass(frozen=True)
class LevelCurve:
    """What a codec's levels cost and lose.

    Attributes:
        bits_per_value: of all files that a level takes, level 1 first, increasing.
        expected_kl: nats per token to the uncompressed cache, not increasing.
        is_embedded: whether levels refine each other, see `ChunkLevels`.
        source: where the numbers come from, for the report.
        chunk_bits: what each file of a chunk costs beside `bits_per_value`, in bits per channel: ends of streams,
            headers.
    """

    bits_per_value: tuple[float, ...]
    expected_kl: tuple[float, ...]
    is_embedded: bool
    source: str = ""
    chunk_bits: float = 0.0

    def document(self, num_tokens: int, chunk_size: int, values_per_token: int) -> tuple[ChunkLevels, ...]:
        """Return a document of this many tokens in chunks of `chunk_size`, the last one shorter."""
        chunks = []
        for first in range(0, num_tokens, chunk_size):
            tokens = min(chunk_size, num_tokens - first)
            totals = [
                math.ceil((bits * tokens + self._num_files(level) * self.chunk_bits) * values_per_token / 8)
                for level, bits in enumerate(self.bits_per_value, 1)
            ]
            if self.is_embedded:
                totals = [totals[0], *(after - before for before, after in itertools.pairwise(totals))]
            loss = tuple(kl * tokens / num_tokens for kl in self.expected_kl)
            chunks.append(ChunkLevels(first, tokens, tuple(totals), loss, self.is_embedded))
        return tuple(chunks)

    def _num_files(self, level: int) -> int:
        return level if self.is_embedded else 1


@dataclass(frozen=True)
class Machine:
    """A model on some GPUs.

    Attributes:
        values_per_token: of the KV cache.
        num_layers: of the model, between which it can break off.
        speeds: of prefill, decoding and the first token.
        source: where the numbers come from, for the report.
    """

    name: str
    values_per_token: int
    num_layers: int
    speeds: Speeds
    source: str


def load_level_curves(path: str | os.PathLike[str]) -> tuple[dict[str, LevelCurve], str]:
    """Read a levels file of config/adaptation: the curve of each codec, and the file's statement of its sources.

    Raises:
        InputError: there is no such file.
        ConfigError: it is not such a file, naming the field.
    """
    fields = _load_fields(path)
    curves = {}
    for name, codec in fields.members("codecs"):
        levels = codec.objects("levels", 1, _MAX_LEVELS_OF_A_CODEC)
        curves[name] = LevelCurve(
            bits_per_value=tuple(level.number("bits_per_value", 0, above=True) for level in levels),
            expected_kl=tuple(level.number("expected_kl", 0) for level in levels),
            is_embedded=codec.flag("levels_are_embedded"),
            source=codec.text("source"),
            chunk_bits=codec.number("bits_per_channel_and_chunk", 0) if "bits_per_channel_and_chunk" in codec else 0.0,
        )
        _check_curve(codec, curves[name])
    return curves, fields.text("source")


def load_machine(path: str | os.PathLike[str], model: str, gpu: str, gpu_share: float = 1.0) -> Machine:
    """Read one model on one kind of GPU from config/adaptation/models.json.

    An entry of "prefill" with `decode_tokens_per_second` was measured as a whole: it has all speeds and its source.

    Args:
        path: of the file.
        model: a key of its "models".
        gpu: a key of that model's "prefill".
        gpu_share: the share of the GPUs that this request gets; slows prefill, decoding and the first token.

    Raises:
        InputError: there is no such file.
        ConfigError: it is not such a file, or has no such model or GPU.
    """
    fields = _load_fields(path)
    try:
        return _read_machine(fields, model, gpu, gpu_share)
    except (ValueError, ArithmeticError) as error:  # numbers that no machine can have, or that leave the floats' range
        raise ConfigError(f"{path}: {model} on {gpu}: {error}") from error


def _read_machine(fields: Fields, model: str, gpu: str, gpu_share: float) -> Machine:
    models = fields.object("models")
    if model not in models:
        raise fields.error("models", f"has no {model} (there are {', '.join(models.names)})")
    described = models.object(model)
    prefills = described.object("prefill")
    if gpu not in prefills:
        raise described.error("prefill", f"has no {gpu} (there are {', '.join(prefills.names)})")
    prefill = prefills.object(gpu)
    values = described.integer("values_per_token", 1, _MAX_COUNT)
    num_layers = described.integer("num_layers", 1, _MAX_COUNT)
    num_gpus = prefill.integer("num_gpus", 1, _MAX_COUNT)
    if "decode_tokens_per_second" in prefill:
        speeds, source = _measured_speeds(prefill, gpu_share), prefill.text("source")
    else:
        speeds, source = _stated_speeds(fields, described, gpu, gpu_share)
    return Machine(f"{model} on {num_gpus} x {gpu}", values, num_layers, speeds, source)


def _measured_speeds(prefill: Fields, gpu_share: float) -> Speeds:
    """Return the speeds of an entry that was measured as a whole."""
    return Speeds(
        prefill=PrefillSpeed(
            gpu_share * prefill.number("tokens_per_second", 0, above=True),
            prefill.number("attention_nanoseconds", 0) * 1e-9 / gpu_share,
        ),
        decode=DecodeSpeed(
            tokens_per_second=gpu_share * prefill.number("decode_tokens_per_second", 0, above=True),
            compute_slowdown=prefill.number("compute_slowdown", 0),
        ),
        first_token_seconds=prefill.number("first_token_seconds", 0) / gpu_share,
    )


def _stated_speeds(fields: Fields, model: Fields, gpu: str, gpu_share: float) -> tuple[Speeds, str]:
    """Return the speeds that follow from a GPU's memory bandwidth and the prefill's fit, and their source."""
    prefill = model.object("prefill").object(gpu)
    bandwidth = 1e12 * fields.object("gpus").object(gpu).number("memory_terabytes_per_second", 0, above=True)
    bandwidth *= gpu_share * prefill.number("num_gpus", 0, above=True)
    decode = fields.object("decode")
    per_bandwidth = decode.number("fp16_gigabytes_per_second_per_memory_terabyte_per_second", 0, above=True) / 1000
    fp16_bytes = BYTES_PER_FP16 * model.number("values_per_token", 0, above=True)
    speeds = Speeds(
        prefill=PrefillSpeed(
            gpu_share * prefill.number("tokens_per_second", 0, above=True),
            prefill.number("attention_nanoseconds", 0) * 1e-9 / gpu_share,
            fields.number("overhead", 0, above=True),
        ),
        decode=DecodeSpeed(
            tokens_per_second=bandwidth * per_bandwidth / fp16_bytes,
            compute_slowdown=decode.number("compute_slowdown", 0),
        ),
        first_token_seconds=BYTES_PER_FP16 * model.number("parameters", 0, above=True) / bandwidth,
    )
    return speeds, f"{fields.text('source')} Decoding: {decode.text('source')}."


def load_encodings(
    paths: Sequence[str | os.PathLike[str]], expected_kl: Sequence[float] | None = None
) -> tuple[ChunkLevels, ...]:
    """Read the sizes of one document from what `run_encoding.py --json` wrote.

    The tables file, which is needed before the first chunk, counts in equal parts per token into every chunk's smallest
    file. Tokens that no chunk covers become a chunk without files.

    Args:
        paths: one file; or several of the same document without levels, which become the levels of independent
            files, in order of size.
        expected_kl: of each level, in the order of `paths` or of the file's levels; None for the files' own.

    Raises:
        InputError: a file is missing.
        ConfigError: a file is not such a record, or no KL is known.
        MismatchError: the files are not of the same document in the same chunks.
    """
    records = [_load_fields(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if "chunks" not in record:
            raise ConfigError(f"{path}: has no field chunks: not the JSON of run_encoding.py, or from an older one")
    if len(records) == 1:
        return _chunks_of_record(paths[0], records[0], expected_kl)
    if expected_kl is not None and len(expected_kl) != len(records):
        raise ConfigError(f"`expected_kl`: {len(records)} encodings need as many values, got {len(expected_kl)}")
    single = [
        _chunks_of_record(path, record, None if expected_kl is None else [expected_kl[i]])
        for i, (path, record) in enumerate(zip(paths, records, strict=True))
    ]
    spans = [[(c.first_token, c.num_tokens) for c in chunks] for chunks in single]
    if any(span != spans[0] for span in spans):
        raise MismatchError(f"{paths[0]} and the others: not the same document in the same chunks")
    if any(chunk.num_levels > 1 for chunks in single for chunk in chunks):
        raise MismatchError(f"{', '.join(map(str, paths))}: only documents without levels can be taken together")
    single.sort(key=lambda chunks: sum(sum(chunk.file_bytes) for chunk in chunks))
    return tuple(
        _chunk(
            ", ".join(map(str, paths)),
            same[0].first_token,
            same[0].num_tokens,
            tuple(c.file_bytes[0] for c in same if c.file_bytes),
            tuple(c.loss[0] for c in same if c.loss),
            False,
        )
        for same in zip(*single, strict=True)
    )


def can_only_be_used_whole(paths: Sequence[str | os.PathLike[str]]) -> bool:
    """Tell whether a document in `--json` records of run_encoding.py lacks what no token behind it attends to.

    Raises:
        ConfigError: a file is not such a record.
    """
    records = [_load_fields(path) for path in paths]
    return any("is_whole_only" in record and record.flag("is_whole_only") for record in records)


def _chunks_of_record(path: object, record: Fields, expected_kl: Sequence[float] | None) -> tuple[ChunkLevels, ...]:
    levels = record.objects("levels", 1, _MAX_LEVELS_OF_A_CODEC)
    is_embedded = record.flag("levels_are_embedded")
    if expected_kl is None:
        if not all(level.has_value("expected_kl") for level in levels):
            raise ConfigError(f"{path}: no KL is known of its levels: give `expected_kl`")
        expected_kl = [level.number("expected_kl", 0) for level in levels]
    if len(expected_kl) != len(levels):
        raise ConfigError(f"`expected_kl`: {path} has {len(levels)} levels, got {len(expected_kl)} values")
    names = [str(level.integer("level", 1, _MAX_LEVELS_OF_A_CODEC)) for level in levels]
    entries = record.objects("chunks", 1, MAX_CHUNKS)
    spans = [
        (entry.integer("first_token", 0, _MAX_COUNT), entry.integer("num_tokens", 1, _MAX_COUNT)) for entry in entries
    ]
    num_uncovered = record.integer("num_uncovered_tokens", 0, _MAX_COUNT)
    num_tokens = sum(span[1] for span in spans) + num_uncovered
    shared_bytes = record.number("shared_bytes", 0) / max(1, num_tokens - num_uncovered)
    chunks = []
    for (first, tokens), entry in zip(spans, entries, strict=True):
        sizes = entry.object("bytes")
        files = [sizes.integer(name, 1, _MAX_COUNT) for name in names]
        shared = math.ceil(shared_bytes * tokens)
        files = tuple(size + shared * (i == 0 or not is_embedded) for i, size in enumerate(files))
        loss = tuple(kl * tokens / num_tokens for kl in expected_kl)
        chunks.append(_chunk(path, first, tokens, files, loss, is_embedded))
    if num_uncovered:
        chunks.append(ChunkLevels(num_tokens - num_uncovered, num_uncovered, (), (), is_embedded))
    return tuple(chunks)


def _chunk(
    path: object, first: int, tokens: int, files: tuple[int, ...], loss: tuple[float, ...], is_embedded: bool
) -> ChunkLevels:
    try:
        return ChunkLevels(first, tokens, files, loss, is_embedded)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_curve(codec: Fields, curve: LevelCurve) -> None:
    bits, kl = curve.bits_per_value, curve.expected_kl
    if any(not before < after for before, after in itertools.pairwise(bits)):
        raise codec.error("levels", "must have increasing bits_per_value")
    if any(after > before for before, after in itertools.pairwise(kl)):
        raise codec.error("levels", "must not have increasing expected_kl")


def _load_fields(path: str | os.PathLike[str]) -> Fields:
    return parse_fields(read_file(path, MAX_JSON_BYTES), refuse_config(path))
