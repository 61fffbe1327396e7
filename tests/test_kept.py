"""A document kept in memory: the same bytes, errors and sizes, without the cache that it was made from."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from cachegen.errors import InputError
from cachegen.pipeline.encode import encode_document
from cachegen.pipeline.kept import KeptEncoding
from tests.fixtures import read_folder
from tests.fixtures.absmax import make_encoder
from tests.fixtures.caches import make_cache, make_metadata
from tests.fixtures.transform import make_profile, make_transformed_cache, start_transform_encoder


@pytest.mark.parametrize("method", ["cachegen", "transform"])
def test_it_writes_what_its_encoder_writes_and_keeps_no_cache(tmp_path, config_path, method):
    if method == "cachegen":
        cache = make_cache(60)
        encoder = make_encoder(cache, make_metadata(60), config_path, (25, 25, 10))
    else:
        profile = make_profile([(2, 6), (1, 8)] * 2, (1, 1))
        cache = make_transformed_cache(profile, 60)
        encoder = start_transform_encoder(cache, profile, (25, 25, 10), num_levels=2)
    expected = encode_document(encoder, tmp_path / "encoder")
    kept = KeptEncoding(encoder)
    planes = [weakref.ref(plane) for plane in cache.planes]
    losses = [(level, encoder.expected_kl(level)) for level in encoder.levels]
    del cache, encoder
    gc.collect()
    assert all(plane() is None for plane in planes)

    assert encode_document(kept, tmp_path / "kept") == expected
    files = read_folder(tmp_path / "kept")
    assert files == read_folder(tmp_path / "encoder")
    assert kept.num_bytes == sum(map(len, files.values()))
    assert [(level, kept.expected_kl(level)) for level in kept.levels] == losses
    assert encode_document(kept, tmp_path / "kept").num_reused_chunks == len(files) - 1


def test_it_refuses_what_its_encoder_refuses(config_path):
    cache = make_cache(60)
    cache.values[0][7] = torch.inf
    with pytest.raises(InputError, match="NaN or infinity"):
        KeptEncoding(make_encoder(cache, make_metadata(60), config_path, (60,)))
