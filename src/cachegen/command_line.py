"""What the scripts share: flags, exit codes, the report for people and the JSON object for sweeps.

A script builds its parser, does its work in a body, and returns `run(body, parser, argv)`. A user's mistake then ends
in one line on stderr and an exit code of `cachegen.errors`; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from cachegen.errors import CacheGenError, InputError, OutputError
from cachegen.files import write_file
from cachegen.startup import EXIT_INTERRUPTED, end_guard
from cachegen.versions import collect_versions

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_LABEL_WIDTH = 18
_ENDING_SIGNALS = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up", signal.SIGINT: "interrupted"}
# What is said where no memory can be had: torch has an exception class for the memory of GPUs only, Python none for
# that of a thread, and the Rust of other packages panics.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "can't start new thread",
    "can't spawn worker thread",
    "pointer is null",
)
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


class CommandLineParser(argparse.ArgumentParser):
    """Parse flags; a wrong one is a single line on stderr, not the whole usage, and exit code 2."""

    def __init__(self, *, description: str | None, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line that names the wrong flag."""
        self.exit(2, f"error: {_one_line(message)} (see {self.prog} --help)\n")


class Reporter:
    """Print the report for people, its values aligned; say nothing when quiet.

    Warnings are not part of the report: they go to stderr, quiet or not.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet: bool = args.quiet
        self._to_stderr: bool = args.json == "-"

    @property
    def is_quiet(self) -> bool:
        """Whether the report is silenced; progress bars should be, too."""
        return self._quiet

    def row(self, label: str, value: object) -> None:
        """Print one value with its label."""
        self.line(f"{label:<{_LABEL_WIDTH}} {value}")

    def line(self, text: str = "") -> None:
        """Print one line of free text."""
        if not self._quiet:
            print(text, file=sys.stderr if self._to_stderr else sys.stdout, flush=True)

    def warn(self, text: str) -> None:
        """Print a one-line warning on stderr."""
        print(f"warning: {_one_line(_name_flags(text))}", file=sys.stderr, flush=True)


def run(
    body: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> int:
    """Parse `argv`, run `body` on the result, and turn what a user can cause into one line and an exit code.

    Args:
        body: does the work; its return value is the exit code, None for success.
        parser: usually a `CommandLineParser`.
        argv: the flags, without the program's name; None for those of the process.

    Returns:
        The exit code: 0, the code `body` returned, that of a CacheGenError, 2 for a wrong flag, 1 for exhausted
        memory, 128 and the signal's number when interrupted, terminated or hung up, 141 when whoever read our output
        has gone.
    """
    end_guard()
    _prepare_streams()
    _FLAGS.clear()
    _FLAGS.update(_list_flags(parser))
    try:
        with _unwinding_at_signals():
            try:
                args = parser.parse_args(argv)
                _check_json_place(args)
                exit_code = body(args) or 0
            except SystemExit as stop:  # argparse: --help, or a wrong flag that it has already reported
                exit_code = stop.code if isinstance(stop.code, int) else 0
            sys.stdout.flush()
            return exit_code
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except _Ended as ended:
        return _fail(_ENDING_SIGNALS[ended.signal], 128 + ended.signal)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except CacheGenError as error:
        return _fail(str(error), error.exit_code)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(f"out of memory: {_one_line(str(error)) or 'no more can be had'}", CacheGenError.exit_code)
    except OSError as error:
        if error.errno is None:  # not from the system: a library's misuse of the class, to be seen whole
            raise
        if _is_stdout_broken():
            return _fail(f"standard output cannot be written: {error.strerror}", OutputError.exit_code)
        kind = OutputError if error.errno in _WRITE_ERRNOS else InputError
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{place}{error.strerror or error}", kind.exit_code)
    except BaseException as error:  # a panic is no Exception
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        return _fail("out of memory: the CPU's is not enough", CacheGenError.exit_code)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add --json and --quiet, which every script has."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the results as one JSON object; - is stdout, the report then goes to stderr",
    )
    parser.add_argument("--quiet", action="store_true", help="print no report and no progress bar")


def add_model_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the flags that name a model: --model_id and --gguf_file."""
    parser.add_argument(
        "--model_id", default=default, help="Hugging Face id or local folder of the model, or a GGUF file"
    )
    parser.add_argument(
        "--gguf_file", help="name of a GGUF file of --model_id, loaded instead of its other files (extra gguf)"
    )


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that round a model's weights, --load_in_8bit and --load_in_4bit: `weight_bits` of the arguments."""
    group = parser.add_mutually_exclusive_group()
    for bits, kind in ((8, "LLM.int8"), (4, "NF4")):
        group.add_argument(
            f"--load_in_{bits}bit",
            dest="weight_bits",
            action="store_const",
            const=bits,
            help=f"keep the weights in {bits} bits ({kind}; needs bitsandbytes)",
        )


def add_study_flags(parser: argparse.ArgumentParser, root: Path) -> None:
    """Add the flags of a study of a model: what methods are fitted on, how contexts are read, and where the model runs.

    Args:
        root: of the clone, whose prompts and profile are the defaults.
    """
    # Scripts that study nothing need not import these.
    from cachegen.device import DTYPES
    from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE

    add = parser.add_argument
    add(
        "--path_to_calibration",
        type=Path,
        default=root / "9k_prompts/calibration",
        help="contexts to fit methods on, of the kinds of --path_to_context",
    )
    add(
        "--profile",
        default=str(root / "models/tiny-mistral/profile"),
        help="the model's profile, for method transform; none leaves that method out",
    )
    add("--num_questions", type=positive_int, help="ask only the first questions of each context")
    add(
        "--context_tokens",
        type=positive_int,
        help="cut a text into contexts of so many tokens, and longer prompts in their middle; None cuts nothing",
    )
    add("--chat_template", action="store_true", help="put the prompts of a data set into the model's chat template")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="float32",
        help="of the model that compares; caches keep the checkpoint's",
    )
    add("--block_size", type=positive_int, default=DEFAULT_BLOCK_SIZE, help="tokens per prefill step")


