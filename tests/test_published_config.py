"""The published QMoE layout: names of parameters and configs."""

import dataclasses
import json

import numpy as np
import pytest
from published_factories import BASE, GEOMETRIES, C, random_dense

from qmoe_jax.checkpoints import huggingface_names, names, published_config
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.errors import CheckpointError


@pytest.fixture(params=["base", "c"])
def geometry(request):
    return GEOMETRIES[request.param]


def test_every_parameter_has_one_name(geometry):
    config = published_config.config_from_hf(geometry)
    dense = huggingface_names.dense_parameters(config)
    shapes = parameter_shapes(config)
    experts = {name for name in shapes if names.is_expert_kernel(name)}
    assert dense.keys() | experts == shapes.keys()
    hf = [parameter.name for parameter in dense.values()]
    copies = huggingface_names.embedding_copies(config)
    expected = random_dense(geometry, np.random.default_rng(0))
    assert sorted([*hf, *copies]) == sorted(expected)  # each once, none left over
    for name, (hf_name, transposed) in dense.items():
        shape = shapes[name][::-1] if transposed else shapes[name]
        assert expected[hf_name].shape == shape, name
    assert {
        f"{names.mlp_prefix(stack, layer)}/expert/{kernel}/kernel"
        for stack, layer in huggingface_names.sparse_layers(config)
        for kernel in ("wi", "wo")
    } == experts


def test_config_of_the_public_models():
    c_2048 = C | {"d_model": 2080, "d_ff": 6144, "num_heads": 30, "d_kv": 64, "num_experts": 2048}
    c_2048 |= {"vocab_size": 32128, "num_layers": 15, "num_decoder_layers": 15}
    config = published_config.config_from_hf(c_2048)
    assert config.encoder_sparse_layers == config.decoder_sparse_layers == tuple(range(15))
    assert (config.mlp_dim, config.tied_logits) == (0, False)
    assert (config.max_group_size, config.min_expert_capacity) == (2048, 2)
    base_128 = BASE | {"num_layers": 12, "num_decoder_layers": 12, "num_experts": 128}
    config = published_config.config_from_hf(base_128)
    assert config.encoder_sparse_layers == (1, 3, 5, 7, 9, 11)
    assert config.tied_logits
    without_step = {k: v for k, v in base_128.items() if not k.endswith("_sparse_step")}
    without_step |= {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    assert published_config.config_from_hf(without_step) == config


def test_config_round_trip(geometry):
    config = published_config.config_from_hf(geometry)
    fields = published_config.config_to_hf(config)
    assert published_config.config_from_hf(json.loads(json.dumps(fields))) == config
    assert ("is_full_sparse" in fields) == ("is_full_sparse" in geometry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'"),
        ({"router_bias": True}, "router_bias is True"),
        ({"d_model": None}, "d_model is None"),
        ({"num_experts": "3"}, "num_experts is '3'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"encoder_sparse_step": -1}, "encoder_sparse_step is -1"),
        (
            {"encoder_sparse_step": None, "num_sparse_encoder_layers": None},
            "neither encoder_sparse_step nor num_sparse_encoder_layers",
        ),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        published_config.config_from_hf(BASE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_activations": ("gelu", "linear")}, "gated MLPs"),
        ({"mlp_dim": 99}, "dense MLPs are 99 wide"),
        ({"encoder_sparse_layers": (0, 2)}, r"layers \[0, 2\] of the 4 encoder layers"),
        ({"encoder_sparse_layers": (0, 1, 2, 3)}, r"all layers of both stacks"),
    ],
)
def test_geometries_that_the_layout_cannot_hold(change, message):
    config = dataclasses.replace(published_config.config_from_hf(BASE), **change)
    with pytest.raises(CheckpointError, match=message):
        published_config.config_to_hf(config)
