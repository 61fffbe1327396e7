"""A document's own profile: made where there is none, found again, and left out where it does not pay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import run_encoding
from cachegen.calibration.own import STEP_LOG
from cachegen.inspection import inspect
from cachegen.kv_cache import from_planes, load_kv_cache, save_kv_cache
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.profiles import OWN_PROFILE_FOLDER, profile_finder
from tests.fixtures import REPOSITORY, read_folder
from tests.fixtures.caches import allocate_like, make_correlated_cache, make_metadata, make_shaped_cache

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(2, 16)] * 8
CONFIG = REPOSITORY / "config" / "transform.json"
NUM_TOKENS = 400


def save(path: Path, num_tokens: int = NUM_TOKENS, seed: int = 0) -> Path:
    metadata = make_metadata(num_tokens, seed=seed, rotary_embeddings=())
    save_kv_cache(path, make_correlated_cache(SHAPES, num_tokens, torch.bfloat16, seed), metadata)
    return path


@pytest.fixture
def kv_path(tmp_path) -> Path:
    return save(tmp_path / "kv.pkl")


def encode(kv_path: Path, output: Path, *flags: str, config: Path = CONFIG) -> int:
    paths = ["--path_to_kv", str(kv_path), "--output_path", str(output), "--quantization_config", str(config)]
    return run_encoding.main([*paths, "--device", "cpu", "--json", str(output.with_suffix(".json")), "--quiet", *flags])


def test_it_is_kept_with_the_files_and_found_there(kv_path, tmp_path):
    assert encode(kv_path, tmp_path / "out") == 0
    cache, metadata = load_kv_cache(kv_path)
    folder = EncodedFolder(tmp_path / "out", 1, find_profile=profile_finder(None, (tmp_path / "out",)))
    output = allocate_like(cache, cache.num_tokens)
    folder.decode_into(output, metadata.token_ids, folder.document.header.chunk_tokens)
    assert folder.document.header.step_log == STEP_LOG
    for found, plane in zip(output.planes, cache.planes, strict=True):
        deviation = plane.double().var(0, correction=0).mean().sqrt()
        assert (found.double() - plane.double()).square().mean().sqrt() < deviation * 2 ** (STEP_LOG / 16) / 2


def test_its_bytes_are_counted_and_fewer_than_without_a_transform(kv_path, tmp_path):
    assert encode(kv_path, tmp_path / "out") == 0
    assert encode(kv_path, tmp_path / "plain", config=REPOSITORY / "config" / "quantization_7b.json") == 0
    own, plain = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("out", "plain"))
    files = read_folder(tmp_path / "out")
    decoding = [content for name, content in files.items() if not name.endswith("analysis.safetensors")]
    assert own["encoded_bytes"] == sum(map(len, decoding)) and own["bytes_by_part"]["profile"] > 0
    assert own["bits_per_value"] < plain["bits_per_value"]


def test_inspect_counts_it_and_names_its_damage(kv_path, tmp_path, capsys):
    assert encode(kv_path, tmp_path / "out") == 0
    expected = json.loads((tmp_path / "out.json").read_text())
    record = inspect(str(tmp_path / "out"))
    assert record["bytes"] == expected["encoded_bytes"] and record["problems"] == []
    assert record["bytes_by_part"]["profile"] == expected["bytes_by_part"]["profile"]
    (tmp_path / "out" / OWN_PROFILE_FOLDER / "synthesis.zlib").write_bytes(b"damaged")
    assert "has changed" in inspect(str(tmp_path / "out"))["problems"][0]


def test_a_second_run_uses_it_again(kv_path, tmp_path):
    assert encode(kv_path, tmp_path / "out") == 0
    before = read_folder(tmp_path / "out")
    assert encode(kv_path, tmp_path / "out") == 0
    assert read_folder(tmp_path / "out") == before
    assert json.loads((tmp_path / "out.json").read_text())["num_reused_chunks"] == 1


def test_another_documents_is_not_replaced_unless_asked(kv_path, tmp_path, capsys):
    assert encode(kv_path, tmp_path / "out") == 0
    before = read_folder(tmp_path / "out")
    other = save(tmp_path / "other.pkl", seed=1)
    assert encode(other, tmp_path / "out") != 0
    assert "another profile is there" in capsys.readouterr().err and read_folder(tmp_path / "out") == before
    assert encode(other, tmp_path / "out", "--overwrite") == 0


def test_one_that_nothing_uses_any_more_is_removed(kv_path, tmp_path):
    assert encode(kv_path, tmp_path / "out") == 0
    plain = REPOSITORY / "config" / "quantization_7b.json"
    assert encode(kv_path, tmp_path / "out", "--overwrite", config=plain) == 0
    place = tmp_path / "out" / OWN_PROFILE_FOLDER
    assert not place.exists()
    shutil.copytree(REPOSITORY / "models" / "tiny-mistral" / "profile", place)
    before = read_folder(place)
    assert encode(kv_path, tmp_path / "out", "--overwrite", config=plain) == 0
    assert read_folder(place) == before, "a model's profile, which is nobody's to remove"


def test_a_folder_that_is_refused_stays_as_it_was(kv_path, tmp_path, capsys):
    assert encode(kv_path, tmp_path / "out", config=REPOSITORY / "config" / "quantization_7b.json") == 0
    before = read_folder(tmp_path / "out")
    assert encode(kv_path, tmp_path / "out") != 0
    assert "holds the encoding of another cache or configuration" in capsys.readouterr().err
    assert read_folder(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["synthesis.zlib", "analysis.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_a_damaged_one_is_made_again(kv_path, tmp_path, name, content):
    assert encode(kv_path, tmp_path / "out") == 0
    before = read_folder(tmp_path / "out")
    path = tmp_path / "out" / OWN_PROFILE_FOLDER / name
    path.unlink() if content is None else path.write_bytes(content)
    assert encode(kv_path, tmp_path / "out") == 0
    assert read_folder(tmp_path / "out") == before


def test_where_an_error_is_too_large_nothing_is_left_and_the_folder_can_be_used(kv_path, tmp_path, capsys):
    assert encode(kv_path, tmp_path / "out", "--max_error", "0.001") != 0
    assert "--max_error" in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []
    assert encode(kv_path, tmp_path / "out") == 0


def test_a_short_document_is_coded_without_and_that_is_said(tmp_path, capsys):
    short = save(tmp_path / "short.pkl", num_tokens=60)
    assert encode(short, tmp_path / "out") == 0
    assert "60 tokens are too few for a profile of their own: coded with method cachegen" in capsys.readouterr().err
    assert not (tmp_path / "out" / OWN_PROFILE_FOLDER).exists()
    assert json.loads((tmp_path / "out.json").read_text())["method"] == "cachegen"
    assert encode(short, tmp_path / "levels", "--levels", "1,2") != 0
    assert "which --levels needs: give --profile" in capsys.readouterr().err


def test_nan_is_refused_and_nothing_left(tmp_path, capsys):
    cache = make_shaped_cache(SHAPES, NUM_TOKENS, torch.float32)
    cache.values[1][7, 0, 3] = torch.nan
    save_kv_cache(tmp_path / "kv.pkl", from_planes(list(cache.planes)), make_metadata(NUM_TOKENS))
    assert encode(tmp_path / "kv.pkl", tmp_path / "out") != 0
    assert "the KV cache: the cache holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
