"""SwitchConfig: inferred from names and shapes, checked against them, and to JSON and back."""

import dataclasses
import json
import re

import golden_data
import pytest

from qmoe_jax.checkpoints.geometry import infer_config, parameter_shapes
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

WI = "encoder/layers_1/mlp/expert/wi/kernel"


def config_of(gin: dict, **others) -> SwitchConfig:
    """The config that flaxformer's gin values in a config.json stand for."""

    def sparse(stack):
        layers, sparse_layers = gin[f"NUM_{stack}_LAYERS"], gin[f"NUM_{stack}_SPARSE_LAYERS"]
        every = layers // sparse_layers
        return tuple(i for i in range(layers) if i % every == every - 1)

    all_sparse = len(sparse("ENCODER")) == gin["NUM_ENCODER_LAYERS"]
    return SwitchConfig(
        num_embeddings=gin["NUM_EMBEDDINGS"],
        embed_dim=gin["EMBED_DIM"],
        mlp_dim=0 if all_sparse else gin["MLP_DIM"],
        expert_mlp_dim=gin["MLP_DIM"],
        num_heads=gin["NUM_HEADS"],
        head_dim=gin["HEAD_DIM"],
        num_experts=gin["NUM_EXPERTS"],
        num_encoder_layers=gin["NUM_ENCODER_LAYERS"],
        num_decoder_layers=gin["NUM_DECODER_LAYERS"],
        encoder_sparse_layers=sparse("ENCODER"),
        decoder_sparse_layers=sparse("DECODER"),
        max_group_size=gin["GROUP_SIZE"],
        train_capacity_factor=gin["TRAIN_EXPERT_CAPACITY_FACTOR"],
        eval_capacity_factor=gin["EVAL_EXPERT_CAPACITY_FACTOR"],
        **others,
    )


EXPECTED = {
    "base": {},
    "xxl": {
        "mlp_activations": ("gelu", "linear"),
        "tied_logits": False,
        "min_expert_capacity": 2,
    },
    "c": {"tied_logits": False, "min_expert_capacity": 2},
}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("base", "t5x_float32"),
        ("base", "orbax_float32"),
        ("base", "orbax_head_bfloat16_inference"),
        ("xxl", "t5x_float32_inference"),
        ("c", "t5x_bfloat16"),
    ],
)
def test_geometry_of_golden_checkpoints(model, layout, golden_checkpoint):
    folder = golden_checkpoint(model, layout)
    config = read_config(folder)
    assert config == config_of(golden_data.load_json(model, "config"), **EXPECTED[model])
    checkpoint = open_t5x_checkpoint(folder)
    assert read_config(checkpoint) == config
    assert parameter_shapes(config) == dict(checkpoint.shapes)


def test_geometry_of_the_demo():
    config = read_config(golden_data.DEMO)
    assert config == config_of(golden_data.demo_info()["config"])


def test_sizes_of_the_public_models():
    """Parameter counts of the published models follow from their gin sizes."""

    def count(config):
        total = 0
        for shape in parameter_shapes(config).values():
            size = 1
            for axis in shape:
                size *= axis
            total += size
        return total

    base = SwitchConfig(
        num_embeddings=32128,
        embed_dim=768,
        mlp_dim=3072,
        expert_mlp_dim=3072,
        num_heads=12,
        head_dim=64,
        num_experts=128,
        num_encoder_layers=12,
        num_decoder_layers=12,
        encoder_sparse_layers=(1, 3, 5, 7, 9, 11),
        decoder_sparse_layers=(1, 3, 5, 7, 9, 11),
    )
    assert round(count(base) / 1e9, 1) == 7.4
    c2048 = dataclasses.replace(
        base,
        embed_dim=2080,
        mlp_dim=0,
        expert_mlp_dim=6144,
        num_heads=30,
        num_experts=2048,
        num_encoder_layers=15,
        num_decoder_layers=15,
        encoder_sparse_layers=tuple(range(15)),
        decoder_sparse_layers=tuple(range(15)),
        tied_logits=False,
    )
    assert round(count(c2048) / 1e12, 1) == 1.6


def with_sizes(**sizes) -> SwitchConfig:
    return dataclasses.replace(config_of(golden_data.load_json("base", "config")), **sizes)


@pytest.mark.parametrize(
    ("sizes", "routing"),
    [
        ({}, (8192, 4, 1.25, 2.0)),
        ({"embed_dim": 1024}, (4096, 4, 1.25, 2.0)),
        ({"embed_dim": 1024, "mlp_activations": ("gelu", "linear")}, (4096, 2, 1.25, 4.0)),
        (
            {"encoder_sparse_layers": (0, 1, 2, 3), "decoder_sparse_layers": (0, 1, 2, 3)},
            (2048, 2, 1.0, 2.0),
        ),
        ({"encoder_sparse_layers": (0, 1, 2, 3)}, (8192, 4, 1.25, 2.0)),
    ],
)
def test_routing_follows_the_gin_files(sizes, routing):
    config = infer_config(parameter_shapes(with_sizes(**sizes)))
    assert routing == (
        config.max_group_size,
        config.min_expert_capacity,
        config.train_capacity_factor,
        config.eval_capacity_factor,
    )


