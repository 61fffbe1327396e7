"""Which of a layer's tokens the tokens behind a cache still attend to, by the layer's window.

What no later token attends to need not be stored. `pipeline.windows` finds a model's windows; KV files keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from cachegen.fields import Fields, refuse_file

WindowKind: TypeAlias = Literal["sliding", "chunked"]
WINDOW_KINDS: tuple[WindowKind, ...] = get_args(WindowKind)
MAX_WINDOW_TOKENS = 1 << 40


@dataclass(frozen=True)
class Window:
    """How far back the tokens of a layer attend.

    Attributes:
        kind: "sliding": to themselves and the `num_tokens` - 1 before them; "chunked": to their own chunk, which begins
            at a multiple of `num_tokens`.
        num_tokens: at least 1.
    """

    kind: WindowKind
    num_tokens: int

    def first_visible(self, num_tokens: int) -> int:
        """Return the first of `num_tokens` cached tokens that any token behind them attends to."""
        if self.kind == "chunked":
            return num_tokens // self.num_tokens * self.num_tokens
        return max(0, num_tokens - (self.num_tokens - 1))


Windows: TypeAlias = tuple[Window | None, ...]
"""Of each layer; None for one whose tokens attend to all before them."""


def first_visible_tokens(windows: Windows, num_tokens: int) -> tuple[int, ...]:
    """Return, per layer, the first of `num_tokens` cached tokens that any token behind them attends to.

    Later tokens attend to no earlier ones than the next does.
    """
    return tuple(0 if window is None else window.first_visible(num_tokens) for window in windows)


def pack_windows(windows: Windows) -> list[dict[str, Any] | None]:
    """Return windows as a file has them: null, or an object with the fields of `Window`."""
    return [None if window is None else {"kind": window.kind, "num_tokens": window.num_tokens} for window in windows]


def read_windows(fields: Fields, num_layers: int) -> Windows | None:
    """Read the field `windows` of a file; None where it has none.

    Raises:
        BitstreamError: it is not one window or null per layer.
    """
    if "windows" not in fields:
        return None
    found: list[Window | None] = []
    for layer, item in enumerate(fields.items("windows", num_layers, num_layers)):
        found.append(None if item is None else _read_window(Fields(item, refuse_file(), f"windows[{layer}]")))
    return tuple(found)


def _read_window(record: Fields) -> Window:
    record.require(("kind", "num_tokens"))
    kind: WindowKind = "chunked" if record.choice("kind", WINDOW_KINDS) == "chunked" else "sliding"
    return Window(kind, record.integer("num_tokens", 1, MAX_WINDOW_TOKENS))
