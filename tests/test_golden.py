"""Golden files: every coder writes exactly these bytes and reads exactly these values; the invalid ones are refused."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from cachegen.coder.components import decode_components, encode_components
from cachegen.coder.cpu_kernels import CPU
from cachegen.errors import BitstreamError, MismatchError, UnsupportedVersionError
from cachegen.format.files import CHUNK_SUFFIX, chunk_name
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import open_document, parse_chunk
from cachegen.methods.absmax.quantization import dequantize, quantize
from cachegen.methods.transform.profile_storage import load_profile
from tests.golden import make_golden, make_transform_golden
from tests.golden.make_golden import FOLDER, GOLDENS, Golden
from tests.reference.kernels import REFERENCE

BY_NAME = {golden.name: golden for golden in GOLDENS}
ERRORS = {error.__name__: error for error in (BitstreamError, UnsupportedVersionError, MismatchError)}
INVALID = json.loads((FOLDER / "invalid" / "invalid.json").read_text("utf-8"))
KERNELS = {"reference": REFERENCE, "cpu": CPU}

golden_documents = pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)


@cache
def read_files(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((FOLDER / name).iterdir())}


def quantize_and_back(golden: Golden) -> list[torch.Tensor]:
    """What decoding must give, straight from the quantizer."""
    planes = make_golden.make_cache(golden).slice(0, sum(golden.chunk_tokens)).planes
    expected = [
        dequantize(*quantize(plane, num_bins), num_bins).reshape(plane.shape)
        for plane, num_bins in zip(planes, golden.num_bins, strict=True)
    ]
    for layer, first in enumerate(golden.first_stored):
        for plane in expected[2 * layer : 2 * layer + 2]:
            plane[:first] = 0
    return expected


@golden_documents
def test_reference_writes_the_golden_bytes(golden: Golden) -> None:
    assert make_golden.encode(golden) == read_files(golden.name)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@golden_documents
def test_cpu_writes_the_golden_bytes_on_any_number_of_threads(golden: Golden, num_threads: int) -> None:
    assert make_golden.encode(golden, CPU, num_threads) == read_files(golden.name)


@golden_documents
def test_reference_reads_the_golden_values(golden: Golden) -> None:
    decoded = make_golden.decode(golden, read_files(golden.name))
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    assert make_golden.hash_cache(decoded) == expected[golden.name]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@golden_documents
def test_cpu_reads_the_golden_values_on_any_number_of_threads(golden: Golden, num_threads: int) -> None:
    decoded = make_golden.decode(golden, read_files(golden.name), CPU, num_threads)
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    assert make_golden.hash_cache(decoded) == expected[golden.name]


@golden_documents
def test_golden_values_are_the_quantizers(golden: Golden) -> None:
    decoded = make_golden.decode(golden, read_files(golden.name), CPU).planes
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
        if name.endswith(CHUNK_SUFFIX):
            files = read_files(golden.name) | {chunk_name(0): content}
            make_golden.decode(golden, files, KERNELS[kernels])
        else:
            open_document(content, kernels=KERNELS[kernels]).prepare()
    error = caught.value
    assert type(error) is ERRORS[reason["error"]]
    if isinstance(error, BitstreamError):
        # The reference decodes one stream and does not know its number.
        anonymous = ("stream",) if kernels == "reference" and reason["field"] == "stream 0" else ()
        assert error.field in (reason["field"], *anonymous)
    else:
        assert str(error).startswith(reason["field"] + " ")


def test_invalid_files_are_all_listed() -> None:
    present = {path.name for path in (FOLDER / "invalid").iterdir()} - {"invalid.json"}
    assert present == set(INVALID)


# --- method transform -------------------------------------------------------------------------------------------------

TRANSFORM = FOLDER / make_transform_golden.NAME
INVALID_TRANSFORM = json.loads((FOLDER / "invalid_transform" / "invalid.json").read_text("utf-8"))
LEVELS = range(1, make_transform_golden.NUM_LEVELS + 1)


def decode_transform(changed: dict[str, bytes], num_levels: int, num_threads: int = 1) -> KVCache:
    """Decode the golden document's chunks with its committed profile, some of its files replaced."""
    files = {path.name: path.read_bytes() for path in TRANSFORM.iterdir() if path.is_file()} | changed
    document = open_document(files["tables.cgt"], find_profile=lambda _: load_profile(TRANSFORM / "profile"))
    shapes, chunk_tokens = make_transform_golden.SHAPES, make_transform_golden.CHUNK_TOKENS
    output = from_planes([torch.full((sum(chunk_tokens), *shape), torch.nan) for shape in shapes])
    start = 0
    for index, num_tokens in enumerate(chunk_tokens):
        document.decode(
            [files[chunk_name(index, level)] for level in range(1, num_levels + 1)],
            output.slice(start, start + num_tokens),
            first_token=start,
            token_hash=make_transform_golden.token_hash(start + num_tokens),
            num_threads=num_threads,
        )
        start += num_tokens
    return output


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_write_and_read_the_golden_components(level: int, num_threads: int) -> None:
    drawn = make_transform_golden.draw_components()
    start = 0
    for index, num_tokens in enumerate(make_transform_golden.CHUNK_TOKENS):
        chunk = parse_chunk((TRANSFORM / chunk_name(index, level)).read_bytes())
        streams, payload = list(chunk.header.streams), bytes(chunk.payload)
        for group, (coding, length) in enumerate(
            zip(make_transform_golden.codings(level), make_transform_golden.TOKENS_PER_STREAM, strict=True)
        ):
            fine = np.array(drawn[level - 1][group][start : start + num_tokens], np.int32)
            coarse = np.array(drawn[level - 2][group][start : start + num_tokens], np.int32) if level > 1 else None
            written, entries = encode_components(fine, coarse, coding, length, num_threads)
            assert (bytes(written), entries) == (payload[: len(written)], streams[: len(entries)])
            found = np.zeros_like(fine)
            if coarse is not None:
                found[:, : coding.num_refined] = coarse[:, : coding.num_refined]
            decode_components(payload[: len(written)], entries, found, coding, length, num_threads)
            assert (found == fine).all()
            streams, payload = streams[len(entries) :], payload[len(written) :]
        assert (streams, payload) == ([], b"")
        start += num_tokens


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("level", LEVELS)
def test_transform_reads_the_golden_values_within_the_tolerance(level: int, num_threads: int) -> None:
    decoded = decode_transform({}, level, num_threads)
    expected = np.fromfile(TRANSFORM / f"decoded_level_{level}.f32", "<f4")
    for plane in decoded.planes:
        wanted = torch.tensor(expected[: plane.numel()]).reshape(plane.shape).flatten(1)
        expected = expected[plane.numel() :]
        tolerance = wanted.abs().amax(1, keepdim=True) / 256
        assert ((plane.flatten(1) - wanted).abs() <= tolerance).all()
    assert len(expected) == 0


