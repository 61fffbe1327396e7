#!/usr/bin/env python3
"""Measure a real model: texts, profile, both protocols and answers, each method beside the usual ones.

Cuts texts into contexts, makes prompts like RULER's, makes the model's profile, and measures with rate_distortion.py.
Writes results.csv, contexts.csv, answers.csv, table.md and plot.png. An interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachegen import command_line
from cachegen.errors import ConfigError, InputError, MismatchError, OutputError
from cachegen.files import read_file, write_file
from cachegen.pipeline.context import MAX_CONTEXT_BYTES, read_context
from cachegen.pipeline.model import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WIKITEXT_TEST, WIKITEXT_VALID = "wikitext-2/wiki.test.raw", "wikitext-2/wiki.valid.tokens"
NOVEL = "text/pride_and_prejudice.txt"
# Of each text the first character, and which windows from there on are used.
TEST_TEXTS = ((WIKITEXT_TEST, 100, (0, 2)), (NOVEL, 300_000, (0,)))
CALIBRATION_TEXTS = ((WIKITEXT_VALID, 100, tuple(range(6))), (NOVEL, 5000, (0, 1)))
OWN_TEST, OWN_CALIBRATION = "9k_prompts", "9k_prompts/calibration"
NUM_OWN_TESTS = 3
# WikiText-2's marks of its word-level tokens.
MARKS = (("<unk>", "the"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))

TEXT_SCHEMES = (
    "uniform=4-bit,8-bit",
    "cachegen=32/16 bins,64/32 bins",
    "llama.cpp",
    "kivi=2-bit",
    "hadamard",
    "spectral=2-bit",
    "pca=1 bit,2 bit,3 bit",
    "transform-sinks=step +28,step +20,step +12,step +4,step -8,step -24,step -40,step -66",
    "transform-own=step +24,step +16,step +8,step +0",
    "lossless",
)
ANSWER_SCHEMES = (
    "uniform=8-bit",
    "cachegen=32/16 bins",
    "llama.cpp=q4_0,q8_0",
    "kivi=2-bit",
    "hadamard",
    "spectral=2-bit",
    "transform-sinks=step +20,step +12,step +4,step -8",
    "transform-own=step +8",
)
PARTS = ("tail", "half", "answers")
CONTINUED = "512"  # tokens that are written from where the encoded part of protocol tail ends


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    command_line.add_model_flags(parser, str(ROOT / "models/smollm2-135m"))
    add("--path_to_data", type=Path, help="folder of the texts (docs/datasets.md); None: 9k_prompts of the repository")
    add("--output_path", type=Path, default=ROOT / "docs/results/smollm2", help="folder of the results")
    add("--work_path", type=Path, default=ROOT / "data/real_report", help="folder of texts, caches, profile and rows")
    add("--profile", type=Path, help="the model's profile; None makes it")
    add(
        "--layers_per_group",
        type=command_line.positive_int,
        help="of the profile that is made; None: as many as run_calibration.py takes",
    )
    add("--context_tokens", type=command_line.positive_int, default=4096, help="tokens of a context")
    add(
        "--half_tokens",
        type=command_line.positive_int,
        default=2048,
        help="tokens of a context of protocol half, at most those of --context_tokens",
    )
    add("--answer_tokens", type=command_line.positive_int, default=2048, help="tokens of a prompt to be answered")
    add("--num_records", type=command_line.positive_int, default=10, help="prompts of each task")
    add(
        "--tasks",
        nargs="+",
        default=["niah_single", "niah_multikey"],
        help="tasks of make_ruler.py",
    )
    add(
        "--leave_out",
        nargs="+",
        metavar="NAME",
        default=[],
        help="schemes that are not measured: pca for a large model",
    )
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure only these; tables hold what is there")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_report, build_parser(), argv)


def _report(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    work: Path = args.work_path
    data = args.path_to_data
    if data is None:
        report.line(f"texts              {OWN_TEST} of the repository, invented; --path_to_data names others")
    else:
        report.line(f"texts              {WIKITEXT_TEST}, {WIKITEXT_VALID} and {NOVEL} of {data}")
    model = ["--model_id", args.model_id, *(["--gguf_file", args.gguf_file] if args.gguf_file else [])]
    _write_texts(args)
    profile = args.profile or work / "profile"
    kv = work / "kv"
    unknown = sorted(set(args.leave_out) - {_name_of(scheme) for scheme in TEXT_SCHEMES})
    if unknown:
        raise ConfigError(f"`leave_out`: there is no scheme {unknown[0]} here")
    if args.profile is None and not (profile / "profile.json").exists():
        calibration = ["--path_to_context", work / "calibration", "--save_dir", kv / "calibration"]
        _run("main.py", *model, *calibration, "--device", args.device)
        groups = ["--layers_per_group", args.layers_per_group] if args.layers_per_group else []
        folders = ["--path_to_kv", kv / "calibration", "--output_path", profile]
        _run("run_calibration.py", *model, *folders, *groups, "--no_curve", "--device", args.device)
    measure = ["scripts/rate_distortion.py", *model, "--path_to_calibration", work / "calibration"]
    measure += ["--profile", profile, "--noise_floor", "--no_retrieval", "--device", args.device]
    for protocol, kind in (("tail", "test"), ("half", "test_half")):
        if protocol in args.parts:
            texts = ["--path_to_context", work / kind, "--kv_folder", _share_calibration(kv, work / f"kv_{protocol}")]
            texts += ["--protocol", protocol, "--schemes", *_choose(TEXT_SCHEMES, args)]
            texts += ["--continue_tokens", CONTINUED] if protocol == "tail" else []
            _run(*measure, *texts, "--output_path", work / protocol)
    if "answers" in args.parts:
        _ask(args, model, measure, _share_calibration(kv, work / "kv_answers"))
    _combine(args)
    report.line(read_file(args.output_path / "table.md", MAX_CONTEXT_BYTES).decode())
    command_line.finish(args, {"output_path": args.output_path})


def _share_calibration(kv: Path, folder: Path) -> Path:
    """Return a folder for the caches of other tests, in which the calibration caches are those of `kv`."""
    _make_folder(folder)
    _make_folder(kv / "calibration")
    if not (folder / "calibration").exists():
        (folder / "calibration").symlink_to((kv / "calibration").resolve(), target_is_directory=True)
    return folder


def _name_of(scheme: str) -> str:
    return scheme.partition("=")[0]


def _choose(schemes: Sequence[str], args: argparse.Namespace) -> list[str]:
    return [scheme for scheme in schemes if _name_of(scheme) not in args.leave_out]


def _write_texts(args: argparse.Namespace) -> None:
    """Cut the texts of tests and of calibration into contexts.

    Raises:
        MismatchError: the working folder is of other texts or flags, whose caches and profile would be taken for these.
    """
    data, room = args.path_to_data, args.context_tokens
    if data is None:
        own = sorted((ROOT / OWN_CALIBRATION).glob("*.txt"), key=lambda path: int(path.stem))
        calibration = [(str(path), 0, (0,)) for path in own]
        tests = [(str(ROOT / OWN_TEST / f"{number}.txt"), 0, (0,)) for number in range(NUM_OWN_TESTS)]
        data = Path()
    else:
        calibration, tests = CALIBRATION_TEXTS, TEST_TEXTS
    tokenizer = load_tokenizer(args.model_id, gguf_file=args.gguf_file)
    room -= len(tokenizer("").input_ids)
    for name, num_tokens in (("context_tokens", args.context_tokens), ("half_tokens", args.half_tokens)):
        if num_tokens - args.context_tokens + room < 2:
            raise ConfigError(f"`{name}` must be larger, got {num_tokens}")
    contents = {}
    for kind, sources in (("calibration", calibration), ("test", tests)):
        windows = []
        for name, first, numbers in sources:
            windows += _cut(read_context(data / name)[first:], tokenizer, room, numbers, name)
        contents.update({Path(kind, f"{number}.txt"): text.encode() for number, text in enumerate(windows)})
        if kind == "test":
            half_room = room - args.context_tokens + args.half_tokens
            for number, text in enumerate(windows):
                begin = text if half_room >= room else _cut(text, tokenizer, half_room, (0,), f"test/{number}.txt")[0]
                contents[Path("test_half", f"{number}.txt")] = begin.encode()
    inputs = [args.model_id, args.gguf_file, args.layers_per_group, str(args.profile)]
    digest = hashlib.sha256(repr([inputs, sorted(contents.items())]).encode()).hexdigest().encode()
    note = args.work_path / "inputs"
    if note.exists() and read_file(note, len(digest)) != digest:
        raise MismatchError(f"{args.work_path}: is of other texts or flags; choose another `work_path`")
    for path, content in contents.items():
        _make_folder((args.work_path / path).parent)
        write_file(args.work_path / path, content)
    write_file(note, digest)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from error


def _cut(text: str, tokenizer: Any, room: int, numbers: Sequence[int], name: str) -> list[str]:
    """Return windows of `room` tokens each."""
    # A token has fewer than 16 characters on average: what is behind the last window need not be tokenized.
    text = text[: 16 * room * (max(numbers) + 1)]
    for mark, plain in MARKS:
        text = text.replace(mark, plain)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(spans) <= room * (max(numbers) + 1):
        raise InputError(f"{name}: has too few tokens for {max(numbers) + 1} windows of {room}: {len(spans)}")
    return [text[spans[room * number][0] : spans[room * (number + 1)][0]] for number in numbers]


def _ask(args: argparse.Namespace, model: Sequence[Any], measure: Sequence[Any], kv: Path) -> None:
    ruler = args.work_path / "ruler"
    sizes = ["--num_tokens", args.answer_tokens, "--num_records", args.num_records, "--tasks", *args.tasks]
    _run("scripts/make_ruler.py", *model, *sizes, "--output_path", ruler)
    has_template = load_tokenizer(args.model_id, gguf_file=args.gguf_file).chat_template is not None
    for task in args.tasks:
        prompts = ["--path_to_context", ruler / f"{task}.jsonl", "--kv_folder", kv, "--schemes"]
        asked = ["--answers", "--no_plot", "--output_path", args.work_path / "answers" / task]
        asked += ["--chat_template"] if has_template else []
        _run(*measure, *prompts, *_choose(ANSWER_SCHEMES, args), *asked)


def _combine(args: argparse.Namespace) -> None:
    """Put what is measured together: rows of both protocols, and tables one after the other."""
    output, work = args.output_path, args.work_path
    _make_folder(output)
    measured = [work / protocol for protocol in ("tail", "half") if (work / protocol / "table.md").exists()]
    asked = [folder for task in args.tasks if ((folder := work / "answers" / task) / "table.md").exists()]
    for name, folders in (("results.csv", measured), ("contexts.csv", measured), ("answers.csv", asked)):
        if folders:
            write_file(output / name, _join([folder / name for folder in folders]))
    sections = []
    for folder in [*measured, *asked]:
        title = f"Protocol `{folder.name}`" if folder in measured else f"Answers to `{folder.name}`"
        sections.append(f"## {title}\n\n{read_file(folder / 'table.md', MAX_CONTEXT_BYTES).decode()}")
    write_file(output / "table.md", "\n".join(sections).encode())
    if (work / "tail/plot.png").exists():
        shutil.copyfile(work / "tail/plot.png", output / "plot.png")


def _join(paths: Sequence[Path]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for number, path in enumerate(paths):
        rows = list(csv.reader(io.StringIO(read_file(path, MAX_CONTEXT_BYTES).decode())))
        writer.writerows(rows[min(number, 1) :])
    return stream.getvalue().encode()


def _run(script: str, *arguments: Any) -> None:
    """Run a script of the repository; it has said what was wrong if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise InputError(f"{script}: ended with exit code {code}; what it says is above. The same command resumes")


if __name__ == "__main__":
    sys.exit(main())
