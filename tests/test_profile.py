"""profile.py: what is saved is loaded, steps are chosen from the curve, and nothing hostile gets in."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors

from cachegen.errors import BitstreamError, CacheGenError, InputError, MismatchError, UnsupportedVersionError
from cachegen.kv_cache import RotaryEmbedding
from cachegen.methods.profile_files import PROFILE_NAME
from cachegen.methods.transform.integer_rows import MAX_CHANNEL_EXPONENT, MAX_ROW_EXPONENT, DeflatedRows, IntegerRows
from cachegen.methods.transform.profile import CurvePoint, Profile, TransformGroup, check_profile
from cachegen.methods.transform.profile_storage import ANALYSIS_NAME, SYNTHESIS_NAME, load_profile, save_profile

CURVE = (CurvePoint(32, 0.25, 4e-3), CurvePoint(0, 0.5, 1e-3), CurvePoint(-32, 1.5, 1e-4))


def make_profile() -> Profile:
    """Three layers in two groups, 32 channels each, 20 and 10 components."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for first_layer, num_layers, count in ((0, 2, 20), (2, 1, 10)):
        channels = 32 * num_layers
        groups.append(
            TransformGroup(
                first_layer,
                num_layers,
                torch.randn(channels, generator=generator),
                torch.randn(count, channels, generator=generator).half(),
                torch.arange(count, 0, -1, dtype=torch.int16),
                torch.randn(channels, count, generator=generator).half(),
            )
        )
    rotary = RotaryEmbedding("rotary_emb.inv_freq", "default", (1.0, 0.1, 0.01, 0.001), 1.0)
    return Profile("ab" * 32, (rotary,), ((2, 8),) * 6, tuple(groups), CURVE, {"num_tokens": 7})


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "profile"
    save_profile(path, make_profile())
    return path


def rewrite(folder: Path, change: Any) -> None:
    """Change the JSON's record in place."""
    record = json.loads((folder / PROFILE_NAME).read_text())
    change(record)
    (folder / PROFILE_NAME).write_text(json.dumps(record))


def replace_tensors(folder: Path, name: str, tensors: dict[str, torch.Tensor] | bytes) -> None:
    """Replace the analysis file, or the first stream of the synthesis file, with its hash in the JSON."""
    content = tensors if isinstance(tensors, bytes) else save_tensors(tensors)
    if name == ANALYSIS_NAME:
        (folder / name).write_bytes(content)
    else:
        replace_streams(folder, [content])
    content = (folder / name).read_bytes()
    rewrite(folder, lambda record: record["sha256"].update({name: hashlib.sha256(content).hexdigest()}))


def replace_streams(folder: Path, inflated: list[bytes]) -> None:
    """Replace the first streams of the synthesis file."""
    record, content = json.loads((folder / PROFILE_NAME).read_text()), (folder / SYNTHESIS_NAME).read_bytes()
    streams: list[bytes] = []
    for length in (record["vectors_bytes"], *(group["matrix_bytes"] for group in record["groups"])):
        streams.append(content[:length])
        content = content[length:]
    streams[: len(inflated)] = map(zlib.compress, inflated)

    def announce(record: dict[str, Any]) -> None:
        record["vectors_bytes"] = len(streams[0])
        for group, stream in zip(record["groups"], streams[1:], strict=True):
            group["matrix_bytes"] = len(stream)

    rewrite(folder, announce)
    (folder / SYNTHESIS_NAME).write_bytes(b"".join(streams))


