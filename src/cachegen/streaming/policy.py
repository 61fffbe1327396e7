"""What a streaming policy sees and what it answers: plain data, no clock, no socket, no model.

A policy is a function `decide(state: LoadState) -> Decision`. It is pure: the same state gives the same decision, and
the state holds what is known at that moment, nothing of the future. The simulator and the real client call the same
function, after every event: a piece of a body arrived, a file is complete or failed, a chunk was computed or decoded,
or `Decision.wake_at_seconds` has come. Three workers are fed by it, each with at most one thing at a time but the
network, which has `LoadState.num_connections`:

- the network fetches files, one per chunk and level;
- the model computes chunks from their text, each after all chunks before it are ready; of a document that can only be
  used whole, after all before it are computed: whoever runs a policy sees to that (`LoadState.chunk_to_compute`);
- the decoder turns the files that have arrived of a chunk into keys and values.

All times are seconds since the request began, all sizes bytes. Levels count from 1 (the smallest file); `TEXT` stands
in the place of a level for a chunk that is computed. A document without levels has one level, number 1, whatever its
files' header says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

TEXT: Literal["text"] = "text"

Choice: TypeAlias = int | Literal["text"]
"""How a chunk comes into the cache: decoded at this level, or computed from its `TEXT`."""


@dataclass(frozen=True)
class ChunkLevels:
    """One chunk of a document and the files that a store has of it.

    Attributes:
        first_token: position of its first token in the document.
        num_tokens: at least 1.
        file_bytes: size of each level's file, level 1 first; empty where the chunk can only be computed.
        loss: what each level adds to the document's expected loss when the chunk is used at that level, level 1
            first; not increasing. Losses of chunks add up to the document's, so a level whose document has a KL
            divergence of `kl` gives a chunk `kl * num_tokens / tokens of the document`.
        is_embedded: level l's file refines level l - 1, so that using level l takes files 1 to l. Otherwise each
            file stands alone.
    """

    first_token: int
    num_tokens: int
    file_bytes: tuple[int, ...]
    loss: tuple[float, ...]
    is_embedded: bool

    def __post_init__(self) -> None:
        if self.first_token < 0 or self.num_tokens < 1:
            raise ValueError(f"a chunk has at least one token, got {self.num_tokens} at {self.first_token}")
        if len(self.file_bytes) != len(self.loss):
            raise ValueError(f"`loss` must have one value per level, got {len(self.loss)} for {len(self.file_bytes)}")
        if any(size < 1 for size in self.file_bytes):
            raise ValueError(f"`file_bytes` must be at least 1, got {self.file_bytes}")
        if any(not 0 <= loss < float("inf") for loss in self.loss):
            raise ValueError(f"`loss` must be finite and at least 0, got {self.loss}")
        if any(after > before for before, after in zip(self.loss, self.loss[1:], strict=False)):
            raise ValueError(f"`loss` must not increase with the level, got {self.loss}")

    @property
    def num_levels(self) -> int:
        """Return the number of the best level; 0 where there is none."""
        return len(self.file_bytes)

    @property
    def end_token(self) -> int:
        """Return the position after the chunk's last token."""
        return self.first_token + self.num_tokens

    def files_of(self, level: int) -> tuple[int, ...]:
        """Return the levels whose files are needed to use `level`, in the order to fetch them."""
        return tuple(range(1, level + 1)) if self.is_embedded else (level,)

    def bytes_of(self, level: int) -> int:
        """Return the bytes of all files that using `level` takes."""
        return sum(self.file_bytes[needed - 1] for needed in self.files_of(level))

    def obtainable_levels(self, missing: Set[int]) -> tuple[int, ...]:
        """Return the levels that can be used without the files of the levels `missing`, in order."""
        return tuple(
            level for level in range(1, self.num_levels + 1) if not any(n in missing for n in self.files_of(level))
        )

    def usable_level(self, files: Set[int]) -> int:
        """Return the best level that the files of these levels give; 0 for none."""
        for level in range(self.num_levels, 0, -1):
            if all(needed in files for needed in self.files_of(level)):
                return level
        return 0


