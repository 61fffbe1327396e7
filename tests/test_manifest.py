"""Manifests: written and read back, and hostile ones refused in one line that names the field."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from cachegen.errors import BitstreamError, UnsupportedVersionError
from cachegen.store.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    is_object_name,
    manifest_name,
    pack_manifest,
    unpack_manifest,
)
from tests.fixtures.stores import make_document, publish


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("manifest")
    return publish(folder / "store", make_document(folder)).manifest


@pytest.fixture
def content(manifest) -> dict[str, Any]:
    return json.loads(pack_manifest(manifest))


def unpack(content: Any) -> Manifest:
    return unpack_manifest(json.dumps(content).encode(), "http://host/m.json")


def test_a_manifest_is_read_back_as_it_was_written(manifest):
    assert unpack_manifest(pack_manifest(manifest)) == manifest
    assert manifest.num_covered_tokens == 640 and [chunk.first_token for chunk in manifest.chunks] == [0, 300, 500, 600]


def test_the_name_says_the_content(manifest):
    other = dataclasses.replace(manifest, model_id="other")
    assert is_object_name(manifest_name(manifest)) and manifest_name(manifest) != manifest_name(other)


def test_levels_that_refine_each_other_need_all_files_below(manifest):
    levels = tuple(dataclasses.replace(level, refines=level.level - 1 or None) for level in manifest.levels)
    embedded = unpack_manifest(pack_manifest(dataclasses.replace(manifest, levels=levels)))
    assert embedded.is_embedded and embedded.files_of(3) == (1, 2, 3) and embedded.files_of(1) == (1,)
    assert not manifest.is_embedded and manifest.files_of(3) == (3,)


def put(content: Any, path: str, value: Any) -> None:
    """Set the field at a path like "chunks.0.files.1.name"; a missing field is added."""
    *parents, last = path.split(".")
    for part in parents:
        content = content[int(part)] if isinstance(content, list) else content[part]
    content[int(last) if isinstance(content, list) else last] = value


BAD_FIELDS = [
    ("model_id", 7, "model_id"),
    ("model_id", "x" * 2000, "model_id"),
    ("model_id", "two\nlines", "model_id"),
    ("model_fingerprint", "ab", "model_fingerprint"),
    ("model_fingerprint", "G" * 64, "model_fingerprint"),
    ("rope_hash", None, "rope_hash"),
    ("dtype", "float64", "dtype"),
    ("dtype", ["float16"], "dtype"),
    ("num_cache_tokens", 639, "chunks"),
    ("num_cache_tokens", -1, "num_cache_tokens"),
    ("num_cache_tokens", 640.0, "num_cache_tokens"),
    ("num_cache_tokens", True, "num_cache_tokens"),
    ("prefill_block_size", 0, "prefill_block_size"),
    ("values_per_token", 1 << 40, "values_per_token"),
    ("levels", [], "levels"),
    ("levels", [{}] * 17, "levels"),
    ("levels", {"0": 1}, "levels"),
    ("levels.0", None, r"levels\[0\]"),
    ("levels.0.level", 2, r"levels\[0\].level"),
    ("levels.0.refines", 0, r"levels\[0\].refines"),
    ("levels.1.refines", 2, r"levels\[1\].refines"),
    ("levels.1.refines", 1, "refines"),
    ("levels.2.refines", True, r"levels\[2\].refines"),
    ("levels.0.method", "best", r"levels\[0\].method"),
    ("levels.0.bits_per_value", "2", r"levels\[0\].bits_per_value"),
    ("levels.0.kl", -0.1, r"levels\[0\].kl"),
    ("levels.0.kl", 1e300, r"levels\[0\].kl"),
    ("levels.0.tables.bytes", 1 << 40, r"levels\[0\].tables.bytes"),
    ("levels.0.tables.name", "../secret", r"levels\[0\].tables.name"),
    ("chunks", [], "chunks"),
    ("chunks.0", [], r"chunks\[0\]"),
    ("chunks.1.first_token", 299, r"chunks\[1\].first_token"),
    ("chunks.0.num_tokens", 0, r"chunks\[0\].num_tokens"),
    ("chunks.0.num_tokens", 1 << 30, r"chunks\[0\].num_tokens"),
    ("chunks.2.token_hash", "", r"chunks\[2\].token_hash"),
    ("chunks.2.files", [], r"chunks\[2\].files"),
    ("chunks.2.files.0.bytes", 0, r"chunks\[2\].files\[0\].bytes"),
    ("chunks.2.files.0.bytes", 1 << 34, r"chunks\[2\].files\[0\].bytes"),
    ("chunks.2.files.0.sha256", "0" * 63, r"chunks\[2\].files\[0\].sha256"),
    ("chunks.2.files.1.name", "http://evil/x", r"chunks\[2\].files\[1\].name"),
    ("chunks.2.files.1.extra", 1, r"chunks\[2\].files\[1\]"),
    ("first_stored", [], "first_stored"),
    ("first_stored", [0, 0], "first_stored"),
    ("first_stored", [0, 641], "first_stored"),
    ("first_stored", [-1, 5], "first_stored"),
    ("first_stored", [True, 5], "first_stored"),
    ("first_stored", [0.0, 5], "first_stored"),
    ("first_stored", [1] * 65536, "first_stored"),
    ("first_stored", None, "first_stored"),
    ("has_states", False, "has_states"),
    ("has_states", 1, "has_states"),
    ("has_states", None, "has_states"),
]


@pytest.mark.parametrize(("path", "value", "field"), BAD_FIELDS)
def test_a_wrong_field_is_refused_by_name(content, path, value, field):
    put(content, path, value)
    with pytest.raises(
        BitstreamError, match=rf"^http://host/m.json, field {field}: must |^.*, field chunks: cover"
    ) as e:
        unpack(content)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_document_that_can_only_be_used_whole_says_so(manifest):
    assert b"first_stored" not in pack_manifest(manifest) and not manifest.is_whole_only
    windowed = dataclasses.replace(manifest, first_stored=(0, 640))
    assert windowed.is_whole_only and unpack_manifest(pack_manifest(windowed)) == windowed
    covering = dataclasses.replace(manifest, num_cache_tokens=manifest.num_covered_tokens, has_states=True)
    assert covering.is_whole_only and unpack_manifest(pack_manifest(covering)) == covering


def test_an_unknown_field_is_refused(content):
    with pytest.raises(BitstreamError, match="must be an object of "):
        unpack({**content, "surprise": 1})


@pytest.mark.parametrize("path", ["model_id", "chunks", "levels.1.kl", "levels.1.tables.name", "chunks.3.files"])
def test_a_missing_field_is_refused(content, path):
    *parents, last = path.split(".")
    place = content
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    del place[last]
    with pytest.raises(BitstreamError, match="must be an object of "):
        unpack(content)


def test_a_chunk_with_too_few_files_is_refused(content):
    content["chunks"][1]["files"].pop()
    with pytest.raises(BitstreamError, match=r"chunks\[1\].files: must have 3 files, one per level"):
        unpack(content)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b"<html></html>",
        b'{"format": "other"}',
        b"[" * 100_000,
        b'{"format": ' + b"9" * 100_000 + b"}",
        b'{"format": "cachegen-manifest", "format": "cachegen-manifest"}',
        b'{"format": NaN}',
    ],
)
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(BitstreamError, match=r"m\.json"):
        unpack_manifest(text, "m.json")


def test_a_manifest_of_unbounded_size_is_refused():
    with pytest.raises(BitstreamError, match="more than the"):
        unpack_manifest(b" " * (MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_by_number(content, version):
    content["version"] = version
    with pytest.raises(UnsupportedVersionError, match="is not supported, this release reads 1"):
        unpack(content)


NAMES = ["", "/etc/passwd", "../x", "a/../x", "a/./x", "a//b", "a/", ".", "..", "a b", "a\\b", "http://x/y", "a?b"]
NAMES += ["a#b", "a%2e%2e/b", "é", "a\n", "a/..", "a/" * 8 + "a", "a" * 513]


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_relative_paths_are_names(name):
    assert not is_object_name(name)


def test_every_flipped_character_is_refused_or_harmless(manifest):
    content = pack_manifest(manifest)
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 2
        try:
            changed = unpack_manifest(bytes(damaged))
        except BitstreamError:
            continue
        assert all(is_object_name(file.name) for chunk in changed.chunks for file in chunk.files)
        assert changed != manifest or json.loads(damaged) == json.loads(content)


def test_levels_are_the_smallest_first(manifest):
    assert [level.kl for level in manifest.levels] == [0.1, 0.01, 0.001]
    assert manifest.levels[0].bits_per_value < manifest.levels[1].bits_per_value < manifest.levels[2].bits_per_value
