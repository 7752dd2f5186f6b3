"""Numbers and tables as text."""

import pytest

from qmoe_jax.formatting import (
    format_bytes,
    format_memory,
    format_row,
    format_seconds,
    format_table,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (941_000, "941 kB"),
        (1_460_000_000, "1.46 GB"),
        (14_831_000_000, "14.83 GB"),
        (3_143_000_000_000, "3.143 TB"),
        (1_000_000_000_000_000, "1000 TB"),
    ],
)
def test_bytes_in_powers_of_ten(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_memory_in_powers_of_two():
    assert format_memory(1745 << 20) == "1,745 MiB"
    assert format_memory((1745 << 20) + (1 << 19) + 1) == "1,746 MiB"
    assert format_memory(1745 << 20, "GiB") == "1.70 GiB"
    assert format_memory(0) == "0 MiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (119.9, "119.9 s"),
        (192.0, "3.2 min"),
        (7199.0, "120.0 min"),
        (7200.0, "2.0 h"),
        (172799.0, "48.0 h"),
        (172800.0, "2.0 d"),
    ],
)
def test_seconds_in_a_unit_that_they_have_two_of(seconds, text):
    assert format_seconds(seconds) == text


ROWS = (("model", "loss", "size"), ("a", "2.5", "-"), ("longer name", "12.25", "17.06x"))


def test_a_column_is_as_wide_as_its_longest_cell():
    assert format_table(ROWS).split("\n") == [
        "model         loss    size",
        "-----------  -----  ------",
        "a              2.5       -",
        "longer name  12.25  17.06x",
    ]


def test_a_table_of_given_widths_and_one_rule():
    table = format_table(ROWS, min_widths=(0, 8, 6), separator=" ", num_left=2, rule="line")
    assert table.split("\n") == [
        "model       loss       size",
        "---------------------------",
        "a           2.5           -",
        "longer name 12.25    17.06x",
    ]


def test_headings_alone_are_a_table():
    assert format_table([("a", "bc")]) == "a  bc\n-  --"


def test_rows_that_are_printed_one_by_one():
    assert format_row(("a", "b"), (3, 4)) == "a       b"
    assert format_row(("a", "b"), (3, 4), separator="", num_left=0) == "  a   b"
    assert format_row(("longer", "b"), (3, 4), separator="") == "longer   b"
    with pytest.raises(ValueError, match="shorter"):
        format_row(("a", "b"), (3,))