@dataclass(frozen=True)
class ChunkProgress:
    """How far one chunk has come.

    Attributes:
        arrived: levels whose files are here, complete and checked.
        missing: levels whose files cannot be had: absent, corrupt, or given up after retries.
        decoded_level: the level whose keys and values are ready for the model; 0 for none.
        is_computed: its keys and values were computed from text. They count as exact, even where those before them
            are not; the two-ended policy computes a prefix, where they are.
        choice: what the policy last put into `Decision.choices` for this chunk; None before that. The client only
            keeps it: a policy that commits itself finds its commitment here.
    """

    arrived: frozenset[int] = frozenset()
    missing: frozenset[int] = frozenset()
    decoded_level: int = 0
    is_computed: bool = False
    choice: Choice | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the model can attend to the chunk."""
        return self.is_computed or self.decoded_level > 0


@dataclass(frozen=True)
class Transfer:
    """A request for one file, in flight or complete.

    Attributes:
        chunk: index of the chunk.
        level: whose file it is.
        num_bytes: received so far.
        started_seconds: when the request was sent.
        ended_seconds: when its last byte came; None in flight.
    """

    chunk: int
    level: int
    num_bytes: int
    started_seconds: float
    ended_seconds: float | None = None


@dataclass(frozen=True)
class ThroughputSample:
    """The bytes that all connections together received in one interval in which at least one request was in flight."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Computing:
    """What the model is busy with.

    Attributes:
        chunk: index of the chunk.
        started_seconds: since when.
        delayed_seconds: how long the model has stood still meanwhile, for the decoder or anything else.
    """

    chunk: int
    started_seconds: float
    delayed_seconds: float = 0.0


@dataclass(frozen=True)
class Decoding:
    """What the decoder is busy with.

    Attributes:
        chunk: index of the chunk.
        level: up to which its files are decoded.
        started_seconds: since when.
    """

    chunk: int
    level: int
    started_seconds: float


@dataclass(frozen=True)
class PrefillSpeed:
    """How long the model takes for n tokens at position p: `overhead * (n / R + 2 k n (p + n / 2))`.

    A whole document of S tokens then takes `overhead * (S / R + k S^2)`: linear layers and attention.

    Attributes:
        tokens_per_second: R.
        attention_seconds: k, per pair of tokens.
        overhead: what a server adds to its kernels; 1 for a speed that was measured end to end.
    """

    tokens_per_second: float
    attention_seconds: float = 0.0
    overhead: float = 1.0

    def __post_init__(self) -> None:
        if not self.tokens_per_second > 0 or not self.attention_seconds >= 0 or not self.overhead > 0:
            raise ValueError(f"a prefill speed must be positive, got {self}")

    def seconds(self, first_token: int, num_tokens: int) -> float:
        """Return the seconds for `num_tokens` tokens that attend to `first_token` tokens before them."""
        pairs = 2 * num_tokens * (first_token + num_tokens / 2)
        return self.overhead * (num_tokens / self.tokens_per_second + self.attention_seconds * pairs)


@dataclass(frozen=True)
class DecodeSpeed:
    """How long the decoder takes for a chunk, copy to the device included; infinite speeds cost nothing.

    Attributes:
        bytes_per_second: of files.
        tokens_per_second: for what depends on the number of values: the inverse transform, the copy of the result.
        seconds_per_chunk: fixed cost.
        compute_slowdown: the share of the model's speed that is lost while the decoder runs: 0 where they do not
            share a device, 1 where the decoder displaces the model.
    """

    bytes_per_second: float = float("inf")
    tokens_per_second: float = float("inf")
    seconds_per_chunk: float = 0.0
    compute_slowdown: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or not self.tokens_per_second > 0 or not self.seconds_per_chunk >= 0:
            raise ValueError(f"a decode speed must be positive, got {self}")
        if not 0 <= self.compute_slowdown <= 1:
            raise ValueError(f"`compute_slowdown` must be 0 to 1, got {self.compute_slowdown}")

    @property
    def is_free(self) -> bool:
        """Whether decoding costs nothing, or nobody has timed it yet."""
        return self.seconds_per_chunk == 0 and math.isinf(self.bytes_per_second) and math.isinf(self.tokens_per_second)

    def seconds(self, chunk: ChunkLevels, level: int) -> float:
        """Return the seconds to decode all files that `level` of `chunk` takes."""
        return (
            self.seconds_per_chunk
            + chunk.bytes_of(level) / self.bytes_per_second
            + chunk.num_tokens / self.tokens_per_second
        )


