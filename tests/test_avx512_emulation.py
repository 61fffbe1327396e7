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
        "rans_decode_avx512.h",
        "carries[s], next_high[s], _mm512_set1_epi16(-1))",
        "carries[s], next_high[s], _mm512_setzero_si512())",
    ),
    "dead lanes take words": ("rans_decode_avx512.h", "needs_word[s] &= live;", ""),
    "the only symbol of a table is decoded like any": (
        "rans_decode_avx512.h",
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
        "rans_encode_avx512.h",
        "_mm512_mask_add_epi32(coded, is_short, coded,",
        "_mm512_mask_add_epi32(coded, 0, coded,",
    ),
    "reciprocals are 14 bits": (
        "rans_encode_avx512.h",
        "const __m512 reciprocal = _mm512_fmadd_ps(rough, error, rough);",
        "const __m512 reciprocal = _mm512_fmadd_ps(rough, _mm512_setzero_ps(), rough);",
    ),
    "dead lanes give words": ("rans_encode_avx512.h", "first_gives &= static_cast<__mmask16>(live);", ""),
    "more is written than a row's words": ("rans_encode_avx512.h", "_bzhi_u32(~0u, num_words)", "~0u"),
}
COMPONENT_MUTATIONS = {
    "one comparison too few": (
        "decode_components_avx512.cpp",
        "if (num_symbols <= 5)",
        "if (num_symbols <= 7)",
    ),
    "low bits are of the row before": (
        "decode_components_avx512.cpp",
        "append_tail_low_bits(high, stream.low_bits, position,",
        "append_tail_low_bits(high, stream.low_bits, 0,",
    ),
    "thirds are not mirrored": (
        "decode_components_avx512.cpp",
        "const __mmask16 is_negative = _mm512_movepi32_mask(coarse);",
        "const __mmask16 is_negative = 0;",
    ),
    "any third is encoded": (
        "encode_components_avx512.cpp",
        "_mm512_mask_cmpgt_epu32_mask(refined, _mm512_add_epi32(third, one), _mm512_add_epi32(one, one)) == 0",
        "true",
    ),
    "escapes have the wrong token": (
        "encode_components_avx512.cpp",
        "add_escapes(escaped, fine, token, first_component)",
        "add_escapes(escaped, fine, token / 32 * 32, first_component)",
    ),
    "low bits stay in the high part": (
        "encode_components_avx512.cpp",
        "_mm512_srl_epi16(symbols, _mm_cvtsi32_si128(low_bits))",
        "symbols",
    ),
}
COMPONENT_OVERRUNS = {
    "streams that have ended go on": (
        "component_tiles.h",
        "component >= batch_.streams[num_active - 1].num_components()",
        "component > batch_.streams[num_active - 1].num_components()",
    ),
    "components behind the last one are written": (
        "decode_components_avx512.cpp",
        "_mm512_mask_storeu_epi32(out, present, components);",
        "_mm512_storeu_si512(out, components);",
    ),
    "components behind the last one are read": (
        "encode_components_avx512.cpp",
        "_mm512_maskz_loadu_epi32(present, fine)",
        "_mm512_loadu_si512(fine)",
    ),
    "coarse ones that are not refined are read": (
        "encode_components_avx512.cpp",
        "_mm512_maskz_loadu_epi32(refined, coarse_row)",
        "_mm512_loadu_si512(coarse_row)",
    ),
}
INTEGER_MUTATIONS = {
    "odd channels keep what even ones carry": (
        "synthesize_avx512.cpp",
        "_mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8))",
        "all",
    ),
    "high digits do not count": ("synthesize_avx512.cpp", "if (num_high == 0) continue;", "continue;"),
    "seconds are turned by the first's new value": (
        "synthesize_avx512.cpp",
        "*second = _mm512_add_ps(_mm512_mul_ps(*second, cosine), _mm512_mul_ps(*first, sine));\n    *first = turned;",
        "*first = turned;\n    *second = _mm512_add_ps(_mm512_mul_ps(*second, cosine), _mm512_mul_ps(*first, sine));",
    ),
}
INTEGER_OVERRUNS = {
    "dims behind a head's last one are written": (
        "synthesize_avx512.cpp",
        "const auto live = static_cast<__mmask16>(first_lanes(plane.head_dim - dim));",
        "const __mmask16 live = 0xFFFF;",
    ),
}
BYTE_MUTATIONS = {
    "seconds are turned the other way": (
        "byte_analysis_avx512.cpp",
        "_mm512_sub_ps(_mm512_mul_ps(y, cosine), _mm512_mul_ps(x, sine))",
        "_mm512_add_ps(_mm512_mul_ps(y, cosine), _mm512_mul_ps(x, sine))",
    ),
    "excesses are lost": ("byte_analysis_avx512.cpp", "__builtin_expect(is_beyond != 0, 0)", "false"),
    "all levels have the first one's step": (
        "byte_analysis_avx512.cpp",
        "_mm512_set1_ps(level.ratio)",
        "_mm512_set1_ps(1.0f)",
    ),
}
BYTE_OVERRUNS = {
    "components behind a level's last one are written": (
        "byte_analysis_avx512.cpp",
        "first + k, live, rounded);",
        "first + k, 0xFFFF, rounded);",
    ),
}
OVERRUNS = {
    "the states of dead lanes are read": (
        "rans_decode_avx512.h",
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
@pytest.mark.parametrize(
    "tests", ["test_cpu_paths", "test_components", "test_golden", "test_integers", "test_byte_analysis"]
)
def test_kernels_agree_with_the_other_paths_and_stay_inside(module_path: Path, tests: str) -> None:
    result = avx512.run_tests(module_path, f"tests/{tests}.py")
    assert result.returncode == 0, result.stdout + result.stderr


INTEGERS, BYTES = "tests/test_integers.py", "tests/test_byte_analysis.py"
PLANES, COMPONENTS = "tests/test_cpu_paths.py", "tests/test_components.py"
NOTICED_BY = dict.fromkeys([*MUTATIONS, *OVERRUNS], PLANES) | dict.fromkeys(
    [*COMPONENT_MUTATIONS, *COMPONENT_OVERRUNS], COMPONENTS
)
NOTICED_BY |= dict.fromkeys([*INTEGER_MUTATIONS, *INTEGER_OVERRUNS], INTEGERS)
NOTICED_BY |= dict.fromkeys([*BYTE_MUTATIONS, *BYTE_OVERRUNS], BYTES)
ALL_MUTATIONS = MUTATIONS | COMPONENT_MUTATIONS | INTEGER_MUTATIONS | BYTE_MUTATIONS
ALL_OVERRUNS = OVERRUNS | COMPONENT_OVERRUNS | INTEGER_OVERRUNS | BYTE_OVERRUNS
ALWAYS = {"dead lanes take words", "quotients are not corrected", "thirds are not mirrored"}
ALWAYS_OVERRUNS = {"rows behind the last token are written", "components behind the last one are written"}


@pytest.mark.slow
@pytest.mark.parametrize("name", choose_mutations(ALL_MUTATIONS, ALWAYS))
def test_comparison_notices_a_mutated_line(tmp_path: Path, name: str) -> None:
    result = avx512.run_tests(mutate(tmp_path, *ALL_MUTATIONS[name]), "-x", NOTICED_BY[name])
    assert result.returncode == 1 and "1 failed" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", choose_mutations(ALL_OVERRUNS, ALWAYS_OVERRUNS))
def test_sanitizer_notices_an_access_outside(tmp_path: Path, name: str) -> None:
    result = avx512.run_tests(mutate(tmp_path, *ALL_OVERRUNS[name]), "-x", "-s", NOTICED_BY[name])
    # An overflow; where it leaps over the gap between two blocks, a use after free; where it begins inside, "unknown".
    assert "ERROR: AddressSanitizer: " in result.stderr, result.stdout + result.stderr
