"""Many tasks on this machine's processors, or on many machines by Ray: each once, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from cachegen.errors import BackendUnavailableError

EXECUTORS = ("local", "ray")

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def run_all(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], executor: str = "local", num_workers: int = 1
) -> Iterator[_Result]:
    """Yield the results of all tasks, as they come.

    Args:
        function: does its work in a process of its own, as the scripts do, so that threads suffice here. With Ray it
            must be importable on all machines.
        executor: "local", or "ray" for the cluster that Ray's address names, else this machine.
        num_workers: tasks at a time.

    Raises:
        BackendUnavailableError: the package ray is not there.
    """
    return _run_by_ray(function, tasks, num_workers) if executor == "ray" else _run_here(function, tasks, num_workers)


def _run_here(function: Callable[[_Task], _Result], tasks: Sequence[_Task], num_workers: int) -> Iterator[_Result]:
    with ThreadPoolExecutor(num_workers) as pool:
        pending = {pool.submit(function, task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in pending:
                future.cancel()


def _run_by_ray(function: Callable[[_Task], _Result], tasks: Sequence[_Task], num_workers: int) -> Iterator[_Result]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BackendUnavailableError("`executor` ray: needs the package ray: pip install ray") from error
    was_running = ray.is_initialized()
    if not was_running:
        ray.init(log_to_driver=False)
    remote: Any = ray.remote(num_cpus=1)(function)
    waiting, running = list(reversed(tasks)), []
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                running.append(remote.remote(waiting.pop()))
            done, running = ray.wait(running)
            yield from ray.get(done)
    finally:
        for reference in running:
            ray.cancel(reference)
        if not was_running:
            ray.shutdown()
