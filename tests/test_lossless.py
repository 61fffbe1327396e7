"""Method lossless: every bit comes back, whatever the values, and files that lie are refused."""

from __future__ import annotations

import zlib
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from cachegen import _native
from cachegen.errors import BitstreamError, InputError
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import KVCache, RotaryEmbedding, from_planes
from cachegen.methods import open_document, parse_chunk
from cachegen.methods.lossless import fit
from cachegen.methods.lossless.codec import LosslessDocument, LosslessEncoder
from cachegen.methods.lossless.headers import BLOCK_TOKENS
from cachegen.methods.lossless.model import NO_WEIGHTS, Model, describe_layers, join_bits, unpack_models
from tests.fixtures.caches import allocate_like, make_correlated_cache, make_metadata, make_shaped_cache
from tests.golden import make_lossless_golden as golden
from tests.golden.make_golden import FOLDER
from tests.reference import lossless as reference

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN_FILES = {path.name: path.read_bytes() for path in (FOLDER / golden.NAME).iterdir()}
SHAPES = ((2, 8), (1, 6), (1, 12), (2, 4), (1, 8), (1, 8))
ROTARY = RotaryEmbedding("rotary_emb", "default", (1.0, 0.3, 0.01), 1.0)


def make_correlated(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> KVCache:
    return make_correlated_cache(SHAPES, num_tokens, dtype, seed)


def encode(cache: KVCache, chunk_tokens: tuple[int, ...], rotary=ROTARY, **options) -> tuple[bytes, list[bytes]]:
    metadata = make_metadata(cache.num_tokens, rotary_embeddings=(rotary,) if rotary else ())
    encoder = LosslessEncoder(cache, metadata, chunk_tokens, **options)
    return encoder.tables_file, [b"".join(encoder.encode_chunk(i)) for i in range(len(chunk_tokens))]


def decode(cache: KVCache, tables_file: bytes, chunks: list[bytes], num_threads: int = 1) -> KVCache:
    document = open_document(tables_file)
    stops = [0, *accumulate(document.header.chunk_tokens)]
    output = allocate_like(cache, stops[-1])
    for chunk, (start, stop) in zip(chunks, pairwise(stops), strict=True):
        document.decode([chunk], output.slice(start, stop), first_token=start, token_hash=None, num_threads=num_threads)
    return output


def bits_of(cache: KVCache) -> np.ndarray:
    return join_bits(cache)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rotary", [ROTARY, None], ids=["rotated", "plain"])
    @pytest.mark.parametrize(
        ("num_tokens", "chunk_tokens"), [(1, (1,)), (2, (1, 1)), (100, (100,)), (600, (300, 290))], ids=str
    )
    def test_every_bit_comes_back(self, dtype, rotary, num_tokens, chunk_tokens):
        cache = make_correlated(num_tokens, dtype)
        output = decode(cache, *encode(cache, chunk_tokens, rotary))
        assert np.array_equal(bits_of(output), bits_of(cache)[: sum(chunk_tokens)])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_values_of_every_kind_come_back(self, dtype):
        cache = make_correlated(300, dtype)
        generator = np.random.default_rng(0)
        for plane in cache.planes:
            flat = plane.view(torch.uint16).view(-1).numpy()
            flat[generator.integers(0, len(flat), 200)] = generator.integers(0, 1 << 16, 200)
        output = decode(cache, *encode(cache, (300,)))
        assert np.array_equal(bits_of(output), bits_of(cache))

    @pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0e38, 1e-40, float("nan")])
    def test_channels_that_never_change_come_back(self, value):
        cache = from_planes([torch.full((80, 1, 4), value, dtype=torch.bfloat16) for _ in range(4)])
        tables_file, chunks = encode(cache, (80,))
        assert np.array_equal(bits_of(decode(cache, tables_file, chunks)), bits_of(cache))

    def test_threads_do_not_change_a_byte(self):
        cache = make_correlated(3 * BLOCK_TOKENS + 5, torch.bfloat16)
        files = encode(cache, (cache.num_tokens,))
        assert encode(cache, (cache.num_tokens,), num_threads=3) == files
        assert np.array_equal(bits_of(decode(cache, *files, num_threads=3)), bits_of(cache))

    def test_an_engine_that_keeps_torchs_threads_to_itself_is_not_asked_for_them(self, monkeypatch):
        torch.set_num_threads(2)
        asked: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", lambda number: asked.append(number))
        cache = make_correlated(300, torch.bfloat16)
        assert np.array_equal(bits_of(decode(cache, *encode(cache, (300,)))), bits_of(cache))
        assert not asked and torch.get_num_threads() == 2

    def test_it_says_that_nothing_is_lost(self):
        encoder = LosslessEncoder(make_correlated(10, torch.bfloat16), make_metadata(10), (10,))
        error = encoder.read_error(0, 1, encoder.encode_chunk(0))
        assert (encoder.expected_kl(1), error.largest, error.mean) == (0.0, 0.0, 0.0)

    def test_values_of_32_bits_are_refused(self):
        with pytest.raises(InputError, match="16 bits per value, this one is float32"):
            encode(make_shaped_cache(SHAPES, 10, torch.float32), (10,))


