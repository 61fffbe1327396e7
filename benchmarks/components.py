"""Components of the shape of an 8B model's, for coder_throughput.py: a layer's keys and values are a group.

Standard deviations fall like a power of the component's number, as a profile's do; components are drawn from Laplace
distributions of them. So what tables say of them is about right, and nothing else is a real cache's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cachegen.coder.component_tables import plan_level
from cachegen.coder.components import ComponentGroup, decode_component_groups, encode_components
from cachegen.format import StreamEntry
from cachegen.methods.transform.encoder import choose_component_stream
from cachegen.methods.transform.transform import LEVEL_RATIO, LEVEL_RATIO_LOG

NUM_TOKENS = 512
DEEPEST = 1024  # components of a group


class ComponentCase:
    """Groups of one level of a chunk, and calls that encode and decode them.

    Attributes:
        name: of the case.
        num_values: components.
    """

    def __init__(self, name: str, num_groups: int, step_log: int, *, is_refined: bool = False) -> None:
        generator = np.random.default_rng(0)
        self._fine: list[np.ndarray] = []
        self._coarse: list[np.ndarray | None] = []
        self._groups: list[ComponentGroup] = []
        for number in range(num_groups):
            logs = np.round(48 - 8 * np.log2(np.arange(1, DEEPEST + 1 + 3 * number))).astype(np.int16)
            coarse_log = step_log + LEVEL_RATIO_LOG if is_refined else None
            coding = plan_level(logs, step_log, coarse_log)
            scales = 2.0 ** ((logs[: coding.num_components] - step_log) / 16)
            drawn = generator.laplace(size=(NUM_TOKENS, coding.num_components)) * scales / np.sqrt(2)
            fine, coarse = np.round(drawn).astype(np.int32), None
            if is_refined:
                coarse = np.round(drawn[:, : coding.num_refined] / LEVEL_RATIO).astype(np.int32)
                thirds = fine[:, : coding.num_refined] - LEVEL_RATIO * coarse
                fine[:, : coding.num_refined] = LEVEL_RATIO * coarse + thirds.clip(-1, 1)
            tokens_per_stream = choose_component_stream(coding.num_components, NUM_TOKENS)
            self._fine.append(fine)
            self._coarse.append(coarse)
            self._groups.append(ComponentGroup(number, np.empty_like(fine), coding, tokens_per_stream))
        self.num_values = sum(fine.size for fine in self._fine)
        bits = 8 * len(self.encode(None)[0]) / self.num_values
        self.name = f"{name}, {NUM_TOKENS} tokens, {bits:.1f} bits"

    def encode(self, path: str | None, num_threads: int = 1) -> tuple[bytes, list[StreamEntry]]:
        """Encode all groups; returns payload and index."""
        payload, streams = [], []
        for fine, coarse, group in zip(self._fine, self._coarse, self._groups, strict=True):
            part, entries = encode_components(
                fine, coarse, group.coding, group.tokens_per_stream, num_threads, path=path
            )
            payload.append(part)
            streams += entries
        return b"".join(payload), streams

    def prepare(self) -> None:
        """Put what a level refines where it is decoded to."""
        for coarse, group in zip(self._coarse, self._groups, strict=True):
            if coarse is not None:
                components = np.asarray(group.components)
                components[:, : coarse.shape[1]] = coarse

    def decode(self, payload: bytes, streams: list[StreamEntry], path: str | None, num_threads: int = 1) -> None:
        """Decode in place: after the first time, a refining level refines what it has decoded itself."""
        decode_component_groups(payload, streams, self._groups, num_threads, path=path)

    def check(self, paths: tuple[str, ...]) -> tuple[bytes, list[StreamEntry]]:
        """Return payload and index, after making sure that all paths give them, and the components."""
        expected = self.encode(paths[0])
        for path in paths:
            if self.encode(path) != expected:
                raise SystemExit(f"{self.name}: path {path} gives other bytes than {paths[0]}")
            self.prepare()
            self.decode(*expected, path)
            for fine, group in zip(self._fine, self._groups, strict=True):
                if not np.array_equal(fine, np.asarray(group.components)):
                    raise SystemExit(f"{self.name}: path {path} decodes other components than were encoded")
        return expected

    def calls(self, payload: bytes, streams: list[StreamEntry], path: str) -> dict[str, Callable[[], object]]:
        """Return what is to be timed on a path."""
        return {"encode": lambda: self.encode(path), "decode": lambda: self.decode(payload, streams, path)}


def iterate_component_cases() -> Iterator[ComponentCase]:
    """Yield one group alone, as many as are decoded together, a finer step, and a level that refines another."""
    yield ComponentCase("1 group", 1, 0)
    yield ComponentCase("4 groups", 4, 0)
    yield ComponentCase("4 groups, finer", 4, -32)
    yield ComponentCase("4 groups, refined", 4, -LEVEL_RATIO_LOG, is_refined=True)
