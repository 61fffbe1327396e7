"""A whole sweep in a folder: what is done, what is missing, and the results once nothing is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cachegen.errors import OutputError
from cachegen.files import write_file
from cachegen.sweeps.executors import run_all
from cachegen.sweeps.grid import Grid, resolve_paths
from cachegen.sweeps.runs import Place, do_prefill, do_run, hash_run, identify, prefill_folder, read_record

_COLUMNS = (
    ("encode", "bits_per_value", "bits per value", ".3f"),
    ("encode", "ratio_vs_fp16", "smaller than fp16", ".2f"),
    ("decode", "kl", "KL", ".3g"),
    ("decode", "next_token_agreement", "agreement", ".3f"),
    ("decode", "greedy_match", "same answer", ""),
)


class Sweep:
    """The runs of a grid, whose records are kept in a folder.

    Attributes:
        grid: that was read.
        keys: of its runs, in order.
    """

    def __init__(
        self,
        grid: Grid,
        scripts: str | os.PathLike[str],
        working: str | os.PathLike[str],
        output: str | os.PathLike[str],
        keeps_files: bool = False,
    ) -> None:
        """Look at all files that the runs name.

        Args:
            scripts, working, output, keeps_files: as of `Place`.

        Raises:
            OutputError: the folder cannot be made.
            CacheGenError: a KV file is damaged.
        """
        self.grid = grid
        self._place = Place(Path(scripts), Path(working), Path(working) / output, keeps_files)
        try:
            self._place.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{output}: cannot be made: {error.strerror} (`output_path`)") from error
        named = {path for run in grid.runs for path in resolve_paths(run, self._place.working).values()}
        self._identities = {path: identify(path) for path in sorted(named)}
        self.keys = [hash_run(run, self._identities, self._place) for run in grid.runs]

    def find_missing(self) -> list[int]:
        """Return the numbers of the runs without a record."""
        return [number for number, key in enumerate(self.keys) if read_record(self._place.record_of(key)) is None]

    def run(self, numbers: Sequence[int], executor: str = "local", num_workers: int = 1) -> Iterator[str | None]:
        """Do runs, prefills first; yield for each what went wrong, or None."""
        runs = {number: self.grid.runs[number] for number in numbers}
        folders = {
            number: prefill_folder(run, self._identities, self._place) if run.prefill else None
            for number, run in runs.items()
        }
        prefills = {
            folder: (runs[number], folder, self._place) for number, folder in folders.items() if folder is not None
        }
        failed: dict[Path, str] = {}
        for folder, error in run_all(_prefill_named, list(prefills.values()), executor, num_workers):
            if error is not None:
                failed[folder] = error
        tasks = []
        for number in numbers:
            folder = folders[number]
            if folder in failed:
                yield failed[folder]
            else:
                tasks.append((self.keys[number], runs[number], folder, self._place))
        for _, error in run_all(do_run, tasks, executor, num_workers):
            yield error

    def write_results(self) -> str:
        """Write results.jsonl, times.jsonl and table.md of all runs; return the table.

        Raises:
            OutputError: a record is missing, or the folder cannot be written.
        """
        lines: list[bytes] = []
        times: list[bytes] = []
        records: list[dict[str, Any]] = []
        for key in self.keys:
            record = read_record(self._place.record_of(key))
            if record is None:
                raise OutputError(f"{self._place.record_of(key)}: is missing: run the sweep again")
            records.append(record)
            lines.append(self._place.record_of(key).read_bytes())
            times.append(self._place.times_of(key).read_bytes() if self._place.times_of(key).exists() else b"")
        table = _format_table(records, self.grid.varying)
        write_file(self._place.output / "results.jsonl", b"".join(lines))
        write_file(self._place.output / "times.jsonl", b"".join(times))
        write_file(self._place.output / "table.md", (table + "\n").encode())
        return table


def _prefill_named(task: Any) -> tuple[Path, str | None]:
    return task[1], do_prefill(task)


def _format_table(records: Sequence[dict[str, Any]], varying: Sequence[str]) -> str:
    columns = [column for column in _COLUMNS if any(column[1] in record.get(column[0], {}) for record in records)]
    rows = [[*(name.split(".", 1)[1] for name in varying), *(title for _, _, title, _ in columns)]]
    for record in records:
        cells = [str(record["flags"].get(name, "")) for name in varying]
        for stage, name, _, spec in columns:
            value = record.get(stage, {}).get(name)
            cells.append(_format_cell(value, spec))
        rows.append(cells)
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _format_cell(value: Any, spec: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else format(value, spec)
