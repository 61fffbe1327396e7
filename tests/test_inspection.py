"""`cachegen inspect` and `verify`: every kind of file, and each damage by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import run_publishing
from cachegen import __main__ as command
from cachegen.kv_cache import save_kv_cache
from cachegen.methods import load_config, make_encoder
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.encode import encode_document
from cachegen.windows import Window
from tests.fixtures.caches import make_metadata, make_shaped_cache

GOLDEN = Path(__file__).parent / "golden"
ROOT = GOLDEN.parents[1]


def look(capsys, *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert command.main([*map(str, argv), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three chunks at 4 bits, beside the KV file they come from."""
    cache, metadata = make_shaped_cache([(2, 16)] * 4, 60, torch.float16), make_metadata(60)
    save_kv_cache(tmp_path / "kv.pkl", cache, metadata)
    config = load_config(ROOT / "config" / "uniform_4bit.json")
    encode_document(make_encoder(config, cache, metadata, (20, 20, 20)), tmp_path / "encoded")
    return tmp_path / "encoded"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/*.cg?")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_golden_files(path: Path, capsys) -> None:
    if path.parent.name.startswith("invalid"):
        # Some are whole, and wrong in a stream, which only decoding shows, or of another document.
        code, error = command.main(["inspect", str(path)]), capsys.readouterr().err
        assert code == 0 or (code == 4 and error.count("\n") == 1 and str(path) in error)
        return
    record = look(capsys, "inspect", path)
    assert record["kind"] == ("tables" if path.suffix == ".cgt" else "chunk") and record["problems"] == []
    assert record["bytes"] == path.stat().st_size
    if record["kind"] == "chunk":
        assert sum(record["bytes_by_part"].values()) == record["bytes"]


def test_a_folder_is_summed_up(folder, capsys) -> None:
    record = look(capsys, "inspect", folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    (level,) = record["levels"]
    assert (record["kind"], record["method"], record["num_tokens"], record["num_chunks"]) == (
        "document",
        "uniform",
        60,
        3,
    )
    assert record["bytes"] == size == sum(record["bytes_by_part"].values())
    assert level["bits_per_value"] == 8 * size / (60 * 4 * 32) == pytest.approx(16 / level["ratio_vs_fp16"])


def test_what_can_only_be_used_whole_says_so(folder, tmp_path, capsys) -> None:
    assert (look(capsys, "inspect", folder)["is_whole_only"], look(capsys, "inspect", folder)["stored_share"]) == (
        False,
        1,
    )
    windows = (Window("sliding", 16), None)
    cache, metadata = make_shaped_cache([(2, 16)] * 4, 60, torch.float16), make_metadata(60, windows=windows)
    save_kv_cache(tmp_path / "windowed.pkl", cache, metadata)
    assert look(capsys, "inspect", tmp_path / "windowed.pkl")["num_layers_with_window"] == 1
    config = load_config(ROOT / "config" / "uniform_4bit.json")
    encoder = make_encoder(config, cache, metadata, (20, 20, 20), first_stored=metadata.first_visible(60))
    encode_document(encoder, tmp_path / "windowed")
    record = look(capsys, "verify", tmp_path / "windowed")
    assert (record["is_whole_only"], record["stored_share"], record["problems"]) == (True, (60 + 15) / 120, [])
    chunks = [look(capsys, "inspect", tmp_path / "windowed" / f"chunk_0000{i}.L1.cgc") for i in range(3)]
    assert [chunk["has_all_tokens"] for chunk in chunks] == [False, False, False]
    argv = ["--path_to_encoded_kv", str(tmp_path / "windowed"), "--path_to_kv", str(tmp_path / "windowed.pkl")]
    assert run_publishing.main([*argv, "--path_to_store", str(tmp_path / "store"), "--quiet"]) == 0
    (document,) = look(capsys, "verify", tmp_path / "store")["documents"]
    assert document["is_whole_only"]


def test_levels_add_up_and_say_their_errors(capsys) -> None:
    record = look(capsys, "inspect", GOLDEN / "transform")
    first, second = record["levels"]
    assert first["bits_per_value"] < second["bits_per_value"] and first["max_error"] >= second["max_error"]
    assert sum(record["bytes_by_part"].values()) == record["bytes"] and record["profile_hash"]


def test_a_kv_file(folder, capsys) -> None:
    record = look(capsys, "inspect", folder.parent / "kv.pkl")
    assert (record["kind"], record["num_tokens"], record["num_layers"]) == ("kv", 60, 2)


def damage(folder: Path, kind: str) -> Path:
    path = folder / "chunk_00001.L1.cgc"
    if kind == "flipped":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif kind == "missing":
        path.unlink()
    elif kind == "another":
        shutil.copy(folder / "chunk_00002.L1.cgc", path)
    else:  # the same place in a document of other values
        cache, metadata = make_shaped_cache([(2, 16)] * 4, 60, torch.float16, seed=1), make_metadata(60)
        config = load_config(ROOT / "config" / "uniform_4bit.json")
        path.write_bytes(b"".join(make_encoder(config, cache, metadata, (20, 20, 20)).encode_chunk(1)))
    return path


@pytest.mark.parametrize("kind", ["flipped", "missing", "another", "another document's"])
def test_damage_is_named_and_verify_refuses_it(folder, capsys, kind: str) -> None:
    assert command.main(["verify", str(folder)]) == 0
    path = damage(folder, kind)
    record = look(capsys, "inspect", folder)
    (problem,) = record["problems"]
    assert str(path) in problem and record["levels"][0]["bits_per_value"] is None
    assert command.main(["verify", str(folder)]) == 4
    assert str(path) in capsys.readouterr().err


def test_verify_compares_the_model(folder, capsys) -> None:
    argv = ["verify", str(folder), "--model_id", str(ROOT / "models" / "tiny-mistral")]
    assert command.main(argv) == 5
    assert "model_fingerprint is " in capsys.readouterr().err


class TestStore:
    """A store in a folder, published from the encodings of `folder`."""

    @pytest.fixture
    def store(self, folder, tmp_path) -> Path:
        argv = ["--path_to_encoded_kv", folder, "--path_to_kv", tmp_path / "kv.pkl", "--path_to_store", tmp_path / "s"]
        assert run_publishing.main([*map(str, argv), "--quiet"]) == 0
        return tmp_path / "s"

    def test_its_documents_are_listed(self, store, folder, capsys) -> None:
        record = look(capsys, "inspect", store)
        (document,) = record["documents"]
        assert document["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        assert document["levels"][0]["method"] == "uniform" and record["problems"] == []

    def test_a_damaged_object_is_named(self, store, capsys) -> None:
        path = sorted((store / "chunks").rglob("*.cgc"))[0]
        path.write_bytes(path.read_bytes()[:-1])
        (problem,) = look(capsys, "inspect", store)["problems"]
        assert path.name in problem
        assert command.main(["verify", str(store)]) == 4


class TestProfiles:
    @pytest.fixture
    def zoo(self, tmp_path) -> Path:
        """Two profiles of one model, in a folder of their own and in the model's."""
        for place in ("fine", "model/profile"):
            shutil.copytree(ROOT / "models" / "tiny-mistral" / "profile", tmp_path / "zoo" / place)
        return tmp_path / "zoo"

    def test_they_are_listed_with_their_sizes(self, zoo, capsys) -> None:
        record = look(capsys, "profiles", zoo)
        assert [profile["path"] for profile in record["profiles"]] == [
            str(zoo / "fine"),
            str(zoo / "model" / "profile"),
        ]
        one, other = ({**profile, "path": None} for profile in record["profiles"])
        assert one == other and one["num_layers"] == 6 and one["can_encode"] and record["problems"] == []
        sizes = [(zoo / "fine" / name).stat().st_size for name in ("profile.json", "synthesis.zlib")]
        assert one["bytes"] == sum(sizes) and 0 < one["finest_kl"] < one["finest_bits_per_value"]
        assert look(capsys, "inspect", zoo / "fine") == {**record["profiles"][0], "problems": []}

    def test_a_damaged_one_is_an_error_that_names_it(self, zoo, capsys) -> None:
        (zoo / "fine" / "analysis.safetensors").write_bytes(b"")
        assert command.main(["profiles", str(zoo)]) == 4
        assert f"{zoo}/fine/analysis.safetensors" in capsys.readouterr().err

    def test_a_place_without_any_is_an_error(self, tmp_path, capsys) -> None:
        assert command.main(["profiles", str(tmp_path)]) == 3
        assert "no profile is here" in capsys.readouterr().err

    def test_one_goes_into_a_store_where_clients_have_none(self, zoo, tmp_path, capsys) -> None:
        profile = load_profile(zoo / "fine", for_encoding=True)
        cache, metadata = make_shaped_cache(profile.plane_shapes, 90, torch.float16), make_metadata(90)
        metadata = dataclasses.replace(
            metadata,
            model_fingerprint=profile.model_fingerprint,
            rotary_embeddings=profile.rotary_embeddings,
            cache_hash=None,
        )
        save_kv_cache(tmp_path / "kv.pkl", cache, metadata)
        config = load_config(ROOT / "config" / "transform_tiny.json").with_flags({"profile": profile})
        encode_document(make_encoder(config, cache, metadata, (90,)), tmp_path / "encoded")
        argv = [
            "--path_to_kv",
            tmp_path / "kv.pkl",
            "--path_to_store",
            tmp_path / "s",
            "--quiet",
            "--profile",
            zoo / "fine",
        ]
        argv = [*map(str, argv), "--path_to_encoded_kv"]
        assert run_publishing.main([*argv, str(tmp_path / "encoded")]) == 0
        record = look(capsys, "inspect", tmp_path / "s")
        assert record["profile_hashes"] == [profile.profile_hash] and record["problems"] == []
        (tmp_path / "s" / "profiles" / profile.profile_hash / "synthesis.zlib").write_bytes(b"")
        assert command.main(["verify", str(tmp_path / "s")]) == 4
        encode_document(
            make_encoder(load_config(ROOT / "config" / "uniform_4bit.json"), cache, metadata, (90,)), tmp_path / "plain"
        )
        capsys.readouterr()
        assert run_publishing.main([*argv, str(tmp_path / "plain")]) != 0
        assert "no folder was encoded with this profile (--profile)" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "code"), [(None, 3), (b"", 4), (b"Dear diary", 4)])
def test_what_is_not_ours(tmp_path, capsys, content: bytes | None, code: int) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    assert command.main(["inspect", str(path)]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_anything_of_ours(tmp_path, capsys) -> None:
    assert command.main(["inspect", str(tmp_path)]) == 3
    assert "no folder of chunks, no store and no profile" in capsys.readouterr().err


def test_the_report_has_a_row_for_each_level(folder, capsys) -> None:
    assert command.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\nlevel 1 " in out and "model fingerprint" in out
