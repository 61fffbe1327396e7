"""run_decoding_remote.py on the bundled model and a real web server: the right answer, or one line, from any server."""

from __future__ import annotations

import json
import re

import pytest
import torch

import run_decoding_disk
import run_decoding_remote
import run_encoding
import run_publishing
from cachegen.kv_cache import from_planes, load_kv_cache
from cachegen.methods import load_config
from cachegen.pipeline import model, session
from cachegen.pipeline.model_cache import view_kv_cache
from tests.fixtures import BUNDLED_MODEL, REPOSITORY
from tests.fixtures.absmax import quantize_and_dequantize
from tests.fixtures.caches import are_equal
from tests.fixtures.models import copy_with_other_keys
from tests.fixtures.script_runs import (
    FIRST,
    FIRST_ANSWER,
    LEVEL_CONFIGS,
    NUM_CHUNKS,
    SECOND,
    TEXT,
    Published,
    answer_of,
    load_model_once,
    publish_text,
    run_to_json,
    to_argv,
)
from tests.fixtures.web_server import HttpServer, Misbehaviour, serve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def published(tmp_path_factory, one_thread) -> Published:
    return publish_text(tmp_path_factory.mktemp("published"))


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    monkeypatch.setattr(model, "load_model", load_model_once)


@pytest.fixture
def server(published):
    with serve(published.folder) as running:
        yield running


@pytest.fixture
def argv(server, published) -> list[str]:
    flags = {
        "--path_to_encoded_kv": f"{server.url}/store",
        "--path_to_context": published.context,
        "--model_id": BUNDLED_MODEL,
        "--stall_seconds": 0.3,
        "--max_new_tokens": 8,
    }
    return to_argv(flags)


