"""What a script's user sees: exit codes, one-line errors, the report and the JSON object."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cachegen import command_line
from cachegen.errors import BackendUnavailableError, ConfigError, InputError, MismatchError, OutputError
from cachegen.versions import collect_versions

SOURCE_FOLDER = Path(__file__).resolve().parents[1] / "src"


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description="A test.")
    parser.add_argument("--count", type=command_line.positive_int, default=3)
    command_line.add_common_flags(parser)
    return parser


def run_raising(error: BaseException) -> int:
    def body(args: argparse.Namespace) -> None:
        raise error

    return command_line.run(body, make_parser(), [])


@pytest.mark.parametrize("error_class", [ConfigError, InputError, MismatchError, BackendUnavailableError, OutputError])
def test_a_project_error_is_one_line_and_its_exit_code(error_class, capsys):
    assert run_raising(error_class("x.bin: is\nbroken")) == error_class.exit_code
    assert capsys.readouterr() == ("", "error: x.bin: is broken\n")


def test_a_librarys_message_names_flags_where_it_names_parameters(capsys):
    message = "`count` 3 is more than `quiet` allows; `counts`, `help` and `pip install x` are no flags"
    assert run_raising(ConfigError(message)) == ConfigError.exit_code
    assert capsys.readouterr().err == (
        "error: --count 3 is more than --quiet allows; `counts`, `help` and `pip install x` are no flags\n"
    )


def test_flags_of_commands_and_of_other_spellings_are_named_in_warnings_too(capsys):
    parser = command_line.CommandLineParser(description="A test.")
    command = parser.add_subparsers(dest="command").add_parser("look", description="A look.")
    command.add_argument("path")
    command.add_argument("--follow-redirects", "--follow_redirects", action="store_true")
    command_line.add_common_flags(command)

    def warn(args: argparse.Namespace) -> None:
        command_line.Reporter(args).warn("`follow_redirects` allows `path`")

    assert command_line.run(warn, parser, ["look", "here"]) == 0
    assert capsys.readouterr().err == "warning: --follow-redirects allows `path`\n"


def test_success_returns_zero_and_a_body_can_return_its_own_code():
    assert command_line.run(lambda args: None, make_parser(), []) == 0
    assert command_line.run(lambda args: 9, make_parser(), []) == 9


def test_a_full_disk_is_one_line_and_the_output_exit_code(capsys):
    assert run_raising(OSError(errno.ENOSPC, "No space left on device", "/tmp/x")) == OutputError.exit_code
    assert capsys.readouterr().err == "error: /tmp/x: No space left on device\n"


def test_an_unreadable_input_is_one_line_and_the_input_exit_code(capsys):
    assert run_raising(PermissionError(errno.EACCES, "Permission denied", "/x")) == InputError.exit_code
    assert capsys.readouterr().err == "error: /x: Permission denied\n"


def test_exhausted_memory_is_one_line(capsys):
    assert run_raising(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == 1
    assert capsys.readouterr().err == "error: out of memory: CUDA out of memory. Tried\n"


def test_an_interrupt_is_one_line_and_exit_code_130(capsys):
    assert run_raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("bug", [RuntimeError("bug"), ValueError("bug"), OSError("not from the system")])
def test_an_unexpected_exception_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        run_raising(bug)


@pytest.mark.parametrize("argv", [["--count", "0"], ["--count", "x"], ["--nonsense"], ["--cou", "1"]])
def test_a_wrong_flag_is_one_line_and_exit_code_two(argv, capsys):
    assert command_line.run(lambda args: None, make_parser(), argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and "--help" in output.err


def test_help_prints_and_succeeds(capsys):
    assert command_line.run(lambda args: None, make_parser(), ["--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_met_with_silence():
    script = (
        "import argparse, sys; from cachegen import command_line\n"
        "def body(args):\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "parser = command_line.CommandLineParser(description='')\n"
        "sys.exit(command_line.run(body, parser, []))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE_FOLDER)},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == command_line.EXIT_BROKEN_PIPE
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(stream, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, stream, None)
        assert command_line.run(lambda args: print("x", file=getattr(sys, stream)), make_parser(), []) == 0
        getattr(sys, stream).close()


def test_report_aligns_values_on_stdout(capsys):
    report = command_line.Reporter(make_parser().parse_args([]))
    report.row("tokens", 9000)
    report.row("a longer label", "x")
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].index("9000") == rows[1].index("x")


def test_report_goes_to_stderr_when_json_has_stdout(capsys):
    args = make_parser().parse_args(["--json", "-"])
    command_line.Reporter(args).row("tokens", 1)
    command_line.write_json(args.json, {"tokens": 1})
    output = capsys.readouterr()
    assert json.loads(output.out) == {"tokens": 1}
    assert "tokens" in output.err


def test_quiet_silences_the_report_but_not_warnings(capsys):
    report = command_line.Reporter(make_parser().parse_args(["--quiet"]))
    report.row("tokens", 1)
    report.line("text")
    report.warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


def test_json_keeps_the_order_and_has_only_what_was_given(tmp_path):
    path = tmp_path / "deep" / "out.json"
    command_line.write_json(path, {"b": 1, "a": {"dtype": torch.float16, "path": Path("x/y")}, "c": (1, 2)})
    assert path.read_text() == (
        '{\n  "b": 1,\n  "a": {\n    "dtype": "float16",\n    "path": "x/y"\n  },\n  "c": [\n    1,\n    2\n  ]\n}\n'
    )


def test_json_writes_null_for_numbers_json_does_not_have(capsys):
    command_line.write_json("-", {"kl": math.nan, "nested": [math.inf]})
    assert json.loads(capsys.readouterr().out) == {"kl": None, "nested": [None]}


def test_json_into_an_impossible_place_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        command_line.write_json(tmp_path / "file" / "out.json", {})


@pytest.mark.parametrize("place", ["", "file/out.json", "."])
def test_a_json_that_cannot_be_written_is_refused_before_the_work(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def body(args: argparse.Namespace) -> None:
        raise AssertionError("the work has begun")

    assert command_line.run(body, make_parser(), ["--json", str(tmp_path / place)]) == OutputError.exit_code
    assert "cannot be written: " in capsys.readouterr().err


def test_effective_config_has_every_flag_with_its_default():
    assert command_line.effective_config(make_parser().parse_args(["--quiet"])) == {
        "count": 3,
        "json": None,
        "quiet": True,
    }


def test_versions_name_what_results_depend_on():
    versions = collect_versions()
    assert list(versions) == ["cachegen", "python", "torch", "transformers", "numpy"]
    assert versions["torch"] == torch.__version__


def test_an_input_default_is_short_in_the_scripts_folder_and_absolute_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.default_input(tmp_path, "models/m") == "models/m"
    assert command_line.default_input(tmp_path / "clone", "models/m") == str(tmp_path / "clone" / "models" / "m")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(999, "999 bytes"), (1500, "1.5 kB"), (27_648_000, "27.6 MB"), (5e9, "5.00 GB")]
)
def test_sizes_read_in_decimal_units(num_bytes, text):
    assert command_line.format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up"), (signal.SIGINT, "interrupted")]
)
@pytest.mark.parametrize("is_swallowed", [False, True])
def test_a_signal_that_ends_the_process_cleans_up_and_says_so(capsys, number, words, is_swallowed):
    before, cleaned = signal.getsignal(number), []

    def body(args: argparse.Namespace) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if is_swallowed:  # as native code does, which knows no such exception
                raise ValueError("no shape") from None
            raise
        finally:
            cleaned.append(True)

    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, handler)
    try:
        assert command_line.run(body, command_line.CommandLineParser(description=None), []) == 128 + number
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert cleaned and capsys.readouterr().err == f"error: {words}\n"
