"""The errors' messages and exit codes, and that docs/scripts.md has them."""

from __future__ import annotations

import re

import pytest

from cachegen import errors
from cachegen.command_line import EXIT_INTERRUPTED
from cachegen.errors import BitstreamError, CacheGenError, UnsupportedVersionError
from tests.fixtures import REPOSITORY


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({}, "is corrupt"),
        ({"path": "a/b.cgc"}, "a/b.cgc: is corrupt"),
        ({"offset": 0}, "byte 0: is corrupt"),
        ({"path": "a/b.cgc", "offset": 44, "field": "scales_crc"}, "a/b.cgc, byte 44, field scales_crc: is corrupt"),
    ],
)
def test_a_bitstream_error_says_where(place, message):
    assert str(BitstreamError("is corrupt", **place)) == message


@pytest.mark.parametrize("error_class", [BitstreamError, UnsupportedVersionError])
def test_a_path_added_later_keeps_class_offset_and_field(error_class):
    error = error_class("is 2", offset=8, field="version").at("a/b.cgc")
    assert type(error) is error_class
    assert str(error) == "a/b.cgc, byte 8, field version: is 2"


def test_the_readme_lists_every_exit_code():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, CacheGenError)]
    table = re.search(
        r"## Exit codes\n\n\| code .*\n\|[-|]+\n((?:\|.*\n)+)", (REPOSITORY / "docs" / "scripts.md").read_text()
    )
    assert table is not None
    listed = [int(row.split("|")[1]) for row in table[1].splitlines()]
    assert listed == sorted({0, EXIT_INTERRUPTED, *(error_class.exit_code for error_class in classes)})
