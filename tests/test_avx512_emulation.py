"""The AVX-512 kernels' own lines, run on any x86-64: the bytes, values and errors of the other paths, and no access
outside memory; and a changed line is noticed."""

import platform
import shutil
from pathlib import Path

import pytest

from tests.emulation import NATIVE, avx512, choose_mutations

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is of x86-64")

MUTATIONS = {
    "a carry is forgotten": (
        "decode_avx512.cpp",
        "carries[s], next_high[s], _mm512_set1_epi16(-1))",
        "carries[s], next_high[s], _mm512_setzero_si512())",
    ),
    "dead lanes take words": ("decode_avx512.cpp", "needs_word[s] &= live;", ""),
    "the only symbol of a table is decoded like any": (
        "decode_avx512.cpp",
        "next_high[s] = _mm512_mask_mov_epi16(next_high[s], is_single, high[s]);",
        "",
    ),
    "bfloat16 rounds ties up": (
        "dequantize_avx512.h",
        "_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), is_odd)",
        "_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), _mm512_setzero_si512())",
    ),
    "odd channels do not count for the scale": (
        "measure_avx512.cpp",
        "_mm512_max_epu32(_mm512_srli_epi32(largest, 16), ",
        "_mm512_max_epu32(_mm512_setzero_si512(), ",
    ),
    "quotients are not corrected": (
        "encode_avx512.cpp",
        "_mm512_mask_add_epi32(coded, is_short, coded,",
        "_mm512_mask_add_epi32(coded, 0, coded,",
    ),
    "reciprocals are 14 bits": (
        "encode_avx512.cpp",
        "const __m512 reciprocal = _mm512_fmadd_ps(rough, error, rough);",
        "const __m512 reciprocal = _mm512_fmadd_ps(rough, _mm512_setzero_ps(), rough);",
    ),
    "dead lanes give words": ("encode_avx512.cpp", "first_gives &= static_cast<__mmask16>(live);", ""),
    "more is written than a row's words": ("encode_avx512.cpp", "_bzhi_u32(~0u, num_words)", "~0u"),
}
OVERRUNS = {
    "the states of dead lanes are read": (
        "decode_avx512.cpp",
        "static_cast<__mmask16>(live >> 16), bytes + 64)",
        "0xFFFF, bytes + 64)",
    ),
    "rows behind the last token are written": (
        "dequantize_avx512.h",
        "if (token >= batch_.shape.num_tokens) return;\n        for (int i = 0; i < runs.num_runs; ++i)\n"
        "            _mm512_mask_storeu_epi16",
        "for (int i = 0; i < runs.num_runs; ++i)\n            _mm512_mask_storeu_epi16",
    ),
    "channels behind the last one are read": (
        "measure_avx512.cpp",
        "first_lanes(plane.head_dim - dim)",
        "first_lanes(32)",
    ),
}


@pytest.fixture(scope="module")
def module_path() -> Path:
    return avx512.build()


def mutate(folder: Path, file_name: str, line: str, mutated: str) -> Path:
    """Build the module with one line of its kernels changed."""
    native = folder / "csrc"
    shutil.copytree(NATIVE, native)
    source = native / "cpu" / file_name
    text = source.read_text("utf-8")
    assert text.count(line) == 1, "the kernels have changed: adapt the mutation"
    source.write_text(text.replace(line, mutated), "utf-8")
    return avx512.build(native, "-O0")


@pytest.mark.slow
@pytest.mark.parametrize("tests", ["test_cpu_paths", "test_golden"])
def test_kernels_agree_with_the_other_paths_and_stay_inside(module_path: Path, tests: str) -> None:
    result = avx512.run_tests(module_path, f"tests/{tests}.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", choose_mutations(MUTATIONS, {"dead lanes take words", "quotients are not corrected"}))
def test_comparison_notices_a_mutated_line(tmp_path: Path, name: str) -> None:
    result = avx512.run_tests(mutate(tmp_path, *MUTATIONS[name]), "-x", "tests/test_cpu_paths.py")
    assert result.returncode == 1 and "1 failed" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", choose_mutations(OVERRUNS, {"rows behind the last token are written"}))
def test_sanitizer_notices_an_access_outside(tmp_path: Path, name: str) -> None:
    result = avx512.run_tests(mutate(tmp_path, *OVERRUNS[name]), "-x", "-s", "tests/test_cpu_paths.py")
    # An overflow, or, where it leaps over the gap between two blocks, a use after free.
    assert "ERROR: AddressSanitizer: heap-" in result.stderr, result.stdout + result.stderr