def tensors_of(profile: Profile, name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for index, group in enumerate(profile.groups):
        if name == ANALYSIS_NAME:
            assert group.analysis is not None
            tensors[f"analysis.{index}"] = group.analysis
        else:
            made = IntegerRows.of(group.synthesis)
            tensors |= {
                f"mean.{index}": group.mean,
                f"variances.{index}": group.variances,
                f"row_exponents.{index}": made.row_exponents,
                f"channel_exponents.{index}": made.channel_exponents,
                f"scale_logs.{index}": group.scale_logs,
            }
    return tensors


class TestRoundTrip:
    @pytest.mark.parametrize("for_encoding", [True, False])
    def test_what_is_saved_is_loaded(self, tmp_path, for_encoding):
        profile = make_profile()
        saved = save_profile(tmp_path, profile)
        loaded = load_profile(tmp_path, for_encoding=for_encoding)
        for field in dataclasses.fields(Profile):
            if field.name != "groups":
                assert getattr(loaded, field.name) == getattr(saved, field.name), field.name
        for group, expected in zip(loaded.groups, profile.groups, strict=True):
            assert (group.first_layer, group.num_layers) == (expected.first_layer, expected.num_layers)
            assert group.mean.equal(expected.mean)
            errors = (group.synthesis - expected.synthesis.float()).abs().amax(1)
            assert (errors <= expected.synthesis.float().abs().amax(1) / 32767).all()
            assert group.scale_logs.equal(expected.scale_logs)
            assert (group.analysis is not None) == for_encoding
            if group.analysis is not None and expected.analysis is not None:
                assert group.analysis.equal(expected.analysis)

    def test_a_saved_profile_is_saved_again_as_it_is(self, tmp_path):
        first = save_profile(tmp_path / "a", make_profile())
        again = save_profile(tmp_path / "b", load_profile(tmp_path / "a", for_encoding=True))
        assert again.profile_hash == first.profile_hash

    def test_integers_times_powers_of_two_keep_their_digits(self):
        rows = torch.tensor([[3.0, -5.0, 0.0], [96.0, -160.0, 32.0], [0.0, 0.0, 0.0], [2.0**-30, 0.0, 2.0**-20]])
        made = IntegerRows.of(rows)
        integers, exponents = made.integers, made.row_exponents
        assert exponents.tolist()[:2] == [0, 5] and integers[:2].tolist() == [[3, -5, 0], [3, -5, 1]]
        assert integers[2].tolist() == [0, 0, 0] and integers[3].tolist() == [1, 0, 1 << 10]

    def test_the_largest_integers_and_powers_of_two_of_channels_are_kept(self, tmp_path):
        of_channels = torch.tensor([-MAX_CHANNEL_EXPONENT, 0, MAX_CHANNEL_EXPONENT, 1] * 8, dtype=torch.int8)
        integers = torch.tensor([32767, -32767, 32640, -129] * 8).float()
        profile = make_profile()
        group = dataclasses.replace(
            profile.groups[1],
            stored_synthesis=(integers * torch.exp2(of_channels.float())).expand(profile.groups[1].num_components, -1),
            channel_exponents=of_channels,
        )
        save_profile(tmp_path, dataclasses.replace(profile, groups=(profile.groups[0], group)))
        loaded = load_profile(tmp_path, for_encoding=True).groups[1]
        assert loaded.synthesis.equal(group.synthesis) and loaded.channel_exponents.equal(of_channels)

    def test_hash_and_size_are_those_of_the_files(self, tmp_path):
        saved = save_profile(tmp_path, make_profile())
        text = (tmp_path / PROFILE_NAME).read_bytes()
        assert saved.profile_hash == hashlib.sha256(text).hexdigest()
        assert saved.num_bytes == len(text) + (tmp_path / SYNTHESIS_NAME).stat().st_size
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PROFILE_NAME, SYNTHESIS_NAME, ANALYSIS_NAME])

    def test_the_same_profile_gives_the_same_bytes(self, tmp_path):
        hashes = {save_profile(tmp_path / name, make_profile()).profile_hash for name in ("a", "b")}
        assert len(hashes) == 1

    def test_decoding_does_without_the_analysis_matrices(self, folder):
        (folder / ANALYSIS_NAME).unlink()
        assert load_profile(folder).groups[0].analysis is None
        with pytest.raises(InputError, match="no such file"):
            load_profile(folder, for_encoding=True)

    def test_a_profile_for_decoding_cannot_be_saved(self, folder, tmp_path):
        with pytest.raises(ValueError, match="analysis"):
            save_profile(tmp_path / "other", load_profile(folder))
        assert not (tmp_path / "other").exists()

    def test_the_last_file_written_is_the_one_that_names_the_others(self, folder, monkeypatch):
        written = []
        monkeypatch.setattr(
            "cachegen.methods.profile_files.write_file", lambda path, content: written.append(path.name)
        )
        save_profile(folder, make_profile())
        assert written[-1] == PROFILE_NAME


