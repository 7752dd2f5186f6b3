"""Codes of a compressed checkpoint in another coding: the same model, as a run would write it."""

import shutil

import jax
import numpy as np
import pytest
from canary import tree
from command import command, refusal
from factories import CALIBRATION, TERNARY, same_tree, shortened
from stored_files import change_coded, flipped

import qmoe_jax
from qmoe_jax.checkpoints import recode
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.recode import recode_checkpoint
from qmoe_jax.errors import CheckpointError, CodecError


def coding_of(path):
    return {spec.coding for spec in open_compressed_checkpoint(path).specs.values()}


def logits(path):
    # One implementation for both codings: the host's kernels take the one and not the other.
    module, variables = shortened(*qmoe_jax.load_switch(path, implementation="xla"), 2)
    batch = CALIBRATION.tokens
    ids = (batch.encoder_input_tokens[:4], batch.decoder_input_tokens[:4])
    call = jax.jit(lambda v, *ids: module.apply(v, *ids, batch.decoder_target_tokens[:4]))
    return np.asarray(call(variables, *ids))


def test_ternary_there_and_back(gptq, tmp_path, base):
    """The output is that of a run with that coding, to the byte, and so is the way back."""
    source = gptq[0]
    assert command("convert")(["coding", "qmoe", str(source), str(tmp_path / "qmoe")]) == 0
    assert coding_of(tmp_path / "qmoe") == {"qmoe"}
    qmoe_jax.compress(base, tmp_path / "run", CALIBRATION, expert_coding="qmoe", **TERNARY)
    assert same_tree(tmp_path / "qmoe", tmp_path / "run")
    np.testing.assert_array_equal(logits(tmp_path / "qmoe"), logits(source))
    recode_checkpoint(tmp_path / "qmoe", tmp_path / "back", "tunstall", progress=False)
    assert same_tree(tmp_path / "back" / "coded", source / "coded")
    assert same_tree(tmp_path / "back" / "dense", source / "dense")


def test_one_grid_of_two(base, tmp_path):
    """Kernels of the other grid stay as they are; group levels too."""
    mixed = {"layer_overrides": {"decoder/*": {"grid": "2bit", "group_size": 8}}, "method": "rtn"}
    for coding in (None, "packed2"):
        changed = {k: dict(v) for k, v in mixed["layer_overrides"].items()}
        if coding is not None:
            changed["decoder/*"]["expert_coding"] = coding
        settings = mixed | {"layer_overrides": changed} | TERNARY
        qmoe_jax.compress(base, tmp_path / str(coding), **settings)
    recode_checkpoint(tmp_path / "None", tmp_path / "recoded", "packed2", progress=False)
    assert coding_of(tmp_path / "recoded") == {"tunstall", "packed2"}
    assert same_tree(tmp_path / "recoded", tmp_path / "packed2")


def test_what_cannot_be(gptq, tmp_path, capsys):
    source = str(gptq[0])
    before = tree(gptq[0])
    for coding, message in (
        ("tunstall", "have the coding tunstall already"),
        ("packed2", "whose codes packed2 cannot store; choose one of tunstall, qmoe, or compress"),
        ("gzip", "The coding 'gzip' is unknown"),
    ):
        assert message in refusal(capsys, "convert", "coding", coding, source, str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []
    assert "is, or holds, the input" in refusal(
        capsys, "convert", "coding", "qmoe", source, source, "--overwrite"
    )
    assert tree(gptq[0]) == before
    line = refusal(capsys, "convert", "published", "qmoe", source, str(tmp_path / "x"))
    assert "write published import or published export" in line


def test_the_published_layout_advises_it(gptq, tmp_path, capsys):
    line = refusal(capsys, "convert", "published", "export", str(gptq[0]), str(tmp_path / "x"))
    assert f"convert it first, qmoe-jax convert coding qmoe {gptq[0]} OUTPUT" in line


def test_stopped_and_started_again(gptq, tmp_path, monkeypatch):
    written = recode._write

    def stop(writer, name, *rest):
        if "decoder" in name:
            raise KeyboardInterrupt
        written(writer, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(recode, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            recode_checkpoint(gptq[0], tmp_path / "out", "qmoe", progress=False)
    assert not (tmp_path / "out").exists()
    recode_checkpoint(gptq[0], tmp_path / "out", "qmoe", progress=False)
    recode_checkpoint(gptq[0], tmp_path / "undisturbed", "qmoe", progress=False)
    assert same_tree(tmp_path / "out", tmp_path / "undisturbed")
    with pytest.raises(CheckpointError, match="exists already"):
        recode_checkpoint(gptq[0], tmp_path / "out", "qmoe", progress=False)


def test_damage_is_found_before_it_is_stored_anew(gptq, tmp_path, monkeypatch):
    shutil.copytree(gptq[0], tmp_path / "damaged")
    change_coded(tmp_path / "damaged", "encoder/layers_1/mlp/expert/wi", "words", flipped)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        recode_checkpoint(tmp_path / "damaged", tmp_path / "out", "qmoe", progress=False)
    assert not (tmp_path / "out").exists()
    encoded = recode.encode
    monkeypatch.setattr(recode, "encode", lambda codes, *rest: encoded(codes * 0, *rest))
    with pytest.raises(CodecError, match="decode to others than they were made from"):
        recode_checkpoint(gptq[0], tmp_path / "out", "qmoe", progress=False)
