"""The reader of JSON fields: what it takes, what it refuses, and how it names the place."""

from __future__ import annotations

import pytest

from cachegen.errors import BitstreamError, ConfigError, InputError, UnsupportedVersionError
from cachegen.fields import Fields, parse_fields, parse_json, refuse_config, refuse_file, refuse_input, shown

HASH = "0123456789abcdef" * 4


def read(**content: object) -> Fields:
    return Fields(content, refuse_file("a.json"))


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", "[Infinity]", '{"a": 1, "a": 1}', "[" * 100_000, "9" * 5000, b'"\xff"'],
    ids=lambda t: t[:9],
)
def test_what_is_not_strict_json_is_refused(text):
    with pytest.raises(BitstreamError, match=r"^a\.json: not JSON \("):
        parse_json(text, refuse_file("a.json"))


@pytest.mark.parametrize("text", ["[]", "1", "null", '"text"'])
def test_what_is_not_an_object_is_refused(text):
    with pytest.raises(BitstreamError, match=r"^a\.json: must be a JSON object$"):
        parse_fields(text, refuse_file("a.json"))


@pytest.mark.parametrize(
    ("refuse", "error", "message"),
    [
        (refuse_file("a.json"), BitstreamError, "a.json, field b: is missing"),
        (refuse_config("a.json"), ConfigError, "a.json: b is missing"),
        (refuse_input("a.jsonl: line 2"), InputError, "a.jsonl: line 2: b is missing"),
    ],
)
def test_each_kind_of_file_has_its_own_error(refuse, error, message):
    with pytest.raises(error) as caught:
        Fields({}, refuse).value("b")
    assert str(caught.value) == message


def test_an_error_names_the_whole_path_of_a_field():
    fields = read(levels=[{}, {"tables": {"bytes": -1}}])
    with pytest.raises(BitstreamError, match=r"^a\.json, field levels\[1\]\.tables\.bytes: must be 0 to 9, got -1$"):
        fields.objects("levels", 1, 4)[1].object("tables").integer("bytes", 0, 9)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], 1 << 999])
def test_an_integer_is_an_integer(value):
    with pytest.raises(BitstreamError, match="field n: must be"):
        read(n=value).integer("n", 0, 9)


def test_digits_are_an_integer_where_the_file_may_have_them():
    assert Fields({"n": " 7 "}, refuse_file(), reads_digits=True).integer("n", 0, 9) == 7
    assert Fields({"o": {"n": "7"}}, refuse_file(), reads_digits=True).object("o").integer("n", 0, 9) == 7


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 1 << 1999])
def test_a_number_is_finite(value):
    with pytest.raises(BitstreamError, match="field x: must be a finite number, got"):
        read(x=value).number("x")


def test_a_number_says_the_bound_that_it_misses():
    fields = read(x=0)
    assert fields.number("x", 0) == fields.number("x", high=0) == 0.0
    with pytest.raises(BitstreamError, match="must be a number above 0, got 0"):
        fields.number("x", 0, above=True)
    with pytest.raises(BitstreamError, match="must be a number of at least 1, got 0"):
        fields.number("x", 1)
    with pytest.raises(BitstreamError, match="must be a number of at most -1, got 0"):
        fields.number("x", high=-1)


def test_lists_are_bounded():
    assert read(x=[1, 2.5]).numbers("x", 0, 2) == (1.0, 2.5)
    for value in ([1, 2, 3], [], {}, "ab"):
        with pytest.raises(BitstreamError, match="field x: must be a list of 1 to 2"):
            read(x=value).numbers("x", 1, 2)


def test_texts_are_bounded_and_labels_printable():
    assert read(t="two\nlines").text("t") == "two\nlines"
    with pytest.raises(BitstreamError, match="must be a text of at most 4 characters"):
        read(t="words").text("t", 4)
    for text in ("two\nlines", "\ud800"):
        with pytest.raises(BitstreamError, match="must be printable characters"):
            read(t=text).label("t")


@pytest.mark.parametrize("value", ["", HASH[:-1], HASH.upper(), HASH + "\n", 7])
def test_a_hash_is_64_lower_case_digits(value):
    assert read(h=HASH).hash("h") == HASH
    with pytest.raises(BitstreamError, match="must be a SHA-256 in hex"):
        read(h=value).hash("h")


@pytest.mark.parametrize("value", [1, 0, None, "true"])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(BitstreamError, match="must be true or false"):
        read(f=value).flag("f")


@pytest.mark.parametrize("value", ["c", None, ["a"], {"a": 1}])
def test_a_choice_is_one_of_the_names(value):
    with pytest.raises(BitstreamError, match="must be one of a, b, got"):
        read(c=value).choice("c", ("a", "b"))


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2])
def test_another_version_is_refused(version):
    read(version=1).check_version("version", 1)
    with pytest.raises(UnsupportedVersionError, match=r"^a\.json, field version: .* this release reads 1$"):
        read(version=version).check_version("version", 1)


def test_unknown_fields_are_named_with_those_that_are_known():
    read(a=1).refuse_unknown({"a", "b"})
    with pytest.raises(BitstreamError, match=r"unknown field c \(known: a, b\)"):
        read(a=1, c=2).refuse_unknown({"a", "b"})


def test_a_value_in_a_message_is_short():
    assert shown(1 << 9999) == "a huge number"
    assert len(shown("x" * 9999)) == 80
    assert shown([[]]) == "a list"
