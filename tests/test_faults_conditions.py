"""Whatever a run meets: its files whole and right, or one line, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.fixtures import REPOSITORY
from tests.fixtures.fault_documents import Documents, answer_of, copy, is_root, snapshot, without_temporaries
from tests.fixtures.script_processes import Outcome

pytestmark = pytest.mark.faults

Argv = Callable[[Documents, Path], Sequence[object]]
WRITERS: dict[str, tuple[str, Argv, str]] = {
    # script, flags, and what it writes when nothing is in its way
    "main": ("main", lambda documents, folder: documents.prefill_flags(folder), "data"),
    "rans": ("run_encoding", lambda documents, folder: documents.encode_flags("rans", folder), "encoded-rans"),
    "transform": (
        "run_encoding",
        lambda documents, folder: documents.encode_flags("transform", folder),
        "encoded-transform",
    ),
    "publishing": ("run_publishing", lambda documents, folder: documents.publish_flags(folder), "store"),
}
READERS: dict[str, tuple[str, Argv]] = {
    "disk": ("run_decoding_disk", lambda documents, _: documents.decode_flags(documents.encoded("transform"))),
    "remote": ("run_decoding_remote", lambda documents, _: documents.remote_flags(documents.folder / "store")),
}
PLENTY_OF_SECONDS = 30  # a run takes less than one; this is for a busy machine


def check(documents: Documents, folder: Path, expected: str, outcome: Outcome, exit_codes: Sequence[int]) -> None:
    """The promise, for a script that writes."""
    assert outcome.seconds < PLENTY_OF_SECONDS
    wanted, found = snapshot(documents.folder / expected), snapshot(folder)
    if outcome.exit_code == 0:
        assert found == wanted
        return
    assert outcome.exit_code in exit_codes, outcome
    assert outcome.error_line
    assert found.items() <= wanted.items(), "half-written, or left behind"


def check_repeated(documents: Documents, folder: Path, name: str) -> None:
    """Run again with nothing in the way, a script ends as if nothing had been."""
    script, argv, expected = WRITERS[name]
    outcome = documents.server.run(script, argv(documents, folder))
    assert outcome.exit_code == 0, outcome
    assert snapshot(folder) == snapshot(documents.folder / expected)


@pytest.fixture(scope="module")
def answers(documents: Documents) -> dict[str, str]:
    """What the readers answer when nothing is in their way."""
    found = {}
    for name, (script, argv) in READERS.items():
        outcome = documents.server.run(script, [*argv(documents, documents.folder), "--json", "-"])
        assert outcome.exit_code == 0, outcome
        found[name] = answer_of(outcome)
    return found


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount small file systems of one's own, where that is allowed."""
    mounted: list[Path] = []

    def do(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        if not is_root() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
            pytest.skip("a file system cannot be mounted here")
        mounted.append(folder)
        return folder

    yield do
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


# --- places that cannot be written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(documents, tmp_path, mount, name):
    script, argv, expected = WRITERS[name]
    size = sum(map(len, snapshot(documents.folder / expected).values()))
    for share in (0.02, 0.3, 0.6, 0.9):
        disk = mount(f"size={max(4, int(share * size / 4096) * 4)}k")
        folder = disk / "output"
        outcome = documents.server.run(script, argv(documents, folder))
        check(documents, folder, expected, outcome, [7])
        assert outcome.exit_code == 7 and "No space left on device" in outcome.err and str(disk) in outcome.err
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        check_repeated(documents, folder, name)


@pytest.mark.parametrize("name", WRITERS)
def test_files_beyond_the_size_limit(documents, tmp_path, name):
    script, argv, expected = WRITERS[name]
    for limit in (4_500, 20_000, 60_000):
        folder = tmp_path / str(limit)
        outcome = documents.server.run(script, argv(documents, folder), limits={"FSIZE": limit})
        check(documents, folder, expected, outcome, [7])
        check_repeated(documents, folder, name)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.ENOSPC])
def test_a_quota_that_shows_when_a_file_is_flushed(documents, tmp_path, name, number):
    script, argv, expected = WRITERS[name]
    outcome = documents.server.run(script, argv(documents, tmp_path / "output"), fsync_errno=number)
    check(documents, tmp_path / "output", expected, outcome, [7])
    assert outcome.exit_code == 7 and os.strerror(number) in outcome.err
    check_repeated(documents, tmp_path / "output", name)


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_read_only(documents, mount, name):
    script, argv, expected = WRITERS[name]
    folder = mount("size=1m,ro")
    for place in (folder, folder / "below"):
        outcome = documents.server.run(script, argv(documents, place))
        check(documents, place, expected, outcome, [7])
        assert outcome.exit_code == 7 and str(folder) in outcome.err


@pytest.mark.parametrize("name", READERS)
def test_a_json_that_cannot_be_written(documents, mount, tmp_path, name):
    script, argv = READERS[name]
    full, read_only = mount("size=4k"), mount("size=1m,ro")
    (full / "mine").write_bytes(bytes(4096))
    for folder in (full, read_only):
        before = snapshot(folder)
        outcome = documents.server.run(script, [*argv(documents, tmp_path), "--quiet", "--json", folder / "x.json"])
        assert outcome.exit_code == 7 and f"{folder}/x.json: cannot be written" in outcome.error_line
        assert snapshot(folder) == before


