"""Options of the block loop: what they change, and layers that are treated otherwise."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import CALIBRATION, TERNARY, codes_of, random_tokens, shortened
from markers import slow

import qmoe_jax
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.load import dequantized

OPTIONS = ({"group_size": 32}, {"move_wo": True}, {"act_order": True}, {"true_sequential": True})


@pytest.mark.parametrize("option", [*OPTIONS[:3], *slow(OPTIONS[3])])
def test_options_run_and_matter(base, gptq, tmp_path, option):
    path, report = gptq
    other = qmoe_jax.compress(base, tmp_path / "other", CALIBRATION, **option, **TERNARY)
    ours, theirs = codes_of(path), codes_of(tmp_path / "other")
    assert any(np.any(ours[key] != theirs[key]) for key in ours)
    if "group_size" in option:
        # Two levels a group cost 1 bit a weight, and smaller groups have fewer zeros.
        assert 1.0 < other.bits_per_weight - report.bits_per_weight < 2.5
    else:
        assert other.bits_per_weight == pytest.approx(report.bits_per_weight, rel=0.1)


# But for groups the format is the same.
@pytest.mark.parametrize("option", [OPTIONS[0], *slow(*OPTIONS[1:])])
def test_codes_lose_nothing_under_options(base, tmp_path, option):
    qmoe_jax.compress(base, tmp_path / "other", CALIBRATION, **option, **TERNARY)
    module, variables = shortened(*qmoe_jax.load_switch(tmp_path / "other"), 2)
    batches = [batch.arrays() for batch in CALIBRATION[:16].batches(16)]
    through_codes = evaluate_loss(module, variables, batches)
    dense = evaluate_loss(*dequantized(module, variables), batches)
    assert through_codes.loss == pytest.approx(dense.loss, abs=1e-4)


class TestLayers:
    """Layers that are treated otherwise: skipped stacks, overrides."""

    def test_a_skipped_stack_stays_dense(self, base, gptq, tmp_path):
        path, _ = gptq
        validation = random_tokens(9, 11)
        report = qmoe_jax.compress(
            base,
            tmp_path / "out",
            CALIBRATION,
            validation_tokens=validation,
            separate_evaluation=True,
            skip="decoder",
            **TERNARY,
        )
        module, variables = qmoe_jax.load_switch(tmp_path / "out")
        assert all(name.startswith("encoder/") for name, _ in module.coded)
        assert len(module.coded) == 4
        source = qmoe_jax.open_t5x_checkpoint(base)
        name = "decoder/layers_3/mlp/expert/wo/kernel"
        kept = variables["params"]["decoder"]["layers_3"]["mlp"]["expert"]["wo"]["kernel"]
        assert kept.dtype == jnp.bfloat16
        np.testing.assert_array_equal(kept, source.read(name).astype(jnp.bfloat16))
        # The encoder does not see what becomes of the decoder.
        ours, whole = codes_of(tmp_path / "out"), codes_of(path)
        for key in whole:
            if key.startswith("['encoder']"):
                np.testing.assert_array_equal(ours[key], whole[key])
        separate = report.separate_validation
        assert report.validation.loss == pytest.approx(separate.loss, rel=1e-4)
        stored = open_compressed_checkpoint(tmp_path / "out").num_bytes()
        assert 8 * stored["dense"] == report.dense_bits
        assert 8 * stored["coded"] == report.expert_bits

    def test_overrides(self, base, tmp_path):
        report = qmoe_jax.compress(
            base,
            tmp_path / "out",
            CALIBRATION,
            layer_overrides={
                "encoder/*": {"method": "rtn"},
                "encoder/layers_3": {"grid": "2bit", "method": "gptq"},
                "decoder/layers_1": {"method": "none"},
            },
            **TERNARY,
        )
        specs = open_compressed_checkpoint(tmp_path / "out").specs
        codings = {name.rpartition("/mlp")[0]: spec.coding for name, spec in specs.items()}
        assert codings == {
            "encoder/layers_1": "tunstall",
            "encoder/layers_3": "tunstall_2bit",
            "decoder/layers_3": "tunstall",
        }
        rtn = qmoe_jax.compress(base, tmp_path / "rtn", method="rtn", **TERNARY)
        assert report.kernels[0].zeros == rtn.kernels[0].zeros
        assert report.kernels[-1].zeros != rtn.kernels[-1].zeros

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer_overrides": {"encoder/layers_2": {"grid": "2bit"}}}, "matches no sparse"),
            ({"layer_overrides": {"*": {"batch_size": 3}}}, "has batch_size; a layer may"),
            ({"layer_overrides": {"*": {"damping": -1.0}}}, "damping is -1.0"),
            ({"method": "none"}, "no layer is left to compress"),
            ({"skip": "both"}, "skip is 'both'"),
            ({"group_size": 24}, "group_size is 24; it must divide the 64"),
            ({"num_devices": 3}, "num_devices is 3; this process has 1"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refusals(self, base, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **changes, **TERNARY)
        assert not list(tmp_path.iterdir())


def test_premasking_leaves_sentinels_out(base, gptq, tmp_path):
    """Replacing what stands at sentinels by another sentinel moves hidden states, so instead:
    without premasking the Hessians, and with them the codes, are different."""
    path, _ = gptq
    qmoe_jax.compress(base, tmp_path / "all", CALIBRATION, premask_sentinels=False, **TERNARY)
    ours, theirs = codes_of(path), codes_of(tmp_path / "all")
    assert any(np.any(ours[key] != theirs[key]) for key in ours)


@pytest.mark.slow
def test_bfloat16_activations(golden_checkpoint, tmp_path):
    report = qmoe_jax.compress(
        golden_checkpoint("base", "t5x_bfloat16"),
        tmp_path / "out",
        CALIBRATION,
        validation_tokens=CALIBRATION[:4],
        activation_dtype="bfloat16",
        **TERNARY,
    )
    module, variables = qmoe_jax.load_switch(tmp_path / "out", "bfloat16")
    batches = [batch.arrays() for batch in CALIBRATION[:4].batches(4)]
    loss = evaluate_loss(module, variables, batches)
    assert loss.loss == pytest.approx(report.validation.loss, rel=1e-2)


def test_premasking_is_by_default_for_the_paper_s_grids():
    settings = qmoe_jax.CompressionSettings
    assert not settings().premasks_sentinels
    assert settings(grid="ternary").premasks_sentinels
    assert settings(premask_sentinels=True).premasks_sentinels
    assert not settings(grid="2bit", premask_sentinels=False).premasks_sentinels
