"""`qmoe-jax inspect`: what it says of compressed and native checkpoints."""

import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from command import command
from stored_files import change_coded, flipped

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.inspection import inspect_checkpoint
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.cli.inspect import format_report
from qmoe_jax.codec import encode
from qmoe_jax.codec.codings import coding_names
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

CONFIG = SwitchConfig(
    num_embeddings=20,
    embed_dim=48,
    mlp_dim=40,
    expert_mlp_dim=40,
    num_heads=2,
    head_dim=4,
    num_experts=3,
    num_encoder_layers=2,
    num_decoder_layers=2,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(1,),
)


def write(path, coding="qmoe"):
    """A checkpoint whose kernels are nine tenths zeros; returns its codes by kernel."""
    rng = np.random.default_rng(0)
    all_codes = {}
    writer = CompressedCheckpointWriter(path)
    for name, shape in parameter_shapes(CONFIG).items():
        if not names.is_expert_kernel(name):
            writer.write_dense(name, np.ones(shape, ml_dtypes.bfloat16))
            continue
        experts, width, rows = shape
        codes = rng.choice(3, (experts, rows, width), p=(0.9, 0.06, 0.04)).astype(np.uint8)
        levels = np.ones((experts, rows, 2), ml_dtypes.bfloat16)
        if coding in ("packed2", "tunstall_2bit"):
            levels[..., 1] = 0  # code 0 is the weight 0
        if coding == "lattice":
            steps = np.full((experts, width), 3, np.uint8)
            levels = {"step_index": steps, "origin": np.ones(experts, np.float32)}
        module = name.removesuffix("/kernel")
        all_codes[module] = codes
        writer.write_coded(module, encode.encode(codes, levels, coding))
    writer.finish(CONFIG, {"note": "test"})
    return all_codes