# --- what the process is denied ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
@pytest.mark.parametrize("stdout", ["closed", "/dev/full"])
def test_a_standard_output_that_takes_nothing(documents, tmp_path, answers, name, stdout):
    if name in WRITERS:
        script, argv, expected = WRITERS[name]
        outcome = documents.server.run(script, argv(documents, tmp_path / "output"), stdout=stdout)
        check(documents, tmp_path / "output", expected, outcome, [7])
    else:
        script, reader_argv = READERS[name]
        argv_with_json = [*reader_argv(documents, tmp_path), "--json", tmp_path / "x.json"]
        outcome = documents.server.run(script, argv_with_json, stdout=stdout)
        if outcome.exit_code == 0:
            assert json.loads((tmp_path / "x.json").read_text())["text"].split()[0] == answers[name]
    if stdout == "closed":
        assert (outcome.exit_code, outcome.err) == (0, "")
    else:
        assert (outcome.exit_code, outcome.err) == (
            7,
            "error: standard output cannot be written: No space left on device\n",
        )


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_asks_to_end(documents, tmp_path, name, number):
    """At moments from beginning to end: one line, 128 and the signal's number, and no temporary file left."""
    script, argv, expected = WRITERS[name]
    generator, num_ended = random.Random(name), 0
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        moment = {"kill_after": generator.uniform(0.02, 0.2)}
        if attempt % 2:
            moment = {"kill_after": generator.uniform(0, 0.01), "kill_writing_in": str(folder)}
        outcome = documents.server.run(script, argv(documents, folder), kill_signal=number, **moment)
        # Before the script has taken over, the signal's own effect is the end, without a word.
        if outcome.exit_code != -number:
            check(documents, folder, expected, outcome, [128 + number])
        assert snapshot(folder) == without_temporaries(snapshot(folder))
        num_ended += outcome.exit_code == 128 + number
        check_repeated(documents, folder, name)
    assert num_ended


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_few_open_files(documents, tmp_path, answers, name):
    for limit in (3, 4, 6, 8, 12, 20, 40):
        folder = tmp_path / str(limit)
        if name in WRITERS:
            script, argv, expected = WRITERS[name]
            outcome = documents.server.run(script, argv(documents, folder), limits={"NOFILE": limit})
            check(documents, folder, expected, outcome, [1, 3, 7])
            check_repeated(documents, folder, name)
        else:
            script, reader_argv = READERS[name]
            outcome = documents.server.run(
                script, [*reader_argv(documents, folder), "--json", "-", "--quiet"], limits={"NOFILE": limit}
            )
            assert outcome.seconds < PLENTY_OF_SECONDS
            if outcome.exit_code == 0:
                assert answer_of(outcome) == answers[name]
            else:
                assert outcome.exit_code in (1, 3, 7) and outcome.error_line


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_little_memory(documents, tmp_path, answers, name):
    """One line where Python or torch is denied memory. Native libraries may abort; nothing is half-written even so."""
    for megabytes in (0, 1, 4, 10, 20, 40, 80, 150):
        folder = tmp_path / str(megabytes)
        argv = WRITERS[name][1] if name in WRITERS else READERS[name][1]
        script = (WRITERS | READERS)[name][0]
        flags = [*argv(documents, folder), *([] if name in WRITERS else ["--json", "-", "--quiet"])]
        outcome = documents.server.run(script, flags, limits={"AS": megabytes << 20})
        assert outcome.seconds < PLENTY_OF_SECONDS
        is_loaders = outcome.exit_code == 127 and "cannot allocate memory for thread-local data" in outcome.err
        assert is_loaders or outcome.exit_code in (0, 1, 3, 7, -signal.SIGABRT, -signal.SIGSEGV), outcome
        assert outcome.exit_code < 0 or "Traceback" not in outcome.err or "panicked" in outcome.err, outcome
        if name in WRITERS:
            wanted = snapshot(documents.folder / WRITERS[name][2])
            assert without_temporaries(snapshot(folder)).items() <= wanted.items()
            check_repeated(documents, folder, name)
        elif outcome.exit_code == 0:
            assert answer_of(outcome) == answers[name]


# --- clocks, names, locales, permissions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("years", [-20, 20, 10_000])
def test_a_clock_that_jumps(documents, tmp_path, name, years):
    script, argv, expected = WRITERS[name]
    seconds = years * 365.25 * 24 * 3600
    folder = tmp_path / "output"
    outcome = documents.server.run(script, argv(documents, folder), clock_jump=seconds)
    check(documents, folder, expected, outcome, [])
    for path in [*folder.rglob("*"), folder]:  # files from the future, or from long ago
        os.utime(path, (max(0, time.time() + seconds) % (1 << 33),) * 2)
    check_repeated(documents, folder, name)


