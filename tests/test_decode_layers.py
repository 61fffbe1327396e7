"""Decoding layer by layer: the first layers of all chunks are ready first, and in the end all is as ever."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cachegen.coder.cpu_kernels import CpuKernels
from cachegen.errors import BitstreamError, MismatchError
from cachegen.kv_cache import KVCache
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from tests.fixtures.absmax import make_encoder, write_config
from tests.fixtures.caches import allocate_like, are_equal, make_cache, make_metadata
from tests.fixtures.transform import make_profile, make_transformed_cache, start_transform_encoder

CHUNKS = (40, 7, 33)


class OneGroup(CpuKernels):
    """Kernels that decode the components of one group at a time."""

    def components_at_a_time(self, num_threads: int) -> int:
        return 0


PROFILE = make_profile([(2, 8)] * 8, (1, 2, 1))


@pytest.fixture(params=[1, 3], ids=["a level", "three levels"])
def opened(request: pytest.FixtureRequest, tmp_path) -> tuple[EncodedFolder, KVCache, torch.Tensor]:
    """A document of method transform, each group of whose layers is decoded alone; its cache and its tokens."""
    cache = make_transformed_cache(PROFILE, sum(CHUNKS), torch.float16)
    cache.keys[1][50, 1, 3] = 3e4  # travels exactly
    encoder = start_transform_encoder(cache, PROFILE, CHUNKS, step_log=0, num_levels=request.param)
    encode_document(encoder, tmp_path)
    folder = EncodedFolder(tmp_path, 2, OneGroup(), find_profile=lambda _: PROFILE)
    return folder, cache, make_metadata(sum(CHUNKS)).token_ids


def test_layers_become_ready_in_order_and_stay_as_they_are(opened) -> None:
    folder, cache, token_ids = opened
    expected, output = allocate_like(cache), allocate_like(cache)
    folder.decode_into(expected, token_ids, CHUNKS)
    for plane in output.planes:
        plane.fill_(7.0)
    found = []
    for layers in folder.decode_layers(output, token_ids, CHUNKS):
        found.append(layers)
        for layer in range(layers.stop):
            assert torch.equal(output.keys[layer], expected.keys[layer])
            assert torch.equal(output.values[layer], expected.values[layer])
        for layer in range(layers.stop, 4):
            assert (output.keys[layer] == 7.0).all() and (output.values[layer] == 7.0).all()
    assert found == [range(1), range(1, 3), range(3, 4)]
    assert are_equal(output, expected)


def test_a_stream_that_is_corrupt_is_named_when_its_layers_are_decoded(opened, monkeypatch) -> None:
    folder, cache, token_ids = opened
    parts = type(folder.document).list_parts

    def spoil(document, contents, *arguments, **fields):
        found = parts(document, contents, *arguments, **fields)
        if fields["first_token"] == CHUNKS[0]:
            problem = BitstreamError("is corrupt")

            def fail():
                raise problem

            found[1] = dataclasses.replace(found[1], start=fail)
        return found

    monkeypatch.setattr(type(folder.document), "list_parts", spoil)
    layers = folder.decode_layers(allocate_like(cache), token_ids, CHUNKS)
    assert next(layers) == range(1)
    with pytest.raises(BitstreamError, match=r"chunk_00001.*is corrupt"):
        next(layers)


def test_files_of_another_context_are_refused_before_the_first_layer(opened) -> None:
    folder, cache, token_ids = opened
    changed = token_ids.clone()
    changed[-1] += 1
    with pytest.raises(MismatchError, match=r"chunk_00002.*token_hash"):
        next(folder.decode_layers(allocate_like(cache), changed, CHUNKS))


def test_methods_that_decode_all_layers_together_give_them_at_once(tmp_path) -> None:
    cache = make_cache(90, num_layers=3)
    encoder = make_encoder(cache, make_metadata(90), write_config(tmp_path / "config.json"), [60, 30])
    encode_document(encoder, tmp_path / "encoded")
    folder = EncodedFolder(tmp_path / "encoded", 1)
    expected, output = allocate_like(cache), allocate_like(cache)
    folder.decode_into(expected, None, (60, 30))
    assert list(folder.decode_layers(output, None, (60, 30))) == [range(cache.num_layers)]
    assert are_equal(output, expected)
