"""The KV file: what is saved comes back bit for bit, and nothing else gets in or is run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from cachegen import _native
from cachegen.errors import BitstreamError, InputError, OutputError, UnsupportedVersionError
from cachegen.files import is_temporary
from cachegen.kv_cache import (
    KVCache,
    RotaryEmbedding,
    from_planes,
    hash_planes,
    hash_rotary_embeddings,
    hash_token_prefixes,
    load_kv_cache,
    save_kv_cache,
)
from tests.fixtures import BUNDLED_MODEL, REPOSITORY
from tests.fixtures.caches import are_equal, make_cache, make_metadata, save_cache

ROTARY = RotaryEmbedding("rotary_emb.inv_freq", "default", (1.0, 0.0123456), 1.0)
RECORD = {"name": "rotary_emb.inv_freq", "rope_type": "default", "inv_freq": [1.0, 0.01], "attention_scaling": 1.0}


class RunsCode:
    """A pickle of this makes a folder where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a KV file; a field changed to None is removed."""
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save({name: value for name, value in content.items() if value is not None}, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_saved_cache_comes_back_bit_for_bit(tmp_path, dtype):
    cache = make_cache(9, num_layers=3, num_kv_heads=2, dtype=dtype)
    cache.values = [value[:, :1, :3] for value in cache.values]  # of another shape than the keys, and strided
    metadata = make_metadata(9, block_size=64)
    save_kv_cache(tmp_path / "kv.pkl", cache, metadata)
    loaded, loaded_metadata = load_kv_cache(tmp_path / "kv.pkl")
    assert are_equal(loaded, from_planes([plane.contiguous() for plane in cache.planes]))
    assert loaded_metadata.token_ids.equal(metadata.token_ids)
    assert loaded_metadata.cache_hash == hash_planes(loaded) == hash_planes(cache)
    assert dataclasses.replace(loaded_metadata, token_ids=metadata.token_ids, cache_hash=None) == metadata
    assert os.listdir(tmp_path) == ["kv.pkl"]


def test_planes_with_scattered_head_dims_are_loaded_in_order(tmp_path):
    planes = [torch.randn(4, 8, 5).half().transpose(1, 2) for _ in range(2)]
    save_kv_cache(tmp_path / "kv.pkl", from_planes(planes), make_metadata(4))
    loaded, _ = load_kv_cache(tmp_path / "kv.pkl")
    assert all(plane.stride(2) == 1 for plane in loaded.planes)
    assert all(a.equal(b) for a, b in zip(loaded.planes, planes, strict=True))


def test_planes_are_keys_and_values_layer_by_layer():
    cache = make_cache(3, num_layers=2)
    assert [id(plane) for plane in cache.planes] == [
        id(plane) for plane in (cache.keys[0], cache.values[0], cache.keys[1], cache.values[1])
    ]
    assert cache.num_values == 4 * 3 * 8
    assert are_equal(from_planes(cache.planes), cache)


def test_a_slice_shares_memory():
    cache = make_cache(5)
    cache.slice(1, 3).keys[0].fill_(7)
    assert (cache.keys[0] == 7).all(dim=2).flatten().tolist() == [False, True, True, False, False]
    for start, stop in [(-1, 2), (3, 2), (0, 6)]:
        with pytest.raises(ValueError, match="must lie within 5 tokens"):
            cache.slice(start, stop)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ([], [], "one tensor per layer"),
        ([torch.zeros(2, 1, 4)], [], "one tensor per layer"),
        ([torch.zeros(2, 4)], [torch.zeros(2, 1, 4)], "must be .num_tokens, num_kv_heads, head_dim."),
        ([torch.zeros(2, 1, 0)], [torch.zeros(2, 1, 4)], "must be .num_tokens, num_kv_heads, head_dim."),
        ([torch.zeros(2, 1, 4)], [torch.zeros(3, 1, 4)], "must have 2 tokens, got 3"),
        ([torch.zeros(2, 1, 4)], [torch.zeros(2, 1, 4).half()], "float32 and torch.float16"),
        ([torch.zeros(2, 1, 4).double()], [torch.zeros(2, 1, 4).double()], "one of fp16, bf16 and fp32"),
    ],
)
def test_a_cache_of_unlike_planes_is_refused(keys, values, message):
    with pytest.raises(ValueError, match=message):
        KVCache(keys, values)


@pytest.mark.parametrize(
    "layout",
    [
        lambda plane: plane,
        lambda plane: plane.transpose(0, 1).contiguous().transpose(0, 1),  # head by head, as models keep it
        lambda plane: torch.cat([plane, plane], dim=1)[:, : plane.shape[1]],
        lambda plane: torch.cat([plane, plane], dim=2)[:, :, : plane.shape[2]],
        lambda plane: plane.transpose(1, 2).contiguous().transpose(1, 2),  # nothing contiguous
    ],
)
@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "head_dim"),
    [(0, 2, 8), (1, 1, 1), (1024, 2, 64), (1025, 3, 7), (2050, 1, 40), (3, 2, 20_000)],
)
def test_the_hash_is_of_the_values_whatever_their_layout(num_tokens, num_kv_heads, head_dim, layout):
    generator = torch.Generator().manual_seed(1)
    planes = [torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator).half() for _ in range(4)]
    lines = ""
    for plane in planes:
        content = plane.numpy().tobytes()
        block_bytes = 1024 * 2 * num_kv_heads * head_dim
        blocks = [content[at : at + block_bytes] for at in range(0, max(1, len(content)), block_bytes)]
        checksums = " ".join(f"{_native.crc32c(block):08x}" for block in blocks)
        lines += f"float16 {num_tokens} {num_kv_heads} {head_dim}: {checksums}\n"
    cache = from_planes([layout(plane) for plane in planes])
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert [hash_planes(cache), hash_planes(cache, num_threads=3)] == [expected, expected]


def test_token_hashes_are_those_of_the_prefixes_and_of_little_endian_int32():
    ids = torch.tensor([1, 256, 4095, 70000])
    whole = b"\1\0\0\0\0\1\0\0\xff\x0f\0\0\x70\x11\1\0"
    assert hash_token_prefixes(ids, [1, 3, 4]) == [hashlib.sha256(whole[: 4 * n]).hexdigest() for n in (1, 3, 4)]
    assert hash_token_prefixes(ids.to(torch.int32), [4]) == hash_token_prefixes(ids, [4])


def test_the_rotary_hash_ignores_the_last_bits_and_nothing_else():
    hashed = hash_rotary_embeddings([ROTARY])
    assert hash_rotary_embeddings([dataclasses.replace(ROTARY, inv_freq=(1.0, 0.0123457))]) == hashed
    for change in (
        {"inv_freq": (1.0, 0.0124456)},
        {"inv_freq": (1.0,)},
        {"attention_scaling": 1.2},
        {"rope_type": "yarn"},
        {"name": "local"},
    ):
        assert hash_rotary_embeddings([dataclasses.replace(ROTARY, **change)]) != hashed
    assert hash_rotary_embeddings([]) != hashed


def test_a_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(InputError, match=r"no-such.pkl: no such KV cache file \(write one with main.py"):
        load_kv_cache(tmp_path / "no-such.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused_and_never_run(tmp_path, protocol):
    (tmp_path / "kv.pkl").write_bytes(pickle.dumps({"keys": RunsCode(tmp_path / "pwned")}, protocol))
    with pytest.raises(BitstreamError, match="plain pickles are never loaded"):
        load_kv_cache(tmp_path / "kv.pkl")
    assert not (tmp_path / "pwned").exists()


def test_code_in_a_file_of_torch_save_is_refused_and_never_run(tmp_path):
    torch.save({"format": "cachegen-kv", "keys": RunsCode(tmp_path / "pwned")}, tmp_path / "kv.pkl")
    with pytest.raises(BitstreamError, match="nothing of it was run"):
        load_kv_cache(tmp_path / "kv.pkl")
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_of_torchs_old_format_is_refused_and_never_run(tmp_path):
    torch.save({"keys": RunsCode(tmp_path / "pwned")}, tmp_path / "kv.pkl", _use_new_zipfile_serialization=False)
    with pytest.raises(BitstreamError, match="plain pickles are never loaded"):
        load_kv_cache(tmp_path / "kv.pkl")
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_hidden_before_a_zip_is_refused_and_never_run(tmp_path):
    """A zip may have anything before it; the file is both a pickle and a zip of one."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("archive/data.pkl", pickle.dumps(RunsCode(tmp_path / "pwned"), 2))
        writer.writestr("archive/version", "3\n")
    (tmp_path / "kv.pkl").write_bytes(pickle.dumps(RunsCode(tmp_path / "pwned"), 2) + archive.getvalue())
    with pytest.raises(BitstreamError):
        load_kv_cache(tmp_path / "kv.pkl")
    assert not (tmp_path / "pwned").exists()


