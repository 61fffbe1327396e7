#!/usr/bin/env python3
"""Prefill contexts once and save their KV caches: stage one of three, before run_encoding.py."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

SCRIPT_FOLDER = Path(__file__).resolve().parent
# In a clone that is not installed, the package is beside the script; an installed one comes first.
sys.path.append(str(SCRIPT_FOLDER / "src"))

from cachegen import startup  # noqa: E402

startup.guard_imports(__name__)

from cachegen import command_line  # noqa: E402
from cachegen.device import DEVICE_NAMES, DTYPE_NAMES, resolve_device, resolve_dtype  # noqa: E402
from cachegen.errors import (  # noqa: E402
    BitstreamError,
    ConfigError,
    InputError,
    OutputError,
    OutputExistsError,
    UnsupportedVersionError,
)
from cachegen.files import remove_stale_temporaries  # noqa: E402
from cachegen.kv_archive import is_damaged_kv_file  # noqa: E402
from cachegen.kv_cache import (  # noqa: E402
    describe_difference,
    hash_planes,
    hash_rotary_embeddings,
    hash_token_prefixes,
    load_kv_cache,
    save_kv_cache,
)
from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE  # noqa: E402
from cachegen.pipeline.context import read_context  # noqa: E402

if TYPE_CHECKING:
    import torch

    from cachegen.pipeline.model import LoadedModel

BYTES_PER_VALUE = 2  # kv_bytes counts fp16 values, whatever the dtype, so that ratios compare


@dataclass(frozen=True)
class Document:
    """One context to prefill: its number, its text's file and the cache's file."""

    doc_id: int
    context_path: Path
    kv_path: Path


class FileState(enum.Enum):
    """What is under the name that a document's cache gets."""

    FREE = enum.auto()
    FINISHED = enum.auto()
    DAMAGED = enum.auto()


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    model_default = command_line.default_input(SCRIPT_FOLDER, "models/tiny-mistral")
    command_line.add_model_flags(parser, model_default)
    add("--save_dir", default="data", help="folder of the caches, test_kv_N.pkl")
    context_default = command_line.default_input(SCRIPT_FOLDER, "9k_prompts/0.txt")
    add(
        "--path_to_context",
        default=context_default,
        help="a text file, a pipe such as /dev/stdin, or a folder of files N.txt",
    )
    add(
        "--doc_id",
        type=command_line.non_negative_int,
        help="number of the cache of a single file; None takes it from a name N.txt and is 0 otherwise",
    )
    add("--device", choices=DEVICE_NAMES, default="auto", help="auto is cuda where torch has it")
    add("--dtype", choices=DTYPE_NAMES, default="auto", help="of weights and cache; auto is the checkpoint's")
    command_line.add_weight_flags(parser)
    add("--num_gpus", type=command_line.positive_int, help="spread the layers over so many GPUs (needs accelerate)")
    add("--max_gpu_memory", type=command_line.positive_int, help="GiB of weights on each GPU at most")
    add(
        "--max_total_tokens",
        type=command_line.positive_int,
        help="of context, question and answer: for rotary embeddings whose frequencies depend on it (longrope, dynamic "
        "NTK); None leaves room for 256 tokens behind each context",
    )
    add("--block_size", type=command_line.positive_int, default=DEFAULT_BLOCK_SIZE, help="tokens per prefill step")
    add(
        "--overwrite",
        action="store_true",
        help="replace existing caches, whatever they are; damaged ones are replaced without it",
    )
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_prefill_documents, build_parser(), argv)


