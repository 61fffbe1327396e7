"""run_encoding.py: the report, the JSON, the files, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import run_encoding
from cachegen.files import is_temporary
from cachegen.kv_cache import from_planes, load_kv_cache, save_kv_cache
from cachegen.methods import load_config, parse_chunk, parse_document
from cachegen.methods.transform.headers import TransformDocumentHeader
from cachegen.methods.transform.profile import CurvePoint
from cachegen.methods.transform.profile_storage import save_profile
from tests.fixtures import REPOSITORY, read_folder
from tests.fixtures.absmax import decode_folder, quantize_and_dequantize, write_config
from tests.fixtures.caches import are_equal, make_cache, make_metadata, save_cache
from tests.fixtures.transform import make_profile

SCRIPT = REPOSITORY / "run_encoding.py"
NUM_LARGE_TOKENS, NUM_LARGE_CHUNKS = 16_000, 24


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "encoded"


@pytest.fixture
def argv(kv_path, config_path, output) -> list[str]:
    """Flags for an encoding in three chunks that succeeds."""
    flags = {"--path_to_kv": kv_path, "--quantization_config": config_path, "--output_path": output, "--num_chunks": 3}
    return [str(item) for pair in flags.items() for item in pair]


@pytest.fixture(scope="module")
def large_kv_path(tmp_path_factory) -> Path:
    """A KV file whose encoding takes long enough to be killed in the middle."""
    path = tmp_path_factory.mktemp("large") / "kv.pkl"
    return save_cache(path, NUM_LARGE_TOKENS, num_layers=4, num_kv_heads=2, head_dim=32)


def large_argv(large_kv_path: Path, output: Path) -> list[str]:
    config = str(REPOSITORY / "config" / "quantization_tiny.json")
    flags = ["--path_to_kv", str(large_kv_path), "--quantization_config", config, "--output_path", str(output)]
    return [*flags, "--num_chunks", str(NUM_LARGE_CHUNKS), "--threads", "1", "--quiet"]


def encode_to_json(argv: list[str], capsys, *flags: object) -> dict[str, Any]:
    """Encode with --json -, which must leave nothing but JSON on stdout."""
    capsys.readouterr()
    assert run_encoding.main([*argv, "--json", "-", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


class TestResults:
    """What a good run writes and says."""

    def test_json_has_the_keys_of_a_sweep_and_counts_every_byte(self, argv, output, capsys):
        record = encode_to_json(argv, capsys)
        keys = "method coder num_tokens num_chunks kv_bytes encoded_bytes bytes_by_part bits_per_value ratio_vs_fp16"
        assert {*keys.split(), "ratio_vs_int8", "seconds", "device", "config", "versions"} <= set(record)
        assert set(record["bytes_by_part"]) == {"header", "tables", "scales", "payload"}
        num_values = 60 * 2 * 2 * 8
        file_bytes = sum(map(len, read_folder(output).values()))
        assert record["encoded_bytes"] == file_bytes == sum(record["bytes_by_part"].values())
        assert record["kv_bytes"] == 2 * num_values
        assert record["bits_per_value"] == 8 * file_bytes / num_values
        assert record["ratio_vs_fp16"] == 2 * record["ratio_vs_int8"] == 2 * num_values / file_bytes
        found = [
            record[name] for name in ("method", "coder", "num_tokens", "num_chunks", "device", "num_reused_chunks")
        ]
        assert found == ["cachegen", "rans", 60, 3, "cpu", 0]
        assert record["seconds"] > 0
        assert record["config"]["num_chunks"] == 3 and record["config"]["output_path"] == str(output)
        assert record["versions"]["torch"] == torch.__version__

    def test_json_has_each_chunks_span_and_bytes(self, argv, output, capsys):
        record = encode_to_json(argv, capsys)
        sizes = [len(content) for name, content in sorted(read_folder(output).items()) if name.startswith("chunk_")]
        assert record["chunks"] == [
            {"first_token": 20 * i, "num_tokens": 20, "bytes": {"1": size}} for i, size in enumerate(sizes)
        ]
        assert record["shared_bytes"] + sum(sizes) == record["encoded_bytes"]
        (level,) = record["levels"]
        assert level.pop("max_error") > 0
        assert level == {
            "level": 1,
            "bits_per_value": record["bits_per_value"],
            "expected_kl": None,
            "mean_error": None,
        }
        assert record["levels_are_embedded"] is False

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_kv_bytes_are_two_per_value_whatever_the_dtype(self, tmp_path, argv, capsys, dtype):
        save_cache(tmp_path / "kv.pkl", 60, dtype=dtype)
        assert encode_to_json(argv, capsys)["kv_bytes"] == 2 * 60 * 2 * 2 * 8

    @pytest.mark.parametrize(
        ("fields", "flags", "method", "coder"),
        [
            ({}, ["--coder", "packed"], "cachegen", "packed"),
            ({"coder": "packed"}, [], "cachegen", "packed"),
            ({"coder": "packed"}, ["--coder", "rans"], "cachegen", "rans"),
            (None, [], "uniform", "packed"),
            (None, ["--coder", "rans"], "uniform", "rans"),
        ],
    )
    def test_any_coder_goes_with_any_method(
        self, argv, kv_path, config_path, output, capsys, fields, flags, method, coder
    ):
        if fields is None:
            config_path.write_text('{"method": "uniform", "bits": 8}')
        else:
            write_config(config_path, **fields)
        record = encode_to_json(argv, capsys, *flags)
        assert (record["method"], record["coder"]) == (method, coder)
        assert (record["bytes_by_part"]["tables"] == 0) == (coder == "packed")
        assert record["encoded_bytes"] == sum(record["bytes_by_part"].values())
        cache, metadata = load_kv_cache(kv_path)
        expected = quantize_and_dequantize(cache, load_config(config_path))
        assert are_equal(decode_folder(output, cache, metadata.token_ids), expected)

    def test_bytes_do_not_depend_on_threads_or_on_the_run(self, tmp_path, argv, capsys):
        save_cache(tmp_path / "kv.pkl", 700, num_layers=3, num_kv_heads=2, head_dim=40)
        encodings = []
        for index, threads in enumerate([1, 2, 7, 7]):
            folder = tmp_path / f"run{index}"
            assert run_encoding.main([*argv, "--output_path", str(folder), "--threads", str(threads), "--quiet"]) == 0
            encodings.append(read_folder(folder))
        assert len(encodings[0]) == 4 and all(files == encodings[0] for files in encodings)

    @pytest.mark.parametrize(
        ("flags", "num_tokens", "num_chunks"),
        [
            (["--num_chunks", "7"], 60, 7),
            (["--chunk_size", "25"], 60, 3),
            (["--num_chunks", "2", "--chunk_size", "25"], 50, 2),
            (["--num_chunks", "3", "--chunk_size", "25"], 60, 3),
            ([], 60, 1),
        ],
    )
    def test_chunks_follow_the_flags_and_an_uncovered_tail_is_said(
        self, argv, output, capsys, flags, num_tokens, num_chunks
    ):
        argv = argv[:-2] + flags
        assert run_encoding.main([*argv, "--json", str(output.parent / "out.json")]) == 0
        report = capsys.readouterr().out
        record = json.loads((output.parent / "out.json").read_text())
        assert (record["num_tokens"], record["num_chunks"]) == (num_tokens, num_chunks)
        assert record["num_uncovered_tokens"] == 60 - num_tokens
        assert record["kv_bytes"] == 2 * num_tokens * 2 * 2 * 8
        assert len(list(output.glob("*.cgc"))) == num_chunks
        sentence = "the last 10 tokens: they are recomputed from text at decoding"
        assert (sentence in report) == (num_tokens == 50)

    def test_quiet_prints_nothing(self, argv, capfd):
        assert run_encoding.main([*argv, "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")

    def test_an_all_zero_token_and_a_token_that_is_one_number_are_encoded(self, kv_path, config_path, argv, output):
        cache, metadata = make_cache(60), make_metadata(60)
        for plane in cache.planes:
            plane[3], plane[4] = 0, 6e-8  # the smallest subnormal
        save_kv_cache(kv_path, cache, metadata)
        assert run_encoding.main(argv) == 0
        expected = quantize_and_dequantize(cache, load_config(config_path))
        assert are_equal(decode_folder(output, cache, metadata.token_ids), expected)


class TestResume:
    """A second run into the same folder."""

    def test_finished_chunks_are_kept_and_counted(self, argv, output, capsys):
        first = encode_to_json(argv, capsys)
        files = read_folder(output)
        (output / "chunk_00001.L1.cgc").unlink()
        second = encode_to_json(argv, capsys)
        assert second["num_reused_chunks"] == 2 and second["encoded_bytes"] == first["encoded_bytes"]
        assert run_encoding.main(argv) == 0
        assert "3 in" in (report := capsys.readouterr().out) and "(3 were there already)" in report
        assert read_folder(output) == files

    def test_a_damaged_chunk_is_encoded_again(self, argv, output, capsys):
        encode_to_json(argv, capsys)
        files = read_folder(output)
        content = bytearray(files["chunk_00000.L1.cgc"])
        content[-20] ^= 1
        (output / "chunk_00000.L1.cgc").write_bytes(content)
        assert encode_to_json(argv, capsys)["num_reused_chunks"] == 2
        assert read_folder(output) == files

    @pytest.mark.parametrize("flags", [["--num_chunks", "2"], ["--coder", "packed"]])
    def test_an_encoding_made_otherwise_is_replaced_only_with_overwrite(self, argv, output, refuse, flags):
        assert run_encoding.main(argv) == 0
        (output / "README").write_text("mine")
        files = read_folder(output)
        error = refuse(run_encoding.main, [*argv, *flags], 7)
        assert "holds the encoding of another cache or configuration" in error and "--overwrite" in error
        assert read_folder(output) == files
        assert run_encoding.main([*argv, *flags, "--overwrite"]) == 0
        assert read_folder(output)["README"] == b"mine" and read_folder(output) != files
        assert run_encoding.main([*argv, *flags]) == 0

    def test_another_documents_encoding_is_replaced_only_with_overwrite(self, argv, kv_path, output, refuse, tmp_path):
        assert run_encoding.main(argv) == 0
        files = read_folder(output)
        save_cache(kv_path, 60, seed=1)
        assert "--overwrite" in refuse(run_encoding.main, argv, 7)
        assert read_folder(output) == files
        assert run_encoding.main([*argv, "--overwrite"]) == 0
        assert run_encoding.main([*argv, "--output_path", str(tmp_path / "fresh")]) == 0
        assert read_folder(output) == read_folder(tmp_path / "fresh")


@pytest.fixture
def profile_path(tmp_path) -> Path:
    """A profile for the caches of `save_cache`, with a curve whose steps fall by a factor of two."""
    curve = [CurvePoint(step_log, 2.0 - step_log / 32, 0.01 * 2 ** (step_log / 8)) for step_log in (32, 16, 0, -16)]
    metadata = make_metadata(1)
    profile = make_profile(
        [(1, 8)] * 4,
        (1, 1),
        rotary=metadata.rotary_embeddings[0],
        model_fingerprint=metadata.model_fingerprint,
        curve=curve,
        scale_fall=2,
    )
    save_profile(tmp_path / "profile", profile)
    return tmp_path / "profile"


@pytest.fixture
def transform_argv(argv, config_path, profile_path) -> list[str]:
    """Flags for an encoding in three chunks with method transform; the config is beside the profile."""
    config_path.write_text('{"method": "transform", "profile": "profile", "step_log": -16}')
    return argv


class TestTransform:
    """Method transform: levels, targets and profiles."""

    def test_levels_are_files_of_their_own_and_every_byte_is_counted(self, transform_argv, output, capsys):
        record = encode_to_json(transform_argv, capsys, "--levels", "1,2,3")
        files = read_folder(output)
        names = [f"chunk_{index:05d}.L{level}.cgc" for index in range(3) for level in (1, 2, 3)]
        assert sorted(files) == [*names, "tables.cgt"]
        assert record["encoded_bytes"] == sum(map(len, files.values())) == sum(record["bytes_by_part"].values())
        assert (record["method"], record["coder"], record["levels_are_embedded"]) == ("transform", "rans", True)
        assert record["bytes_by_part"]["tables"] == record["bytes_by_part"]["scales"] == 0
        expected = [
            {
                "first_token": 20 * i,
                "num_tokens": 20,
                "bytes": {str(n): len(files[f"chunk_{i:05d}.L{n}.cgc"]) for n in (1, 2, 3)},
            }
            for i in range(3)
        ]
        assert record["chunks"] == expected
        bits = [level["bits_per_value"] for level in record["levels"]]
        assert bits == sorted(bits) and bits[-1] == record["bits_per_value"]
        kl = [level["expected_kl"] for level in record["levels"]]
        assert kl == [pytest.approx(0.01 * 2**-2), None, None]  # beyond the curve nothing is expected

    def test_one_level_is_the_default_and_the_configs_levels_are_taken(
        self, transform_argv, config_path, output, capsys
    ):
        assert len(encode_to_json(transform_argv, capsys)["levels"]) == 1
        config_path.write_text('{"method": "transform", "profile": "profile", "step_log": -16, "levels": 2}')
        assert len(encode_to_json(transform_argv, capsys, "--overwrite")["levels"]) == 2
        assert len(encode_to_json(transform_argv, capsys, "--overwrite", "--levels", 1)["levels"]) == 1

    @pytest.mark.parametrize(
        ("flags", "step_log"),
        [
            (["--target_bits", "2"], 0),
            (["--target_bits", "1.5"], 16),
            (["--target_kl", "0.01"], 0),
            (["--target_kl", "0.0025"], -16),
            ([], -16),
        ],
    )
    def test_targets_choose_the_step_by_the_profiles_curve(self, transform_argv, output, flags, step_log):
        assert run_encoding.main([*transform_argv, *flags]) == 0
        header = parse_document((output / "tables.cgt").read_bytes())
        assert isinstance(header, TransformDocumentHeader)
        assert header.step_log == step_log

    def test_the_last_tokens_may_be_left_to_be_recomputed(self, transform_argv, capsys):
        record = encode_to_json(transform_argv, capsys, "--recompute_last", 12)
        assert (record["num_tokens"], record["num_uncovered_tokens"]) == (48, 12)

    def test_finished_levels_are_kept_and_damaged_ones_encoded_again(self, transform_argv, output, capsys):
        flags = ["--levels", "1,2"]
        encode_to_json(transform_argv, capsys, *flags)
        files = read_folder(output)
        (output / "chunk_00001.L2.cgc").unlink()
        (output / "chunk_00002.L1.cgc").write_bytes(files["chunk_00002.L1.cgc"][:-1])
        record = encode_to_json(transform_argv, capsys, *flags)
        # All levels of a chunk are of one run: of the three chunks one is kept.
        assert (record["num_reused_chunks"], record["repaired_files"]) == (2, ["chunk_00002.L1.cgc"])
        assert read_folder(output) == files

    @pytest.mark.parametrize("flags", [["--levels", "1"], ["--target_bits", "2"]])
    def test_other_levels_or_steps_need_overwrite_which_leaves_no_old_level(
        self, transform_argv, output, refuse, flags
    ):
        assert run_encoding.main([*transform_argv, "--levels", "1,2"]) == 0
        files = read_folder(output)
        assert "--overwrite" in refuse(run_encoding.main, [*transform_argv, *flags], 7)
        assert read_folder(output) == files
        assert run_encoding.main([*transform_argv, *flags, "--overwrite"]) == 0
        assert not list(output.glob("*.L2.cgc")) and len(list(output.glob("*.L1.cgc"))) == 3

    def test_an_error_beyond_the_bound_is_refused_and_nothing_is_left(self, transform_argv, output, refuse, capsys):
        level = encode_to_json(transform_argv, capsys)["levels"][0]
        assert 0 < level["mean_error"] < level["max_error"]
        shutil.rmtree(output)
        error = refuse(run_encoding.main, [*transform_argv, "--max_error", 0.9 * level["max_error"]], 2)
        assert "more than --max_error" in error
        assert read_folder(output) == {}
        assert run_encoding.main([*transform_argv, "--max_error", str(1.1 * level["max_error"])]) == 0

    def test_a_level_of_another_encoding_is_refused(self, transform_argv, output, refuse, tmp_path):
        assert run_encoding.main([*transform_argv, "--levels", "1,2"]) == 0
        other = tmp_path / "other"
        assert (
            run_encoding.main([*transform_argv, "--levels", "1,2", "--target_bits", "2", "--output_path", str(other)])
            == 0
        )
        shutil.copy(other / "chunk_00001.L2.cgc", output / "chunk_00001.L2.cgc")
        error = refuse(run_encoding.main, [*transform_argv, "--levels", "1,2"], 7)
        assert "chunk_00001.L2.cgc: is a chunk of another cache or configuration" in error

    def test_bytes_do_not_depend_on_threads(self, transform_argv, output, tmp_path):
        for threads in ("1", "3"):
            argv = [*transform_argv, "--levels", "1,2", "--threads", threads, "--output_path", str(tmp_path / threads)]
            assert run_encoding.main(argv) == 0
        assert read_folder(tmp_path / "1") == read_folder(tmp_path / "3")


class TestAnotherCache:
    """An encoding is never taken for that of another cache of the same tokens."""

    @pytest.mark.parametrize("coder", ["rans", "packed", "ac", "transform"])
    @pytest.mark.parametrize("change", ["twice", "dtype", "one value"])
    def test_of_the_same_tokens(self, argv, output, tmp_path, request, refuse, coder, change):
        if coder == "transform":
            argv = request.getfixturevalue("transform_argv")
        elif coder == "packed":
            argv = [*argv, "--quantization_config", str(REPOSITORY / "config" / "uniform_8bit.json"), "--coder", coder]
        else:
            argv = [*argv, "--coder", coder]
        assert run_encoding.main(argv) == 0
        files = read_folder(output)
        cache, metadata = load_kv_cache(argv[argv.index("--path_to_kv") + 1])
        planes = [plane.clone() for plane in cache.planes]
        if change == "twice":
            planes = [2 * plane for plane in planes]
        elif change == "dtype":
            planes = [plane.float() for plane in planes]
        else:
            planes[-1][3, 0, 1] += 0.5
        other = tmp_path / "other.pkl"
        save_kv_cache(other, from_planes(planes), metadata)
        error = refuse(run_encoding.main, [*argv, "--path_to_kv", other], 7)
        assert "holds the encoding of another cache or configuration" in error
        assert read_folder(output) == files
        assert run_encoding.main([*argv, "--path_to_kv", str(other), "--overwrite"]) == 0
        assert run_encoding.main([*argv, "--path_to_kv", str(other), "--output_path", str(tmp_path / "alone")]) == 0
        assert read_folder(output) == read_folder(tmp_path / "alone") != files


class TestTransformRefusals:
    """What cannot be encoded with method transform: one line, its exit code, and nothing written."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, output) -> Iterator[None]:
        yield
        assert not output.exists()

    @pytest.mark.parametrize(
        "flags", [["--profile", "p"], ["--levels", "1,2"], ["--target_bits", "1"], ["--target_kl", "0.1"]]
    )
    def test_its_flags_with_another_method(self, argv, refuse, flags):
        error = refuse(run_encoding.main, [*argv, *flags], 2)
        assert f"{flags[0]} is not for method cachegen" in error

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--levels", "2"], "--levels"),
            (["--levels", "1,3"], "--levels"),
            (["--levels", "1,2,3,4,5"], "--levels"),
            (["--levels", ""], "--levels"),
            (["--target_bits", "0"], "--target_bits"),
            (["--target_kl", "nan"], "--target_kl"),
            (["--target_bits", "1", "--target_kl", "1"], "--target_bits and --target_kl exclude each other"),
            (["--coder", "packed"], "--coder packed: method transform is coded with rans"),
            (["--recompute_last", "60"], "--recompute_last 60 leaves none of the cache's 60 tokens"),
            (["--recompute_last", "-1"], "--recompute_last"),
        ],
    )
    def test_wrong_flags(self, transform_argv, refuse, flags, message):
        assert message in refuse(run_encoding.main, [*transform_argv, *flags], 2)

    def test_a_missing_profile(self, transform_argv, tmp_path, refuse):
        error = refuse(run_encoding.main, [*transform_argv, "--profile", tmp_path / "nowhere"], 3)
        assert "nowhere/profile.json: no such file (--profile takes a folder" in error

    @pytest.mark.parametrize("name", ["profile.json", "synthesis.zlib", "analysis.safetensors"])
    def test_a_damaged_profile(self, transform_argv, profile_path, refuse, name):
        content = (profile_path / name).read_bytes()
        (profile_path / name).write_bytes(content[: len(content) // 2])
        assert f"profile/{name}" in refuse(run_encoding.main, transform_argv, 4)

    def test_a_profile_of_another_model(self, transform_argv, tmp_path, refuse):
        (rotary,) = make_metadata(1).rotary_embeddings
        other = make_profile([(1, 8)] * 4, (2,), rotary=rotary, model_fingerprint="cd" * 32)
        save_profile(tmp_path / "other", other)
        error = refuse(run_encoding.main, [*transform_argv, "--profile", tmp_path / "other"], 5)
        assert "the profile's model_fingerprint is " in error and "give --profile the one made for this model" in error

    def test_a_target_without_a_curve(self, transform_argv, tmp_path, refuse):
        metadata = make_metadata(1)
        rotary, fingerprint = metadata.rotary_embeddings[0], metadata.model_fingerprint
        save_profile(tmp_path / "bare", make_profile([(1, 8)] * 4, (2,), rotary=rotary, model_fingerprint=fingerprint))
        argv = [*transform_argv, "--profile", tmp_path / "bare", "--target_bits", "1"]
        assert "no measured curve" in refuse(run_encoding.main, argv, 3)


class TestRefusals:
    """One line on stderr, its exit code, and nothing written."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, output) -> Iterator[None]:
        yield
        assert not output.exists()

    def test_a_missing_kv_file(self, argv, tmp_path, refuse):
        error = refuse(run_encoding.main, [*argv, "--path_to_kv", tmp_path / "no.pkl"], 3)
        assert "no.pkl: no such KV cache file (write one with main.py" in error

    def test_a_folder_as_kv_file(self, argv, tmp_path, refuse):
        assert "is a folder, where" in refuse(run_encoding.main, [*argv, "--path_to_kv", tmp_path], 3)

    @pytest.mark.parametrize("as_zip", [False, True])
    def test_a_pickle_that_would_run_code(self, argv, tmp_path, kv_path, refuse, as_zip):
        class RunsCode:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "pwned"),)

        if as_zip:
            torch.save({"format": "cachegen-kv", "keys": [RunsCode()]}, kv_path)
        else:
            kv_path.write_bytes(pickle.dumps(RunsCode()))
        error = refuse(run_encoding.main, argv, 4)
        assert ("nothing of it was run" if as_zip else "plain pickles are never loaded") in error
        assert not (tmp_path / "pwned").exists()

    def test_a_truncated_kv_file(self, argv, kv_path, refuse):
        kv_path.write_bytes(kv_path.read_bytes()[:-100])
        assert f"{kv_path}: not a KV cache file of main.py, or not whole" in refuse(run_encoding.main, argv, 4)

    def test_nan_in_the_cache(self, argv, kv_path, refuse):
        cache = make_cache(60)
        cache.values[1][17, 0, 7] = torch.nan
        save_kv_cache(kv_path, cache, make_metadata(60))
        error = refuse(run_encoding.main, argv, 3)
        assert "NaN or infinity (layer 1, values, token 17)" in error

    def test_a_missing_config(self, argv, tmp_path, refuse):
        error = refuse(run_encoding.main, [*argv, "--quantization_config", tmp_path / "no.json"], 3)
        assert "no.json: no such config file" in error

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"key_first_bins": 31}, "key_first_bins must be even, got 31"),
            ({"key_second_bins": "17"}, "key_second_bins must be even, got 17"),
            ({"key_third_bins": 2}, "key_third_bins must be 4 to 256, got 2"),
            ({"value_first_bins": 258}, "value_first_bins must be 4 to 256, got 258"),
            ({"value_second_bins": "300"}, "value_second_bins must be 4 to 256, got 300"),
            ({"value_second_bins": -16}, "value_second_bins must be 4 to 256, got -16"),
            ({"value_second_bins": 16.5}, "value_second_bins must be an integer, got 16.5"),
            ({"value_second_bins": None}, "value_second_bins must be an integer, got null"),
            ({"value_second_bins": "many"}, 'value_second_bins must be an integer, got "many"'),
            ({"key_third_layers": 1}, "key_third_layers must not be below the boundary before it, got 1"),
            ({"value_second_layers": 1}, "no value group covers layers 1 to 1: raise value_second_layers"),
            ({"bins": 3}, "unknown field bins"),
            ({"method": "huffman"}, 'method must be one of cachegen, uniform, transform, lossless, got "huffman"'),
            ({"coder": "zip"}, "coder must be one of rans, ac, packed"),
        ],
    )
    def test_a_wrong_config(self, argv, config_path, refuse, fields, message):
        write_config(config_path, **fields)
        error = refuse(run_encoding.main, argv, 2)
        assert message in error and str(config_path) in error

    @pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
    def test_a_config_that_is_no_json_object(self, argv, config_path, refuse, text):
        config_path.write_bytes(text.encode("latin-1"))
        assert str(config_path) in refuse(run_encoding.main, argv, 2)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--num_chunks", "61"], "--num_chunks 61 is more than the cache has tokens (60)"),
            (["--num_chunks", "4", "--chunk_size", "20"], "begin beyond the cache's 60 tokens: there is room for 3"),
            (["--num_chunks", "0"], "--num_chunks"),
            (["--chunk_size", "-1"], "--chunk_size"),
            (["--threads", "none"], "--threads"),
            (["--coder", "zip"], "--coder"),
            (["--device", "tpu"], "--device"),
            (["--nonsense"], "--nonsense"),
        ],
    )
    def test_a_wrong_flag(self, argv, refuse, flags, message):
        assert message in refuse(run_encoding.main, [*argv, *flags], 2)

    def test_cuda_without_cuda(self, argv, refuse, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "or use --device cpu" in refuse(run_encoding.main, [*argv, "--device", "cuda"], 6)


class TestOutput:
    """Places that cannot be written, or that hold something of the user's."""

    @pytest.mark.parametrize("below", ["", "below"])
    def test_an_output_path_that_is_a_file_is_refused(self, argv, tmp_path, refuse, below):
        (tmp_path / "file").write_text("mine")
        error = refuse(run_encoding.main, [*argv, "--output_path", tmp_path / "file" / below], 7)
        assert "--output_path" in error
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_folder_of_foreign_files_is_refused_and_left_alone_by_overwrite(self, argv, output, refuse):
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
        (output / ".tmp-notes").write_text("mine")
        error = refuse(run_encoding.main, argv, 7)
        assert "is not empty and holds no tables.cgt (.tmp-notes)" in error and "--overwrite" in error
        assert list(read_folder(output)) == [".tmp-notes", "thesis.tex"]
        assert run_encoding.main([*argv, "--overwrite"]) == 0
        assert (output / "thesis.tex").read_text() == (output / ".tmp-notes").read_text() == "mine"
        assert (output / "tables.cgt").exists()

    def test_a_json_file_that_cannot_be_written_is_an_output_error(self, argv, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        assert run_encoding.main([*argv, "--quiet", "--json", str(tmp_path / "file" / "out.json")]) == 7
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "out.json: cannot be written" in error

    def test_a_file_beyond_the_size_limit_is_one_line_and_leaves_whole_files_only(self, tmp_path, argv, output, refuse):
        save_cache(tmp_path / "kv.pkl", 9000, num_kv_heads=2, head_dim=32)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            error = refuse(run_encoding.main, argv, 7)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "chunk_00000.L1.cgc: cannot be written: File too large" in error
        assert list(read_folder(output)) == ["tables.cgt"]
        assert run_encoding.main(argv) == 0

    def test_a_full_disk_is_one_line_and_leaves_whole_files_only(self, tmp_path, argv, refuse, full_disk):
        save_cache(tmp_path / "kv.pkl", 9000, num_kv_heads=2, head_dim=32)
        folder = full_disk(kilobytes=600) / "encoded"
        argv = [*argv[:-2], "--output_path", str(folder), "--chunk_size", "1000"]
        error = refuse(run_encoding.main, argv, 7)
        assert ".cgc: cannot be written: No space left on device" in error
        assert 1 <= check_all_whole(folder) < 9
        assert not any(map(is_temporary, folder.iterdir()))


def check_all_whole(folder: Path) -> int:
    """Parse every file under a final name; returns the number of chunks."""
    num_chunks = 0
    for path in folder.iterdir() if folder.exists() else ():
        if is_temporary(path):
            continue
        if path.name == "tables.cgt":
            parse_document(path.read_bytes())
        else:
            assert path.name.startswith("chunk_")
            parse_chunk(path.read_bytes())
            num_chunks += 1
    return num_chunks


class TestProcess:
    """The real process: killed, interrupted, and run from elsewhere."""

    def start(self, argv: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), *argv]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(self, process: subprocess.Popen[str], path: Path) -> None:
        """Wait until the process has written a file, or has ended."""
        while process.poll() is None and not path.exists():
            time.sleep(0.001)

    @pytest.mark.slow
    def test_a_killed_encoding_leaves_whole_files_and_completes_when_run_again(self, large_kv_path, tmp_path):
        """20 kills: 4 from the start to the first file, and 16 spread evenly over the time that writing takes.

        Those 16 wait for a number of finished chunks, since wall time alone says little on a busy machine.
        """
        undisturbed = tmp_path / "undisturbed"
        started = time.perf_counter()
        process = self.start(large_argv(large_kv_path, undisturbed))
        self.wait_for(process, undisturbed / "tables.cgt")
        first_file_at = time.perf_counter()
        assert process.communicate() == ("", "") and process.returncode == 0
        seconds_per_chunk = (time.perf_counter() - first_file_at) / NUM_LARGE_CHUNKS
        expected = read_folder(undisturbed)
        assert len(expected) == NUM_LARGE_CHUNKS + 1
        shutil.rmtree(undisturbed)
        generator = random.Random(0)
        moments = [(None, generator.random() * (first_file_at - started)) for _ in range(4)]
        finished = ["tables.cgt", *(f"chunk_{index:05d}.L1.cgc" for index in range(NUM_LARGE_CHUNKS - 2))]
        moments += [(finished[i * len(finished) // 16], generator.random() * seconds_per_chunk) for i in range(16)]

        def kill_and_run_again(number: int) -> int:
            """Return how many chunks the process had finished when it was killed."""
            folder = tmp_path / f"killed{number}"
            finished_name, delay = moments[number]
            process = self.start(large_argv(large_kv_path, folder))
            if finished_name is not None:
                self.wait_for(process, folder / finished_name)
            time.sleep(delay)
            process.kill()
            _, errors = process.communicate()
            assert errors == "" and process.returncode in (0, -signal.SIGKILL)
            num_chunks = check_all_whole(folder)
            assert run_encoding.main(large_argv(large_kv_path, folder)) == 0
            assert read_folder(folder) == expected  # and no temporary is left
            shutil.rmtree(folder)
            return num_chunks

        with ThreadPoolExecutor(max_workers=2) as pool:
            numbers_of_chunks = list(pool.map(kill_and_run_again, range(len(moments))))
        # Most were hit in the middle, or the test would mean nothing.
        assert sum(number < NUM_LARGE_CHUNKS for number in numbers_of_chunks) >= 12
        assert len(set(numbers_of_chunks)) >= 8

    def test_ctrl_c_is_one_line_and_exit_code_130_and_the_rerun_completes(self, large_kv_path, output):
        process = self.start(large_argv(large_kv_path, output))
        self.wait_for(process, output / "tables.cgt")
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "error: interrupted\n") and process.returncode == 130
        assert check_all_whole(output) < NUM_LARGE_CHUNKS
        assert not any(map(is_temporary, output.iterdir()))
        assert run_encoding.main(large_argv(large_kv_path, output)) == 0
        assert check_all_whole(output) == NUM_LARGE_CHUNKS

    def test_it_runs_from_elsewhere_without_an_installed_package(self, argv, output, tmp_path):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(
            [sys.executable, str(SCRIPT), *argv, "--json", "-"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert result.returncode == 0
        assert json.loads(result.stdout)["num_chunks"] == 3
        assert "bits per value" in result.stderr and "Traceback" not in result.stderr

    def test_an_error_is_one_line_and_the_processs_exit_code(self, argv, tmp_path):
        command = [sys.executable, str(SCRIPT), *argv, "--path_to_kv", str(tmp_path / "no.pkl")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (3, "")
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_sweep_writes_one_json_per_config_and_a_table(kv_path, tmp_path):
    coarse = write_config(tmp_path / "coarse.json", key_first_bins=8, value_second_bins=4)
    fine = write_config(tmp_path / "fine.json", key_first_bins=128, value_second_bins=64)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(REPOSITORY / "scripts" / "sweep.sh"), kv_path, tmp_path / "sweep", coarse, fine]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    records = [json.loads((tmp_path / "sweep" / f"{name}.json").read_text()) for name in ("coarse", "fine")]
    for record, config in zip(records, (coarse, fine), strict=True):
        assert record["stage"] == "encode" and record["num_tokens"] == 60
        assert record["config"]["quantization_config"] == str(config)
        (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == [config.stem]]
        assert f"{record['bits_per_value']:.3f}" in line
    assert records[0]["bits_per_value"] < records[1]["bits_per_value"]
