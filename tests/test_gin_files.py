"""The gin files: each is parsed, finalised and run on a tiny model, with T5X's own outputs."""

import json
from pathlib import Path

import golden_data
import numpy as np
import pytest
from markers import slow

from qmoe_jax.calibration.tokens import ARRAY_NAMES, TokenBatch, TokenMetadata, write_tokens
from qmoe_jax.cli import evaluate

gin = pytest.importorskip("gin")
REPOSITORY = Path(__file__).parent.parent
# The golden model that was made from the gin file of this public one, scaled down.
GOLDEN_OF = {"base": "base", "large": "base", "xxl": "xxl", "c": "c"}
# Each of these is run by a test: models and eval here, the others in test_commands and
# test_finetune.
RUN = {f"models/switch_{model}.gin" for model in GOLDEN_OF} | {
    f"runs/{run}.gin" for run in ("compress", "eval", "finetune", "infer", "recover")
}


def test_every_gin_file_is_run_by_a_test():
    """Those in gin/t5x are for T5X's own commands, and tested with the plug-in."""
    folder = REPOSITORY / "gin"
    found = [path for kind in ("models", "runs") for path in (folder / kind).rglob("*.gin")]
    assert {path.relative_to(folder).as_posix() for path in found} == RUN


def golden_tokens(model, path):
    """The golden batch as a token file."""
    golden = golden_data.load_golden(model)
    size = golden_data.load_json(model, "config")["NUM_EMBEDDINGS"]
    arrays = {name: golden[f"batch/{name}"].astype(np.int32) for name in ARRAY_NAMES}
    batch = TokenBatch(**arrays, num_real=len(arrays["encoder_input_tokens"]))
    write_tokens(path, batch, TokenMetadata("golden", "test", size, size - 100, 100, 1, 0, ""))
    return len(batch)


@pytest.fixture(scope="module")
def run(golden_checkpoint, tmp_path_factory):
    """Evaluates a golden model through the command, with a public model's gin file."""

    def run(public, *bindings):
        model = GOLDEN_OF[public]
        folder = tmp_path_factory.mktemp(public)
        batch_size = golden_tokens(model, folder / "tokens.npz")
        evaluate.main(
            [
                f"--gin_file=gin/models/switch_{public}.gin",
                "--gin_file=gin/runs/eval.gin",
                f"--gin.CHECKPOINT='{golden_checkpoint(model, 't5x_float32')}'",
                f"--gin.TOKENS='{folder / 'tokens.npz'}'",
                f"--gin.BATCH_SIZE={batch_size}",
                f"--gin.OUTPUT='{folder / 'out'}'",
                "--gin.TENSORBOARD=False",
                "--routers",
                *bindings,
            ]
        )
        (result,) = json.loads((folder / "out" / "metrics.json").read_text())["models"]
        return golden_data.load_golden(model), result, folder

    return run


@pytest.mark.parametrize("public", ["base", "xxl", *slow("c", "large")])
def test_a_model_file_and_t5x_s_routing_give_t5x_s_metrics(run, public, capsys):
    golden, result, folder = run(public, "--gin.EXPERT_CAPACITY_FACTOR=%T5X_EXPERT_CAPACITY_FACTOR")
    prefix = "std_f32/loss/t5x_metric/"
    expected = {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}
    for name, value in result["t5x"].items():
        assert value == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-7), name
    losses = float(golden["std_f32/loss/ce_sum"]) / float(golden["std_f32/loss/ntokens"])
    assert result["loss"] == pytest.approx(losses, rel=1e-5)
    assert result["z_loss"] == pytest.approx(float(expected["z_loss"]) / 1e-4, rel=1e-4)
    drops = golden_data.load_json(GOLDEN_OF[public], "info")["std_f32"]["drops"]
    assert set(result["router"]["layers"]) == set(drops)
    for layer, found in result["router"]["layers"].items():
        check_layer(golden, layer, found, drops[layer])
    # The table says the same.
    printed = capsys.readouterr().out
    assert f"{result['loss']:.4f}" in printed
    assert all(layer in printed for layer in drops)
    # What was used is saved beside the output, and is a gin file that gives the same settings.
    saved = (folder / "out.operative_config.gin").read_text()
    assert "EXPERT_CAPACITY_FACTOR = %T5X_EXPERT_CAPACITY_FACTOR" in saved
    assert "load_switch.max_group_size = " in saved


def check_layer(golden, layer, found, drops):
    """A layer's statistics, computed again in NumPy from flaxformer's own routing."""
    stack = layer.split("/")[0]
    real = golden["batch/encoder_input_tokens"] > 0
    if stack == "decoder":
        real = golden["batch/decoder_target_tokens"] > 0
    padded = np.zeros(drops["padded_shape"], bool)
    padded[: real.shape[0], : real.shape[1]] = real
    logits = golden[f"std_f32/router_logits/{layer}"]
    real = padded.reshape(logits.shape[:2])
    load = np.bincount(logits.argmax(-1)[real], minlength=logits.shape[-1])
    kept = real & (golden[f"std_f32/dispatched_expert/{layer}"] >= 0)
    gate = np.exp(logits.max(-1) - np.log(np.exp(logits.astype(np.float64)).sum(-1)))
    assert found["num_tokens"] == real.sum()
    assert found["num_dropped"] == (real & ~kept).sum() > 0
    assert found["dropped_fraction"] == pytest.approx((real & ~kept).sum() / real.sum())
    assert found["max_load"] == pytest.approx(load.max() / load.mean())
    assert found["unused_experts"] == pytest.approx((load == 0).mean())
    assert found["confidence"] == pytest.approx(gate[kept].mean(), rel=1e-4)
    for name in ("auxiliary_loss", "router_z_loss", "fraction_tokens_left_behind"):
        expected = float(golden[f"std_f32/metric/{layer}/{name}"])
        assert found[name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("public", ["base", *slow("xxl", "c")])
def test_dropless_is_the_default(run, public):
    golden, result, _ = run(public)
    losses = float(golden["nodrop_f32/loss/ce_sum"]) / float(golden["nodrop_f32/loss/ntokens"])
    assert result["loss"] == pytest.approx(losses, rel=1e-5)
    accuracy = float(golden["nodrop_f32/loss/t5x_metric/accuracy"])
    assert result["accuracy"] == pytest.approx(accuracy, abs=1e-7)
    assert result["router"]["total"]["num_dropped"] == 0