def _prefill_documents(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    documents = _find_documents(Path(args.path_to_context), Path(args.save_dir), args.doc_id)
    texts = [read_context(document.context_path) for document in documents]
    _make_folder(Path(args.save_dir))
    device, dtype = resolve_device(args.device), resolve_dtype(args.dtype)

    # transformers takes seconds to import, more than it takes to say that a file is missing.
    from tqdm import tqdm

    from cachegen.pipeline.frequencies import DEFAULT_ROOM, choose_frequencies
    from cachegen.pipeline.limits import check_context
    from cachegen.pipeline.model import load_model
    from cachegen.pipeline.prefill import tokenize
    from cachegen.pipeline.rotation import find_rotations

    loaded = load_model(
        args.model_id,
        device=device,
        dtype=dtype,
        gguf_file=args.gguf_file,
        weight_bits=args.weight_bits,
        num_gpus=args.num_gpus,
        max_gpu_memory=args.max_gpu_memory,
    )
    report.row("model", f"{loaded.model_id} ({loaded.dtype}, on {loaded.device})".replace("torch.", ""))

    # All contexts are checked before the first is prefilled: a mistake should not show after an hour.
    ids_of_documents = [tokenize(loaded, text) for text in texts]
    # The same model, with the frequencies for each document's length.
    models = [
        choose_frequencies(loaded, args.max_total_tokens or len(token_ids) + DEFAULT_ROOM)
        for token_ids in ids_of_documents
    ]
    states = []
    for document, token_ids, chosen in zip(documents, ids_of_documents, models, strict=True):
        if len(token_ids) < 2:
            raise InputError(f"{document.context_path}: a context needs at least two tokens, has {len(token_ids)}")
        check_context(chosen, len(token_ids), document.context_path)
        if loaded.max_tokens is not None and len(token_ids) > loaded.max_tokens:
            made_for = f"more than the {loaded.max_tokens} the model is made for"
            report.warn(f"{document.context_path}: {len(token_ids)} tokens, {made_for}")
        states.append((FileState.FREE, 0) if args.overwrite else _examine(document.kv_path, chosen, token_ids, args))

    num_tokens = sum(
        len(ids) - 1
        for ids, (state, _) in zip(ids_of_documents, states, strict=True)
        if state is not FileState.FINISHED
    )
    records = []
    with tqdm(total=num_tokens, unit="token", file=sys.stderr, disable=True if report.is_quiet else None) as bar:
        for document, token_ids, chosen, (state, num_values) in zip(
            documents, ids_of_documents, models, states, strict=True
        ):
            records.append(_prefill_document(document, chosen, token_ids, args, state, num_values, bar))
    used = [chosen for chosen, record in zip(models, records, strict=True) if not record["skipped"]]
    doubts = dict.fromkeys(find_rotations(chosen).describe_doubt() for chosen in used)
    for doubt in filter(None, doubts):
        report.warn(f"{loaded.model_id}: {doubt}")
    for record in records:
        _report_document(report, record)
    command_line.finish(
        args, {"stage": "prefill", "documents": records, "device": str(loaded.device), "dtype": loaded.dtype}
    )


def _prefill_document(
    document: Document,
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    args: argparse.Namespace,
    state: FileState,
    num_values: int,
    bar: Any,
) -> dict[str, Any]:
    """Prefill and save one context, unless that is done already, and return its JSON record.

    Args:
        state, num_values: what `_examine` found.

    Raises:
        OutputError: the file cannot be written, or another process has put another document's there meanwhile.
    """
    from cachegen.pipeline.prefill import prefill_context

    prefill_seconds = None
    if state is not FileState.FINISHED:
        start = time.perf_counter()
        cache, metadata = prefill_context(loaded, token_ids, args.block_size, progress=bar.update)
        prefill_seconds = time.perf_counter() - start
        num_values = cache.num_values
        metadata = dataclasses.replace(metadata, weight_bits=args.weight_bits)
        try:
            save_kv_cache(document.kv_path, cache, metadata, replace=args.overwrite or state is FileState.DAMAGED)
        except OutputExistsError:
            # Another process was faster: with the same document, which is as good, or with another, which stays.
            if _examine(document.kv_path, loaded, token_ids, args)[0] is not FileState.FINISHED:
                raise
            state = FileState.FINISHED
    return {
        "doc_id": document.doc_id,
        "path_to_context": document.context_path,
        "path_to_kv": document.kv_path,
        "num_tokens": len(token_ids) - 1,
        "kv_bytes": BYTES_PER_VALUE * num_values,
        "file_bytes": document.kv_path.stat().st_size,
        "prefill_seconds": prefill_seconds,
        "skipped": state is FileState.FINISHED,
        "was_damaged": state is FileState.DAMAGED,
    }


def _report_document(report: command_line.Reporter, record: dict[str, Any]) -> None:
    report.row("context", record["path_to_context"])
    report.row("  tokens cached", f"{record['num_tokens']:,}")
    report.row("  KV size", f"{command_line.format_bytes(record['kv_bytes'])} at 2 bytes per value")
    report.row("  file", f"{record['path_to_kv']} ({command_line.format_bytes(record['file_bytes'])})")
    seconds = record["prefill_seconds"]
    if record["was_damaged"]:
        report.row("  prefill", f"{seconds:.2f} s: the file was damaged: written again")
    elif record["skipped"]:
        report.row("  prefill", "skipped, the file is there already")
    else:
        report.row("  prefill", f"{seconds:.2f} s")


def _find_documents(context_path: Path, save_dir: Path, doc_id: int | None) -> list[Document]:
    """List what --path_to_context names, in numeric order."""
    if context_path.is_dir():
        if doc_id is not None:
            raise ConfigError(f"--doc_id is for a single file, {context_path} is a folder whose files are numbered")
        numbered = {int(path.stem): path for path in context_path.glob("*.txt") if _is_number(path.stem)}
        if not numbered:
            raise InputError(f"{context_path}: no context files N.txt (0.txt, 1.txt, ...) in this folder")
    elif context_path.exists():  # whether it can be read, `read_context` says: it may be a pipe
        number = int(context_path.stem) if context_path.suffix == ".txt" and _is_number(context_path.stem) else 0
        numbered = {number if doc_id is None else doc_id: context_path}
    else:
        raise InputError(f"{context_path}: no such context file or folder (--path_to_context)")
    return [Document(n, path, save_dir / f"test_kv_{n}.pkl") for n, path in sorted(numbered.items())]


def _is_number(text: str) -> bool:
    """Tell whether `text` is a number as we write it: digits, no leading zero, so that no two files share one."""
    return text.isascii() and text.isdigit() and str(int(text)) == text


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror} (--save_dir)") from error