@pytest.mark.parametrize("name", READERS)
def test_a_clock_that_jumps_while_answering(documents, tmp_path, answers, name):
    script, argv = READERS[name]
    for seconds in (-1e9, 1e9):
        outcome = documents.server.run(script, [*argv(documents, tmp_path), "--json", "-"], clock_jump=seconds)
        assert outcome.exit_code == 0 and answer_of(outcome) == answers[name]


def test_a_umask_of_077(documents, tmp_path):
    for name, (script, argv, expected) in WRITERS.items():
        folder = tmp_path / name
        outcome = documents.server.run(script, argv(documents, folder), umask=0o077)
        check(documents, folder, expected, outcome, [])
        assert outcome.exit_code == 0
        assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
        check_repeated(documents, folder, name)


NAMES = {
    "spaces": "  a b  ",
    "newlines": "a\nb\n",
    "Latin-1": os.fsdecode(b"caf\xe9"),
    "UTF-8": "für 語",
    "a dash": "--overwrite",
    "shell": "$(touch x); *?'\"",
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_of_any_bytes(documents, tmp_path, answers, kind):
    """All that is read and written lies below a folder of that name."""
    folder = tmp_path / NAMES[kind]
    made = Documents(documents.server, folder)
    folder.mkdir()
    copy(documents.context, made.context)
    for name, (script, argv, expected) in WRITERS.items():
        outcome = made.server.run(script, [*argv(made, made.folder / expected), "--json", folder / f"{name}.json"])
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
        assert snapshot(made.folder / expected) == snapshot(documents.folder / expected)
        record = json.loads((folder / f"{name}.json").read_bytes())
        assert any(NAMES[kind] in str(value) for value in record["config"].values())
    for name, (script, argv) in READERS.items():
        outcome = made.server.run(script, [*argv(made, folder), "--json", "-", "--quiet"])
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
        assert answer_of(outcome) == answers[name]
    outcome = made.server.run("run_decoding_disk", made.decode_flags(folder / "nothing"))
    assert outcome.exit_code == 3 and outcome.error_line


@pytest.mark.parametrize("kind", ["Latin-1", "UTF-8"])
def test_a_locale_of_ascii(documents, tmp_path, answers, kind):
    """Real processes: the locale is taken up as the interpreter starts."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    folder = tmp_path / NAMES[kind]
    folder.mkdir()
    made = Documents(documents.server, folder)
    context = made.context
    context.write_bytes(documents.context.read_bytes())
    steps: list[tuple[str, Sequence[object]]] = [
        ("main", made.prefill_flags(folder / "data")),
        ("run_encoding", made.encode_flags("transform", made.encoded("transform"))),
        ("run_decoding_disk", [*made.decode_flags(made.encoded("transform")), "--json", "-"]),
        ("run_decoding_disk", made.decode_flags(folder / "nothing")),
    ]
    done = []
    for script, argv in steps:
        command = [sys.executable, str(REPOSITORY / f"{script}.py"), *(os.fsencode(str(a)) for a in argv)]
        done.append(subprocess.run(command, capture_output=True, env=environment, cwd=REPOSITORY))
    assert [process.returncode for process in done] == [0, 0, 0, 3], done
    assert all(b"Traceback" not in process.stderr for process in done)
    assert snapshot(folder / "data") == snapshot(documents.folder / "data")
    assert json.loads(done[2].stdout)["text"].split()[0] == answers["disk"]
    assert done[3].stderr.startswith(b"error: ") and done[3].stderr.count(b"\n") == 1


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_two_processes_side_by_side(documents, tmp_path, name):
    """Each ends well or says that another is at work; what is there in the end is one undisturbed run's."""
    script, argv, expected = WRITERS[name]
    generator = random.Random(name)
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        runs = [documents.server.start(script, argv(documents, folder))]
        time.sleep(generator.uniform(0, 0.05))
        runs.append(documents.server.start(script, argv(documents, folder)))
        outcomes = [run.wait(PLENTY_OF_SECONDS) for run in runs]
        assert any(outcome.exit_code == 0 for outcome in outcomes), outcomes
        for outcome in outcomes:
            if outcome.exit_code != 0:
                assert outcome.exit_code == 7 and "another process is writing" in outcome.error_line
        assert snapshot(folder) == snapshot(documents.folder / expected)


def test_one_is_killed_while_another_works(documents, tmp_path):
    """Two GPUs filling one folder: the one's end takes nothing from the other, and what it left goes away."""
    context = tmp_path / "1.txt"
    context.write_text(documents.context.read_text()[::-1])
    generator = random.Random(0)
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        other = ["--path_to_context", context, "--save_dir", folder, "--device", "cpu"]
        killed = documents.server.start(
            "main", other, kill_after=generator.uniform(0, 0.01), kill_writing_in=str(folder)
        )
        working = documents.server.start("main", documents.prefill_flags(folder))
        assert working.wait().exit_code == 0
        killed.wait()
        assert documents.server.run("main", other).exit_code == 0
        found = snapshot(folder)
        assert found["test_kv_0.pkl"] == documents.kv_path.read_bytes()
        assert sorted(found) == ["test_kv_0.pkl", "test_kv_1.pkl"]