@dataclass(frozen=True)
class Speeds:
    """What was measured of the machine, as well as it is known now.

    Attributes:
        prefill: of the model.
        decode: of the decoder.
        first_token_seconds: from a complete cache to the first token: the question and the last prompt token.
        prior_bytes_per_second: the link's throughput remembered from an earlier request; None for a first one.
        stop_seconds: the longest time until the model stops when what it computes is abandoned.
    """

    prefill: PrefillSpeed
    decode: DecodeSpeed = field(default_factory=DecodeSpeed)
    first_token_seconds: float = 0.0
    prior_bytes_per_second: float | None = None
    stop_seconds: float = 0.0


@dataclass(frozen=True)
class Objective:
    """What the user asks for.

    Attributes:
        deadline_seconds: the objective for the time to first token (SLO).
        target_loss: expected loss of the document that is good enough: nothing waits to get below it. 0 means: as
            good as the deadline allows.
    """

    deadline_seconds: float = 1.0
    target_loss: float = 0.0


@dataclass(frozen=True)
class LoadState:
    """All that is known when a policy is asked.

    Attributes:
        chunks: the document, in order and without gaps.
        progress: of each chunk.
        objective: the deadline and the loss that is good enough.
        speeds: of model, decoder and earlier requests.
        elapsed_seconds: since the request began.
        in_flight: requests that are being answered.
        finished: requests that were answered completely, oldest first.
        samples: throughput per interval of about 100 ms, oldest first.
        computing: what the model computes now; None when it is idle.
        decoding: what the decoder decodes now; None when it is idle.
        num_connections: requests that may be in flight together.
        is_whole_only: files lack what tokens within the document attend to: of its chunks only the first ones can be
            computed. Chunks without any files lie behind it; they can be computed in any case.
    """

    chunks: tuple[ChunkLevels, ...]
    progress: tuple[ChunkProgress, ...]
    objective: Objective
    speeds: Speeds
    elapsed_seconds: float = 0.0
    in_flight: tuple[Transfer, ...] = ()
    finished: tuple[Transfer, ...] = ()
    samples: tuple[ThroughputSample, ...] = ()
    computing: Computing | None = None
    decoding: Decoding | None = None
    num_connections: int = 1
    is_whole_only: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the model can attend to every chunk."""
        return all(progress.is_ready for progress in self.progress)

    @property
    def num_free_connections(self) -> int:
        """Return how many requests may be sent now."""
        return max(0, self.num_connections - len(self.in_flight))

    @property
    def loss(self) -> float:
        """Return the expected loss of what is ready; a chunk that is not ready counts as exact."""
        return sum(
            chunk.loss[progress.decoded_level - 1]
            for chunk, progress in zip(self.chunks, self.progress, strict=True)
            if not progress.is_computed and progress.decoded_level
        )

    def first_not_ready(self) -> int:
        """Return the first chunk that the model cannot attend to; the number of chunks where there is none."""
        return next((i for i, progress in enumerate(self.progress) if not progress.is_ready), len(self.chunks))

    def first_not_computed(self) -> int:
        """Return the first chunk that was not computed; the number of chunks where there is none."""
        return next((i for i, progress in enumerate(self.progress) if not progress.is_computed), len(self.chunks))

    def chunk_to_compute(self, chunk: int) -> int:
        """Return which chunk the model computes first where `chunk` is to be computed: itself, if it can be."""
        return min(chunk, self.first_not_computed()) if self._needs_all_before(chunk) else chunk

    def can_be_loaded(self, chunk: int) -> bool:
        """Tell whether files can give the chunk, and it need not be computed for one behind it."""
        is_obtainable = bool(self.chunks[chunk].obtainable_levels(self.progress[chunk].missing))
        return is_obtainable and not (self.is_whole_only and chunk < self._end_of_lost)

    @cached_property
    def _end_of_lost(self) -> int:
        """The chunk behind the last one that is not there and that no file gives any more; 0 where there is none."""
        lost = [
            i
            for i, (chunk, progress) in enumerate(zip(self.chunks, self.progress, strict=True))
            if self._needs_all_before(i) and not progress.is_ready and not chunk.obtainable_levels(progress.missing)
        ]
        return lost[-1] + 1 if lost else 0

    def _needs_all_before(self, chunk: int) -> bool:
        """Tell whether a chunk can only be computed after all before it; not one that follows what was stored."""
        return self.is_whole_only and self.chunks[chunk].num_levels > 0

    def expected_files(self, chunk: int) -> frozenset[int]:
        """Return the levels of `chunk` whose files are here or in flight."""
        return self.progress[chunk].arrived | {t.level for t in self.in_flight if t.chunk == chunk}

    def prefill_seconds(self, chunk: int) -> float:
        """Return the seconds to compute `chunk` from its text."""
        return self.speeds.prefill.seconds(self.chunks[chunk].first_token, self.chunks[chunk].num_tokens)

    def prefill_seconds_of(self, chunks: Collection[int]) -> float:
        """Return the seconds to compute chunks from their text, with all that must be computed for them.

        What the model computes now does not count.
        """
        front = max((chunk for chunk in chunks if self._needs_all_before(chunk)), default=-1)
        before = (i for i in range(front + 1) if not self.progress[i].is_computed)
        chunks = {*chunks, *before}
        now = self.computing.chunk if self.computing is not None else None
        return sum(self.prefill_seconds(i) for i in sorted(chunks) if i != now)

    def compute_seconds_left(self) -> float:
        """Return the seconds until the chunk that the model computes now is done; 0 when it is idle."""
        work = self.computing
        if work is None:
            return 0.0
        end = work.started_seconds + work.delayed_seconds + self.prefill_seconds(work.chunk)
        return max(0.0, end - self.elapsed_seconds)

    def decode_seconds_left(self) -> float:
        """Return the seconds until the decoder is done; 0 when it is idle."""
        if self.decoding is None:
            return 0.0
        seconds = self.speeds.decode.seconds(self.chunks[self.decoding.chunk], self.decoding.level)
        return max(0.0, self.decoding.started_seconds + seconds - self.elapsed_seconds)


@dataclass(frozen=True)
class Fetch:
    """A request to send: the file of this chunk and level."""

    chunk: int
    level: int


@dataclass(frozen=True)
class Decode:
    """Work for the decoder: make this chunk's keys and values from its files, up to this level."""

    chunk: int
    level: int


@dataclass(frozen=True)
class Decision:
    """What to do next. Whatever is running goes on, unless it is in `cancel`.

    Attributes:
        fetch: requests to send now, in this order; never more than `LoadState.num_free_connections`.
        cancel: requests in flight that are of no use any more.
        compute: the chunk that the model shall begin; None leaves it as it is, busy or idle.
        decode: what the decoder shall begin; None leaves it as it is.
        choices: (chunk, level or `TEXT`) to be kept in `ChunkProgress.choice`.
        is_finished: the cache is good enough and complete: stop everything and generate. What the model or the
            decoder is in the middle of is abandoned.
        wake_at_seconds: ask again then, should nothing happen before; None for no need.
    """

    fetch: tuple[Fetch, ...] = ()
    cancel: tuple[Fetch, ...] = ()
    compute: int | None = None
    decode: Decode | None = None
    choices: tuple[tuple[int, Choice], ...] = ()
    is_finished: bool = False
    wake_at_seconds: float | None = None


Policy = Callable[[LoadState], Decision]
"""Ask it after every event and do what it says; see the top of this module."""