def positive_int(text: str) -> int:
    """Parse a flag's value that must be an integer of at least 1; for argparse's `type`."""
    return _bounded_int(text, 1)


def non_negative_int(text: str) -> int:
    """Parse a flag's value that must be an integer of at least 0; for argparse's `type`."""
    return _bounded_int(text, 0)


def positive_float(text: str) -> float:
    """Parse a flag's value that must be a finite number above 0; for argparse's `type`."""
    value = _finite_float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """Parse a flag's value that must be a finite number of at least 0; for argparse's `type`."""
    value = _finite_float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def default_input(script_folder: str | os.PathLike[str], relative: str) -> str:
    """Return the default of a flag that names an input of the repository, valid from any working directory.

    Args:
        script_folder: the folder of the script.
        relative: path of the input below that folder; returned as it is when the script runs in its own folder.
    """
    folder = Path(script_folder).resolve()
    return relative if folder == Path.cwd() else str(folder / relative)


def effective_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return all flags with the values in force, as plain JSON values."""
    return {name: _plain(value) for name, value in vars(args).items()}


def finish(args: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Write what --json asks for: the results, then all flags and the versions.

    Raises:
        OutputError: the file cannot be written.
    """
    if args.json is not None:
        write_json(args.json, {**record, "config": effective_config(args), "versions": collect_versions()})


def write_json(destination: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write one JSON object, whole or not at all, its keys in the order given.

    Args:
        destination: a file, or "-" for stdout.
        record: anything `json` can write, and paths, dtypes and devices, which become strings. Numbers that are not
            finite become null, since JSON has none.

    Raises:
        OutputError: the file cannot be written.
    """
    is_ascii = destination == "-" and sys.stdout.encoding.lower() not in ("utf-8", "utf8")
    text = json.dumps(_plain(record), indent=2, allow_nan=False, ensure_ascii=is_ascii) + "\n"
    # A byte of a path that is not UTF-8 is a lone surrogate here, and JSON has an escape for those.
    content = text.encode("utf-8", "backslashreplace")
    if destination == "-":
        sys.stdout.write(content.decode("utf-8"))
        sys.stdout.flush()
    else:
        write_file(destination, content)


def _check_json_place(args: argparse.Namespace) -> None:
    """Refuse a --json that cannot be written before the work is done, where that shows."""
    destination = getattr(args, "json", None)
    if destination is None or destination == "-":
        return
    path = Path(destination)
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if path.exists() and not path.is_file():
        problem = "is not a file"
    elif nearest != path and not nearest.is_dir():
        problem = f"{nearest} is not a folder"
    elif not os.access(nearest if nearest.is_dir() else nearest.parent, os.W_OK):
        problem = "permission denied"
    else:
        return
    raise OutputError(f"{destination}: cannot be written: {problem} (--json)")


def format_bytes(num_bytes: float) -> str:
    """Return a size for people, in decimal units: "27.6 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def _plain(value: Any) -> Any:
    """Return `value` made of what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (os.PathLike, torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    return value


def _bounded_int(text: str, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}, got {text!r}")
    return value


def _finite_float(text: str) -> float:
    """Return the number, NaN where there is none: no comparison holds for it."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {_one_line(_name_flags(message))}", file=sys.stderr, flush=True)
    return exit_code


_FLAGS: dict[str, str] = {}
"""The running script's flags, by the names that libraries' messages have for them."""


def _list_flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield name and flag of every option of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _list_flags(command)
        else:
            for flag in action.option_strings[:1]:
                if flag.startswith("--"):
                    yield from ((name, flag) for name in (action.dest, flag.removeprefix("--")))


def _name_flags(text: str) -> str:
    """Return a library's message as a script says it: names in backticks that are flags become flags."""
    return re.sub(r"`(\w+)`", lambda match: _FLAGS.get(match[1], match[0]), text)


class _Ended(KeyboardInterrupt):
    """A signal asks the process to end: everything cleans up as after an interrupt."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextmanager
def _unwinding_at_signals() -> Iterator[None]:
    """Let signals that end a process raise `_Ended`, so that unfinished files go; ignored ones, as by nohup, stay so.

    A library that the signal comes in may make another exception of it, which is then not what has to be said.
    """
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise _Ended(number)

    is_main = threading.current_thread() is threading.main_thread()
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {n: signal.getsignal(n) for n in _ENDING_SIGNALS if is_main and signal.getsignal(n) in defaults}
    try:
        for number in before:
            signal.signal(number, end)
        yield
    except BaseException as error:
        if received and not isinstance(error, KeyboardInterrupt):
            raise _Ended(received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_streams() -> None:
    """Let anything be printed: nowhere where the caller has closed stdout or stderr, escaped what has no encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # what Python has for a closed one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _is_stdout_broken() -> bool:
    """Tell whether what was printed cannot be written, and let go of it."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()
        return True
    return False


def _discard_stdout() -> None:
    """Let the interpreter flush what is left of stdout at exit into nothing, rather than into a broken pipe."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # a stream of a test, not a file
        return
    null_descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_descriptor, descriptor)
    os.close(null_descriptor)