def test_golden_transform_document_has_what_a_decoder_can_get_wrong() -> None:
    first, second = (make_transform_golden.codings(level) for level in LEVELS)
    for coarse, fine in zip(first, second, strict=True):
        assert 0 < fine.num_refined == coarse.num_components < fine.num_components
    assert {0, 1, 2, 3} <= set(first[0].low_bits.tolist())
    coarse_components = [value for row in make_transform_golden.draw_components()[0][0] for value in row]
    assert min(coarse_components) < 0 < max(coarse_components) and 0 in coarse_components


@pytest.mark.parametrize("name", INVALID_TRANSFORM)
def test_invalid_transform_file_is_refused(name: str) -> None:
    reason, content = INVALID_TRANSFORM[name], (FOLDER / "invalid_transform" / name).read_bytes()
    replaced = {"tables": "tables.cgt"} | {f"chunk_L{n}": chunk_name(0, n) for n in LEVELS}
    (kind,) = (kind for kind in replaced if name.startswith(f"{kind}_"))
    with pytest.raises(ERRORS[reason["error"]]) as caught:
        decode_transform({replaced[kind]: content}, 1 if kind == "chunk_L1" else 2)
    error = caught.value
    assert type(error) is ERRORS[reason["error"]]
    if isinstance(error, BitstreamError):
        assert error.field == reason["field"]
    else:
        assert str(error).startswith(reason["field"] + " ")
    assert error.level == (int(kind[-1]) if kind != "tables" else None)


def test_invalid_transform_files_are_all_listed() -> None:
    present = {path.name for path in (FOLDER / "invalid_transform").iterdir()} - {"invalid.json"}
    assert present == set(INVALID_TRANSFORM)
