"""The plan's command line: tables, JSON, and what it refuses."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from factories import CALIBRATION
from plan_factories import PAPER_SIZES, T5X_DOCUMENTATION, facts

from qmoe_jax.__main__ import main
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.cli.plan import _meanings
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.quantization.settings import CompressionSettings

AMPLE = ["--host_gb", "4000", "--disk_gb", "9000", "--device", "h100"]


@pytest.mark.parametrize("name", T5X_DOCUMENTATION)
def test_a_table_for_every_public_checkpoint(capsys, name):
    assert main(["plan", name, *AMPLE, "--grid", "ternary", "--expert_batch", "4"]) == 0
    out = capsys.readouterr().out
    total = facts(name).num_parameters()["total"]
    assert f"{total:,}" in out
    assert "The run fits" in out
    assert ("assumed: the QMoE paper's" in out) == (name not in PAPER_SIZES)


def test_every_setting_is_an_option_with_its_meaning(capsys):
    """As the docstring has it; an option that may be None takes what it may be besides."""
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.partition("settings of the run")[2].split())
    for field in dataclasses.fields(CompressionSettings):
        assert re.search(rf"--{field.name}(, --no-{field.name})? ", text), field.name
    assert "experts that are quantized together (default: 16)" in text
    for name, meaning in _meanings(CompressionSettings).items():
        assert len(meaning.split()) > 2, name


def test_small_groups_cost_what_they_store(tmp_path):
    bits = []
    given = ["plan", "switch_base_8", *AMPLE, "--grid", "ternary"]
    for arguments in ([], ["--group_size", "32"]):
        file = tmp_path / "plan.json"
        assert main([*given, "--json", str(file), *arguments]) == 0
        sizes = {size["layout"]: size for size in json.loads(file.read_text())["sizes"]}
        assert ("published" in sizes) == (not arguments)  # has no place for groups
        bits.append(sizes["tunstall"]["bits_per_weight"])
    # Two bfloat16 levels for 32 weights instead of a row.
    assert 1.0 < bits[1] - bits[0] < 2.5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["switch_c_2048", *AMPLE, "--host_gb", "64"], "NO: host memory"),
        (["switch_xxl_128", *AMPLE, "--device", "t4"], "NO: device memory"),
        (["switch_base_128", *AMPLE, "--disk_gb", "0.9"], "NO: disk"),
        (["switch_base_8", *AMPLE, "--batch_size", "4096"], "Lower batch_size"),
    ],
)
def test_a_run_that_cannot_fit_is_told_no(capsys, arguments, reason):
    assert main(["plan", *arguments]) == 1
    assert reason in capsys.readouterr().out


def test_a_no_says_whose_memory_and_disk_it_is(capsys):
    assert main(["plan", "switch_c_2048", "--device", "h100", "--disk_gb", "9000"]) == 1
    assert "what this machine has free now" in capsys.readouterr().out
    assert main(["plan", "switch_c_2048", *AMPLE, "--host_gb", "64"]) == 1
    assert "what this machine has free now" not in capsys.readouterr().out


def test_the_example_of_the_readme_fits(capsys):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (command,) = re.findall(r"`qmoe-jax (plan .*?)`", text)
    assert main(command.split()) == 0
    assert "The run fits (device 60 GB, host 128 GB, disk 100 GB)" in capsys.readouterr().out


def test_the_hub_s_name_is_one_too(capsys):
    assert main(["plan", "google/switch-base-128", *AMPLE]) == 0
    of_the_hub = capsys.readouterr().out
    assert main(["plan", "switch_base_128", *AMPLE]) == 0
    assert capsys.readouterr().out == of_the_hub


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "neither a folder nor a public checkpoint"),
        (["nowhere/checkpoint_1"], "nowhere"),
        (["switch_base_8", "--device", "abacus"], "abacus"),
        (["switch_base_8", "--grid", "decimal"], "decimal"),
        (["switch_base_8", "--expert_batch", "0"], "expert_batch is 0"),
        (["switch_base_8", "--zero_share", "1.5"], "zero_share is 1.5"),
        (["switch_base_8", "--num_examples", "0"], "needs calibration"),
        (["switch_base_8", "--method", "none"], "no layer is left to compress"),
        (["switch_base_8", "--memory_fraction", "2"], "memory_fraction is 2.0"),
        (["switch_base_8", "--read_gbps", "0"], "read_gbps is 0.0"),
        (["switch_base_8", "--tokens", "no_such.npz"], "no_such.npz"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [("--layer_overrides", "nope"), ("--layer_overrides", '{"decoder/*": 1}'), ("--damping", "x")],
)
def test_what_argparse_refuses_is_one_line_too(capsys, option, value):
    assert main(["plan", "switch_base_8", option, value]) == 2
    error = capsys.readouterr().err
    assert option in error
    assert error.count("\n") == 1


def test_the_list_has_all_nine(capsys):
    assert main(["plan", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in T5X_DOCUMENTATION)
    assert out.count("%*") == 6


def test_a_checkpoint_with_token_files_as_json(golden_checkpoint, tmp_path, capsys):
    tokens = tmp_path / "tokens.npz"
    write_tokens(tokens, CALIBRATION.tokens, CALIBRATION.metadata)
    path, target = golden_checkpoint("base", "t5x_float32_inference"), tmp_path / "plan.json"
    arguments = [str(path), "--tokens", str(tokens), "--validation_tokens", str(tokens)]
    arguments += ["--num_examples", "30", "--expert_batch", "2", "--json", str(target)]
    arguments += ["--buffer_dir", str(tmp_path / "buffers"), "--output", str(tmp_path / "out")]
    assert main(["plan", *arguments]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "tokens.npz"}
    written = json.loads(target.read_text())
    assert written["fits"] is True
    assert written["tokens"]["num_calibration"] == 30
    assert written["tokens"]["num_validation"] == 40
    assert written["parameters"]["total"] == sum(
        math.prod(shape)
        for shape in parameter_shapes(ModelFacts.from_checkpoint(str(path)).config).values()
    )
    assert written["seconds"]["total"] > 0
    assert "whole chunks" in capsys.readouterr().out


def test_the_lattice(tmp_path, capsys):
    file = tmp_path / "plan.json"
    lattice = ["--grid", "lattice", "--kernel_steps", '{"*/wo": 5}']
    target = ["--target_bits_per_weight", "0.5"]
    assert main(["plan", "switch_base_8", *AMPLE, *lattice, *target, "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert plan["zero_shares"]["lattice"]["source"] == "codes of 0.50 bits a weight"
    assert 0.9 < plan["zero_shares"]["lattice"]["value"] < 0.95
    assert plan["sizes"][0]["bits_per_weight"] == pytest.approx(0.5)
    size = [*lattice, "--target_size", "700MB", "--json", str(file)]
    assert main(["plan", "switch_base_8", *AMPLE, *size]) == 0
    assert json.loads(file.read_text())["sizes"][0]["total"] == pytest.approx(700e6, rel=0.001)
    measured = ["--grid", "lattice", "--allocation", "measured", "--json", str(file)]
    assert main(["plan", "switch_base_8", *AMPLE, *measured]) == 0
    plan, seconds = json.loads(file.read_text()), json.loads(file.read_text())["seconds"]
    assert 0 < seconds["allocation"] < seconds["total"] / 4
    assert plan["device_memory"]["allocation"]["uncompressed model"] > 1e9
    assert main(["plan", "switch_base_8", *AMPLE, "--kernel_steps", '{"*/wo": "5"}']) == 2
    assert "no object of numbers" in capsys.readouterr().err