class TestBytes:
    def test_two_encodings_are_alike(self):
        cache = make_correlated(300, torch.bfloat16)
        assert encode(cache, (200, 100)) == encode(cache, (200, 100))

    def test_channels_that_follow_from_each_other_take_fewer_bits_than_their_own_entropy(self):
        cache = make_correlated(3000, torch.bfloat16)
        tables_file, chunks = encode(cache, (3000,), rotary=None)
        entropy = 0.0
        for channel in bits_of(cache).T:
            _, counts = np.unique(channel, return_counts=True)
            entropy -= float((counts * np.log2(counts / 3000)).sum())
        assert 8 * (len(tables_file) + len(chunks[0])) < 0.75 * entropy

    def test_rotated_keys_are_predicted_as_before_their_rotation(self):
        cache = make_correlated(3000, torch.bfloat16)
        rotated = []
        for index, plane in enumerate(cache.planes):
            if index % 2 == 0:
                angles = torch.arange(3000)[:, None, None] * torch.tensor(ROTARY.inv_freq)
                a, b, rest = plane.float().split([3, 3, plane.shape[2] - 6], dim=2)
                turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest)
                plane = torch.cat(turned, dim=2).to(torch.bfloat16)
            rotated.append(plane)
        turned_cache = from_planes(rotated)
        plain, known, unknown = (
            len(encode(c, (3000,), rotary)[1][0])
            for c, rotary in ((cache, None), (turned_cache, ROTARY), (turned_cache, None))
        )
        assert known < 1.1 * plain < 0.9 * unknown

    def test_independent_values_cost_their_entropy(self):
        values = torch.randn(2, 2000, 1, 16, generator=torch.Generator().manual_seed(0))
        planes = [(plane + 3 * i).to(torch.bfloat16) for i, plane in enumerate(values)]
        _, (chunk,) = encode(from_planes(planes), (2000,), rotary=None)
        # The differential entropy of a bell of deviation 1, less the logarithm of the distance between neighbours.
        spacings = torch.cat([torch.frexp(plane.float())[1] - 8 for plane in planes]).double()
        entropy = 0.5 * np.log2(2 * np.pi * np.e) - spacings.mean().item()
        assert 8 * len(chunk) / values.numel() == pytest.approx(entropy, rel=0.02)

    def test_even_bits_without_any_order_grow_by_less_than_half(self):
        bits = np.random.default_rng(0).integers(0, 1 << 16, (500, 1, 8), dtype=np.uint16)
        planes = [torch.from_numpy(bits.copy()).view(torch.float16) for _ in range(2)]
        _, (chunk,) = encode(from_planes(planes), (500,))
        assert len(chunk) < 1.5 * 4 * bits.size

    def test_turns_are_those_of_exact_fractions(self):
        assert fit.turn_of(1.0) == 2935890503282001226  # floor and ceiling of 2^64 / 2 pi: ...226.47
        assert fit.turn_of(0.0) == 0


