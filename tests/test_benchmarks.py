"""method_throughput.py, lmcache_blocks.py and gpu_report.py: what they write and check; that a dry run goes through."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import pytest
import torch

from tests import emulation
from tests.fixtures.caches import make_shaped_cache

TINY = ["--device", "cpu", "--layers", "2", "--kv_heads", "1", "--head_dim", "32", "--components", "32"]
TINY += ["--num_tokens", "300", "--rounds", "1", "--threads", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(emulation.ROOT / "benchmarks"))


@pytest.fixture
def throughput() -> ModuleType:
    return importlib.import_module("method_throughput")


def test_every_method_is_measured_and_judged(throughput, tmp_path) -> None:
    assert throughput.main([*TINY, "--prefill_seconds", "100", "--json", str(tmp_path / "x.json")]) == 0
    record = json.loads((tmp_path / "x.json").read_text())
    rows = {row["case"]: row for row in record["cases"]}
    assert list(rows) == [case.name for case in throughput.list_cases(2)]
    for row in rows.values():
        fp16 = record["fp16_bytes"]
        link = 1e9 * row["beats_fp16_below_gbit"]
        if row["encoded_bytes"] < fp16:
            assert 8 * fp16 / link == pytest.approx(8 * row["encoded_bytes"] / link + row["decode_seconds"])
        text = 8 * row["encoded_bytes"] / (1e9 * row["beats_text_above_gbit"])
        assert text + row["decode_seconds"] == pytest.approx(100)
    assert rows["transform, 3 levels"]["bits_per_value"] > rows["transform, 1 level"]["bits_per_value"]


def test_wrong_values_end_the_run(throughput, monkeypatch) -> None:
    cases = [throughput.Case("uniform 8-bit, rans", {"method": "uniform", "bits": 8}, error=1e-6)]
    monkeypatch.setattr(throughput, "list_cases", lambda _: cases)
    with pytest.raises(SystemExit, match="off by"):
        throughput.main(TINY)


def test_a_case_that_does_not_exist_is_refused_in_one_line(throughput) -> None:
    with pytest.raises(SystemExit, match="there is no nothing"):
        throughput.main([*TINY, "--cases", "nothing"])


def test_blocks_are_measured_with_their_tables(kv_path, tmp_path) -> None:
    blocks = importlib.import_module("lmcache_blocks")
    arguments = [str(kv_path), "--block_tokens", "16", "32", "--json", str(tmp_path / "x.json")]
    assert blocks.main(arguments) == 0
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [(row["method"], row["block_tokens"], row["blocks"]) for row in rows] == [
        (method, tokens, 60 // tokens) for tokens in (16, 32) for method in ("lossless", "uniform", "cachegen")
    ]
    assert all(0 < row["of_raw"] < 1.5 and row["misplaced"] == 0 for row in rows)


def test_blocks_of_no_kv_file_are_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"^lmcache_blocks: .*nothing"):
        importlib.import_module("lmcache_blocks").main([str(tmp_path / "nothing")])


class FakeNvcomp:
    """nvCOMP's interface, as far as it is used; `encode` keeps what it is given."""

    __version__ = "0"
    flip = 0

    class Codec:
        def __init__(self, algorithm: str) -> None:
            assert algorithm == "ANS"

        def encode(self, source: torch.Tensor) -> torch.Tensor:
            source.buffer_size = source.numel() // 2  # type: ignore[attr-defined]
            return source

        def decode(self, encoded: torch.Tensor) -> torch.Tensor:
            return encoded + FakeNvcomp.flip

    @staticmethod
    def as_array(symbols: torch.Tensor) -> torch.Tensor:
        return symbols


def test_ans_of_nvcomp_gets_symbols_and_gives_them_back(monkeypatch) -> None:
    peer = importlib.import_module("nvcomp_ans")
    cache = make_shaped_cache([(2, 8)] * 4, 40, torch.float16)
    symbols = peer.make_symbols(cache, torch.device("cpu"))
    assert symbols.shape == (40 * 64,) and symbols.max() <= 30
    found = peer.measure_ans(FakeNvcomp, symbols, 1, lambda: None)
    assert found["bits_per_value"] == 4.0 and "4.00 bits" in peer.describe_ans(found)
    monkeypatch.setattr(FakeNvcomp, "flip", 1)
    with pytest.raises(SystemExit, match="other symbols"):
        peer.measure_ans(FakeNvcomp, symbols, 1, lambda: None)


