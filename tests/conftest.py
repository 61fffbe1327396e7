"""Synthetic caches, their files, and runs of a script that must fail: what several test modules share."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cachegen.kv_cache import ContextMetadata, KVCache, RotaryEmbedding, from_planes, save_kv_cache
from cachegen.methods import load_config
from cachegen.methods.absmax.codec import AbsmaxEncoder
from cachegen.methods.absmax.config import AbsmaxConfig
from cachegen.methods.absmax.quantization import dequantize, quantize
from cachegen.pipeline.decode import EncodedFolder

REPOSITORY = Path(__file__).resolve().parents[1]


def make_cache(
    num_tokens: int,
    *,
    num_layers: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> KVCache:
    """A random cache, its values about as uneven between channels as a model's."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(num_kv_heads, head_dim, generator=generator) + 0.1
    planes = [
        (torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator) * spread).to(dtype)
        for _ in range(2 * num_layers)
    ]
    return from_planes(planes)


def make_metadata(num_tokens: int, *, seed: int = 0, **fields: Any) -> ContextMetadata:
    """Metadata of random tokens; `fields` replace those of the dataclass."""
    generator = torch.Generator().manual_seed(seed)
    metadata = ContextMetadata(
        model_id="random",
        model_fingerprint="ab" * 32,
        token_ids=torch.randint(5, 4096, (num_tokens,), generator=generator, dtype=torch.int32),
        rotary_embeddings=(RotaryEmbedding("rotary_emb.inv_freq", "default", (1.0, 0.01), 1.0),),
        block_size=512,
    )
    return dataclasses.replace(metadata, **fields)


def save_cache(path: Path, num_tokens: int = 60, *, seed: int = 0, **shape: Any) -> Path:
    """Write a KV file of `make_cache` and `make_metadata`."""
    save_kv_cache(path, make_cache(num_tokens, seed=seed, **shape), make_metadata(num_tokens, seed=seed))
    return path


def write_config(path: Path, **fields: Any) -> Path:
    """Write a quantization config of method cachegen, 32 and 16 bins for any number of layers, but for `fields`."""
    content: dict[str, Any] = {
        "key_first_layers": 1,
        "key_second_layers": 2,
        "key_first_bins": 32,
        "key_second_bins": 16,
        "key_third_bins": 16,
        "value_first_layers": 1,
        "value_first_bins": 32,
        "value_second_bins": 16,
    }
    path.write_text(json.dumps({**content, **fields}))
    return path


def quantize_and_dequantize(cache: KVCache, config: AbsmaxConfig) -> KVCache:
    """What decoding must give back, bit for bit."""
    groups = config.groups_of_planes(cache.num_layers)
    return from_planes(
        [
            dequantize(*quantize(plane, group.num_bins), group.num_bins).reshape(plane.shape)
            for plane, group in zip(cache.planes, groups, strict=True)
        ]
    )


def empty_like(cache: KVCache) -> KVCache:
    """A cache of the same shape, all NaN, to decode into."""
    return from_planes([torch.full_like(plane, torch.nan) for plane in cache.planes])


def decode_folder(folder: Path, cache: KVCache, token_ids: torch.Tensor, num_chunks: int | None = None) -> KVCache:
    """Decode a folder into a cache of the shape of `cache`; tokens that no chunk covers stay NaN."""
    encoded = EncodedFolder(folder, num_threads=1)
    output = empty_like(cache)
    encoded.decode_into(output, token_ids, encoded.select_chunks(num_chunks))
    return output


def are_equal(a: KVCache, b: KVCache) -> bool:
    """Whether two caches have the same dtype, shapes and bits."""
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.contiguous().view(torch.uint8).equal(y.view(torch.uint8))
        for x, y in zip(a.planes, b.planes, strict=True)
    )


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make_encoder(
    cache: KVCache, metadata: ContextMetadata, config_path: Path, chunk_tokens: Sequence[int]
) -> AbsmaxEncoder:
    """An encoder with the config's own coder, on one thread."""
    config = load_config(config_path)
    return AbsmaxEncoder(cache, metadata, config, chunk_tokens, config.coder)


@pytest.fixture
def refuse(capsys) -> Callable[..., str]:
    """Run a script's main, which must fail with an exit code, one line on stderr and nothing on stdout; its line."""

    def run(main: Callable[[list[str]], int], argv: Sequence[object], exit_code: int) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == exit_code
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ") and output.err.endswith("\n") and output.err.count("\n") == 1
        return output.err

    return run


@pytest.fixture
def config_path(tmp_path) -> Path:
    """A config of 32 and 16 bins."""
    return write_config(tmp_path / "config.json")


@pytest.fixture
def kv_path(tmp_path) -> Path:
    """A KV file of 60 tokens, two layers, one head of 8 dims, fp16."""
    return save_cache(tmp_path / "kv.pkl")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: a small model's steps are short, and on a busy machine threads wait long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system; skips where that is not allowed."""
    mounted = []

    def mount(*, kilobytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a small file system cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