class TestReference:
    """Plain Python by the specification decodes what the native coder wrote."""

    def test_it_decodes_the_golden_files(self):
        document = open_document(GOLDEN_FILES["tables.cgt"])
        assert isinstance(document, LosslessDocument)
        header = document.header
        model = reference.Model(GOLDEN_FILES["tables.cgt"][header.header_bytes :], list(golden.SHAPES))
        rows: list[list[int]] = []
        for index, num_tokens in enumerate(golden.CHUNK_TOKENS):
            streams = split_streams(GOLDEN_FILES[f"chunk_0000{index}.L1.cgc"])
            rows += reference.decode(model, streams, num_tokens, len(rows), 8)
        expected = np.frombuffer(GOLDEN_FILES[golden.VALUES_NAME], "<u2").reshape(len(rows), -1)
        assert np.array_equal(np.array(rows), expected)

    def test_so_does_the_native_decoder(self):
        cache = from_planes([torch.empty(0, *shape, dtype=torch.bfloat16) for shape in golden.SHAPES])
        chunks = [GOLDEN_FILES[f"chunk_0000{index}.L1.cgc"] for index in range(len(golden.CHUNK_TOKENS))]
        output = decode(cache, GOLDEN_FILES["tables.cgt"], chunks)
        assert bits_of(output).astype("<u2").tobytes() == GOLDEN_FILES[golden.VALUES_NAME]

    def test_it_decodes_float16_with_a_fitted_model(self):
        cache = make_correlated(40, torch.float16)
        tables_file, (chunk,) = encode(cache, (40,))
        model = reference.Model(tables_file[open_document(tables_file).header.header_bytes :], list(SHAPES))
        assert np.array_equal(np.array(reference.decode(model, split_streams(chunk), 40, 0, 11)), bits_of(cache))

    def test_sines_are_within_a_unit(self):
        for phase in np.random.default_rng(0).integers(0, 1 << 64, 200, dtype=np.uint64):
            expected = 32768 * np.sin(2 * np.pi * float(phase) / 2.0**64)
            assert abs(reference.sine(int(phase)) - expected) < 1.5


