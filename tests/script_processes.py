"""Scripts as processes of their own, many and cheap: forked from a server that has imported all they import.

A real process, killed by a real signal, without the seconds that importing torch takes. `python script_processes.py`
is the server; `ScriptServer` starts it and asks for runs. Each run has a process that waits for it, kills it when told,
and writes down how it ended.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ("main", "run_encoding", "run_decoding_disk", "run_publishing", "run_decoding_remote", "run_calibration")


@dataclass
class Conditions:
    """What a run meets.

    Attributes:
        kill_after: seconds to `kill_signal`, from its start or, with
        kill_writing_in: a folder, from when it is first seen to write a file there; None lets it end.
        limits: of resources, by name without RLIMIT_; that of AS is beyond what the process has at its start.
        umask, folder: where not None.
        stdout: "closed", or a device or file in its place.
        clock_jump: seconds by which time.time differs from the second call on.
        fsync_errno: what flushing a file to disk fails with, as network file systems do where a quota is used up.
    """

    kill_after: float | None = None
    kill_writing_in: str | None = None
    kill_signal: int = signal.SIGKILL
    limits: Mapping[str, int] = field(default_factory=dict)
    umask: int | None = None
    folder: str | None = None
    stdout: str | None = None
    clock_jump: float = 0.0
    fsync_errno: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit_code: negative for a signal that ended it.
        peak_bytes: of resident memory, beyond what the process began with.
    """

    exit_code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int

    @property
    def error_line(self) -> str:
        """The only line on stderr, of a run that refused."""
        lines = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), self
        return lines[0]


class Run:
    """A run that was started."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def wait(self, seconds: float = 120.0) -> Outcome:
        """Wait for its end, which must come within so many seconds."""
        deadline = time.monotonic() + seconds
        while not (self._place / "outcome").exists():
            assert time.monotonic() < deadline, f"{self._place}: still running after {seconds} seconds"
            time.sleep(0.002)
        content = json.loads((self._place / "outcome").read_text())
        out, err = ((self._place / name).read_bytes().decode("utf-8", "replace") for name in ("out", "err"))
        return Outcome(out=out, err=err, **content)

    @property
    def is_over(self) -> bool:
        return (self._place / "outcome").exists()

    def signal(self, number: int) -> None:
        """Send a signal, once it has begun."""
        while not (self._place / "pid").exists():
            time.sleep(0.001)
        os.kill(int((self._place / "pid").read_text()), number)


class ScriptServer:
    """Starts runs; made by `script_server`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process, self._folder, self._num_runs = process, folder, 0

    def start(self, script: str, argv: Sequence[object], **conditions: Any) -> Run:
        """Start a script with flags."""
        self._num_runs += 1
        place = self._folder / str(self._num_runs)
        place.mkdir()
        content = {"script": script, "argv": [os.fspath(a) if isinstance(a, Path) else str(a) for a in argv]}
        request = {**content, "place": str(place), "conditions": asdict(Conditions(**conditions))}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return Run(place)

    def run(self, script: str, argv: Sequence[object], **conditions: Any) -> Outcome:
        """Run a script to its end, or to its being killed."""
        return self.start(script, argv, **conditions).wait()


@contextmanager
def script_server(folder: Path) -> Iterator[ScriptServer]:
    """Start a server; `folder` takes what the runs print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src")])
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield ScriptServer(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def serve() -> None:
    """Fork a run for every request on stdin."""
    for name in SCRIPTS:
        importlib.import_module(name)
    # What the scripts import late, for their --help to be quick.
    for name in ("decode", "encode", "generate", "model", "prefill", "profiles", "verify"):
        importlib.import_module(f"cachegen.pipeline.{name}")
    importlib.import_module("obstore.store")
    importlib.import_module("transformers.models.mistral.modeling_mistral")
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            os.close(0)
            _watch(json.loads(line))
            os._exit(0)


def _watch(request: dict[str, Any]) -> None:
    """Run a script in a child, kill it when it is time, and write down how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    place, conditions = Path(request["place"]), Conditions(**request["conditions"])
    for name in ("out", "err"):
        (place / name).touch()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        _become(request["script"], request["argv"], place, conditions)
    (place / ".pid").write_text(str(child))
    (place / ".pid").rename(place / "pid")
    if conditions.kill_after is not None:
        threading.Thread(target=_kill, args=(child, conditions), daemon=True).start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    peak = max(0, usage.ru_maxrss - before) * 1024
    (place / ".outcome").write_text(json.dumps({"exit_code": code, "seconds": seconds, "peak_bytes": peak}))
    (place / ".outcome").rename(place / "outcome")
    os._exit(0)


def _kill(process: int, conditions: Conditions) -> None:
    folder = conditions.kill_writing_in
    while folder is not None and not any(name.startswith(".tmp-") for _, _, names in os.walk(folder) for name in names):
        pass
    time.sleep(conditions.kill_after or 0)
    with suppress(ProcessLookupError):  # it was faster
        os.kill(process, conditions.kill_signal)


def _become(script: str, argv: list[str], place: Path, conditions: Conditions) -> None:
    """Turn this process into a run of the script, and never return."""
    for number in (signal.SIGHUP, signal.SIGTERM):  # which nohup and jobs in the background ignore
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    outputs = [(1, conditions.stdout or place / "out"), (2, place / "err")]
    for descriptor, path in outputs:
        if path == "closed":
            os.close(descriptor)
        else:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout = None if conditions.stdout == "closed" else open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if conditions.umask is not None:
        os.umask(conditions.umask)
    if conditions.folder is not None:
        os.chdir(conditions.folder)
    for name, limit in conditions.limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        if name == "AS":
            limit += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(number, (limit, resource.getrlimit(number)[1]))
    if conditions.clock_jump:
        clock, jumps = time.time, iter([0.0])
        time.time = lambda: clock() + next(jumps, conditions.clock_jump)  # type: ignore[assignment]
    if conditions.fsync_errno is not None:

        def fail(descriptor: int) -> None:
            raise OSError(conditions.fsync_errno, os.strerror(conditions.fsync_errno or 0))

        os.fsync = fail
    code = 1
    try:
        code = sys.modules[script].main(argv)
    except BaseException:
        traceback.print_exc()
    _end_like_an_interpreter(code)


def _end_like_an_interpreter(code: int) -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        code = 120
    os._exit(code)


if __name__ == "__main__":
    serve()