def test_other_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "kv.pkl", "w") as writer:
        writer.writestr("hello.txt", "no tensors")
    with pytest.raises(BitstreamError, match=r"not a KV cache file of main.py"):
        load_kv_cache(tmp_path / "kv.pkl")
    for content in ([1, 2], {"format": "another"}, torch.zeros(3)):
        torch.save(content, tmp_path / "kv.pkl")
        with pytest.raises(BitstreamError, match=r"not a KV cache file of main.py"):
            load_kv_cache(tmp_path / "kv.pkl")


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    content = save_cache(tmp_path / "whole.pkl", 2, num_layers=1, head_dim=2).read_bytes()
    path = tmp_path / "kv.pkl"
    lengths = {*range(0, len(content), 9), *range(40), *range(len(content) - 60, len(content))}
    for length in sorted(lengths, reverse=True):
        path.write_bytes(content[:length])
        with pytest.raises(BitstreamError):
            load_kv_cache(path)


def test_a_flipped_bit_is_refused_or_harmless_but_never_another_error(tmp_path):
    """The file has no checksums of its own, and torch's unpickler fails over a flipped bit in many ways."""
    content = save_cache(tmp_path / "whole.pkl", 2, num_layers=1, head_dim=2).read_bytes()
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    assert names[0] == "archive/data.pkl"
    path = tmp_path / "kv.pkl"
    for position in random.Random(0).sample(range(8 * len(content)), 600):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            load_kv_cache(path)
        except BitstreamError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "field version: version 1 is not supported, this release reads 2"),
        ({"version": 1 << 1000}, "field version: version a huge number is not supported"),
        ({"version": True}, "field version: must be an integer"),
        ({"version": "2"}, "field version: must be an integer"),
        ({"version": torch.tensor([2, 2], dtype=torch.int32)}, "field version: must be an integer"),
        ({"version": None}, "field version: must be an integer"),
        ({"format": torch.zeros(2)}, "not a KV cache file"),
        ({"keys": None}, "field keys: is missing"),
        ({"cache_hash": None}, "field cache_hash: is missing"),
        ({"cache_hash": "ab"}, "field cache_hash: must be a SHA-256 in hex"),
        ({"cache_hash": ["ab" * 32]}, "field cache_hash: must be a SHA-256 in hex"),
        ({"keys": 3}, "field keys: must be a list of 1 to 65535"),
        ({"keys": []}, "field keys: must be a list of 1 to 65535"),
        ({"keys": torch.zeros(2, 60, 1, 8).half()}, "field keys: must be a list"),
        ({"keys": (torch.zeros(60, 1, 8).half(),) * 2}, "field keys: must be a list"),
        ({"keys": [torch.zeros(60, 1, 8).half()]}, "one tensor per layer"),
        ({"keys": [torch.zeros(59, 1, 8).half() + i for i in range(2)]}, "59"),
        ({"keys": [torch.zeros(60, 8).half() + i for i in range(2)]}, "must be .num_tokens, num_kv_heads, head_dim."),
        ({"keys": [torch.zeros(60, 1, 8).int() + i for i in range(2)]}, "one of fp16, bf16 and fp32"),
        ({"keys": [torch.zeros(60, 1 << 16, 1).half() + i for i in range(2)]}, "at most 65535 heads and dims"),
        ({"keys": [torch.zeros(60, 1, 1 << 16).half() + i for i in range(2)]}, "at most 65535 heads and dims"),
        ({"keys": [torch.zeros(60, 512, 256).half() + i for i in range(2)]}, "65536 channels"),
        ({"keys": [torch.zeros(60, 1, 8).half().to_sparse()] * 2}, "not a KV cache file"),
        ({"keys": [torch.zeros(60, 1, 8).half(), "text"]}, "field keys: a plane is not a plain tensor"),
        ({"keys": [torch.zeros(60, 1, 8).half(), 7]}, "field keys: a plane is not a plain tensor"),
        ({"values": [torch.zeros(60, 1, 8).half(), [1.0]]}, "field values: a plane is not a plain tensor"),
        ({"keys": [torch.zeros(60, 1, 8).half().requires_grad_()] * 2}, "not a plain tensor"),
        ({"keys": [torch.zeros(1, 1, 8).half().expand(60, 1, 8)] * 2}, "elements of a plane share their place"),
        ({"keys": [torch.zeros(1, 1, 1).half().expand(60, 1, 8)] * 2}, "elements of a plane share their place"),
        ({"keys": [torch.zeros(600).half().as_strided((60, 1, 8), (4, 1, 1))] * 2}, "elements of a plane share"),
        ({"keys": [torch.zeros(60, 0, 8).half()] * 2}, "a plane is empty"),
        ({"token_ids": torch.zeros(60, dtype=torch.int64)}, "not a KV cache file"),
        ({"token_ids": torch.zeros(60, dtype=torch.float32)}, "field token_ids: one int32 per token"),
        ({"token_ids": torch.zeros(59, dtype=torch.int32)}, "field token_ids: one int32 per token"),
        ({"token_ids": torch.zeros(60, dtype=torch.int32)}, "field token_hash: does not match the token ids"),
        ({"token_ids": torch.zeros(60, dtype=torch.int32, device="meta")}, "not a KV cache file"),
        ({"token_ids": [1] * 60}, "field token_ids: a plane is not a plain tensor"),
        ({"rope_hash": "00" * 32}, "field rope_hash: does not match the rotary embeddings"),
        ({"rotary_embeddings": [{"name": "x"}]}, "must be an object of name, rope_type"),
        ({"rotary_embeddings": 5}, "field rotary_embeddings: must be a list"),
        ({"rotary_embeddings": [{**RECORD, "name": ["x"]}]}, "name: must be a text"),
        ({"rotary_embeddings": [{**RECORD, "name": "\ud800"}]}, "name: must be printable"),
        (
            {"rotary_embeddings": [{**RECORD, "inv_freq": "text"}]},
            "inv_freq: must be a list",
        ),
        (
            {"rotary_embeddings": [{**RECORD, "inv_freq": [True]}]},
            "inv_freq: must be a finite number",
        ),
        (
            {"rotary_embeddings": [{**RECORD, "attention_scaling": float("nan")}]},
            "attention_scaling: must be",
        ),
        (
            {"rotary_embeddings": [{**RECORD, "attention_scaling": 1 << 1999}]},
            "attention_scaling: must be",
        ),
        (
            {"rotary_embeddings": [{**RECORD, "inv_freq": [1.0] * 65_537}]},
            "inv_freq: must be a list",
        ),
        ({"weight_bits": 5}, "field weight_bits: must be "),
        ({"model_id": 7}, "field model_id: must be a text"),
        ({"model_id": "x" * 5000}, "field model_id: must be a text"),
        ({"model_fingerprint": "ab"}, "field model_fingerprint: must be a SHA-256 in hex"),
        ({"model_fingerprint": "xy" * 32}, "field model_fingerprint: must be a SHA-256 in hex"),
        ({"block_size": "many"}, "field block_size: must be an integer"),
        ({"block_size": True}, "field block_size: must be an integer"),
        ({"block_size": 512.0}, "field block_size: must be an integer"),
        ({"block_size": 0}, "field block_size"),
        ({"block_size": 1 << 32}, "field block_size"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path, changes, message):
    path = save_cache(tmp_path / "kv.pkl")
    rewrite(path, **changes)
    expected = UnsupportedVersionError if "is not supported" in message else BitstreamError
    with pytest.raises(expected, match=message) as caught:
        load_kv_cache(path)
    assert type(caught.value) is expected and str(caught.value).startswith(str(path))


