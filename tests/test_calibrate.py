"""From saved caches to a profile: what is fitted is what the caches and the model say, twice the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import cachegen.calibration.calibrate as calibration
from cachegen.calibration.basis import WEIGHTS
from cachegen.calibration.calibrate import (
    TOKENS_PER_CHANNEL,
    CalibrationContext,
    calibrate,
    check_model,
    check_tokens,
    count_tokens,
    open_contexts,
    plan_calibration,
    plan_groups,
    plane_shapes_of,
    split_contexts,
)
from cachegen.calibration.curve import measure_curve, plan_steps
from cachegen.calibration.settings import CalibrationSettings
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.kv_cache import from_planes, hash_planes, load_kv_cache, save_kv_cache
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile, save_profile
from cachegen.methods.transform.transform import SINK_TOKENS, GroupTransform
from cachegen.pipeline.prefill import prefill_context
from cachegen.windows import Window
from tests.fixtures.models import make_named, make_token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = "llama"
SETTINGS = CalibrationSettings(fisher_tokens=16, fisher_samples=1, finest_step=0.01)
CPU = torch.device("cpu")


def save_context(folder: Path, number: int, model: str = LLAMA, num_tokens: int = 150) -> Path:
    """Write the cache of random tokens."""
    path = folder / f"test_kv_{number}.pkl"
    save_kv_cache(path, *prefill_context(make_named(model), make_token_ids(num_tokens + 1, seed=number)))
    return path


@pytest.fixture(scope="module")
def kv_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kv")
    for number in (0, 1, 2, 10):
        save_context(folder, number)
    (folder / "test_kv_x.pkl").write_bytes(b"not a number")
    return folder


@pytest.fixture(scope="module")
def contexts(kv_folder) -> list[CalibrationContext]:
    return open_contexts(kv_folder)


def run(contexts: list[CalibrationContext], work: Path, settings: CalibrationSettings = SETTINGS, **options) -> Profile:
    return calibrate(contexts, make_named(LLAMA), settings, device=CPU, work_folder=work, **options)


def are_same(a: Profile, b: Profile) -> bool:
    return all(
        x.synthesis.equal(y.synthesis) and x.scale_logs.equal(y.scale_logs) and x.mean.equal(y.mean)
        for x, y in zip(a.groups, b.groups, strict=True)
    )


def components_of(profile: Profile, contexts: list[CalibrationContext]) -> torch.Tensor:
    """Components of all tokens of the first group but the first ones of a context, as the codec computes them."""
    transform = GroupTransform(profile, profile.groups[0], CPU)
    return torch.cat(
        [transform.analyze(transform.join(context.cache, 0))[SINK_TOKENS:] for context in contexts]
    ).double()


class TestContexts:
    def test_a_folder_gives_its_numbered_files_in_numeric_order(self, contexts):
        assert [context.path.name for context in contexts] == [f"test_kv_{n}.pkl" for n in (0, 1, 2, 10)]

    def test_a_single_file_is_a_context(self, kv_folder):
        assert len(open_contexts(kv_folder / "test_kv_2.pkl")) == 1

    def test_nothing_and_what_is_no_kv_file_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="no KV cache files"):
            open_contexts(tmp_path)
        with pytest.raises(InputError, match="no such KV cache file"):
            open_contexts(tmp_path / "nothing")
        (tmp_path / "test_kv_0.pkl").write_bytes(b"x")
        with pytest.raises(BitstreamError, match="test_kv_0"):
            open_contexts(tmp_path)

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"model_fingerprint": "cd" * 32}, "model_fingerprint"),
            ({"rotary_embeddings": ()}, "rope_hash"),
            ({}, "same context"),
        ],
    )
    def test_caches_of_different_models_and_the_same_context_twice_are_refused(
        self, kv_folder, tmp_path, fields, problem
    ):
        for number, changes in ((0, {}), (1, fields)):
            cache, metadata = load_kv_cache(kv_folder / "test_kv_0.pkl")
            path = tmp_path / f"test_kv_{number}.pkl"
            save_kv_cache(path, cache, dataclasses.replace(metadata, **changes))
        with pytest.raises(MismatchError, match=problem):
            open_contexts(tmp_path)

    def test_caches_of_different_shapes_are_refused(self, tmp_path):
        save_context(tmp_path, 0)
        cache, metadata = prefill_context(make_named("deepseek with unlike keys and values"), make_token_ids(20))
        _, like = load_kv_cache(tmp_path / "test_kv_0.pkl")
        metadata = dataclasses.replace(metadata, rotary_embeddings=like.rotary_embeddings)
        save_kv_cache(tmp_path / "test_kv_1.pkl", cache, metadata)
        with pytest.raises(MismatchError, match="shapes"):
            open_contexts(tmp_path)

    def test_caches_of_another_model_are_refused(self, contexts):
        check_model(contexts, "0" * 64, "random")
        with pytest.raises(MismatchError, match="`model_id`"):
            check_model(contexts, "1" * 64, "random")

    def test_fewer_tokens_than_channels_are_refused(self, contexts, tmp_path):
        with pytest.raises(InputError, match="146 tokens to fit on are fewer than the 192 channels"):
            check_tokens(contexts[:1], dataclasses.replace(SETTINGS, layers_per_group=3))
        with pytest.raises(InputError, match="more contexts"):
            run(contexts[:1], tmp_path, dataclasses.replace(SETTINGS, layers_per_group=3))
        assert check_tokens(contexts[:1], SETTINGS) == 146

    @pytest.mark.parametrize(("count", "held_out"), [(2, [1]), (3, [2]), (4, [3]), (5, [3]), (12, [3, 7, 11])])
    def test_every_fourth_context_or_the_last_is_held_out(self, contexts, count, held_out):
        several = (contexts * 3)[:count]
        fitted, rest = split_contexts(several)
        assert [id(context) for context in rest] == [id(several[index]) for index in held_out]
        assert len(fitted) + len(rest) == count

    def test_nothing_can_be_held_out_of_one(self, contexts):
        with pytest.raises(InputError, match="`no_curve`"):
            split_contexts(contexts[:1])


class TestGroups:
    @pytest.mark.parametrize(
        ("num_layers", "width", "layers_per_group", "sizes"),
        [
            (6, 128, None, [6]),
            (32, 1024, None, [4] * 8),
            (5, 1024, None, [2, 3]),
            (30, 192, None, [15, 15]),
            (3, 5000, None, [1, 1, 1]),
            (6, 128, 4, [4, 2]),
            (6, 128, 9, [6]),
            (3, 5000, 2, [2, 1]),
        ],
    )
    def test_groups_have_so_many_layers_or_at_most_8192_channels(self, num_layers, width, layers_per_group, sizes):
        groups = plan_groups([(1, width)] * (2 * num_layers), layers_per_group)
        assert [size for _, size in groups] == sizes
        assert [first for first, _ in groups] == [sum(sizes[:index]) for index in range(len(sizes))]

    def test_groups_are_as_few_as_the_tokens_allow(self, contexts):
        shapes = plane_shapes_of(contexts[0].cache)
        max_channels = int(count_tokens(contexts[:1]) / TOKENS_PER_CHANNEL)
        assert max_channels < sum(heads * dim for heads, dim in shapes)
        few, many = (plan_calibration(some, CalibrationSettings()) for some in (contexts[:1], contexts))
        assert few == plan_groups(shapes, max_channels=max_channels) and len(few) > 1
        assert len(many) == 1

    def test_the_layers_of_a_group_have_one_window(self):
        near, far = Window("sliding", 16), Window("sliding", 64)
        windows = (near, near, None, None, None, far, near, near)
        assert plan_groups([(1, 8)] * 16, None, windows) == [(0, 2), (2, 3), (5, 1), (6, 2)]
        assert plan_groups([(1, 8)] * 16, 2, windows) == [(0, 2), (2, 2), (4, 1), (5, 1), (6, 2)]


class TestFit:
    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_components_of_the_calibration_data_are_uncorrelated_as_scale_logs_say(self, contexts, tmp_path, weights):
        settings = dataclasses.replace(SETTINGS, weights=weights, finest_step=0.05)
        profile = run(contexts, tmp_path, settings)
        components = components_of(profile, contexts)
        assert components.mean(0).abs().max() < 1e-3 * components.std(0)[0]
        covariance = components.T @ components / len(components)
        deviations = covariance.diagonal().sqrt()
        correlation = covariance / torch.outer(deviations, deviations)
        assert (correlation - torch.diag(correlation.diagonal())).abs().max() < 0.2  # matrices are rounded
        scale_logs = profile.groups[0].scale_logs.double()
        torch.testing.assert_close(16 * deviations.log2(), scale_logs, atol=0.7, rtol=0)

    def test_synthesis_rebuilds_the_caches(self, contexts, tmp_path):
        profile = run(contexts, tmp_path, dataclasses.replace(SETTINGS, finest_step=1e-6, layers_per_group=3))
        group = profile.groups[0]
        assert group.num_components == group.num_channels == 192
        product = group.synthesis.double() @ (group.analysis if group.analysis is not None else torch.empty(0)).double()
        torch.testing.assert_close(product, torch.eye(192, dtype=torch.float64), atol=0.05, rtol=0)

    def test_the_weights_have_a_mean_eigenvalue_of_one_over_all_groups(self, contexts, tmp_path):
        """A change by one in every component costs, over all groups, what the unit says: W^2 has trace D."""
        settings = dataclasses.replace(SETTINGS, layers_per_group=1, finest_step=1e-6)
        profile = run(contexts, tmp_path, settings)
        assert [group.num_layers for group in profile.groups] == [1, 1, 1]
        squares = [(g.analysis.double() ** 2).sum().item() for g in profile.groups if g.analysis is not None]
        assert sum(squares) == pytest.approx(192 * (1 + 1e-3), rel=0.01)
        assert max(squares) > 1.05 * min(squares)  # layers do not matter alike

    def test_two_runs_give_the_same_profile(self, contexts, tmp_path):
        first, second = (run(contexts, tmp_path / name) for name in ("a", "b"))
        assert are_same(first, second)
        hashes = {save_profile(tmp_path / name, p).profile_hash for name, p in (("c", first), ("d", second))}
        assert len(hashes) == 1

    def test_without_weights_no_model_is_needed(self, contexts, tmp_path):
        settings = dataclasses.replace(SETTINGS, weights="none")
        profile = calibrate(contexts, None, settings, device=CPU, work_folder=tmp_path)
        assert are_same(profile, run(contexts, tmp_path, settings)) and list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="loaded"):
            calibrate(contexts, None, SETTINGS, device=CPU, work_folder=tmp_path)

    def test_a_cache_with_nan_is_refused(self, kv_folder, tmp_path):
        cache, metadata = load_kv_cache(kv_folder / "test_kv_0.pkl")
        cache.values[1][3, 0, 0] = torch.nan
        save_kv_cache(tmp_path / "test_kv_0.pkl", cache, metadata)
        broken = [*open_contexts(tmp_path), *open_contexts(kv_folder)[1:]]
        for weights in ("fisher", "none"):
            with pytest.raises(InputError, match=r"test_kv_0.*NaN"):
                run(broken, tmp_path, dataclasses.replace(SETTINGS, weights=weights))

    def test_the_profile_says_what_it_was_made_of(self, contexts, tmp_path):
        calibration = run(contexts, tmp_path).calibration
        assert (calibration["num_contexts"], calibration["num_tokens"]) == (4, 584)
        assert calibration["token_hashes"] == [context.token_hash for context in contexts]
        assert calibration["settings"]["finest_step"] == 0.01


def twice(context: CalibrationContext) -> CalibrationContext:
    """A context with the same tokens and twice the values."""
    cache = from_planes([2 * plane for plane in context.cache.planes])
    return dataclasses.replace(
        context, cache=cache, metadata=dataclasses.replace(context.metadata, cache_hash=hash_planes(cache))
    )


def test_a_cache_whose_values_have_changed_is_refused(contexts, tmp_path):
    damaged = dataclasses.replace(contexts[0], cache=twice(contexts[0]).cache)
    for weights in ("fisher", "none"):
        with pytest.raises(BitstreamError, match="its values are not what was saved") as caught:
            run([damaged, *contexts[1:]], tmp_path, dataclasses.replace(SETTINGS, weights=weights))
        assert str(damaged.path) in str(caught.value)


class TestResume:
    def interrupt(self, contexts, work: Path, monkeypatch, after: int) -> None:
        """Run until so many contexts' gradients are done."""
        original, count = calibration.accumulate_fisher, 0

        def stop(*args, **kwargs):
            nonlocal count
            count += 1
            if count > after:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(calibration, "accumulate_fisher", stop)
            with pytest.raises(KeyboardInterrupt):
                run(contexts, work)

    def count_passes(self, monkeypatch) -> list[int]:
        original, calls = calibration.accumulate_fisher, []
        monkeypatch.setattr(
            calibration, "accumulate_fisher", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
        )
        return calls

    def test_an_interrupted_run_goes_on_and_ends_the_same(self, contexts, tmp_path, monkeypatch):
        whole = run(contexts, tmp_path / "whole")
        self.interrupt(contexts, tmp_path / "work", monkeypatch, after=3)
        calls = self.count_passes(monkeypatch)
        assert are_same(run(contexts, tmp_path / "work"), whole)
        assert len(calls) == 1

    @pytest.mark.parametrize("change", ["seed", "order", "damage", "flip", "values", "foreign"])
    def test_what_another_run_left_is_not_taken(self, contexts, tmp_path, monkeypatch, change):
        self.interrupt(contexts, tmp_path, monkeypatch, after=2)
        path, settings, order = tmp_path / calibration.FISHER_NAME, SETTINGS, contexts
        if change == "seed":
            settings = dataclasses.replace(SETTINGS, seed=1)
        elif change == "order":
            order = contexts[::-1]
        elif change == "damage":
            path.write_bytes(path.read_bytes()[:-100])
        elif change == "flip":
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)
        elif change == "values":
            order = [twice(contexts[0]), *contexts[1:]]
        else:
            path.write_bytes(b"not a safetensors file")
        calls = self.count_passes(monkeypatch)
        assert are_same(run(order, tmp_path, settings), run(order, tmp_path / "fresh", settings))
        assert len(calls) == 8


class TestCurve:
    def test_steps_are_eight_over_six_octaves_in_descending_order(self):
        steps = plan_steps(0.0625)
        assert (len(steps), steps[0], steps[-1]) == (8, 32, -64)
        assert steps == sorted(steps, reverse=True)

    def test_a_finer_step_costs_more_and_gives_more(self, contexts, tmp_path):
        save_profile(tmp_path, run(contexts[:3], tmp_path / "work"))
        profile = load_profile(tmp_path, for_encoding=True)
        done: list[int] = []
        curve = measure_curve(
            make_named(LLAMA), profile, contexts[3:], [16, -32, -80], num_threads=1, progress=done.append
        )
        assert [point.step_log for point in curve] == [16, -32, -80] and done == [1, 1, 1]
        assert curve[0].bits_per_value < curve[1].bits_per_value < curve[2].bits_per_value
        assert curve[0].kl > curve[1].kl > curve[2].kl > 0