def split_streams(chunk: bytes) -> list[bytes]:
    parsed = parse_chunk(chunk)
    streams, at = [], 0
    for stream in parsed.header.streams:
        streams.append(bytes(parsed.payload[at : at + stream.num_bytes]))
        at += -(-stream.num_bytes // 16) * 16
    return streams


class TestHostile:
    """Bytes whose checksums are right and whose content is not."""

    PLANES = tuple(PlaneShape(*shape) for shape in golden.SHAPES)
    COUNTS = np.zeros((6, 64), np.uint32)

    def decode_streams(self, streams: list[bytes], model: Model | None = None) -> tuple[int, int]:
        padded = [stream.ljust(-(-len(stream) // 16) * 16, b"\0") for stream in streams]
        index = np.array([[len(stream), 0, 0] for stream in streams], np.uint32)
        values = np.zeros((30, sum(plane.num_channels for plane in self.PLANES)), np.uint16)
        coding = (model or golden.make_model()).for_native(self.PLANES, is_float16=False)
        payload = np.frombuffer(b"".join(padded), np.uint8)
        return _native.lossless_decode(payload, index, values, 261, coding, 1)

    def test_changed_streams_are_noticed_or_decode_to_other_values(self):
        streams = split_streams(GOLDEN_FILES["chunk_00001.L1.cgc"])
        generator = np.random.default_rng(0)
        outcomes = set()
        for _ in range(300):
            changed = [bytearray(stream) for stream in streams]
            target = changed[generator.integers(3)]
            target[generator.integers(len(target))] ^= 1 << generator.integers(8)
            outcomes.add(self.decode_streams([bytes(stream) for stream in changed])[1] != 0)
        assert True in outcomes

    @pytest.mark.parametrize("kept", [0, 2, 63, 64, 100])
    def test_streams_that_end_early_are_refused(self, kept):
        streams = split_streams(GOLDEN_FILES["chunk_00001.L1.cgc"])
        assert self.decode_streams([streams[0], streams[1][:kept], streams[2]])[0] == 1

    def test_streams_with_words_left_over_are_refused(self):
        streams = split_streams(GOLDEN_FILES["chunk_00001.L1.cgc"])
        assert self.decode_streams([*streams[:2], streams[2] + bytes(2)]) == (2, _native.Status.CORRUPT.value)

    @pytest.mark.parametrize(
        ("column", "value"),
        [(0, (1 << 30) + 1), (2, -1), (2, 63), (3, 101), (3, -101), (4, -1), (4, 41), (5, 0), (5, 1024)],
    )
    def test_parameters_out_of_range_are_refused(self, column, value):
        model = golden.make_model()
        model.channels[3, column] = value
        with pytest.raises(ValueError, match="channel 3 has a parameter out of range"):
            self.decode_streams([b"", b"", b""], model)

    @pytest.mark.parametrize(
        ("place", "row"),
        [
            (0, (-1, 0)),  # a second one without a first one
            (0, (5, 0)),  # not a second one
            (0, (40, 0)),  # in another plane
            (0, (2, 3)),  # no such turn
            (0, (2, -1)),
            (2, (0, 0)),  # a first one without a second one
            (1, (1, 0)),  # two have one second one
        ],
    )
    def test_pairs_of_other_channels_are_refused(self, place, row):
        *parts, pairs, is_float16 = golden.make_model().for_native(self.PLANES, is_float16=False)
        assert pairs[:4].tolist() == [[2, 0], [2, 1], [-1, 0], [-1, 0]]
        pairs[place] = row
        with pytest.raises(ValueError, match=r"layer 0 has (a pair of other channels|half a pair)"):
            _native.lossless_count(np.zeros((1, len(pairs)), np.uint16), 0, (*parts, pairs, is_float16), self.COUNTS)

    def test_a_corrupt_model_is_a_corrupt_file(self):
        model = golden.make_model()
        model.frequencies[1, 0] = 0
        document = open_document(GOLDEN_FILES["tables.cgt"])
        broken = LosslessDocument(document.header, document.tables_hash, model.pack())
        output = from_planes([torch.empty(261, *shape, dtype=torch.bfloat16) for shape in golden.SHAPES])
        with pytest.raises(BitstreamError, match="layer 0 has a symbol without frequency"):
            broken.decode([GOLDEN_FILES["chunk_00000.L1.cgc"]], output, first_token=0, token_hash=None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda content: content[:-1], "ends too early"),
            (lambda content: content + b"\0", "longer than it must be"),
            (lambda content: content[:5] + b"\xff\xff" + content[7:], "ends too early"),
            (lambda content: content[:2] + b"\x02" + content[3:], "pairs dims in an unknown way"),
            (lambda content: content[:3] + b"\x03" + content[4:], "not there or of more dims"),
            (lambda content: content[:36] + b"\x03" + content[37:], "not there or of more dims"),
            (lambda content: content[:36] + b"\x02" + content[37:], "rotations of no plane"),
            (lambda content: content[:48] + b"\x01" + content[49:], "layer 0 is predicted from 1 layers before it"),
        ],
    )
    def test_a_model_of_another_length_is_refused(self, change, message):
        content = zlib.decompress(golden.make_model().pack())
        with pytest.raises(BitstreamError, match=message):
            unpack_models(zlib.compress(change(content)), [self.PLANES])

    def test_a_model_that_grows_without_bounds_is_refused(self):
        with pytest.raises(BitstreamError, match="longer than its compressed form may stand for"):
            unpack_models(zlib.compress(bytes(1 << 30), 9), [self.PLANES])
        with pytest.raises(BitstreamError, match="not compressed data"):
            unpack_models(b"no zlib", [self.PLANES])

    def test_a_context_wider_than_the_sums_allow_is_refused(self):
        planes = (PlaneShape(33, 64), PlaneShape(33, 64))
        layers = describe_layers(planes, (0,))
        assert layers[0, 0] + layers[0, 1] > 4096
        model = Model(
            np.tile(np.array([0, 1, 0, 0, 0, 1], np.int32), (4224, 1)),
            (0,),
            np.zeros(4224 * 4224, np.uint8),
            np.full((2, 64), 64, np.uint16),
            (),
            (0, 0),
        )
        values = np.zeros((1, 4224), np.uint16)
        with pytest.raises(ValueError, match="context out of range"):
            _native.lossless_encode(values, 0, model.for_native(planes, is_float16=False), 1)

    def test_short_caches_carry_no_weights(self):
        cache = make_correlated(40, torch.bfloat16)
        tables_file, _ = encode(cache, (40,))
        header = open_document(tables_file).header
        (model,) = unpack_models(tables_file[header.header_bytes :], [[PlaneShape(*shape) for shape in SHAPES]])
        assert set(model.layers_before) == {NO_WEIGHTS}