class TestAnswers:
    """What a good run says."""

    def test_json_has_the_disk_scripts_keys_and_a_log_of_every_chunk(self, argv, capsys):
        record = run_to_json(argv, capsys, "--slo", 30, "--level", 1, "--question", FIRST)
        keys = "num_cached_tokens num_recomputed_tokens num_chunks encoded_bytes load_seconds decode_seconds "
        keys += "prefill_seconds ttft_seconds text token_ids answers device decoding_device config versions"
        assert set(keys.split()) <= set(record)
        assert answer_of(record) == FIRST_ANSWER and record["num_chunks"] == NUM_CHUNKS
        assert [chunk["chunk"] for chunk in record["chunks"]] == list(range(NUM_CHUNKS))
        log = "level num_bytes seconds estimate_bytes_per_second num_queued source problems"
        assert all(set(log.split()) <= set(chunk) for chunk in record["chunks"])
        assert {span["worker"] for span in record["timeline"]} >= {"fetch", "decode", "copy"}
        assert record["slo_met"] is True and record["problems"] == []

    @pytest.mark.parametrize("level", [1, 2, 3])
    def test_a_level_gives_exactly_the_disk_scripts_cache_and_answers(
        self, published, argv, capsys, monkeypatch, level
    ):
        given = []
        generate_answer = session.generate_answer

        def note_and_generate(loaded, cache, num_cached_tokens, *rest):
            planes = view_kv_cache(cache, num_cached_tokens).planes
            given.append(from_planes([plane.clone(memory_format=torch.contiguous_format) for plane in planes]))
            return generate_answer(loaded, cache, num_cached_tokens, *rest)

        monkeypatch.setattr(session, "generate_answer", note_and_generate)
        questions = ["--question", FIRST, "--question", SECOND]
        remote = run_to_json(argv, capsys, "--level", level, *questions)
        config = LEVEL_CONFIGS[level - 1]
        saved, _ = load_kv_cache(published.kv_path)
        path = REPOSITORY / "config" / f"{config}.json"
        expected = quantize_and_dequantize(saved, load_config(path))
        assert len(given) == 2 and all(are_equal(cache, expected) for cache in given)
        disk_argv = [*argv, *questions, "--path_to_encoded_kv", str(published.folder / config)]
        disk_argv = [flag for flag in disk_argv if flag not in ("--stall_seconds", "0.3")]
        capsys.readouterr()
        assert run_decoding_disk.main([*disk_argv, "--json", "-"]) == 0
        disk = json.loads(capsys.readouterr().out)
        assert remote["answers"] == disk["answers"]
        assert remote["num_recomputed_tokens"] == 0 and {c["level"] for c in remote["chunks"]} == {level}

    @pytest.mark.parametrize("policy", ["text", "cachegen", "ours"])
    def test_every_policy_answers(self, argv, capsys, policy):
        record = run_to_json(argv, capsys, "--policy", policy, "--slo", 0.2, "--question", FIRST, "--verify")
        assert answer_of(record) == FIRST_ANSWER == record["text_uncompressed"].split()[0]
        if policy == "text":
            assert record["num_cached_tokens"] == 0 and record["encoded_bytes"] == 0
            assert record["kl"] < 1e-4 and record["greedy_match"] is True

    def test_a_folder_is_a_store_too(self, published, argv, capsys):
        record = run_to_json(argv, capsys, "--path_to_encoded_kv", published.store, "--question", FIRST)
        assert answer_of(record) == FIRST_ANSWER

    def test_a_text_that_differs_late_uses_the_chunks_before(self, argv, capsys, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text(TEXT[: len(TEXT) // 2] + " And then, all of a sudden, it was over.")
        record = run_to_json(argv, capsys, "--path_to_context", other, "--level", 3)
        assert 0 < record["num_chunks"] < NUM_CHUNKS and record["num_recomputed_tokens"] > 0

    def test_the_first_chunks_only(self, argv, capsys):
        record = run_to_json(argv, capsys, "--num_chunks", 2, "--level", 3, "--question", FIRST)
        assert record["num_chunks"] == 2 and answer_of(record) == FIRST_ANSWER

    def test_configs_that_agree_are_accepted(self, argv, capsys):
        config = REPOSITORY / "config" / "quantization_tiny_fine.json"
        flags = ["--quantization_config", config, "--model_config", REPOSITORY / "config" / "tiny_mistral.json"]
        assert len(run_to_json(argv, capsys, "--level", 2, *flags)["token_ids"]) == 8

    def test_quiet_prints_nothing(self, argv, capfd):
        assert run_decoding_remote.main([*argv, "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")


LIES = [
    Misbehaviour("-L3-", "flip", position=5000),
    Misbehaviour("-L3-", "status", body=b"404"),
    Misbehaviour("-L3-", "status", body=b"500"),
    Misbehaviour("-L3-", "hang up", position=3000),
    Misbehaviour("-L3-", "stall", position=3000),
    Misbehaviour("-L3-", "drip", position=3000),
    Misbehaviour("-L3-", "huge length"),
    Misbehaviour("-L3-", "short", position=2000),
    Misbehaviour("-L3-", "long"),
    Misbehaviour("-L3-", "garbage"),
    Misbehaviour("-L3-", "no length"),
    Misbehaviour("chunks/", "status", body=b"404"),
    Misbehaviour("chunks/", "other body", body=b"<html>Please log in</html>"),
    Misbehaviour("tables/", "flip", position=100),
    Misbehaviour("tables/", "status", body=b"404"),
]


class TestLyingServer:
    """The right answer, whatever the server does to the files."""

    @pytest.mark.parametrize("fault", LIES, ids=lambda fault: f"{fault.path} {fault.how} {fault.body[:4].decode()}")
    def test_what_cannot_be_had_comes_from_another_level_or_from_text(self, server, argv, capsys, fault):
        server.faults = [fault]
        capsys.readouterr()
        assert run_decoding_remote.main([*argv, "--level", "3", "--question", FIRST, "--json", "-"]) == 0
        output = capsys.readouterr()
        record = json.loads(output.out)
        assert answer_of(record) == FIRST_ANSWER
        assert {chunk["level"] for chunk in record["chunks"]} == {2 if fault.path == "-L3-" else "text"}
        assert output.err.count("warning: ") == len(record["problems"]) > 0

    @pytest.mark.parametrize("path", ["store.json", "prefixes/", "documents/"])
    @pytest.mark.parametrize("how", ["drip for ever", "drip its headers", "stall"])
    def test_a_store_too_slow_to_say_what_it_has_is_answered_from_the_text(self, server, argv, capsys, path, how):
        server.faults = [Misbehaviour(path, how, methods=("GET", "HEAD"))]
        capsys.readouterr()
        assert run_decoding_remote.main([*argv, "--question", FIRST, "--json", "-", "--dtype", "float32"]) == 0
        output = capsys.readouterr()
        record = json.loads(output.out)
        assert answer_of(record) == FIRST_ANSWER and record["policy"] == "text"
        assert record["manifest"] is None and record["num_recomputed_tokens"] > 0
        assert "; computed from the text" in output.err and output.err.count("warning: ") == 1

    def test_a_redirect_is_a_failure_unless_it_is_allowed(self, server, published, argv, capsys):
        with serve(published.folder) as elsewhere:
            names = [path.relative_to(published.folder) for path in (published.store / "chunks").rglob("*-L3-*")]
            server.faults = [
                Misbehaviour(str(name), "redirect", body=f"302 {elsewhere.url}/{name}".encode()) for name in names
            ]
            flags = ["--level", "3", "--question", FIRST]
            assert run_decoding_remote.main([*argv, "--json", "-", *flags]) == 0
            output = capsys.readouterr()
            record = json.loads(output.out)
            assert {chunk["level"] for chunk in record["chunks"]} == {2} and elsewhere.requests == []
            assert "`follow_redirects` allows it" in record["problems"][0]
            assert "--follow-redirects allows it" in output.err
            record = run_to_json(argv, capsys, *flags, "--follow-redirects")
            assert {chunk["level"] for chunk in record["chunks"]} == {3} and record["problems"] == []

    def test_another_documents_chunk_is_not_used(self, server, published, argv, capsys):
        chunks = sorted((published.store / "chunks").rglob("*-L3-*"))
        server.faults = [Misbehaviour("-L3-", "other body", body=chunks[0].read_bytes())]
        record = run_to_json(argv, capsys, "--level", 3, "--question", FIRST)
        levels = [chunk["level"] for chunk in record["chunks"]]
        assert sorted(levels) == [2, 2, 2, 2, 3] and answer_of(record) == FIRST_ANSWER


class TestRefusals:
    """One line on stderr and its exit code."""

    def test_no_server(self, argv, refuse):
        argv[1] = "http://127.0.0.1:9/store"
        assert "http://127.0.0.1:9/store/store.json: " in refuse(run_decoding_remote.main, argv, 3)

    def test_no_store(self, argv, server, refuse):
        argv[1] = f"{server.url}/nothing"
        assert "not a store of cachegen (fill one with run_publishing.py)" in refuse(run_decoding_remote.main, argv, 3)

    def test_a_context_that_is_not_there(self, argv, refuse, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text("Something else entirely. " * 300)
        error = refuse(run_decoding_remote.main, [*argv, "--path_to_context", other], 3)
        assert "holds no chunk of this context for this model (add it with run_publishing.py)" in error

    def test_other_weights_behind_the_same_config_and_tokenizer_are_another_model(self, argv, refuse, tmp_path):
        other = copy_with_other_keys(tmp_path / "other")
        error = refuse(run_decoding_remote.main, [*argv, "--model_id", other], 3)
        assert "holds no chunk of this context for this model" in error

    @pytest.mark.parametrize(
        ("fault", "code"),
        [
            (Misbehaviour("documents/", "other body", body=b'{"format": "cachegen-manifest"}'), 4),
            (Misbehaviour("documents/", "huge length"), 3),
            (Misbehaviour("documents/", "status", body=b"404"), 3),
            (Misbehaviour("prefixes/", "other body", body=b'{"manifest": "../../etc/passwd"}'), 4),
            (Misbehaviour("store.json", "garbage"), 3),
        ],
    )
    def test_a_manifest_that_lies(self, server, argv, refuse, fault, code):
        server.faults = [fault]
        assert server.url in refuse(run_decoding_remote.main, argv, code)

    def test_more_chunks_or_levels_than_there_are(self, argv, refuse):
        assert "--num_chunks 6 asked for, 5 are there" in refuse(
            run_decoding_remote.main, [*argv, "--num_chunks", 6], 2
        )
        assert "--level 4 asked for" in refuse(run_decoding_remote.main, [*argv, "--level", 4], 2)

    def test_a_profile_that_nothing_would_use(self, argv, refuse, published):
        error = refuse(run_decoding_remote.main, [*argv, "--profile", "x"], 2)
        assert "--profile is not for method cachegen, which the document is of" in error
        argv = ["--path_to_encoded_kv", published.folder / LEVEL_CONFIGS[0], "--path_to_context", published.context]
        error = refuse(run_decoding_disk.main, [*argv, "--profile", "x"], 2)
        assert "--profile is not for method cachegen, which the document is of" in error

    def test_another_dtype(self, argv, refuse):
        error = refuse(run_decoding_remote.main, [*argv, "--dtype", "bfloat16"], 5)
        assert "dtype is torch.float32, but the model has torch.bfloat16" in error

    def test_a_config_of_another_quantization(self, argv, refuse):
        config = REPOSITORY / "config" / "quantization_tiny.json"
        error = refuse(run_decoding_remote.main, [*argv, "--level", 2, "--quantization_config", config], 5)
        assert "key_first_bins is 64" in error

    @pytest.mark.parametrize(
        "flags", [["--slo", "0"], ["--slo", "nan"], ["--level", "0"], ["--policy", "x"], ["--target_kl", "-1"]]
    )
    def test_a_wrong_flag(self, argv, refuse, flags):
        assert flags[0] in refuse(run_decoding_remote.main, [*argv, *flags], 2)


@pytest.mark.parametrize("level", [1, 2, None])
def test_levels_that_refine_each_other_are_loaded_file_by_file(published, server, argv, capsys, level):
    encoded, store = published.folder / "transform", published.folder / "embedded"
    if not store.exists():
        config = REPOSITORY / "config" / "transform_tiny.json"
        flags = {"--path_to_kv": published.kv_path, "--quantization_config": config, "--num_chunks": NUM_CHUNKS}
        assert run_encoding.main([*to_argv(flags), "--levels", "1,2,3", "--output_path", str(encoded), "--quiet"]) == 0
        flags = {"--path_to_encoded_kv": encoded, "--path_to_kv": published.kv_path, "--path_to_store": store}
        assert run_publishing.main([*to_argv(flags), "--quiet"]) == 0
    argv[1] = f"{server.url}/embedded"
    record = run_to_json(argv, capsys, "--question", FIRST, *([] if level is None else ["--level", level]))
    assert record["problems"] == [] and answer_of(record) == FIRST_ANSWER
    if level is not None:
        fetched = [(span["chunk"], span["level"]) for span in record["timeline"] if span["worker"] == "fetch"]
        assert fetched == [(chunk, file) for chunk in range(NUM_CHUNKS) for file in range(1, level + 1)]
        assert {chunk["level"] for chunk in record["chunks"]} == {level}


def test_publishing_refuses_losses_that_are_not_the_folders(published, refuse):
    folders = [published.folder / config for config in LEVEL_CONFIGS]
    argv = [
        "--path_to_encoded_kv",
        *folders,
        "--path_to_kv",
        published.kv_path,
        "--path_to_store",
        published.folder / "x",
    ]
    assert "--kl must have one value per level" in refuse(run_publishing.main, [*argv, "--kl", "0.1"], 2)
    assert "--kl must not be larger" in refuse(run_publishing.main, [*argv, "--kl", "0.1", "0.2", "0.3"], 2)
    assert "tables.cgt: no such file" in refuse(run_publishing.main, [*argv[:1], published.folder, *argv[4:]], 3)


def test_servers_are_asked_for_nothing_twice(server: HttpServer, argv, capsys):
    run_to_json(argv, capsys, "--level", 2)
    paths = [path for method, path, _ in server.requests if method == "GET"]
    assert len(paths) == len(set(paths)) == 3 + 1 + NUM_CHUNKS


def test_publishing_says_what_clients_find_and_what_it_repaired(published, capsys, tmp_path):
    store = tmp_path / "store"
    folders = [str(published.folder / config) for config in LEVEL_CONFIGS]

    def publish(num_levels: int) -> str:
        flags = {"--path_to_kv": published.kv_path, "--path_to_store": store}
        capsys.readouterr()
        assert run_publishing.main(["--path_to_encoded_kv", *folders[:num_levels], *to_argv(flags)]) == 0
        return capsys.readouterr().out

    assert re.search(r"^clients find +1 level$", publish(1), re.MULTILINE)
    wanted = r"^clients find +2 levels; the manifest with 1 level is superseded$"
    assert re.search(wanted, publish(2), re.MULTILINE)
    chunk = next((store / "chunks").rglob("*.cgc"))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:100])
    report = publish(2)
    assert re.search(r"^clients find +2 levels$", report, re.MULTILINE) and chunk.read_bytes() == whole
    assert f"{chunk.relative_to(store)}, which was damaged" in report
