"""Killed at 200 random moments and run again, every script ends with the bytes of an undisturbed run, and no others."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cachegen.kv_cache import load_kv_cache
from cachegen.store.catalog import find_document
from cachegen.store.store import open_store
from tests.fixtures.fault_documents import Documents, snapshot, without_temporaries

pytestmark = pytest.mark.faults


@dataclass(frozen=True)
class Case:
    """A script that writes into a folder, and how often it is killed.

    Attributes:
        argv: from the documents and the folder.
        begin: makes the state of the folder before the run; None leaves it away.
        check: what must hold of the folder whenever the script was killed.
    """

    script: str
    num_kills: int
    argv: Callable[[Documents, Path], Sequence[object]]
    begin: Callable[[Documents, Path], object] | None = None
    check: Callable[[Documents, Path], object] | None = None


def prefill_otherwise(documents: Documents, folder: Path) -> None:
    assert documents.server.run("main", [*documents.prefill_flags(folder), "--block_size", 64]).exit_code == 0


def encode_otherwise(documents: Documents, folder: Path) -> None:
    argv = [*documents.encode_flags("packed", folder), "--chunk_size", 70]
    assert documents.server.run("run_encoding", argv).exit_code == 0


def check_kv_files_are_whole(documents: Documents, folder: Path) -> None:
    for name in without_temporaries(snapshot(folder)):
        load_kv_cache(folder / name)


def check_document_is_whole_or_absent(documents: Documents, folder: Path) -> None:
    """What a client sees of a store whose writer was killed."""
    if not (folder / "store.json").exists():
        return
    store, (_, metadata) = open_store(folder), load_kv_cache(documents.kv_path)
    ids = torch.cat([metadata.token_ids, torch.tensor([1], dtype=torch.int32)])
    found = find_document(store, ids, model_fingerprint=metadata.model_fingerprint, rope_hash=metadata.rope_hash)
    if found is not None:
        objects = [level.tables for level in found.manifest.levels]
        objects += [file for chunk in found.manifest.chunks for file in chunk.files]
        for described in objects:
            store.get_exactly(described.name, described.bytes, sha256=described.sha256)


def encode(method: str) -> Callable[[Documents, Path], Sequence[object]]:
    return lambda documents, folder: documents.encode_flags(method, folder)


CASES = {
    "main": Case("main", 40, lambda documents, folder: documents.prefill_flags(folder), check=check_kv_files_are_whole),
    "main that overwrites": Case(
        "main",
        10,
        lambda documents, folder: [*documents.prefill_flags(folder), "--overwrite"],
        prefill_otherwise,
        check_kv_files_are_whole,
    ),
    "run_encoding, rans": Case("run_encoding", 25, encode("rans")),
    "run_encoding, ac": Case("run_encoding", 20, encode("ac")),
    "run_encoding, packed": Case("run_encoding", 20, encode("packed")),
    "run_encoding, transform": Case("run_encoding", 25, encode("transform")),
    "run_encoding that overwrites": Case(
        "run_encoding",
        10,
        lambda documents, folder: [*documents.encode_flags("rans", folder), "--overwrite"],
        encode_otherwise,
    ),
    "run_publishing": Case(
        "run_publishing",
        35,
        lambda documents, folder: documents.publish_flags(folder),
        check=check_document_is_whole_or_absent,
    ),
}
DISK_KILLS = 15


def test_there_are_200_moments():
    assert sum(case.num_kills for case in CASES.values()) + DISK_KILLS == 200


@pytest.mark.parametrize("name", CASES)
def test_killed_and_run_again_a_script_writes_the_undisturbed_bytes(documents, tmp_path, name):
    case, generator = CASES[name], random.Random(name)
    script_server = documents.server
    seconds = []
    for undisturbed in (tmp_path / "first", tmp_path / "second", tmp_path / "third"):
        if case.begin is not None:
            case.begin(documents, undisturbed)
        outcome = script_server.run(case.script, case.argv(documents, undisturbed))
        assert outcome.exit_code == 0, outcome
        seconds.append(outcome.seconds)
        assert snapshot(undisturbed) == snapshot(tmp_path / "first")
    expected, num_killed, num_left = snapshot(tmp_path / "first"), 0, 0
    for number in range(case.num_kills):
        folder = tmp_path / f"work-{number}"
        if case.begin is not None:
            case.begin(documents, folder)
        argv = case.argv(documents, folder)
        # Every fifth document is killed over twice. The moments lie in all of an undisturbed run or, every other one,
        # in the time when files are written.
        for _ in range(2 if number % 5 == 0 else 1):
            for attempt in range(20):  # until it is killed: it may have been faster
                moment = {"kill_after": generator.uniform(0, min(seconds)) * 0.9**attempt}
                if number % 2 and attempt < 10:
                    moment = {"kill_after": generator.uniform(0, 0.03) * 0.7**attempt, "kill_writing_in": str(folder)}
                outcome = script_server.run(case.script, argv, **moment)
                if outcome.exit_code == -signal.SIGKILL:
                    num_killed += 1
                    break
                assert outcome.exit_code == 0, outcome
                shutil.rmtree(folder)
                if case.begin is not None:
                    case.begin(documents, folder)
            num_left += snapshot(folder) != without_temporaries(snapshot(folder))
            if case.check is not None:
                case.check(documents, folder)
        again = script_server.run(case.script, argv)
        assert again.exit_code == 0, again
        assert snapshot(folder) == expected, f"moment {number}"
    assert num_killed >= case.num_kills
    print(f"{name}: {num_killed} killed, {num_left} times a temporary file was left")


def test_killed_and_run_again_decoding_answers_the_same(documents, tmp_path):
    """It writes nothing but its JSON, and that whole or not at all."""
    generator, folder = random.Random(0), documents.encoded("rans")
    argv, before = [*documents.decode_flags(folder), "--quiet"], snapshot(documents.folder)
    first = documents.server.run("run_decoding_disk", [*argv, "--json", tmp_path / "first.json"])
    assert first.exit_code == 0, first
    answer = json.loads((tmp_path / "first.json").read_text())["text"]
    for number in range(DISK_KILLS):
        output = tmp_path / str(number)
        flags = [*argv, "--json", output / "decode.json"]
        documents.server.run("run_decoding_disk", flags, kill_after=generator.uniform(0, 1.05 * first.seconds))
        for file in without_temporaries(snapshot(output)).values():
            assert json.loads(file)["text"] == answer
        again = documents.server.run("run_decoding_disk", flags)
        assert again.exit_code == 0, again
        assert json.loads((output / "decode.json").read_text())["text"] == answer
        assert snapshot(documents.folder) == before