@pytest.mark.parametrize("coding", coding_names())
def test_numbers_of_a_compressed_checkpoint(tmp_path, coding):
    all_codes = write(tmp_path / "compressed", coding)
    report = inspect_checkpoint(tmp_path / "compressed")
    assert report["kind"] == "compressed"
    assert report["config"] == CONFIG.to_json()
    assert report["compression"] == {"note": "test"}
    assert [kernel["name"] for kernel in report["kernels"]] == sorted(all_codes)
    for kernel in report["kernels"]:
        codes = all_codes[kernel["name"]]
        bits = kernel["bits"]
        assert kernel["coding"] == coding
        assert bits["zero_share"] == pytest.approx((codes == 0).mean())
        shares = np.bincount(codes.reshape(-1), minlength=3) / codes.size
        assert bits["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())
        assert bits["codes"] + bits["levels"] + bits["offsets"] == bits["total"]

    weights = sum(codes.size for codes in all_codes.values())
    stored = open_compressed_checkpoint(tmp_path / "compressed").num_bytes()
    experts = report["experts"]
    assert report["parameters"]["experts"] == weights
    assert experts["bits"]["total"] == 8 * stored["coded"] == 8 * report["num_bytes"]["experts"]
    assert experts["bits"]["bits_per_weight"] == pytest.approx(8 * stored["coded"] / weights)
    assert experts["compression"] == pytest.approx(2 * weights / stored["coded"])
    assert report["num_bytes"]["dense"] == 2 * report["parameters"]["dense"]
    total = 2 * report["parameters"]["total"]
    assert report["model"]["compression"] == pytest.approx(total / sum(stored.values()))
    assert report["parameters"]["total"] == sum(
        math.prod(shape) for shape in parameter_shapes(CONFIG).values()
    )


def test_text_of_a_compressed_checkpoint(tmp_path, capsys):
    write(tmp_path / "compressed")
    assert command("inspect")([str(tmp_path / "compressed")]) == 0
    text = capsys.readouterr().out
    report = inspect_checkpoint(tmp_path / "compressed")
    assert text == format_report(report) + "\n"
    for name in ("encoder/layers_1/mlp/expert/wi", "decoder/layers_1/mlp/expert/wo"):
        assert name in text
    bits = report["experts"]["bits"]
    last = next(line for line in text.splitlines() if line.startswith("all experts"))
    assert f"{bits['bits_per_weight']:.4f}" in last
    # The parts of bits/weight add up, as far as they are shown.
    zeros, entropy, codes, levels, lengths, total, share = last.split()[2:]
    assert float(codes) + float(levels) + float(lengths) == pytest.approx(float(total), abs=2e-4)
    assert float(entropy) / float(total) == pytest.approx(float(share[:-1]) / 100, abs=1e-3)
    assert zeros == f"{bits['zero_share']:.2%}"
    assert f"{report['model']['compression']:.2f}x smaller" in text


@pytest.mark.parametrize("coding", coding_names())
def test_bits_by_part(tmp_path, coding, capsys):
    path = tmp_path / "compressed"
    write(path, coding)
    report = inspect_checkpoint(path)
    own = {"tunstall": {"codewords", "signs", "filler"}, "qmoe": {"codes", "filler"}}
    for holder in (*report["kernels"], report["experts"]):
        parts, bits = holder["parts"], holder["bits"]
        assert sum(part["bits"] for part in parts) == bits["total"]
        for kind, counted in (("codes", "codes"), ("levels", "levels"), ("lengths", "offsets")):
            assert sum(p["bits"] for p in parts if p["kind"] == kind) == bits[counted]
        names_of_codes = {part["name"] for part in parts if part["kind"] == "codes"}
        assert names_of_codes == own.get(coding, names_of_codes)
    # What is on disk, but for the contents of arrays that are compressed there.
    coded = sum(f.stat().st_size for f in (path / "coded").rglob("*") if f.is_file())
    dense = sum(f.stat().st_size for f in (path / "dense").rglob(".zarray"))
    manifest = (path / "manifest.json").stat().st_size
    assert report["container"] == coded + dense + manifest - report["num_bytes"]["experts"]

    assert command("inspect")([str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    weights = report["parameters"]["experts"]
    for part in report["experts"]["parts"]:
        shown = [w for w in lines if w[: 1 + len(part["name"].split())][1:] == part["name"].split()]
        share = f"{part['bits'] / report['experts']['bits']['total']:.1%}"
        if part["bits"]:
            assert [w[-2:] for w in shown] == [[f"{part['bits'] / weights:.4f}", share]]
        else:
            assert not shown
    assert [words[0] for words in lines if words].count("container") == 1


@pytest.mark.parametrize("damaged", [b"", b"{", b"{}", b'{"chunks": [0], "compressor": null}'])
def test_damaged_metadata(tmp_path, damaged):
    write(tmp_path / "compressed")
    checkpoint = open_compressed_checkpoint(tmp_path / "compressed")
    (tmp_path / "compressed/dense/packed/.zarray").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"dense/packed/.zarray is missing or damaged"):
        checkpoint.container_bytes()


@pytest.mark.parametrize(
    ("model", "layout"), [("base", "t5x_float32"), ("c", "t5x_bfloat16"), ("xxl", "t5x_float32")]
)
def test_native_checkpoints_are_not_read(golden_checkpoint, model, layout, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(T5XCheckpoint, "read", refuse)
    monkeypatch.setattr(T5XCheckpoint, "read_many", refuse)
    path = golden_checkpoint(model, layout)
    report = inspect_checkpoint(path)
    config = read_config(path)
    assert report["kind"] == "native"
    assert report["config"] == config.to_json()
    assert report["step"] == 500100
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    assert report["parameters"]["total"] == parameters
    assert sum(report["dtypes"].values()) == parameters
    size = {"t5x_float32": 4, "t5x_bfloat16": 2}[layout]
    if set(report["dtypes"]) == {layout.removeprefix("t5x_")}:
        assert report["num_bytes"]["total"] == size * parameters
    text = format_report(report)
    assert f"{config.num_experts} a sparse layer" in text
    assert "native checkpoint" in text


def test_json(tmp_path, capsys):
    write(tmp_path / "compressed")
    assert command("inspect")([str(tmp_path / "compressed"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == inspect_checkpoint(tmp_path / "compressed")


def test_mistakes_end_in_a_message(tmp_path, capsys):
    assert command("inspect")([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    write(tmp_path / "compressed")
    change_coded(tmp_path / "compressed", "encoder/layers_1/mlp/expert/wi", "levels", flipped)
    assert command("inspect")([str(tmp_path / "compressed")]) == 2
    assert "encoder/layers_1/mlp/expert/wi/levels" in capsys.readouterr().err


def test_the_module_does_not_hide_the_standard_library():
    code = (
        "import sys, inspect, qmoe_jax.cli.inspect; "
        "assert inspect.__file__ != qmoe_jax.cli.inspect.__file__; "
        "print('getsource' in dir(inspect))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "True"


def test_the_parent_of_compressed_checkpoints_stands_for_the_latest(tmp_path):
    write(tmp_path / "runs" / "checkpoint_3")
    write(tmp_path / "elsewhere")
    (tmp_path / "runs" / "checkpoint_12").symlink_to(tmp_path / "elsewhere")
    found = open_compressed_checkpoint(tmp_path / "runs")
    assert found.url == str(tmp_path / "runs" / "checkpoint_12")
    assert read_config(str(tmp_path / "runs")) == CONFIG
    # Results that are kept for that folder are of the checkpoint in it.
    fingerprint = found.fingerprint()
    assert fingerprint == open_compressed_checkpoint(tmp_path / "elsewhere").fingerprint()
    write(tmp_path / "runs" / "checkpoint_13", coding="tunstall")
    assert open_compressed_checkpoint(tmp_path / "runs").fingerprint() != fingerprint
