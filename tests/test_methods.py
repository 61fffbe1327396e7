"""methods/: a method that one file adds goes through every script, and methods are named and numbered once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import main
import run_decoding_disk
import run_decoding_remote
import run_encoding
import run_publishing
from cachegen.errors import BitstreamError, ConfigError, MismatchError, UnsupportedVersionError
from cachegen.kv_cache import load_kv_cache
from cachegen.methods import METHODS, check_config, load_config, open_document, parse_chunk, parse_document
from cachegen.pipeline.decode import EncodedFolder
from tests.fixtures import BUNDLED_MODEL
from tests.fixtures.caches import allocate_like, are_equal
from tests.toy_method import NUMBER, ToyMethod

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = "The harbour pilot counted eleven ships before the fog came in, and wrote the number down. " * 4


@pytest.fixture
def toy() -> Iterator[ToyMethod]:
    """The toy method, registered for one test."""
    method = ToyMethod()
    METHODS.append(method)
    yield method
    METHODS.remove(method)


@pytest.fixture
def encoded(toy, tmp_path: Path) -> Path:
    """A folder with a context, its cache, and its encoding by the toy method in three chunks."""
    context, config = tmp_path / "5.txt", tmp_path / "toy.json"
    context.write_text(CONTEXT)
    config.write_text('{"method": "toy"}')
    argv = ["--model_id", BUNDLED_MODEL, "--path_to_context", context, "--save_dir", tmp_path / "data", "--quiet"]
    assert main.main([*map(str, argv), "--dtype", "float32"]) == 0
    argv = ["--path_to_kv", tmp_path / "data" / "test_kv_5.pkl", "--quantization_config", config, "--num_chunks", 3]
    assert run_encoding.main([*map(str, argv), "--output_path", str(tmp_path / "encoded"), "--quiet"]) == 0
    return tmp_path / "encoded"


def answer(run, argv: list, capsys) -> list[int]:
    capsys.readouterr()
    assert run.main([*map(str, argv), "--json", "-", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)["token_ids"]


def test_names_and_numbers_are_given_once() -> None:
    assert len({method.name for method in METHODS}) == len({method.number for method in METHODS}) == len(METHODS)
    numbers = {method.name: method.number for method in METHODS}
    assert numbers == {"cachegen": 1, "uniform": 2, "transform": 3, "lossless": 4}


class TestToy:
    """The method of tests/toy_method.py."""

    def test_it_decodes_to_the_cache_itself(self, encoded) -> None:
        cache, metadata = load_kv_cache(encoded.parent / "data" / "test_kv_5.pkl")
        folder = EncodedFolder(encoded, 1)
        output = allocate_like(cache, cache.num_tokens)
        folder.decode_into(output, metadata.token_ids, folder.document.header.chunk_tokens)
        assert are_equal(output, cache)

    def test_the_scripts_answer_from_it_as_from_the_text(self, encoded, tmp_path, capsys) -> None:
        context = tmp_path / "5.txt"
        argv = ["--path_to_encoded_kv", encoded, "--model_id", BUNDLED_MODEL, "--path_to_context", context]
        from_disk = answer(run_decoding_disk, [*argv, "--verify"], capsys)
        kv, store = tmp_path / "data" / "test_kv_5.pkl", tmp_path / "store"
        argv = ["--path_to_encoded_kv", encoded, "--path_to_kv", kv, "--path_to_store", store]
        assert run_publishing.main([*map(str, argv), "--quiet"]) == 0
        argv = ["--path_to_encoded_kv", store, "--model_id", BUNDLED_MODEL, "--path_to_context", context]
        assert answer(run_decoding_remote, [*argv, "--level", 1], capsys) == from_disk

    def test_a_resumed_encoding_repairs_it(self, encoded, tmp_path, capsys) -> None:
        damaged = encoded / "chunk_00001.L1.cgc"
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1])
        argv = ["--path_to_kv", tmp_path / "data" / "test_kv_5.pkl", "--quantization_config", tmp_path / "toy.json"]
        argv += ["--output_path", encoded, "--num_chunks", 3, "--quiet", "--json", "-"]
        assert run_encoding.main(list(map(str, argv))) == 0
        assert json.loads(capsys.readouterr().out)["repaired_files"] == [damaged.name]
        assert damaged.read_bytes() == content

    def test_flipped_bits_are_refused(self, encoded) -> None:
        generator = random.Random(0)
        for name in ("tables.cgt", "chunk_00002.L1.cgc"):
            content = (encoded / name).read_bytes()
            for _ in range(200):
                changed = bytearray(content)
                changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
                with pytest.raises(BitstreamError):
                    (parse_document if name == "tables.cgt" else parse_chunk)(bytes(changed))

    def test_configs_and_flags_of_other_methods_are_refused(self, encoded, tmp_path) -> None:
        header = parse_document((encoded / "tables.cgt").read_bytes())
        with pytest.raises(MismatchError, match=r"method is toy, but .* says uniform"):
            check_config(load_config(Path("config/uniform_8bit.json")), header, "tables.cgt")
        with pytest.raises(ConfigError, match="`levels` is not for method toy"):
            load_config(tmp_path / "toy.json").with_flags({"levels": (1, 2)})


def test_files_of_a_method_that_is_not_there_are_refused_by_number(encoded, toy) -> None:
    content = (encoded / "tables.cgt").read_bytes()
    METHODS.remove(toy)
    try:
        message = rf"{NUMBER} is not supported, this release reads 1 \(cachegen\), 2 \(uniform\), 3 \(transform\), 4 "
        with pytest.raises(UnsupportedVersionError, match=message) as caught:
            open_document(content)
        assert (caught.value.offset, caught.value.field) == (38, "method")
    finally:
        METHODS.append(toy)