def test_a_failed_write_is_an_output_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache, metadata = make_cache(4000), make_metadata(4000)
    try:
        for limit in (50_000, 100_000, 200_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OutputError, match=r"kv.pkl: cannot be written: File too large"):
                save_kv_cache(tmp_path / "kv.pkl", cache, metadata)
            assert os.listdir(tmp_path) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_interrupt_while_saving_stays_one_and_leaves_nothing(tmp_path, monkeypatch):
    """torch's zip writer turns it into a RuntimeError."""
    numbers = []

    class Interrupted(io.FileIO):
        def write(self, content: Any) -> int:
            numbers.append(len(content))
            if len(numbers) == 5:
                signal.raise_signal(signal.SIGINT)
            return super().write(content)

    monkeypatch.setattr("builtins.open", lambda path, mode: Interrupted(path, mode.replace("b", "")))
    with pytest.raises(KeyboardInterrupt):
        save_kv_cache(tmp_path / "kv.pkl", make_cache(40), make_metadata(40))
    assert os.listdir(tmp_path) == []


def test_a_killed_save_leaves_no_half_kv_file(tmp_path):
    """The save of main.py, without the model: processes that save a cache of 8 MB over and over, each killed once."""
    shape = {"num_tokens": 8_000, "num_layers": 4, "num_kv_heads": 2, "head_dim": 32}
    program = (
        f"import sys; sys.path[:0] = {[str(REPOSITORY / 'src'), str(REPOSITORY)]!r}\n"
        "from pathlib import Path; from cachegen.kv_cache import save_kv_cache\n"
        "from tests.fixtures.caches import make_cache, make_metadata\n"
        f"cache, metadata = make_cache(**{shape!r}), make_metadata(8_000)\n"
        "while True: save_kv_cache(Path(sys.argv[1]), cache, metadata)\n"
    )
    expected = make_cache(**shape)

    def kill(seed: int) -> None:
        folder = tmp_path / str(seed)
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", program, str(folder / "kv.pkl")])
        while not any(folder.iterdir()):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for path in folder.iterdir():
            if path.name == "kv.pkl":
                assert are_equal(load_kv_cache(path)[0], expected)
            else:
                assert is_temporary(path)

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(kill, range(2)))


@pytest.mark.parametrize("is_limit", [False, True])
def test_main_says_a_full_disk_in_one_line_and_leaves_nothing(tmp_path, capsys, request, is_limit):
    (tmp_path / "0.txt").write_text("A little text, and then some more of it. " * 40)
    argv = ["--model_id", BUNDLED_MODEL, "--path_to_context", str(tmp_path / "0.txt"), "--save_dir"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_limit:
        save_dir = tmp_path / "data"
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    else:
        save_dir = request.getfixturevalue("full_disk")(kilobytes=200)
    try:
        assert main.main([*argv, str(save_dir)]) == 7
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = "File too large" if is_limit else "No space left on device"
    assert capsys.readouterr().err == f"error: {save_dir}/test_kv_0.pkl: cannot be written: {reason}\n"
    assert os.listdir(save_dir) == []
