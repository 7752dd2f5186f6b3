"""A tiny Switch Transformer: a checkpoint of its own, whose programs compile in a second or two."""

from pathlib import Path

import numpy as np

from qmoe_jax.calibration.tokens import TokenFile, TokenMetadata, from_sequences
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.config import SwitchConfig

CONFIG = SwitchConfig(
    num_embeddings=64,
    embed_dim=16,
    mlp_dim=24,
    expert_mlp_dim=40,
    num_heads=2,
    head_dim=8,
    num_experts=4,
    num_encoder_layers=1,
    num_decoder_layers=2,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(1,),
)


def write_checkpoint(folder: Path, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """A native checkpoint of random parameters; returns its path."""
    rng = np.random.default_rng(seed)
    writer = T5XCheckpointWriter(folder, 0)
    for name, shape in parameter_shapes(CONFIG).items():
        values = rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)
        if name.endswith("scale"):
            values = rng.uniform(0.5, 1.5, shape)
        stored = np.float32
        if dtype == "bfloat16":
            import ml_dtypes

            stored = ml_dtypes.bfloat16
        writer.create(name, shape, dtype)
        writer.write(name, values.astype(stored))
    return writer.finish()


def copying_tokens(seed: int, count: int) -> TokenFile:
    """Examples whose target is the first input: there is something to learn."""
    rng = np.random.default_rng(seed)
    inputs = [np.append(rng.integers(3, 50, rng.integers(2, 7)), 1) for _ in range(count)]
    targets = [np.array([own[0], 1]) for own in inputs]
    batch = from_sequences(inputs, targets, inputs_length=8, targets_length=3)
    metadata = TokenMetadata(
        task="copying",
        split="train",
        vocabulary_size=60,
        sentinel_first=50,
        sentinel_count=10,
        eos_id=1,
        seed=seed,
        source="test",
    )
    return TokenFile(batch, metadata)