def _examine(
    kv_path: Path, loaded: LoadedModel, token_ids: torch.Tensor, args: argparse.Namespace
) -> tuple[FileState, int]:
    """Tell whether a file is there, is what would be written, and is whole; and how many values it has, 0 if unknown.

    Raises:
        OutputError: it is something else, which only --overwrite may replace.
    """
    if not os.path.lexists(kv_path):
        return FileState.FREE, 0
    from cachegen.pipeline.prefill import choose_block_size, measure_plane_shapes

    remedy = "give another --save_dir, or --overwrite to replace it"
    try:
        cache, metadata = load_kv_cache(kv_path)
    except (BitstreamError, InputError) as error:
        is_ours = isinstance(error, BitstreamError) and not isinstance(error, UnsupportedVersionError)
        if is_ours and is_damaged_kv_file(kv_path):
            return FileState.DAMAGED, 0
        raise OutputError(f"{error}; {remedy}") from error
    num_cached = len(token_ids) - 1
    shapes = [(plane.shape[1], plane.shape[2]) for plane in cache.planes]
    differences = {
        "model": metadata.model_fingerprint != loaded.fingerprint,
        "context": hash_token_prefixes(metadata.token_ids, [cache.num_tokens])
        != hash_token_prefixes(token_ids[:-1], [num_cached]),
        "dtype": cache.dtype != loaded.dtype,
        "block size": metadata.block_size != choose_block_size(loaded, args.block_size, num_cached),
        "precision of the weights (--load_in_8bit, --load_in_4bit)": metadata.weight_bits != args.weight_bits,
        # What a model caches has changed between versions of transformers (latent attention).
        "form of keys and values": describe_difference(shapes, measure_plane_shapes(loaded)) is not None,
        "rotary embedding": metadata.rope_hash != hash_rotary_embeddings(loaded.rotary_embeddings),
    }
    differing = [name for name, differs in differences.items() if differs]
    if differing:
        raise OutputError(f"{kv_path}: was made with another {' and another '.join(differing)}; {remedy}")
    # What the file says about itself is covered by checksums; this reads the values, too.
    is_whole = hash_planes(cache) == metadata.cache_hash
    return FileState.FINISHED if is_whole else FileState.DAMAGED, cache.num_values


if __name__ == "__main__":
    sys.exit(main())
