"""Token files and settings of small runs, and comparisons of what they wrote."""

import dataclasses
import filecmp
import os

import jax
import numpy as np

import qmoe_jax
from qmoe_jax.calibration.tokens import TokenFile, TokenMetadata, from_sequences
from qmoe_jax.models.load import dequantized

SENTINELS = (500, 12)


def random_tokens(seed, count, longest=24, num_embeddings=500):
    """Examples with sentinels, of different lengths."""
    rng = np.random.default_rng(seed)
    inputs, targets = [], []
    for _ in range(count):
        body = rng.integers(3, num_embeddings, rng.integers(4, longest))
        body[len(body) // 2] = SENTINELS[0] + SENTINELS[1] - 1
        inputs.append(np.append(body, 1))
        answer = rng.integers(3, num_embeddings, rng.integers(2, longest // 2))
        answer[0] = SENTINELS[0] + SENTINELS[1] - 1
        targets.append(np.append(answer, 1))
    batch = from_sequences(inputs, targets, inputs_length=longest + 8, targets_length=longest)
    metadata = TokenMetadata(
        task="random",
        split="train",
        vocabulary_size=512,
        sentinel_first=SENTINELS[0],
        sentinel_count=SENTINELS[1],
        eos_id=1,
        seed=seed,
        source="test",
    )
    return TokenFile(batch, metadata)


CALIBRATION = random_tokens(0, 40)
QUICK = {"progress": False, "batch_size": 8, "expert_batch": 3, "token_chunk": 16}
TERNARY = QUICK | {"grid": "ternary"}


def same_tree(a, b):
    compared = filecmp.dircmp(a, b)
    if compared.left_only or compared.right_only:
        return False
    _, mismatch, errors = filecmp.cmpfiles(a, b, compared.common_files, shallow=False)
    return not (mismatch or errors) and all(
        same_tree(os.path.join(a, d), os.path.join(b, d)) for d in compared.common_dirs
    )


def shortened(module, variables, layers):
    """A model of the first layers of both stacks: a program is compiled in a part of the time."""
    config = module.config
    config = dataclasses.replace(
        config,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        encoder_sparse_layers=tuple(x for x in config.encoder_sparse_layers if x < layers),
        decoder_sparse_layers=tuple(x for x in config.decoder_sparse_layers if x < layers),
    )
    left_out = {f"layers_{i}" for i in range(layers, 100)}
    coded = tuple(item for item in module.coded if item[0].split("/")[1] not in left_out)
    kept = {
        collection: {
            stack: {name: part for name, part in parts.items() if name not in left_out}
            if stack in ("encoder", "decoder")
            else parts
            for stack, parts in stacks.items()
        }
        for collection, stacks in variables.items()
    }
    return module.clone(config=config, coded=coded), kept


def codes_of(path):
    """All decoded weights, by kernel."""
    module, variables = qmoe_jax.load_switch(path)
    _, dense = dequantized(module, variables)
    flat = jax.tree_util.tree_flatten_with_path(dense["params"])[0]
    return {
        jax.tree_util.keystr(key): np.asarray(value)
        for key, value in flat
        if "'expert'" in jax.tree_util.keystr(key)
    }
