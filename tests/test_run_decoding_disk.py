"""run_decoding_disk.py on the bundled model: answers, counts, quality, and one line for whatever can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import main
import run_decoding_disk
import run_encoding
from cachegen.kv_cache import from_planes, load_kv_cache
from cachegen.methods import load_config, parse_document
from cachegen.methods.transform.profile_storage import save_profile
from cachegen.pipeline import model, session
from cachegen.pipeline.model_cache import view_kv_cache
from tests.fixtures import BUNDLED_MODEL, REPOSITORY, read_folder
from tests.fixtures.absmax import quantize_and_dequantize, write_config
from tests.fixtures.caches import are_equal
from tests.fixtures.models import copy_with_other_keys, load_tokenizer
from tests.fixtures.script_runs import ANSWERS, FIRST, FIRST_ANSWER, SECOND, TEXT, to_argv
from tests.fixtures.transform import make_profile

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = REPOSITORY / "run_decoding_disk.py"
CONFIGS = REPOSITORY / "config"
PROBE = 1  # token that tells what shapes the model's cache has
GROUPS = ("key_first", "key_second", "key_third", "value_first", "value_second")
GROUPED = {"key_first_layers": 2, "key_second_layers": 4}  # as in quantization_tiny.json


@dataclass(frozen=True)
class Prefilled:
    """A context, its cache, and an encoding of it in four chunks for each config used here."""

    folder: Path
    num_tokens: int  # of the context; the cache has one fewer

    @property
    def context(self) -> Path:
        return self.folder / "5.txt"

    @property
    def kv_path(self) -> Path:
        return self.folder / "data" / "test_kv_5.pkl"

    def encoded(self, config: str) -> Path:
        return self.folder / config


@pytest.fixture(scope="module")
def prefilled(tmp_path_factory, one_thread) -> Prefilled:
    """The context, prefilled once in fp32 and encoded at 32/16, at 64/32 and at 8 bits."""
    folder = tmp_path_factory.mktemp("prefilled")
    document = Prefilled(folder, len(load_tokenizer()(TEXT)["input_ids"]))
    document.context.write_text(TEXT)
    flags = {"--model_id": BUNDLED_MODEL, "--path_to_context": document.context, "--dtype": "float32"}
    assert main.main([*to_argv(flags), "--save_dir", str(folder / "data"), "--quiet"]) == 0
    for config in ("quantization_tiny", "quantization_tiny_fine", "uniform_8bit"):
        flags = {"--path_to_kv": document.kv_path, "--quantization_config": CONFIGS / f"{config}.json"}
        argv = [*to_argv(flags), "--output_path", str(document.encoded(config)), "--num_chunks", "4", "--quiet"]
        assert run_encoding.main(argv) == 0
    return document


@pytest.fixture
def argv(prefilled) -> list[str]:
    """Flags for decoding the encoding at 32/16 bins."""
    return to_argv(
        {
            "--path_to_encoded_kv": prefilled.encoded("quantization_tiny"),
            "--model_id": BUNDLED_MODEL,
            "--path_to_context": prefilled.context,
        }
    )


@pytest.fixture
def encoded(prefilled, argv, tmp_path) -> Path:
    """A copy of that encoding that may be damaged; `argv` then names it."""
    folder = Path(shutil.copytree(prefilled.encoded("quantization_tiny"), tmp_path / "encoded"))
    argv[1] = str(folder)
    return folder


def decode_to_json(argv: list[str], capsys, *flags: object) -> dict[str, Any]:
    """Decode with --json -, which must leave nothing but JSON on stdout."""
    capsys.readouterr()
    assert run_decoding_disk.main([*argv, "--json", "-", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


def count_tokens(text: str) -> int:
    return len(load_tokenizer()(text, add_special_tokens=False)["input_ids"])


class TestAnswers:
    """What a good run says."""

    def test_json_has_the_keys_of_a_sweep(self, prefilled, argv, capsys):
        record = decode_to_json(argv, capsys)
        keys = "num_cached_tokens num_recomputed_tokens load_seconds decode_seconds prefill_seconds ttft_seconds text"
        assert {*keys.split(), "token_ids", "device", "config", "versions"} <= set(record)
        assert record["num_cached_tokens"] == prefilled.num_tokens - 1 and record["num_recomputed_tokens"] == 0
        assert record["num_chunks"] == 4
        files = read_folder(prefilled.encoded("quantization_tiny"))
        assert record["encoded_bytes"] == sum(map(len, files.values()))
        assert len(record["token_ids"]) == 10 and record["text"] == load_tokenizer().decode(record["token_ids"])
        assert 0 < record["prefill_seconds"] < record["ttft_seconds"]
        assert record["config"]["max_new_tokens"] == 10 and record["versions"]["torch"] == torch.__version__
        assert not {"kl", "greedy_match", "text_uncompressed"} & set(record)

    def test_questions_are_answered_from_one_cache_as_in_runs_of_their_own(self, argv, capsys):
        flags = ["--max_new_tokens", "8"]
        together = decode_to_json(argv, capsys, *flags, "--question", FIRST, "--question", SECOND, "--question", FIRST)
        alone = [decode_to_json(argv, capsys, *flags, "--question", question) for question in (FIRST, SECOND)]
        assert together["answers"] == [alone[0]["answers"][0], alone[1]["answers"][0], alone[0]["answers"][0]]
        assert [answer["question"] for answer in together["answers"]] == [FIRST, SECOND, FIRST]
        assert (together["text"], together["token_ids"]) == (alone[0]["text"], alone[0]["token_ids"])
        numbers = [answer["text"].split()[0] for answer in together["answers"][:2]]
        assert numbers == list(ANSWERS.values())[:2]

    @pytest.mark.parametrize(("config", "largest_kl"), [("quantization_tiny_fine", 0.01), ("uniform_8bit", 0.001)])
    def test_verify_compares_with_the_uncompressed_cache(self, prefilled, argv, capsys, config, largest_kl):
        argv[1] = str(prefilled.encoded(config))
        record = decode_to_json(argv, capsys, "--verify", "--question", FIRST, "--question", SECOND)
        keys = "kl next_token_agreement nll_delta verified_tokens greedy_match text_uncompressed text_prefill_seconds"
        assert record["bit_exact"] is False
        assert set(keys.split()) <= set(record)
        assert 0 < record["kl"] < largest_kl
        assert 0.9 < record["next_token_agreement"] <= 1 and abs(record["nll_delta"]) < 0.1
        assert record["verified_tokens"] == 256 < prefilled.num_tokens
        assert record["text_prefill_seconds"] > 0
        assert record["text_uncompressed"].split()[0] == FIRST_ANSWER
        if config == "uniform_8bit":
            assert record["greedy_match"] is True and record["text"] == record["text_uncompressed"]

    def test_verify_proves_that_a_lossless_cache_is_the_saved_one(self, prefilled, argv, capsys, tmp_path):
        prefill = {
            "--model_id": BUNDLED_MODEL,
            "--path_to_context": prefilled.context,
            "--save_dir": tmp_path,
            "--doc_id": 0,
            "--dtype": "bfloat16",
        }
        encode = {
            "--path_to_kv": tmp_path / "test_kv_0.pkl",
            "--quantization_config": CONFIGS / "lossless.json",
            "--output_path": tmp_path / "lossless",
            "--chunk_size": 400,
        }
        assert main.main([*to_argv(prefill), "--quiet"]) == 0
        assert run_encoding.main([*to_argv(encode), "--quiet"]) == 0
        argv[1] = str(tmp_path / "lossless")
        record = decode_to_json(argv, capsys, "--verify", "--question", FIRST)
        assert record["bit_exact"] is True and record["greedy_match"] is True
        part = decode_to_json(argv, capsys, "--verify", "--num_chunks", "1", "--question", FIRST)
        assert part["bit_exact"] is False

    def test_verify_says_so_when_the_answer_changes(self, argv, capsys, tmp_path, prefilled):
        config = write_config(tmp_path / "crude.json", **{f"{plane}_bins": 4 for plane in GROUPS})
        flags = {
            "--path_to_kv": prefilled.kv_path,
            "--quantization_config": config,
            "--output_path": tmp_path / "crude",
        }
        assert run_encoding.main([*to_argv(flags), "--quiet"]) == 0
        argv[1] = str(tmp_path / "crude")
        assert run_decoding_disk.main([*argv, "--verify", "--question", FIRST, "--json", str(tmp_path / "r.json")]) == 0
        record, report = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
        assert record["greedy_match"] is False and record["kl"] > 0.1
        assert re.search(r"^same answer +NO$", report, re.MULTILINE) and "uncompressed" in report

    def test_quiet_prints_nothing(self, argv, capfd):
        assert run_decoding_disk.main([*argv, "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")

    def test_generation_stops_at_the_number_of_new_tokens(self, argv, capsys):
        ten = decode_to_json(argv, capsys)["token_ids"]
        assert decode_to_json(argv, capsys, "--max_new_tokens", 3)["token_ids"] == ten[:3]
        assert decode_to_json(argv, capsys, "--max_new_tokens", 1)["token_ids"] == ten[:1]

    @pytest.mark.parametrize("config", ["quantization_tiny", "uniform_8bit"])
    def test_generation_is_given_exactly_the_quantized_cache(self, prefilled, argv, capsys, monkeypatch, config):
        given = []
        generate_answer = session.generate_answer

        def note_and_generate(loaded, cache, num_cached_tokens, *rest):
            planes = view_kv_cache(cache, num_cached_tokens).planes
            given.append(from_planes([plane.clone(memory_format=torch.contiguous_format) for plane in planes]))
            return generate_answer(loaded, cache, num_cached_tokens, *rest)

        monkeypatch.setattr(session, "generate_answer", note_and_generate)
        argv[1] = str(prefilled.encoded(config))
        decode_to_json(argv, capsys, "--question", FIRST, "--question", SECOND)
        saved, _ = load_kv_cache(prefilled.kv_path)
        expected = quantize_and_dequantize(saved, load_config(CONFIGS / f"{config}.json"))
        assert len(given) == 2 and all(are_equal(cache, expected) for cache in given)

    def test_configs_that_agree_with_the_files_are_accepted(self, argv, capsys, tmp_path):
        flags = ["--quantization_config", CONFIGS / "quantization_tiny.json"]
        with_configs = decode_to_json(argv, capsys, *flags, "--model_config", CONFIGS / "tiny_mistral.json")
        assert with_configs["token_ids"] == decode_to_json(argv, capsys)["token_ids"]
        same = write_config(tmp_path / "same.json", **GROUPED)
        assert decode_to_json(argv, capsys, "--quantization_config", same)["text"] == with_configs["text"]


@dataclass(frozen=True)
class Transformed:
    """The context encoded with method transform at two levels, and its profile."""

    encoded: Path
    profile: Path


@pytest.fixture(scope="module")
def transformed(prefilled) -> Transformed:
    """A profile of random bases for the bundled model, all its components equally wide, and a small step."""
    _, metadata = load_kv_cache(prefilled.kv_path)
    profile = make_profile(
        [(2, 64)] * 12,
        (2, 4),
        rotary=metadata.rotary_embeddings[0],
        model_fingerprint=metadata.model_fingerprint,
        scale_fall=0,
    )
    save_profile(prefilled.folder / "profile", profile)
    config = prefilled.folder / "transform.json"
    config.write_text('{"method": "transform", "profile": "profile", "step_log": 0, "levels": 2}')
    flags = {"--path_to_kv": prefilled.kv_path, "--quantization_config": config, "--num_chunks": 2}
    assert run_encoding.main([*to_argv(flags), "--output_path", str(prefilled.encoded("levels")), "--quiet"]) == 0
    return Transformed(prefilled.encoded("levels"), prefilled.folder / "profile")


class TestTransform:
    """Documents of method transform."""

    @pytest.fixture
    def argv(self, argv, transformed, tmp_path) -> list[str]:
        """Flags for decoding a copy that may be damaged, at all levels."""
        argv[1] = str(shutil.copytree(transformed.encoded, tmp_path / "levels"))
        return [*argv, "--profile", str(transformed.profile)]

    def test_levels_are_decoded_up_to_the_one_asked_for(self, argv, capsys):
        records = [decode_to_json(argv, capsys, "--verify", *flags) for flags in (["--level", 1], ["--level", 2], [])]
        assert [record["level"] for record in records] == [1, 2, 2]
        sizes = {name: len(content) for name, content in read_folder(Path(argv[1])).items()}
        first = sum(size for name, size in sizes.items() if ".L2." not in name)
        assert [record["encoded_bytes"] for record in records] == [first, sum(sizes.values()), sum(sizes.values())]
        assert records[0]["kl"] > records[1]["kl"] == records[2]["kl"]
        assert records[1]["token_ids"] == records[2]["token_ids"]

    def test_a_level_needs_the_files_of_those_below_alone(self, argv, capsys, refuse):
        (Path(argv[1]) / "chunk_00001.L2.cgc").unlink()
        assert decode_to_json(argv, capsys, "--level", 1)["num_chunks"] == 2
        assert "chunk_00001.L2.cgc: no such file" in refuse(run_decoding_disk.main, argv, 3)

    def test_a_level_that_is_not_there(self, argv, refuse, prefilled):
        error = refuse(run_decoding_disk.main, [*argv, "--level", 3], 2)
        assert "--level 3 asked for, the document has 2 levels" in error
        argv[1] = str(prefilled.encoded("quantization_tiny"))
        error = refuse(run_decoding_disk.main, [*argv, "--level", 2], 2)
        assert "--level 2 asked for, the document has 1 level" in error

    @pytest.mark.parametrize("level", [1, 2])
    def test_a_damaged_level_is_named(self, argv, refuse, level):
        path = Path(argv[1]) / f"chunk_00001.L{level}.cgc"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert f"chunk_00001.L{level}.cgc, byte " in refuse(run_decoding_disk.main, argv, 4)

    def test_swapped_levels_are_refused(self, argv, refuse):
        shutil.copy(Path(argv[1]) / "chunk_00000.L2.cgc", Path(argv[1]) / "chunk_00000.L1.cgc")
        error = refuse(run_decoding_disk.main, argv, 5)
        assert "chunk_00000.L1.cgc: level is 2, but " in error

    def test_a_missing_profile(self, argv, refuse, tmp_path):
        error = refuse(run_decoding_disk.main, [*argv[:-1], tmp_path / "nowhere"], 3)
        assert "nowhere/profile.json: no such file" in error
        error = refuse(run_decoding_disk.main, argv[:-2], 3)
        assert "no profile there is " in error and "give its folder with --profile" in error

    def test_another_profile(self, argv, refuse, tmp_path):
        save_profile(tmp_path / "other", make_profile([(2, 64)] * 12, (6,), scale_fall=0))
        error = refuse(run_decoding_disk.main, [*argv[:-1], tmp_path / "other"], 5)
        assert "profile_hash is " in error and "give --profile its folder" in error

    def test_a_damaged_profile_is_named(self, argv, refuse, transformed, tmp_path):
        folder = Path(shutil.copytree(transformed.profile, tmp_path / "profile"))
        content = (folder / "synthesis.zlib").read_bytes()
        (folder / "synthesis.zlib").write_bytes(content[:-1])
        error = refuse(run_decoding_disk.main, [*argv[:-1], folder], 4)
        assert "profile/synthesis.zlib" in error and "tables.cgt" not in error

    def test_a_config_of_the_method_is_accepted_and_of_another_refused(self, argv, capsys, refuse, prefilled):
        decode_to_json(argv, capsys, "--quantization_config", prefilled.folder / "transform.json")
        flags = ["--quantization_config", CONFIGS / "quantization_tiny.json"]
        error = refuse(run_decoding_disk.main, [*argv, *flags], 5)
        assert "tables.cgt: method is transform, but " in error


class TestRecomputed:
    """Tokens that no decoded chunk covers."""

    @pytest.fixture
    def passed(self, monkeypatch) -> list[int]:
        """How many tokens went through the model at each step."""
        numbers: list[int] = []
        load_model = model.load_model

        def load_with_hook(*args, **kwargs):
            loaded = load_model(*args, **kwargs)
            loaded.model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: numbers.append(inputs[0].numel())
            )
            return loaded

        monkeypatch.setattr(model, "load_model", load_with_hook)
        return numbers

    @pytest.mark.parametrize("num_chunks", [1, 2, 4])
    @pytest.mark.parametrize("max_new_tokens", [1, 5])
    def test_only_they_one_more_and_the_generated_ones_pass_through_the_model(
        self, prefilled, argv, capsys, passed, num_chunks, max_new_tokens
    ):
        record = decode_to_json(argv, capsys, "--num_chunks", num_chunks, "--max_new_tokens", max_new_tokens)
        num_cached = sum(plan_four(prefilled.num_tokens - 1)[:num_chunks])
        assert (record["num_chunks"], record["num_cached_tokens"]) == (num_chunks, num_cached)
        assert record["num_recomputed_tokens"] == prefilled.num_tokens - 1 - num_cached
        assert len(record["token_ids"]) == max_new_tokens
        # The last generated token is never fed to the model.
        assert sum(passed) == PROBE + record["num_recomputed_tokens"] + 1 + (max_new_tokens - 1)

    def test_every_question_adds_its_own_tokens_only(self, argv, capsys, passed):
        record = decode_to_json(argv, capsys, "--question", FIRST, "--question", SECOND, "--max_new_tokens", 4)
        num_generated = sum(len(answer["token_ids"]) for answer in record["answers"])
        assert record["num_recomputed_tokens"] == 0
        assert sum(passed) == PROBE + count_tokens(FIRST) + count_tokens(SECOND) + 2 + (num_generated - 2)

    def test_text_after_the_cache_is_recomputed(self, prefilled, argv, capsys, passed, tmp_path):
        more = tmp_path / "more.txt"
        more.write_text(TEXT + FIRST)
        record = decode_to_json(argv, capsys, "--path_to_context", more, "--max_new_tokens", 8)
        assert record["num_cached_tokens"] == prefilled.num_tokens - 1
        assert record["num_recomputed_tokens"] == count_tokens(FIRST)
        assert sum(passed) == PROBE + count_tokens(FIRST) + len(record["token_ids"])
        assert record["text"].split()[0] == FIRST_ANSWER

    def test_an_uncovered_tail_is_recomputed_and_said(self, prefilled, argv, capsys, tmp_path):
        config, output = CONFIGS / "uniform_8bit.json", tmp_path / "encoded"
        flags = {"--path_to_kv": prefilled.kv_path, "--quantization_config": config, "--output_path": output}
        flags |= {"--num_chunks": 3, "--chunk_size": 200}
        assert run_encoding.main(to_argv(flags)) == 0
        num_tail = prefilled.num_tokens - 1 - 600
        assert f"the last {num_tail} tokens: they are recomputed from text" in capsys.readouterr().out
        argv[1] = str(output)
        assert run_decoding_disk.main([*argv, "--json", str(tmp_path / "out.json"), "--verify"]) == 0
        record = json.loads((tmp_path / "out.json").read_text())
        assert (record["num_cached_tokens"], record["num_recomputed_tokens"]) == (600, num_tail)
        assert f"{num_tail} tokens that no decoded chunk covers, from text" in capsys.readouterr().out
        assert record["greedy_match"] is True and record["kl"] < 0.001

    def test_the_first_chunks_serve_a_text_that_ends_or_differs_after_them(self, prefilled, argv, capsys, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text(TEXT[: len(TEXT) // 2] + " And then, all of a sudden, it was over.")
        num_tokens = len(load_tokenizer()(other.read_text())["input_ids"])
        record = decode_to_json(argv, capsys, "--path_to_context", other, "--num_chunks", 1)
        num_cached = plan_four(prefilled.num_tokens - 1)[0]
        assert (record["num_cached_tokens"], record["num_recomputed_tokens"]) == (
            num_cached,
            num_tokens - 1 - num_cached,
        )


def plan_four(num_tokens: int) -> list[int]:
    """Four chunks of equal size, the first ones a token longer."""
    return [num_tokens // 4 + (index < num_tokens % 4) for index in range(4)]


class TestRefusals:
    """One line on stderr and its exit code."""

    def test_a_missing_folder(self, argv, refuse, tmp_path):
        error = refuse(run_decoding_disk.main, [*argv, "--path_to_encoded_kv", tmp_path / "nowhere"], 3)
        assert "nowhere/tables.cgt: no such file (encode the document again" in error

    @pytest.mark.parametrize("name", ["tables.cgt", "chunk_00000.L1.cgc", "chunk_00002.L1.cgc", "chunk_00003.L1.cgc"])
    def test_a_missing_file(self, argv, encoded, refuse, name):
        (encoded / name).unlink()
        assert f"{name}: no such file (encode the document again" in refuse(run_decoding_disk.main, argv, 3)

    @pytest.mark.parametrize("name", ["tables.cgt", "chunk_00002.L1.cgc"])
    @pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "extended", "foreign"])
    def test_a_damaged_file(self, argv, encoded, refuse, name, damage):
        content = (encoded / name).read_bytes()
        middle = len(content) // 2
        damaged = {
            "truncated": content[:middle],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "extended": content + b"\n",
            "foreign": b"Dear diary,\n" * 100,
        }[damage]
        (encoded / name).write_bytes(damaged)
        assert f"{encoded / name}, " in refuse(run_decoding_disk.main, argv, 4)

    @pytest.mark.parametrize("name", ["tables.cgt", "chunk_00001.L1.cgc"])
    def test_a_file_of_a_later_version(self, argv, encoded, refuse, name):
        content = bytearray((encoded / name).read_bytes())
        content[8] = 3
        (encoded / name).write_bytes(content)
        error = refuse(run_decoding_disk.main, argv, 4)
        assert f"{name}, byte 8, field version: 3 is not supported, this release reads 1" in error

    def test_a_chunk_of_another_config(self, prefilled, argv, encoded, refuse):
        shutil.copy(prefilled.encoded("quantization_tiny_fine") / "chunk_00001.L1.cgc", encoded)
        assert "chunk_00001.L1.cgc: planes is " in refuse(run_decoding_disk.main, argv, 5)

    @pytest.mark.parametrize("shape", [(4, 32), (1, 128)])
    def test_planes_of_another_shape_whose_checksums_are_right(self, argv, encoded, refuse, shape):
        path = encoded / "tables.cgt"
        header = parse_document(path.read_bytes())
        tables = path.read_bytes()[header.header_bytes :]
        planes = [dataclasses.replace(plane, num_kv_heads=shape[0], head_dim=shape[1]) for plane in header.planes]
        path.write_bytes(dataclasses.replace(header, planes=tuple(planes)).pack() + tables)
        error = refuse(run_decoding_disk.main, argv, 5)
        assert f"tables.cgt: planes: the keys of layer 0 are {shape[0]} x {shape[1]}, the cache's 2 x 64 with" in error

    def test_more_chunks_than_there_are(self, argv, refuse):
        error = refuse(run_decoding_disk.main, [*argv, "--num_chunks", 5], 2)
        assert "--num_chunks 5 asked for, 4 are there" in error

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                CONFIGS / "quantization_tiny_fine.json",
                rf"key_first_bins is 32 \(layer 0\), but {CONFIGS}.*fine.json says 64",
            ),
            (CONFIGS / "uniform_8bit.json", "method is cachegen, but .*uniform_8bit.json says uniform"),
            ({**GROUPED, "key_third_bins": 18}, r"key_third_bins is 16 \(layer 4\), but .* says 18"),
            ({**GROUPED, "value_second_bins": 4}, r"value_second_bins is 16 \(layer 1\), but .* says 4"),
            ({**GROUPED, "value_first_layers": 3}, r"value_first_bins is 16 \(layer 1\), but .* says 32"),
            ({**GROUPED, "key_first_layers": 1}, r"key_second_bins is 32 \(layer 1\), but .* says 16"),
        ],
    )
    def test_another_quantization_config_by_field(self, argv, refuse, tmp_path, config, message):
        if isinstance(config, dict):
            config = write_config(tmp_path / "config.json", **config)
        error = refuse(run_decoding_disk.main, [*argv, "--quantization_config", config], 5)
        assert re.search(rf"tables.cgt: {message}", error)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"layers": 32}, "layers is 6, but .* says 32"),
            ({"layers": 6, "channels": 1024}, "channels is 128, but .* says 1024"),
            ({"layers": "6", "channels": 128, "kv_heads": 8}, "kv_heads is 2, but .* says 8"),
            ({"layers": 6, "head_dim": "32"}, "head_dim is 64, but .* says 32"),
        ],
    )
    def test_another_model_config_by_field(self, argv, refuse, tmp_path, content, message):
        path = tmp_path / "model.json"
        path.write_text(json.dumps(content))
        assert re.search(message, refuse(run_decoding_disk.main, [*argv, "--model_config", path], 5))

    @pytest.mark.parametrize("flag", ["--quantization_config", "--model_config"])
    def test_a_config_that_is_missing_or_none(self, argv, refuse, tmp_path, flag):
        path = tmp_path / "config.json"
        assert "no such config file" in refuse(run_decoding_disk.main, [*argv, flag, path], 3)
        path.write_text("{}")
        assert "is missing" in refuse(run_decoding_disk.main, [*argv, flag, path], 2)

    def test_another_context(self, argv, refuse, tmp_path):
        path = tmp_path / "5.txt"
        path.write_text(TEXT.replace("heaven", "haven"))
        error = refuse(run_decoding_disk.main, [*argv, "--path_to_context", path], 5)
        assert "5.txt: token_hash is " in error and "the files are of another context" in error

    def test_a_context_that_ends_within_the_cache(self, argv, refuse, tmp_path):
        path = tmp_path / "5.txt"
        path.write_text(TEXT[:1000])
        error = refuse(run_decoding_disk.main, [*argv, "--path_to_context", path], 5)
        assert "and one more must follow: it is another context" in error

    def test_a_context_that_is_missing_empty_or_no_text(self, argv, refuse, tmp_path):
        path = tmp_path / "5.txt"
        argv = [*argv, "--path_to_context", str(path)]
        assert "5.txt: no such context file" in refuse(run_decoding_disk.main, argv, 3)
        path.write_bytes(b"")
        assert "5.txt: is empty" in refuse(run_decoding_disk.main, argv, 3)
        path.write_bytes(b"caf\xe9")
        assert "5.txt: is not UTF-8 text (byte 3)" in refuse(run_decoding_disk.main, argv, 3)

    def test_another_model(self, argv, refuse, tmp_path):
        other = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "other"))
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
        error = refuse(run_decoding_disk.main, [*argv, "--model_id", other], 5)
        assert "tables.cgt: model_fingerprint is " in error and "give the model that computed the cache" in error

    def test_other_weights_behind_the_same_config_and_tokenizer(self, prefilled, argv, refuse, tmp_path):
        other = copy_with_other_keys(tmp_path / "other")
        error = refuse(run_decoding_disk.main, [*argv, "--model_id", other], 5)
        assert "tables.cgt: model_fingerprint is " in error and "give the model that computed the cache" in error
        # Nor is an encoding of the one model's cache reused for that of the other's.
        flags = {"--model_id": other, "--path_to_context": prefilled.context, "--dtype": "float32"}
        assert main.main([*to_argv(flags), "--save_dir", str(tmp_path / "data"), "--quiet"]) == 0
        encoded = Path(shutil.copytree(prefilled.encoded("quantization_tiny"), tmp_path / "encoded"))
        flags = {
            "--path_to_kv": tmp_path / "data" / "test_kv_5.pkl",
            "--quantization_config": CONFIGS / "quantization_tiny.json",
            "--num_chunks": 4,
            "--output_path": encoded,
        }
        assert "--overwrite" in refuse(run_encoding.main, [*to_argv(flags), "--quiet"], 7)

    def test_another_dtype(self, argv, refuse):
        error = refuse(run_decoding_disk.main, [*argv, "--dtype", "bfloat16"], 5)
        assert "tables.cgt: dtype is torch.float32, but " in error and "--dtype" in error

    def test_a_model_that_is_nowhere(self, argv, refuse, tmp_path):
        error = refuse(run_decoding_disk.main, [*argv, "--model_id", tmp_path / "nowhere"], 3)
        assert "nowhere: there is no such model folder" in error and "models/tiny-mistral" in error

    def test_an_empty_question(self, argv, refuse):
        assert "--question must not be empty" in refuse(run_decoding_disk.main, [*argv, "--question", ""], 2)

    def test_cuda_without_cuda(self, argv, refuse, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "or use --device cpu" in refuse(run_decoding_disk.main, [*argv, "--device", "cuda"], 6)

    @pytest.mark.parametrize(
        "flags", [["--num_chunks", "0"], ["--max_new_tokens", "0"], ["--threads", "x"], ["--dtype", "q"]]
    )
    def test_a_wrong_flag(self, argv, refuse, flags):
        assert flags[0] in refuse(run_decoding_disk.main, [*argv, *flags], 2)


class TestProcess:
    """The real process."""

    def test_it_runs_from_elsewhere_without_an_installed_package(self, argv, tmp_path):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, str(SCRIPT), *argv, "--json", "-", "--question", FIRST, "--threads", "2"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0
        assert json.loads(result.stdout)["text"].split()[0] == FIRST_ANSWER
        assert "first token after" in result.stderr
        assert not re.search("Traceback|[Ww]arning|error", result.stderr)

    def test_an_error_is_one_line_and_the_processs_exit_code(self, argv, encoded):
        (encoded / "tables.cgt").write_bytes(b"")
        result = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (4, "")
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