class TestSteps:
    def test_measured_points_are_chosen_exactly(self):
        profile = make_profile()
        for point in CURVE:
            assert profile.choose_step(bits_per_value=point.bits_per_value) == point.step_log
            assert profile.choose_step(kl=point.kl) == point.step_log

    def test_between_points_the_target_is_kept(self):
        profile = make_profile()
        for bits in (0.3, 0.6, 1.2):
            expected = profile.expect(profile.choose_step(bits_per_value=bits))
            assert expected is not None and expected.bits_per_value <= bits * (1 + 1e-9)
        for kl in (2e-4, 5e-4, 3e-3):
            expected = profile.expect(profile.choose_step(kl=kl))
            assert expected is not None and expected.kl <= kl * (1 + 1e-9)

    def test_beyond_the_curve_its_ends_are_taken(self):
        profile = make_profile()
        assert profile.choose_step(bits_per_value=9.0) == -32 and profile.choose_step(bits_per_value=0.01) == 32
        assert profile.choose_step(kl=1.0) == 32 and profile.choose_step(kl=1e-9) == -32
        assert profile.expect(33) is None and profile.expect(-33) is None

    def test_wrong_targets_and_a_profile_without_a_curve_are_refused(self):
        profile = make_profile()
        for targets in (
            {},
            {"kl": 1.0, "bits_per_value": 1.0},
            {"kl": 0.0},
            {"bits_per_value": -1.0},
            {"kl": math.nan},
        ):
            with pytest.raises(ValueError):
                profile.choose_step(**targets)
        with pytest.raises(InputError, match="run_calibration"):
            dataclasses.replace(profile, curve=()).choose_step(kl=1.0)


class TestGates:
    def test_another_models_profile_is_refused_by_field(self):
        profile = make_profile()
        check_profile(profile, profile.model_fingerprint, profile.rope_hash, "the cache")
        with pytest.raises(MismatchError, match="model_fingerprint"):
            check_profile(profile, "cd" * 32, profile.rope_hash, "the cache")
        with pytest.raises(MismatchError, match="rope_hash"):
            check_profile(profile, profile.model_fingerprint, "cd" * 32, "the cache")


# Field by field, values of every wrong type and beyond every range; "." descends into the record.
WRONG: dict[str, list[Any]] = {
    "format": [None, 1, "cachegen-kv", ["cachegen-profile"]],
    "version": [None, "1", 2, 0, -1, [1], {}, True, 1.0],
    "model_fingerprint": [None, 1, "", "ab", "zz" * 32, "ab" * 33, ["ab" * 32]],
    "plane_shapes": [None, 1, "x", {}, [], [[2, 8]], [[2, 8]] * 5, [[2]] * 6, [[2, 8, 1]] * 6],
    "plane_shapes.0": [None, [0, 8], [2, -8], [2, 8.0], [2, True], ["2", 8], [65536, 8], [2, 1 << 70], [2, 4], [3, 8]],
    "rotary_embeddings": [None, 1, "x", [1], [{}], [None]],
    "rotary_embeddings.0.inv_freq": [None, 1, "x", ["x"], [None], [True], [[1.0]], [1.0] * 5, [10**400]],
    "rotary_embeddings.0.attention_scaling": [None, "1", 0, 0.0, True, [1.0], 10**400],
    "groups": [None, 1, "x", {}, [], [1], [None], [{}]],
    "groups.0.first_layer": [None, "0", 1, -1, 3, 0.0, False],
    "groups.0.num_layers": [None, "2", 0, 1, 3, -1, 2.0, True, 1 << 64],
    "groups.0.num_components": [None, "20", 0, 19, 21, 65, -1, 20.0, True, 1 << 64],
    "groups.0.matrix_bytes": [None, "20", 0, 1, 19, -1, 20.0, True, 1 << 31, 1 << 64],
    "vectors_bytes": [None, "20", 0, 1, 19, -1, 20.0, True, 1 << 31, 1 << 64],
    "curve": [None, 1, "x", [1], [{}], [None]],
    "curve.0.step_log": [None, "1", 1.5, True, 1 << 15, -(1 << 15)],
    "curve.0.bits_per_value": [None, "1", True, [1.0], 10**400],
    "curve.0.kl": [None, "1", True, [1.0], 10**400],
    "rotary_embeddings.0.name": [None, 1, "\ud800", "\n", ["x"], {}, True, "x" * 5000],
    "rotary_embeddings.0.rope_type": [None, 1, ["x"], {}, True],
    "calibration": [None, 1, "x", []],
    "sha256": [None, 1, "x", [], {}],
    f"sha256.{SYNTHESIS_NAME}": [None, 1, "", "ab" * 32, []],
    f"sha256.{ANALYSIS_NAME}": [None, 1, "", "ab" * 32, []],
}


