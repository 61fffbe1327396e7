"""Decoding that goes on by itself: a GPU's kernels begin and are waited for, the CPU's are done when they return."""

from __future__ import annotations

from collections.abc import Callable


def start(kernels, operation: str, *arguments, **options) -> Callable[[], None]:
    """Call `start_` + `operation` of kernels that have it, and their `operation` itself otherwise.

    Returns:
        A function that waits for the end and raises what is left to raise; where all is done already it does nothing.
    """
    begin = getattr(kernels, f"start_{operation}", None)
    if begin is not None:
        return begin(*arguments, **options)
    getattr(kernels, operation)(*arguments, **options)
    return _do_nothing


def _do_nothing() -> None:
    pass
