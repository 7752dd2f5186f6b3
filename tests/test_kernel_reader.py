"""Kernels are read a batch ahead, and no chunk twice."""

import numpy as np
import pytest

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError
from qmoe_jax.pipeline.kernel_reader import KernelReader, cache_bytes
from qmoe_jax.pipeline.schedule import BatchKey


def keys(config, step):
    for stack, layer in config.sparse_layers:
        for start in range(0, config.num_experts, step):
            yield BatchKey(stack, layer, start, min(start + step, config.num_experts))


@pytest.fixture(scope="module")
def source(golden_checkpoint):
    return open_t5x_checkpoint(golden_checkpoint("base", "t5x_float32_inference"))


@pytest.mark.parametrize("step", [1, 3, 8])
def test_every_batch_is_what_the_checkpoint_holds(source, step):
    config = read_config(source)
    total = 0
    with KernelReader(source, ("wi", "wo"), keys(config, step)) as reader:
        for key in keys(config, step):
            kernels = reader.take(key)
            for name, kernel in kernels.items():
                whole = source.read(names.expert_kernel(key.stack, key.layer, name))
                np.testing.assert_array_equal(kernel, whole[key.start : key.stop])
                total += kernel.nbytes
    assert reader.num_bytes == total


def test_one_batch_is_read_ahead_and_no_more(source):
    config = read_config(source)
    announced = []

    def watched():
        for key in keys(config, 4):
            announced.append(key)
            yield key

    reader = KernelReader(source, ("wi", "wo"), watched())
    assert announced == []  # a constructor reads nothing
    with reader:
        assert len(announced) == 1
        first = next(keys(config, 4))
        reader.take(first)
        assert len(announced) == 2
        with pytest.raises(ValueError, match="the schedule's next read is"):
            reader.take(first)


def test_damage_is_reported_when_the_batch_is_taken(golden_copy):
    path = golden_copy("base", "t5x_float32_inference")
    chunk = path / "target.encoder.layers_1.mlp.expert.wo.kernel" / "0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-50])
    source = open_t5x_checkpoint(path)
    config = read_config(source)
    with (
        KernelReader(source, ("wi", "wo"), keys(config, 8)) as reader,
        pytest.raises(CheckpointError, match="layers_1/mlp/expert/wo"),
    ):
        reader.take(next(keys(config, 8)))


def test_the_cache_is_as_large_as_chunks_across_batches_need(source):
    config = read_config(source)
    chunk = source.chunk_shape("encoder/layers_1/mlp/expert/wi/kernel")
    assert chunk == source.shapes["encoder/layers_1/mlp/expert/wi/kernel"]  # one chunk, 8 experts
    one_kernel = 8 * config.embed_dim * config.expert_mlp_dim * 4
    assert cache_bytes(source, config, 8) == 0
    assert cache_bytes(source, config, 16) == 0
    assert cache_bytes(source, config, 3) == 2 * one_kernel


def test_a_checkpoint_of_single_experts_needs_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("qmoe_jax.checkpoints.t5x_writer._CHUNK_BYTES", 1)
    from qmoe_jax.checkpoints.geometry import parameter_shapes

    config = SwitchConfig(
        num_embeddings=16,
        embed_dim=4,
        mlp_dim=8,
        expert_mlp_dim=8,
        num_heads=1,
        head_dim=4,
        num_experts=3,
        num_encoder_layers=2,
        num_decoder_layers=2,
        encoder_sparse_layers=(1,),
        decoder_sparse_layers=(1,),
    )
    writer = T5XCheckpointWriter(tmp_path, 7)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in parameter_shapes(config).items():
        arrays[name] = rng.standard_normal(shape, np.float32)
        writer.create(name, shape, "float32")
        writer.write(name, arrays[name])
    source = open_t5x_checkpoint(writer.finish())
    assert source.step == 7
    assert read_config(source) == config
    for name, array in arrays.items():
        np.testing.assert_array_equal(source.read(name), array)
    assert cache_bytes(source, config, 2) == 0