class TestHostile:
    """Every refusal is an error of ours, with the path; nothing else escapes."""

    @pytest.mark.parametrize("place", WRONG)
    def test_a_wrong_field_is_refused(self, folder, place):
        original = (folder / PROFILE_NAME).read_text()
        for value in WRONG[place]:
            record: Any = json.loads(original)
            *parents, last = (int(part) if part.isdigit() else part for part in split_place(place))
            target = record
            for parent in parents:
                target = target[parent]
            assert target[last] is not None
            target[last] = copy.deepcopy(value)
            (folder / PROFILE_NAME).write_text(json.dumps(record))
            with pytest.raises(BitstreamError) as caught:
                load_profile(folder, for_encoding=True)
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value), (place, value)
            del target[last]
            (folder / PROFILE_NAME).write_text(json.dumps(record))
            with pytest.raises(BitstreamError):
                load_profile(folder, for_encoding=True)

    def test_a_later_version_is_named_as_such(self, folder):
        rewrite(folder, lambda record: record.update(version=2))
        with pytest.raises(UnsupportedVersionError, match="reads 1"):
            load_profile(folder)

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
    @pytest.mark.parametrize("place", ["kl", "bits_per_value", "attention_scaling"])
    def test_numbers_that_are_not_finite_are_refused(self, folder, number, place):
        record = json.loads((folder / PROFILE_NAME).read_text())
        (record["rotary_embeddings"] if place == "attention_scaling" else record["curve"])[0][place] = "@"
        (folder / PROFILE_NAME).write_text(json.dumps(record).replace('"@"', number))
        with pytest.raises(BitstreamError):
            load_profile(folder)

    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"\x00" * 100, b"[" * 100_000, b'{"a":' * 100_000],
    )
    def test_what_is_not_a_record_is_refused(self, folder, text):
        (folder / PROFILE_NAME).write_bytes(text)
        with pytest.raises(BitstreamError):
            load_profile(folder)

    def test_a_huge_record_is_refused_unread(self, folder):
        with open(folder / PROFILE_NAME, "r+b") as stream:
            stream.truncate(1 << 40)  # sparse
        with pytest.raises(InputError, match="more than the"):
            load_profile(folder)

    @pytest.mark.parametrize("name", [PROFILE_NAME, SYNTHESIS_NAME, ANALYSIS_NAME])
    def test_every_truncation_and_any_flipped_bit_of_a_file_is_noticed(self, folder, name):
        content = (folder / name).read_bytes()
        for length in sorted({0, 1, 7, 8, 9, len(content) // 2, len(content) - 1 - (name == PROFILE_NAME)}):
            (folder / name).write_bytes(content[:length])
            with pytest.raises(BitstreamError):
                load_profile(folder, for_encoding=True)
        if name != PROFILE_NAME:
            for position in range(0, len(content), 97):
                changed = bytearray(content)
                changed[position] ^= 1 << position % 8
                (folder / name).write_bytes(changed)
                with pytest.raises(BitstreamError, match="sha256"):
                    load_profile(folder, for_encoding=True)

    @pytest.mark.parametrize("name", [SYNTHESIS_NAME, ANALYSIS_NAME])
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"PK\x03\x04 a zip",
            b"\x80\x02c__builtin__\neval\n.",
            (1 << 62).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"{}",
            (40).to_bytes(8, "little") + b'{"a":{"dtype":"F16","shape":[9],"data_of',
        ],
    )
    def test_what_is_not_safetensors_is_refused_though_its_hash_is_right(self, folder, name, content):
        replace_tensors(folder, name, content)
        with pytest.raises(BitstreamError):
            load_profile(folder, for_encoding=True)

    @pytest.mark.parametrize("name", [SYNTHESIS_NAME, ANALYSIS_NAME])
    def test_tensors_that_are_missing_or_of_another_shape_or_dtype_are_refused(self, folder, name):
        tensors = tensors_of(make_profile(), name)
        for key, tensor in tensors.items():
            for wrong in (
                None,
                tensor.float() if tensor.dtype != torch.float32 else tensor.half(),
                tensor.to(torch.int64),
                tensor[:-1],
                tensor[None],
                torch.cat([tensor, tensor]),
                tensor[:0],
                tensor.flatten()[0],
            ):
                changed = (
                    {**tensors, key: wrong} if wrong is not None else {k: v for k, v in tensors.items() if k != key}
                )
                replace_tensors(folder, name, {k: v.contiguous() for k, v in changed.items()})
                with pytest.raises(BitstreamError, match=key):
                    load_profile(folder, for_encoding=True)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("key", ["mean.1", "analysis.1"])
    def test_nan_and_infinity_are_refused(self, folder, key, value):
        name = ANALYSIS_NAME if key.startswith("analysis") else SYNTHESIS_NAME
        tensors = tensors_of(make_profile(), name)
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[3] = value
        replace_tensors(folder, name, tensors)
        with pytest.raises(BitstreamError, match="NaN"):
            load_profile(folder, for_encoding=True)

    def test_variances_below_zero_are_refused(self, folder):
        tensors = tensors_of(make_profile(), SYNTHESIS_NAME)
        tensors["variances.1"][3] = -1e-9
        replace_tensors(folder, SYNTHESIS_NAME, tensors)
        with pytest.raises(BitstreamError, match=r"variances\.1"):
            load_profile(folder)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("row_exponents.0", MAX_ROW_EXPONENT + 1), ("channel_exponents.0", -MAX_CHANNEL_EXPONENT - 1)],
    )
    def test_exponents_beyond_their_range_are_refused(self, folder, name, value):
        tensors = tensors_of(make_profile(), SYNTHESIS_NAME)
        tensors[name][1] = value
        replace_tensors(folder, SYNTHESIS_NAME, tensors)
        with pytest.raises(BitstreamError, match=name):
            load_profile(folder)

    def test_a_file_that_grows_without_bounds_is_refused(self, folder):
        replace_tensors(folder, SYNTHESIS_NAME, bytes(1 << 28))
        with pytest.raises(BitstreamError, match=r"holds more than the \d+ bytes that are announced"):
            load_profile(folder)

    @pytest.mark.parametrize(
        ("inflated", "problem"),
        [
            (bytes(1 << 20), "holds more than the 2560 bytes that are announced"),
            (bytes(2 * 20 * 64 - 1), r"holds 2559 bytes, a matrix \[20, 64\] has 2560"),
            (b"", "holds 0 bytes"),
        ],
        ids=["much more", "less", "nothing"],
    )
    def test_a_matrix_of_another_size_is_refused_when_it_is_wanted(self, folder, inflated, problem):
        vectors = save_tensors(tensors_of(make_profile(), SYNTHESIS_NAME))
        replace_streams(folder, [vectors, inflated])
        content = (folder / SYNTHESIS_NAME).read_bytes()
        rewrite(folder, lambda record: record["sha256"].update({SYNTHESIS_NAME: hashlib.sha256(content).hexdigest()}))
        profile = load_profile(folder)
        with pytest.raises(BitstreamError, match=rf"{SYNTHESIS_NAME}, field synthesis\.0: {problem}"):
            profile.check()

    def test_the_first_rows_of_a_matrix_are_had_without_the_others(self, folder):
        rows = load_profile(folder).groups[0].stored_synthesis
        assert isinstance(rows, DeflatedRows)
        whole = rows.inflate()
        for count in (0, 1, 7, 20):
            assert rows.inflate(count).integers.equal(whole.integers[:count])
            assert rows.inflate(count).row_exponents.equal(whole.row_exponents[:count])

    def test_a_matrix_gets_only_the_bytes_of_its_stream(self, folder):
        def move(record: dict[str, Any], count: int) -> None:
            record["groups"][0]["matrix_bytes"] -= count
            record["groups"][1]["matrix_bytes"] += count

        rewrite(folder, lambda record: move(record, 1))
        with pytest.raises(BitstreamError, match=r"synthesis\.0: is truncated"):
            load_profile(folder).check()
        rewrite(folder, lambda record: move(record, -2))
        with pytest.raises(BitstreamError, match=r"synthesis\.0: is followed by other bytes"):
            load_profile(folder).check()

    def test_a_matrix_is_refused_where_its_stream_could_not_hold_it(self, folder):
        rows = load_profile(folder).groups[0].stored_synthesis
        assert isinstance(rows, DeflatedRows)
        with pytest.raises(BitstreamError, match="too short"):
            dataclasses.replace(rows, shape=torch.Size((1 << 16, 1 << 16))).inflate()

    @pytest.mark.parametrize("logs", [[1, 2], [32767, 1], [1, -32768], [-1, -20000]])
    def test_scales_that_increase_or_lie_beyond_their_range_are_refused(self, folder, logs):
        tensors = tensors_of(make_profile(), SYNTHESIS_NAME)
        tensors["scale_logs.1"] = torch.tensor(logs[:1] * 9 + logs[1:], dtype=torch.int16)
        replace_tensors(folder, SYNTHESIS_NAME, tensors)
        with pytest.raises(BitstreamError, match="scale_logs"):
            load_profile(folder)

    @pytest.mark.parametrize(
        "layers",
        [[(0, 2)], [(0, 2), (2, 1), (2, 1)], [(1, 2), (0, 1)], [(0, 2), (1, 2)], [(0, 1), (2, 1)], [(0, 3), (2, 1)]],
    )
    def test_groups_that_do_not_cover_the_layers_once_are_refused(self, folder, layers):
        profile = make_profile()
        groups = tuple(
            TransformGroup(
                first, num, torch.zeros(32 * num), torch.ones(1, 32 * num), torch.zeros(1), torch.ones(32 * num, 1)
            )
            for first, num in layers
        )
        save_profile(folder, dataclasses.replace(profile, groups=groups))
        with pytest.raises(BitstreamError, match="cover"):
            load_profile(folder, for_encoding=True)

    @pytest.mark.parametrize("name", [PROFILE_NAME, SYNTHESIS_NAME, ANALYSIS_NAME])
    def test_missing_files_folders_dangling_links_and_pipes_are_refused(self, folder, name):
        path = folder / name
        path.unlink()
        with pytest.raises(InputError, match="no such file"):
            load_profile(folder, for_encoding=True)
        path.symlink_to(folder / "nowhere")
        with pytest.raises(InputError, match="no such file"):
            load_profile(folder, for_encoding=True)
        path.unlink()
        path.symlink_to(path)
        with pytest.raises(CacheGenError):
            load_profile(folder, for_encoding=True)
        path.unlink()
        path.mkdir()
        with pytest.raises(InputError):
            load_profile(folder, for_encoding=True)
        path.rmdir()
        os.mkfifo(path)
        with pytest.raises(InputError):  # and does not wait for a writer
            load_profile(folder, for_encoding=True)

    def test_a_file_or_nothing_in_place_of_the_folder_is_refused(self, folder, tmp_path):
        for place in (tmp_path / "nothing", folder / PROFILE_NAME):
            with pytest.raises(InputError):
                load_profile(place)

    def test_links_to_the_files_are_followed(self, folder, tmp_path):
        (tmp_path / "link").symlink_to(folder)
        assert load_profile(tmp_path / "link").profile_hash == load_profile(folder).profile_hash


def split_place(place: str) -> list[str]:
    """Split a dotted place; the tensor files' names hold a dot themselves."""
    first, _, rest = place.partition(".")
    return [first, rest] if first == "sha256" and rest else place.split(".")
