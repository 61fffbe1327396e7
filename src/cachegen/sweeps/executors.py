"""Many tasks on this machine's processors, or on many machines by Ray: each once, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from cachegen.errors import BackendUnavailableError, CacheGenError

EXECUTORS = ("local", "ray")

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def run_all(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    executor: str = "local",
    num_workers: int = 1,
    *,
    in_processes: bool = False,
) -> Iterator[_Result]:
    """Yield the results of all tasks, as they come.

    Args:
        function: with Ray it must be importable on all machines.
        executor: "local", or "ray" for the cluster that Ray's address names, else this machine.
        num_workers: tasks at a time.
        in_processes: give each worker a process. What calls the scripts has processes of its own, and threads suffice.

    Raises:
        BackendUnavailableError: the package ray is not there.
        CacheGenError: a process was killed.
    """
    if executor == "ray":
        return _run_by_ray(function, tasks, num_workers)
    # Not by fork: torch's threads do not survive it.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn")) if in_processes else ThreadPoolExecutor(num_workers)
    return _run_here(pool, function, tasks)


def _run_here(pool: Executor, function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> Iterator[_Result]:
    with pool:
        pending = {pool.submit(function, task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise CacheGenError(
                "a worker was killed, perhaps for want of memory: run again, with fewer workers"
            ) from error
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
