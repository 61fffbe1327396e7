"""Publishing a document, and finding the one that covers the longest prefix, on a store that cannot list."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cachegen.errors import (
    BitstreamError,
    CacheGenError,
    MismatchError,
    OutputError,
    StoreError,
    UnsupportedVersionError,
)
from cachegen.files import atomic_write
from cachegen.methods import parse_chunk
from cachegen.store.catalog import EncodedLevel, FoundDocument, find_document, publish_document
from cachegen.store.index import read_manifest
from cachegen.store.store import Store, open_store
from tests.fixtures import read_folder
from tests.fixtures.caches import make_metadata
from tests.fixtures.stores import CHUNK_TOKENS, NUM_TOKENS, make_document, publish
from tests.fixtures.transform import encode_levels, make_profile, make_transformed_cache, start_transform_encoder
from tests.fixtures.web_server import serve


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    return make_document(tmp_path_factory.mktemp("document"))


@pytest.fixture
def folder(tmp_path, document):
    publish(tmp_path / "store", document)
    return tmp_path / "store"


def find(store: Store, token_ids: torch.Tensor, document) -> FoundDocument | None:
    metadata = document.metadata
    return find_document(store, token_ids, model_fingerprint=metadata.model_fingerprint, rope_hash=metadata.rope_hash)


def with_more(token_ids: torch.Tensor, num_more: int = 1) -> torch.Tensor:
    return torch.cat([token_ids, torch.full((num_more,), 4000, dtype=torch.int32)])


def fail_after(monkeypatch, num_writes: int) -> None:
    """Let every write fail but the first ones."""
    write, names = Store._write, []

    def fail_late(self, name, content, overwrite):
        names.append(name)
        if len(names) > num_writes:
            raise OutputError("the disk is full")
        return write(self, name, content, overwrite)

    monkeypatch.setattr(Store, "_write", fail_late)


def pointers_of(folder: Path) -> list[Path]:
    return sorted((folder / "prefixes").rglob("*.json"))


class TestPublish:
    """What is in a store afterwards."""

    def test_every_object_is_named_by_its_content(self, folder, document):
        files = read_folder(folder)
        kinds = {name.split("/")[0] for name in files}
        assert kinds == {"store.json", "tables", "chunks", "documents", "prefixes"}
        assert sum(name.startswith("chunks/") for name in files) == 3 * len(CHUNK_TOKENS)
        # Blocks of 256 tokens, and the end.
        assert sum(name.startswith("prefixes/") for name in files) == 3

    def test_publishing_again_writes_nothing(self, folder, document):
        before = read_folder(folder)
        assert publish(folder, document).num_written == 0 and read_folder(folder) == before

    def test_a_corrupt_chunk_is_named(self, tmp_path, document):
        first, *others = document.levels
        broken = dataclasses.replace(first, chunks=[*first.chunks[:2], lambda: b"", *first.chunks[3:]])
        with pytest.raises(BitstreamError, match="level 1, chunk 2"):
            publish(tmp_path / "store", dataclasses.replace(document, levels=[broken, *others]))

    def test_two_documents_share_a_store(self, folder, document, tmp_path):
        other = make_document(tmp_path, seed=1)
        publish(folder, other)
        for published in (document, other):
            found = find(open_store(folder), with_more(published.metadata.token_ids), published)
            assert found is not None and found.num_chunks == len(CHUNK_TOKENS)

    def test_an_interrupted_publishing_shows_nothing_and_resumes(self, tmp_path, document, monkeypatch):
        text = with_more(document.metadata.token_ids)
        for limit in range(0, 20, 3):
            store = open_store(tmp_path / f"store {limit}", create=True)
            with monkeypatch.context() as patched:
                fail_after(patched, limit)
                with pytest.raises(OutputError, match="the disk is full"):
                    publish_document(store, document.levels, document.metadata)
            if limit:
                found = find(store, text, document)
                assert found is None or found.num_chunks == len(CHUNK_TOKENS)
            assert publish_document(store, document.levels, document.metadata).num_written == 20 - limit
            assert find(store, text, document) is not None

    def test_a_damaged_chunk_is_not_published(self, tmp_path, document):
        content = bytearray(document.levels[0].chunks[1]())
        content[len(content) // 2] ^= 1
        chunks = [*document.levels[0].chunks]
        chunks[1] = lambda: bytes(content)
        with pytest.raises(BitstreamError):
            publish_document(
                open_store(tmp_path / "s", create=True),
                [dataclasses.replace(document.levels[0], chunks=chunks)],
                document.metadata,
            )

    @pytest.mark.parametrize("what", ["tokens", "model", "chunks", "cache"])
    def test_what_does_not_belong_together_is_refused(self, tmp_path, document, what):
        levels, metadata = list(document.levels), document.metadata
        if what == "tokens":
            metadata = make_metadata(NUM_TOKENS, seed=5)
        elif what == "model":
            metadata = dataclasses.replace(metadata, model_fingerprint="cd" * 32)
        elif what == "chunks":
            levels[1] = make_document(tmp_path, chunk_tokens=(320, 320)).levels[1]
        else:
            levels[1] = make_document(tmp_path, num_layers=3).levels[1]
        with pytest.raises(MismatchError, match="encode the same cache in the same chunks"):
            publish_document(open_store(tmp_path / "s", create=True), levels, metadata)

    def test_chunks_of_another_level_are_refused(self, tmp_path, document):
        first, second, _ = document.levels
        mixed = EncodedLevel(first.tables_file, second.chunks)
        with pytest.raises(MismatchError, match=r"level 1, chunk 0: tables_hash is .*of another document"):
            publish_document(open_store(tmp_path / "s", create=True), [mixed], document.metadata)

    def test_a_file_under_another_chunks_number_is_refused(self, tmp_path, document):
        chunks = document.levels[0].chunks
        swapped = dataclasses.replace(document.levels[0], chunks=[chunks[1], chunks[0], *chunks[2:]])
        with pytest.raises(MismatchError, match="level 1, chunk 0: first_token is "):
            publish_document(open_store(tmp_path / "s", create=True), [swapped], document.metadata)

    def test_a_file_that_refines_another_is_refused(self, tmp_path):
        profile = make_profile([(2, 6), (1, 8)] * 2, (1, 1))
        encoder = start_transform_encoder(make_transformed_cache(profile, 40), profile, (40,), num_levels=2)
        ((first, second),) = encode_levels(encoder)
        header = parse_chunk(second).header
        other = dataclasses.replace(header, refines=header.refines ^ 1).pack() + second[header.header_bytes :]
        levels = [
            EncodedLevel(encoder.tables_file, [lambda: first]),
            EncodedLevel(encoder.tables_file, [lambda: other], refines=1),
        ]
        metadata = make_metadata(40, rotary_embeddings=profile.rotary_embeddings)
        with pytest.raises(MismatchError, match="level 2, chunk 0: refines a file of level 1 that is not the one"):
            publish_document(open_store(tmp_path / "s", create=True), levels, metadata)


class TestPublishAgain:
    """A newer manifest of a document takes the place of the older one, and damage is repaired."""

    def test_more_levels_published_later_are_what_clients_find(self, tmp_path, document):
        store = open_store(tmp_path, create=True)
        one = publish_document(store, document.levels[:1], document.metadata)
        two = publish_document(store, document.levels[:2], document.metadata)
        assert one.found is not None and one.found.address == store.describe(one.name) and one.superseded == {}
        assert two.found is not None and len(two.found.manifest.levels) == 2 and two.superseded == {one.name: 1}
        assert find(store, with_more(document.metadata.token_ids), document) == two.found
        # What the older one lists stays, for who is reading it.
        files = [stored for chunk in one.manifest.chunks for stored in chunk.files]
        for stored in [one.manifest.levels[0].tables, *files]:
            assert store.get_exactly(stored.name, stored.bytes, sha256=stored.sha256)
        assert read_manifest(store, one.name) == one.manifest
        assert publish_document(store, document.levels[:2], document.metadata).num_written == 0
        again = publish_document(store, document.levels[:1], document.metadata)
        assert again.found == one.found and again.superseded == {two.name: 2}

    def test_wherever_it_is_interrupted_clients_find_the_older_or_the_newer_one_whole(
        self, tmp_path, document, monkeypatch
    ):
        text = with_more(document.metadata.token_ids)
        seen = set()
        for limit in range(20):
            store = open_store(tmp_path / str(limit), create=True)
            publish_document(store, document.levels[:1], document.metadata)
            with monkeypatch.context() as patched:
                fail_after(patched, limit)
                try:
                    publish_document(store, document.levels, document.metadata)
                except OutputError:
                    pass
                else:
                    assert len(seen) == 2
                    return
            for num_tokens in (300, 600, len(text)):
                found = find(store, text[:num_tokens], document)
                assert found is not None and len(found.manifest.levels) in (1, 3)
                seen.add(len(found.manifest.levels))
                for chunk in found.manifest.chunks:
                    assert all(store.get_exactly(f.name, f.bytes, sha256=f.sha256) for f in chunk.files)
        pytest.fail("it never came to an end")

    def test_two_publishers_at_once_leave_one_or_the_other_whole(self, tmp_path, document):
        store = open_store(tmp_path, create=True)
        variants = [document.levels[:1], document.levels[:2], document.levels]
        for _ in range(5):
            with ThreadPoolExecutor(3) as pool:
                runs = [pool.submit(publish_document, store, levels, document.metadata) for levels in variants]
                names = {run.result().name for run in runs}
            targets = {json.loads(path.read_text())["manifest"] for path in pointers_of(tmp_path)}
            assert targets <= names
            assert find(store, with_more(document.metadata.token_ids), document) is not None

    @pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
    @pytest.mark.parametrize("kind", ["store.json", "tables", "chunks", "documents", "prefixes"])
    def test_what_is_damaged_is_repaired_and_named(self, folder, document, kind, damage):
        before = read_folder(folder)
        name = sorted(name for name in before if name.startswith(kind))[-1]
        content = bytearray(before[name])
        content[len(content) // 2] ^= 0x80
        (folder / name).write_bytes({"empty": b"", "truncated": before[name][:-5], "flipped": bytes(content)}[damage])
        published = publish(folder, document)
        assert read_folder(folder) == before
        assert published.repaired == (name,) and published.num_written == 1

    def test_a_chunk_that_is_damaged_on_a_web_server_is_repaired(self, folder, document):
        before = read_folder(folder)
        name = next(name for name in before if name.startswith("chunks"))
        (folder / name).write_bytes(bytes(len(before[name])))
        with serve(folder) as server:
            server.takes_writes = True
            assert publish_document(server.open(), document.levels, document.metadata).repaired == (name,)
        assert read_folder(folder) == before

    def test_a_description_that_somebody_else_wrote_stays(self, tmp_path, document):
        (tmp_path / "store.json").write_text('{"name": "a shop"}')
        with pytest.raises(BitstreamError, match=r"store\.json"):
            publish(tmp_path, document)
        assert (tmp_path / "store.json").read_text() == '{"name": "a shop"}'

    @pytest.mark.parametrize("is_there", [True, False])
    def test_the_pointer_of_another_document_stays_while_that_is_there(self, folder, document, tmp_path, is_there):
        """Two documents whose first 300 tokens are the same."""
        tokens = document.metadata.token_ids.clone()
        tokens[300:] += 1
        twin = make_document(tmp_path / "twin", metadata=dataclasses.replace(document.metadata, token_ids=tokens))
        shared = [path for path in pointers_of(folder)]
        if not is_there:
            next((folder / "documents").rglob("*.json")).unlink()
        published = publish(folder, twin)
        targets = [json.loads(path.read_text())["manifest"] for path in shared]
        assert sum(target == published.name for target in targets) == (0 if is_there else 1)
        assert len(published.repaired) == (0 if is_there else 1) and published.superseded == {}
        assert published.found is not None and published.found.address.endswith(published.name)

    def test_a_document_that_covers_less_than_another_is_not_what_clients_find(self, folder, document, tmp_path):
        short = make_document(tmp_path / "short", chunk_tokens=(300, 200, 100), num_tokens=NUM_TOKENS)
        published = publish(folder, short)
        assert published.found is not None and not published.found.address.endswith(published.name)
        assert published.found.manifest.num_covered_tokens == NUM_TOKENS


class TestFind:
    """Longest prefix, by requests for names only."""

    @pytest.mark.parametrize("num_more", [1, 2, 300, 5000])
    def test_a_text_that_continues_the_context_finds_all_of_it(self, folder, document, num_more):
        with serve(folder) as server:
            found = find(server.open(), with_more(document.metadata.token_ids, num_more), document)
            num_asked = sum(method == "HEAD" for method, _, _ in server.requests)
        assert found is not None and found.num_chunks == len(CHUNK_TOKENS)
        assert num_asked <= 1 + (640 + num_more).bit_length() - 8 + 1

    @pytest.mark.parametrize(
        ("num_shared", "num_chunks"), [(639, 3), (600, 3), (599, 2), (500, 2), (499, 1), (300, 1), (256, 0)]
    )
    def test_a_text_that_differs_later_shares_the_chunks_before(self, folder, document, num_shared, num_chunks):
        token_ids = with_more(document.metadata.token_ids[:num_shared], 100)
        found = find(open_store(folder), token_ids, document)
        assert found is not None and found.num_chunks == num_chunks

    def test_a_chunk_that_ends_with_the_text_is_not_used(self, folder, document):
        # Generation begins with the last token.
        found = find(open_store(folder), document.metadata.token_ids[:600], document)
        assert found is not None and found.num_chunks == 2

    @pytest.mark.parametrize("num_shared", [0, 1, 255])
    def test_nothing_is_found_below_a_block(self, folder, document, num_shared):
        token_ids = with_more(document.metadata.token_ids[:num_shared], 700)
        assert find(open_store(folder), token_ids, document) is None

    @pytest.mark.parametrize("num_tokens", [1, 2, 256])
    def test_a_short_text_finds_nothing(self, folder, document, num_tokens):
        assert find(open_store(folder), document.metadata.token_ids[:num_tokens], document) is None

    def test_a_document_shorter_than_a_block_is_found_by_its_end(self, tmp_path):
        short = make_document(tmp_path, chunk_tokens=(60, 40))
        publish(tmp_path / "s", short)
        found = find(open_store(tmp_path / "s"), with_more(short.metadata.token_ids), short)
        assert found is not None and found.num_chunks == 2

    def test_another_model_finds_nothing(self, folder, document):
        for changes in ({"model_fingerprint": "cd" * 32}, {"rope_hash": "cd" * 32}):
            flags = {
                "model_fingerprint": document.metadata.model_fingerprint,
                "rope_hash": document.metadata.rope_hash,
            }
            token_ids = with_more(document.metadata.token_ids)
            assert find_document(open_store(folder), token_ids, **(flags | changes)) is None

    def test_an_empty_store_says_what_it_lacks(self, tmp_path, document):
        with pytest.raises(StoreError, match=r"store.json: no such object: not a store of cachegen"):
            find(open_store(tmp_path), with_more(document.metadata.token_ids), document)

    @pytest.mark.parametrize(
        ("content", "error"),
        [
            (b"", BitstreamError),
            (b"[]", BitstreamError),
            (b'{"format": "cachegen-store", "version": 2, "tokens_per_block": 256}', UnsupportedVersionError),
            (b'{"format": "other", "version": 1, "tokens_per_block": 256}', BitstreamError),
            (b'{"format": "cachegen-store", "version": 1, "tokens_per_block": 0}', BitstreamError),
            (b'{"format": "cachegen-store", "version": 1, "tokens_per_block": "256"}', BitstreamError),
            (b"x" * 100_000, StoreError),
        ],
    )
    def test_a_wrong_description_is_refused(self, folder, document, content, error):
        (folder / "store.json").write_bytes(content)
        with pytest.raises(error, match=r"store\.json"):
            find(open_store(folder), with_more(document.metadata.token_ids), document)

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b'{"manifest": "../x"}', b'{"manifest": "tables/x"}', b'{"manifest": 7}', b"[" * 9999]
    )
    def test_a_wrong_pointer_is_refused(self, folder, document, content):
        for path in (folder / "prefixes").rglob("*.json"):
            path.write_bytes(content)
        with pytest.raises(BitstreamError, match="prefixes/"):
            find(open_store(folder), with_more(document.metadata.token_ids), document)

    def test_a_pointer_to_another_models_document_is_refused(self, folder, document, tmp_path):
        (path,) = (folder / "documents").rglob("*.json")
        content = path.read_bytes().replace(document.metadata.model_fingerprint.encode(), b"ef" * 32)
        other = path.with_name(hashlib.sha256(content).hexdigest()[:32] + ".json")
        other.write_bytes(content)
        for pointer in pointers_of(folder):
            pointer.write_text(pointer.read_text().replace(path.name, other.name))
        with pytest.raises(MismatchError, match="model_fingerprint is efefefefefef, but the pointer to it was for"):
            find(open_store(folder), with_more(document.metadata.token_ids), document)

    def test_a_document_of_other_tokens_shares_no_chunk(self, folder, document, tmp_path):
        other = make_document(tmp_path, seed=1)
        published = publish(folder, other)
        (pointers,) = (folder / "prefixes").iterdir()
        for path in pointers.iterdir():
            with atomic_write(path) as stream:
                stream.write(b'{"manifest": "%s"}' % published.name.encode())
        found = find(open_store(folder), with_more(document.metadata.token_ids), document)
        assert found is not None and found.num_chunks == 0

    def test_every_error_is_one_line(self, folder, document):
        with serve(folder) as server:
            for path in folder.rglob("*.json"):
                path.write_bytes(b"\n\n\n{")
            with pytest.raises(CacheGenError) as caught:
                find(server.open(), with_more(document.metadata.token_ids), document)
        assert "\n" not in str(caught.value)
