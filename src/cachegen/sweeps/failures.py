"""What goes wrong in many tasks: collected while the others go on, and said at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from cachegen.errors import CacheGenError


def collect_errors(results: Iterable[str | None], num_tasks: int, unit: str, *, is_quiet: bool) -> list[str]:
    """Let tasks be done, with a progress bar; return what went wrong.

    Args:
        results: of each task what went wrong, None where nothing did.
        unit: what the bar counts, such as "run".
    """
    from tqdm import tqdm

    with tqdm(results, total=num_tasks, unit=unit, file=sys.stderr, disable=True if is_quiet else None) as bar:
        return [error for error in bar if error is not None]


def raise_errors(errors: Sequence[str], num_tasks: int, units: str) -> None:
    """Fail in one line where anything went wrong.

    Raises:
        CacheGenError: with the first error.
    """
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise CacheGenError(f"{len(errors)} of {num_tasks} {units} failed; run again to try them: {errors[0]}{more}")