def test_where_nvcomp_is_not_one_line_says_so(capsys, monkeypatch) -> None:
    peer = importlib.import_module("nvcomp_ans")
    monkeypatch.setattr(peer, "find_nvcomp", lambda: None)
    assert peer.main([]) == 1
    assert capsys.readouterr().err == peer.NOT_THERE + "\n" == peer.describe_ans(None) + "\n"


def test_a_dry_run_of_the_gpus_report_writes_its_page(tmp_path, capfd) -> None:
    report = importlib.import_module("gpu_report")
    assert report.main(["--dry_run", "--steps", "prefill", "memcheck", "--output_path", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["steps"]["prefill"]["figures"]["prefill_seconds"] > 0
    assert record["steps"]["memcheck"]["state"].startswith("not run")
    page = (tmp_path / "gpu.md").read_text()
    assert "**This is a dry run on a CPU**" in page and "| prefill | passed |" in page


def test_a_step_that_fails_is_noted_and_the_exit_code_says_so(tmp_path, monkeypatch) -> None:
    report = importlib.import_module("gpu_report")
    steps = [
        ("broken", lambda: report.Step("broken", ["-c", "print('why'); raise SystemExit(3)"], 20)),
        ("slow", lambda: report.Step("slow", ["-c", "import time; time.sleep(60)"], 1)),
        ("fine", lambda: report.Step("fine", ["-c", "pass"], 20)),
    ]
    monkeypatch.setattr(report, "list_steps", lambda args, done: steps)
    assert report.main(["--dry_run", "--output_path", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    states = [step["state"] for step in found.values()]
    assert states == ["failed", "stopped: it took too long", "passed"] and found["broken"]["last_lines"] == ["why"]


def test_without_a_gpu_only_a_dry_run_runs(tmp_path, capsys, monkeypatch) -> None:
    report = importlib.import_module("gpu_report")
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    assert report.main(["--output_path", str(tmp_path)]) == 1
    assert "--dry_run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_proof_on_emulated_kernels_passes(capsys) -> None:
    prove_gpu = importlib.import_module("tests.prove_gpu")
    assert prove_gpu.main(["--emulated", "--short"]) == 0
    assert "checks passed" in capsys.readouterr().out


def test_the_table_to_choose_by_says_what_the_seconds_say(tmp_path) -> None:
    choosing = importlib.import_module("choosing")
    cases = {choice.case for choice in choosing.CHOICES if choice.case}
    rows = [{"case": case, "decode_gb_per_second": 2.0} for case in cases]
    (tmp_path / "m.json").write_text(json.dumps({"shape": [32, 8, 128], "cases": rows}))
    (tmp_path / "p.json").write_text(json.dumps({"tokens_per_second": 1000}))
    argv = ["--methods", str(tmp_path / "m.json"), "--prefill", str(tmp_path / "p.json"), "--prefill_share", "0.5"]
    assert choosing.main([*argv, "--num_tokens", "8000", "--output_path", str(tmp_path)]) == 0
    assert (tmp_path / "choosing.png").stat().st_size > 1000
    lines = (tmp_path / "choosing.md").read_text().splitlines()
    # 131,072 bytes of fp16 per token: 1.05 GB, 8.39 s at 1 Gbit/s; half of it and half a second of decoding at 8 bits.
    assert lines[2].startswith("| fp16 | 16.00 |  | 83.9 s | 8.39 s | 0.839 s | 0.0839 s |  | 0.52 Gbit/s |")
    assert lines[3].startswith("| uniform 8-bit | 8.08 | 2.00 | 42.9 s | 4.76 s | 0.948 s | 0.567 s | 7.9 Gbit/s |")
    assert lines[-1] == "| the text | | | 16 s | 16 s | 16 s | 16 s | | |"
