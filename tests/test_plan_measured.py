"""A plan of a checkpoint at hand, against real runs: bits of its own weights, disk at the most."""

import json

import pytest
from factories import CALIBRATION, QUICK, TERNARY
from golden_data import DEMO

import qmoe_jax
from qmoe_jax.__main__ import main
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.planning import measured_zeros
from qmoe_jax.planning.sizes import zero_share

# Bits of an expert weight in the runs of `make demo` (README).
DEMO_BITS = {
    ("rtn", "ternary"): 0.897,
    ("gptq", "ternary"): 1.077,
    ("rtn", "2bit"): 1.423,
    ("gptq", "2bit"): 1.487,
}


def planned(tmp_path, checkpoint, *arguments):
    file = tmp_path / "plan.json"
    given = ["--num_examples", "40", "--host_gb", "64", "--disk_gb", "10", "--grid", "ternary"]
    assert main(["plan", str(checkpoint), *given, *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize(("method", "grid"), DEMO_BITS)
def test_the_trained_model_of_the_demo(tmp_path, method, grid):
    plan = planned(tmp_path, DEMO / "checkpoint_4200", "--method", method, "--grid", grid)
    bits = plan["sizes"][0]["bits_per_weight"]
    assert bits == pytest.approx(DEMO_BITS[method, grid], rel=0.03)
    source = plan["zero_shares"][grid]["source"]
    assert source.startswith("measured by rounding 4 experts of 2 of its layers")
    assert ("as GPTQ is assumed to leave them" in source) == (method == "gptq")
    given = planned(tmp_path, DEMO / "checkpoint_4200", "--zero_share", "0.5", "--grid", grid)
    assert given["zero_shares"][grid]["source"] == "given"
    assert given["sizes"][0]["bits_per_weight"] > 1.1 * bits


@pytest.mark.parametrize(("method", "tolerance"), [("rtn", 0.01), ("gptq", 0.08)])
def test_a_model_of_random_weights(base, tmp_path, method, tolerance):
    """GPTQ's part is an assumption from a trained model: it is off here, to the safe side."""
    mixed = {"decoder/*": {"grid": "2bit", "group_size": 16}}
    settings = {"method": method, "layer_overrides": mixed}
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **settings, **TERNARY)
    plan = planned(tmp_path, base, "--method", method, "--layer_overrides", json.dumps(mixed))
    bits = plan["sizes"][0]["bits_per_weight"]
    assert bits == pytest.approx(report.bits_per_weight, rel=tolerance)
    assert bits > 0.99 * report.bits_per_weight
    assert set(plan["zero_shares"]) == {"ternary", "2bit"}
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert size < plan["most_output_disk"]


@pytest.mark.parametrize(
    ("grid", "coding"), [("ternary", "tunstall"), ("ternary", "qmoe"), ("lattice", "lattice")]
)
def test_at_the_most_holds_while_a_run_works(base, tmp_path, monkeypatch, grid, coding):
    """Of all files, at every moment that one of them is finished."""
    import qmoe_jax.pipeline.layer_store as layer_store

    seen = []

    def look(method):
        def counted(self, *arguments):
            result = method(self, *arguments)
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            seen.append(sum(path.stat().st_size for path in files))
            return result

        return counted

    for name in ("save_batch", "_move", "finish"):
        method = getattr(layer_store.LayerStore, name)
        monkeypatch.setattr(layer_store.LayerStore, name, look(method))
    options = QUICK | {"method": "rtn", "grid": grid, "expert_coding": coding}
    qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **options)
    assert len(seen) > 8
    arguments = ["--method", "rtn", "--grid", grid, "--expert_coding", coding]
    arguments += ["--expert_batch", "3"]
    assert max(seen) < planned(tmp_path, base, *arguments)["most_output_disk"]


def test_a_disk_that_the_worst_weights_would_not_fit(base, tmp_path, capsys):
    plan = planned(tmp_path, base)
    expected, most = sum(plan["output_disk"].values()), plan["most_output_disk"]
    given = [
        "plan",
        str(base),
        "--num_examples",
        "40",
        "--host_gb",
        "64",
        "--grid",
        "ternary",
        "--disk_gb",
    ]
    capsys.readouterr()
    assert main([*given, str((expected + most) / 2e9)]) == 0
    out = capsys.readouterr().out
    assert "for weights that code badly it could take" in out
    assert main([*given, str(0.9 * expected / 1e9)]) == 1
    assert "NO: disk" in capsys.readouterr().out
    assert main([*given, str(1.1 * most / 1e9)]) == 0
    assert "code badly" not in capsys.readouterr().out


def test_few_experts_are_read(base, monkeypatch):
    read = []
    real = T5XCheckpoint.read_experts

    def counted(self, name, start, stop, **options):
        read.append((name, start, stop))
        return real(self, name, start, stop, **options)

    monkeypatch.setattr(T5XCheckpoint, "read_experts", counted)
    monkeypatch.setattr(measured_zeros, "_SAMPLE_BYTES", 0)
    source = qmoe_jax.open_t5x_checkpoint(base)
    config = qmoe_jax.checkpoints.read_config.read_config(source)
    settings = qmoe_jax.CompressionSettings(grid="ternary", method="rtn")
    shares = measured_zeros.measured_zero_shares(source, config, settings)
    assert len(read) == len({name for name, _, _ in read}) <= 8
    assert all(stop - start == 1 for _, start, stop in read)
    assert not shares["ternary"].source.startswith("assumed")
    assert zero_share(config, "ternary").source.startswith("assumed")
