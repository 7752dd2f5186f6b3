"""A size for the whole output: what is not compressed is subtracted, the steps do the rest."""

import pytest
from factories import CALIBRATION, QUICK

import qmoe_jax
from qmoe_jax.quantization.settings import CompressionSettings, size_in_bytes


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (12, 12),
        ("12", 12),
        ("12GB", 12 * 10**9),
        ("12 GiB", 12 * 2**30),
        ("1.5mb", 1_500_000),
        (" 2TB ", 2 * 10**12),
    ],
)
def test_sizes(size, count):
    assert size_in_bytes(size) == count


@pytest.mark.parametrize("size", ["", "GB", "12 elephants", "-3GB", 0, "0", True, "1e9"])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="it must be bytes above 0, or text"):
        CompressionSettings(grid="lattice", target_size=size)


def test_one_target_at_a_time():
    with pytest.raises(ValueError, match="give one of the two"):
        CompressionSettings(grid="lattice", target_size="1GB", target_bits_per_weight=0.5)
    with pytest.raises(ValueError, match='no layer has grid="lattice"'):
        CompressionSettings(grid="2bit", target_size="1GB")


def stored(report):
    return (report.dense_bits + report.expert_bits) / 8


def test_the_output_has_that_size(base, tmp_path):
    plain = qmoe_jax.compress(base, tmp_path / "plain", CALIBRATION, grid="lattice", **QUICK)
    wanted = round(plain.dense_bits / 8 + 1.2 * plain.expert_bits / 8)
    report = qmoe_jax.compress(
        base, tmp_path / "out", CALIBRATION, grid="lattice", target_size=wanted, **QUICK
    )
    # Within 1 % of what the steps decide.
    assert stored(report) == pytest.approx(wanted, abs=0.02 * plain.expert_bits / 8)
    assert report.settings["target_size"] == wanted


def test_sizes_that_cannot_be(base, tmp_path):
    with pytest.raises(ValueError, match=r"what is not compressed takes \d+ alone"):
        qmoe_jax.compress(
            base, tmp_path / "out", CALIBRATION, grid="lattice", target_size=100, **QUICK
        )
    mixed = {"decoder/*": {"grid": "ternary"}}
    with pytest.raises(ValueError, match="another grid"):
        qmoe_jax.compress(
            *(base, tmp_path / "out", CALIBRATION),
            grid="lattice",
            layer_overrides=mixed,
            target_size="1GB",
            **QUICK,
        )
    assert not (tmp_path / "out").exists()
