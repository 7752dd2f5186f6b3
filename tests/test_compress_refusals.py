"""What the block loop refuses; it leaves no output."""

import numpy as np
import pytest
import tensorstore as ts
from factories import CALIBRATION, TERNARY, random_tokens

import qmoe_jax
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.errors import CheckpointError, TokensError


class TestRefusals:
    def test_gptq_without_tokens(self, base, tmp_path):
        with pytest.raises(TokensError, match="needs calibration tokens"):
            qmoe_jax.compress(base, tmp_path / "out", **TERNARY)
        assert not list(tmp_path.iterdir())

    def test_existing_output(self, base, gptq):
        path, _ = gptq
        before = (path / "manifest.json").read_bytes()
        with pytest.raises(CheckpointError, match="overwrite=True"):
            qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
        assert (path / "manifest.json").read_bytes() == before

    def test_bad_settings(self, base, tmp_path):
        with pytest.raises(ValueError, match="grid is '3bit'"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, grid="3bit")
        with pytest.raises(ValueError, match="damping is 0.0"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, damping=0.0)
        with pytest.raises(TypeError, match="dampning"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, dampning=0.1)
        assert not list(tmp_path.iterdir())

    def test_tokens_of_another_vocabulary(self, golden_checkpoint, tmp_path):
        tokens = random_tokens(0, 4)
        write_tokens(tmp_path / "tokens.npz", tokens.tokens, tokens.metadata)
        config = read_config(golden_checkpoint("c", "t5x_bfloat16"))
        assert config.num_embeddings < 512
        with pytest.raises(TokensError, match="another vocabulary"):
            qmoe_jax.compress(
                golden_checkpoint("c", "t5x_bfloat16"),
                tmp_path / "out",
                tmp_path / "tokens.npz",
                **TERNARY,
            )

    def test_a_nan_in_the_last_layer_leaves_no_output(self, golden_copy, tmp_path):
        checkpoint = golden_copy("base", "t5x_float32_inference")
        name = "decoder/layers_3/mlp/expert/wo/kernel"
        array = ts.open(
            {
                "driver": "zarr",
                "kvstore": {
                    "driver": "file",
                    "path": str(checkpoint / f"target.{name.replace('/', '.')}"),
                },
            },
            open=True,
        ).result()
        array[1, 0, 0].write(np.float32("nan")).result()
        with pytest.raises(CheckpointError, match=f"{name}.*NaN"):
            qmoe_jax.compress(checkpoint, tmp_path / "out", method="rtn", **TERNARY)
        assert not (tmp_path / "out").exists()
        with pytest.raises(CheckpointError):
            qmoe_jax.load_switch(tmp_path / "out.partial")