def test_overrides(golden_checkpoint):
    folder = golden_checkpoint("base", "t5x_float32_inference")
    config = read_config(folder, eval_capacity_factor=None, max_group_size=64)
    assert (config.eval_capacity_factor, config.max_group_size) == (None, 64)
    with pytest.raises(ValueError, match="num_heads cannot be overridden"):
        read_config(folder, num_heads=8)


def without(pattern):
    return lambda shapes: {n: s for n, s in shapes.items() if not re.search(pattern, n)}


def with_shapes(**changes):
    return lambda shapes: shapes | {n.replace("__", "/"): s for n, s in changes.items()}


def scanned(shapes):
    layers = {re.sub(r"layers_\d+", "layers", n): (s[0], 4, *s[1:]) for n, s in shapes.items()}
    return {n: s for n, s in shapes.items() if "layers_" not in n} | layers


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(r"encoder/layers_2/"), r"no encoder/layers_2/\.\.\. \(missing layers: \[2\]\)"),
        (without(r"^decoder/"), "no decoder layers"),
        (without(r"/expert/"), "not a Switch Transformer"),
        (without(r"token_embedder"), "token_embedder/embedding is missing"),
        (
            without(r"encoder/layers_1/mlp/expert/wo"),
            r"layers_1/mlp/expert/wo/kernel is missing, expected with shape \[8, 128, 64\]",
        ),
        (
            without(r"encoder/layers_1/mlp/router"),
            r"encoder/layers_1/mlp/router/router_weights/w/kernel is missing",
        ),
        (
            without(r"decoder/layers_3/pre_cross_attention_layer_norm"),
            r"decoder/layers_3/pre_cross_attention_layer_norm/scale is missing",
        ),
        (
            with_shapes(encoder__extra__scale=(64,)),
            r"encoder/extra/scale \[64\] does not belong",
        ),
        (
            with_shapes(decoder__layers_3__mlp__expert__wi__kernel=(4, 64, 128)),
            r"decoder/layers_3/mlp/expert/wi/kernel has shape \[4, 64, 128\], "
            r"the others imply \[8, 64, 128\]",
        ),
        (
            with_shapes(encoder__relpos_bias__rel_embedding=(3, 32)),
            "64 columns, which 3 heads",
        ),
        (
            with_shapes(encoder__relpos_bias__rel_embedding=(2, 32)),
            r"decoder/relpos_bias/rel_embedding has shape \[4, 32\], the others imply \[2, 32\]",
        ),
        (
            with_shapes(token_embedder__embedding=(512, 60)),
            r"imply \[60\].*; and \d+ more",
        ),
        (scanned, "scanned"),
        (
            with_shapes(encoder__layers_0__attention__query__kernel=(64, 4, 64)),
            r"expected 2 axes\. A scanned",
        ),
    ],
)
def test_inconsistent_parameters(damage, message):
    shapes = damage(parameter_shapes(config_of(golden_data.load_json("base", "config"))))
    with pytest.raises(CheckpointError, match=message):
        infer_config(shapes)


# JSON


@pytest.mark.parametrize("model", golden_data.MODELS)
def test_json_round_trip(model):
    config = config_of(golden_data.load_json(model, "config"), **EXPECTED[model])
    assert SwitchConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    dropless = dataclasses.replace(config, eval_capacity_factor=None)
    assert SwitchConfig.from_json(json.loads(json.dumps(dropless.to_json()))) == dropless


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": None}, "num_heads is None, expected int"),
        ({"num_heads": True}, "num_heads is True, expected int"),
        ({"num_heads": -1}, "num_heads is -1, expected int"),
        ({"tied_logits": 1}, "tied_logits is 1, expected bool"),
        ({"encoder_sparse_layers": [1, "3"]}, "encoder_sparse_layers"),
        ({"mlp_activations": "relu"}, "mlp_activations is 'relu'"),
        ({"train_capacity_factor": None}, "train_capacity_factor is None, expected float"),
        ({"jitter": 0.1}, r"unknown fields \['jitter'\]"),
    ],
)
def test_json_is_validated(change, message):
    fields = config_of(golden_data.load_json("base", "config")).to_json() | change
    with pytest.raises(CheckpointError, match=message):
        SwitchConfig.from_json(fields)


def test_json_lacks_nothing_silently():
    fields = config_of(golden_data.load_json("base", "config")).to_json()
    del fields["relpos_buckets"]
    with pytest.raises(CheckpointError, match=r"lacks \['relpos_buckets'\]"):
        SwitchConfig.from_json(fields)
    fields["relpos_buckets"], fields["eval_capacity_factor"] = 32, 2
    assert isinstance(SwitchConfig.from_json(fields).eval_capacity_factor, float)


def test_config_of_a_compressed_checkpoint(base, gptq):
    path, _ = gptq
    config = read_config(path)
    assert config == read_config(base)
    dropless = read_config(f"{path}/", eval_capacity_factor=None)
    assert dropless == dataclasses.replace(config, eval_capacity_factor=None)


def test_config_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="is no T5X checkpoint"):
        read_config(tmp_path)
