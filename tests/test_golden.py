"""Golden files: every coder writes exactly these bytes and reads exactly these values; the invalid ones are refused."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from cachegen import container
from cachegen.codec import load_document
from cachegen.coder import cpu, reference
from cachegen.errors import BitstreamError, MismatchError, UnsupportedVersionError
from cachegen.quantization import dequantize, quantize
from tests.golden import make_golden
from tests.golden.make_golden import FOLDER, GOLDENS, Golden

BY_NAME = {golden.name: golden for golden in GOLDENS}
ERRORS = {error.__name__: error for error in (BitstreamError, UnsupportedVersionError, MismatchError)}
INVALID = json.loads((FOLDER / "invalid" / "invalid.json").read_text("utf-8"))
KERNELS = {"reference": reference, "cpu": cpu}

golden_documents = pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)


@cache
def read_files(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((FOLDER / name).iterdir())}


def quantize_and_back(golden: Golden) -> list[torch.Tensor]:
    """What decoding must give, straight from the quantizer."""
    planes = make_golden.make_cache(golden).slice(0, sum(golden.chunk_tokens)).planes
    return [
        dequantize(*quantize(plane, num_bins), num_bins).reshape(plane.shape)
        for plane, num_bins in zip(planes, golden.num_bins, strict=True)
    ]


@golden_documents
def test_reference_writes_the_golden_bytes(golden: Golden) -> None:
    assert make_golden.encode(golden) == read_files(golden.name)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@golden_documents
def test_cpu_writes_the_golden_bytes_on_any_number_of_threads(golden: Golden, num_threads: int) -> None:
    assert make_golden.encode(golden, cpu, num_threads) == read_files(golden.name)


@golden_documents
def test_reference_reads_the_golden_values(golden: Golden) -> None:
    decoded = make_golden.decode(golden, read_files(golden.name))
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    assert make_golden.hash_cache(decoded) == expected[golden.name]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@golden_documents
def test_cpu_reads_the_golden_values_on_any_number_of_threads(golden: Golden, num_threads: int) -> None:
    decoded = make_golden.decode(golden, read_files(golden.name), cpu, num_threads)
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    assert make_golden.hash_cache(decoded) == expected[golden.name]


@golden_documents
def test_golden_values_are_the_quantizers(golden: Golden) -> None:
    decoded = make_golden.decode(golden, read_files(golden.name), cpu).planes
    for plane, expected in zip(decoded, quantize_and_back(golden), strict=True):
        assert torch.equal(plane.view(torch.uint8), expected.view(torch.uint8))


def test_maker_writes_the_committed_files_and_no_others() -> None:
    made = make_golden.make_all()
    committed = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in FOLDER.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert sorted(made) == sorted(committed)
    assert [name for name, content in made.items() if committed[name] != content] == []


def test_maker_refuses_to_overwrite_unless_asked(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(make_golden, "FOLDER", tmp_path)
    monkeypatch.setattr(make_golden, "make_all", lambda: {"worked/tables.cgt": b"one"})
    (tmp_path / "worked").mkdir()
    (tmp_path / "worked" / "tables.cgt").write_bytes(b"two")
    assert make_golden.main([]) == 1
    assert (tmp_path / "worked" / "tables.cgt").read_bytes() == b"two"
    assert make_golden.main(["--overwrite"]) == 0
    assert (tmp_path / "worked" / "tables.cgt").read_bytes() == b"one"
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", INVALID)
def test_invalid_file_is_refused(name: str, kernels: str) -> None:
    reason, content = INVALID[name], (FOLDER / "invalid" / name).read_bytes()
    golden = BY_NAME[reason["base"]]
    with pytest.raises(ERRORS[reason["error"]]) as caught:
        if name.endswith(container.CHUNK_SUFFIX):
            files = read_files(golden.name) | {container.chunk_name(0): content}
            make_golden.decode(golden, files, KERNELS[kernels])
        else:
            load_document(content, kernels=KERNELS[kernels])
    error = caught.value
    assert type(error) is ERRORS[reason["error"]]
    if isinstance(error, BitstreamError):
        # The reference decodes one stream and does not know its number.
        anonymous = ("stream", "band_map") if kernels == "reference" and reason["field"] == "stream 0" else ()
        assert error.field in (reason["field"], *anonymous)
    else:
        assert str(error).startswith(reason["field"] + " ")


def test_invalid_files_are_all_listed() -> None:
    present = {path.name for path in (FOLDER / "invalid").iterdir()} - {"invalid.json"}
    assert present == set(INVALID)
