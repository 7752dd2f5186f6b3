"""The public checkpoints and their sizes, against T5X's documentation, the paper and real runs."""

import ml_dtypes
import numpy as np
import pytest
from factories import CALIBRATION, QUICK
from plan_factories import PAPER_SIZES, T5X_DOCUMENTATION, facts

import qmoe_jax
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.inspection import inspect_checkpoint
from qmoe_jax.codec import codings
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits
from qmoe_jax.errors import CheckpointError
from qmoe_jax.planning import public_checkpoints, sizes
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.quantization.settings import CompressionSettings

# The gin files of T5X_DOCUMENTATION: layers of each stack, sparse ones, embed, mlp, heads,
# head_dim, activations, and whether logits are of their own.
GIN_GEOMETRY = {
    "switch_base.gin": (12, 6, 768, 3072, 12, 64, ("relu",), False),
    "switch_large.gin": (24, 12, 1024, 4096, 16, 64, ("relu",), False),
    "switch_xxl.gin": (24, 12, 4096, 10240, 64, 64, ("gelu", "linear"), True),
    "switch_c.gin": (15, 15, 2080, 6144, 30, 64, ("relu",), True),
}
# Billions of parameters by name: the papers round to these (Switch Transformer's table 1 counts C
# as 1,571B and XXL as 395B; QMoE has base-128 as 7B and large-128 as 26B).
BILLIONS = {"base_128": 7.4, "large_128": 26.3, "xxl_128": 395, "c_2048": 1571}


def test_the_registry_agrees_with_the_documentation_of_t5x():
    known = public_checkpoints.public_checkpoints()
    assert list(known) == list(T5X_DOCUMENTATION)
    root = "gs://t5-data/pretrained_models/t5x/moe/switch_classic/"
    for name, (gin_file, location) in T5X_DOCUMENTATION.items():
        entry, config = known[name], known[name].config
        layers, sparse, embed, mlp, heads, head_dim, activations, own_logits = GIN_GEOMETRY[
            gin_file
        ]
        assert entry.location == root + location
        assert entry.gin == f"gin/models/{gin_file}"
        assert config.num_encoder_layers == config.num_decoder_layers == layers
        assert len(config.encoder_sparse_layers) == len(config.decoder_sparse_layers) == sparse
        assert (config.embed_dim, config.expert_mlp_dim) == (embed, mlp)
        assert (config.num_heads, config.head_dim) == (heads, head_dim)
        assert (config.mlp_activations, not config.tied_logits) == (activations, own_logits)
        assert f"/e{config.num_experts}/" in entry.location


@pytest.mark.parametrize(("name", "billions"), BILLIONS.items())
def test_numbers_of_parameters(name, billions):
    assert facts(f"switch_{name}").num_parameters()["total"] / 1e9 == pytest.approx(
        billions, rel=0.01
    )


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_sizes_agree_with_the_paper(name):
    compression, in_bfloat16, compressed = PAPER_SIZES[name]
    model = facts(name)
    zeros = sizes.zero_share(model.config, "ternary")
    assert not zeros.source.startswith("assumed")
    size = sizes.published_size(model.config, model.shapes, zeros.value)
    assert size.bfloat16_bytes / 1e9 == pytest.approx(in_bfloat16, rel=0.005)
    assert size.total / 1e9 == pytest.approx(compressed, rel=0.05)
    assert size.expert_compression == pytest.approx(compression, rel=0.05)


def test_independent_codes_cost_what_the_paper_says():
    """Section 4.3.2: 21.11x for matrices of c-2048 sampled with 88.5 % zeros."""
    shapes = sizes.expert_kernel_shapes(facts("switch_c_2048").config).values()
    per_weight = [
        sizes.sample_bits("qmoe", out, width, 0.885).codes_per_weight + 64 / width
        for out, width in shapes
    ]
    assert 16 / np.mean(per_weight) == pytest.approx(21.11, rel=0.01)


def test_zero_shares_of_the_other_models_are_said_to_be_assumed():
    for name in T5X_DOCUMENTATION.keys() - PAPER_SIZES:
        zeros = sizes.zero_share(facts(name).config, "ternary")
        assert zeros.source.startswith("assumed")
        assert zeros.value in sizes.PAPER_ZERO_SHARES["ternary"].values()


@pytest.mark.parametrize("coding", codings.coding_names())
@pytest.mark.parametrize(("out", "width", "zeros"), [(96, 1024, 0.886), (64, 37, 0.7), (5, 6, 0.5)])
def test_the_sample_s_size_is_that_of_whole_tensors(coding, out, width, zeros):
    """A tensor of other codes, all of it encoded and counted by `codec.stats`."""
    rng = np.random.default_rng(7)
    experts = 16
    draws = rng.random((experts, out, width))
    levels = np.ones((experts, out, 2))
    if codings.get_coding(coding).num_symbols in (3, 255):
        codes = (draws > zeros).astype(np.uint8) + (draws > (1 + zeros) / 2)
    else:
        first, second, _ = sizes._TWO_BIT_NONZERO
        bounds = [zeros, zeros + (1 - zeros) * first, zeros + (1 - zeros) * (first + second)]
        codes = np.array([1, 2, 0, 3])[np.searchsorted(bounds, draws)]
    levels = levels.astype(ml_dtypes.bfloat16)
    if coding == "lattice":
        steps = np.zeros((experts, width), np.uint8)
        levels = {"step_index": steps, "origin": np.ones(experts, np.float32)}
    coded = encode(codes.astype(np.uint8), levels, coding)
    sample = sizes.sample_bits(coding, out, width, zeros)
    predicted = sample.codes_per_weight + sample.per_row / width + sample.per_expert / (out * width)
    tolerance = 0.01 if out * width > 50_000 else 0.06
    assert predicted == pytest.approx(bits(coded)["bits_per_weight"], rel=tolerance)


@pytest.mark.parametrize(
    ("method", "grid"), [("gptq", "ternary"), ("rtn", "2bit"), ("rtn", "lattice")]
)
def test_the_plan_s_size_is_that_of_a_real_run(golden_checkpoint, tmp_path, method, grid):
    """Coded bytes within 3 % given the run's own zero share; dense bytes to the byte."""
    source = golden_checkpoint("base", "t5x_float32_inference")
    report = qmoe_jax.compress(
        source, tmp_path / "out", CALIBRATION, method=method, grid=grid, **QUICK
    )
    weights = sum(kernel.num_weights for kernel in report.kernels)
    zeros = sum(kernel.zeros * kernel.num_weights for kernel in report.kernels) / weights
    settings = CompressionSettings(method=method, grid=grid)
    share = sizes.ZeroShare(zeros, "given")
    model = ModelFacts.from_checkpoint(str(source))
    size = sizes.compressed_size(model.config, model.shapes, model.dtypes, settings, {grid: share})
    stored = open_compressed_checkpoint(tmp_path / "out").num_bytes()
    assert size.expert_weights == weights
    assert size.dense == stored["dense"]
    assert size.experts == pytest.approx(stored["coded"], rel=0.03)
    # By part: levels and lengths as exactly as arrays can be counted.
    found = inspect_checkpoint(tmp_path / "out")
    real = dict.fromkeys(sizes.PARTS, 0)
    for part in found["experts"]["parts"]:
        real[part["name"] if part["name"] == "signs" else part["kind"]] += part["bits"] / 8
    assert sum(size.parts.values()) == pytest.approx(size.experts, abs=4)
    assert size.parts["levels"] == pytest.approx(real["levels"], rel=0.01)
    assert size.parts["lengths"] == pytest.approx(real["lengths"], rel=0.03)
    assert size.parts["signs"] == pytest.approx(real["signs"], rel=0.06)
    assert size.container == pytest.approx(found["container"], rel=0.15)


def test_parts_of_a_size_that_is_given():
    """A target: steps are counted, the codes are what is left of it."""
    settings = CompressionSettings(grid="lattice", target_bits_per_weight=0.5)
    model = facts("switch_base_128")
    zeros = {"lattice": sizes.zero_share(model.config, "lattice", 0.5)}
    size = sizes.compressed_size(model.config, model.shapes, model.dtypes, settings, zeros)
    assert 8 * size.experts / size.expert_weights == pytest.approx(0.5)
    assert sum(size.parts.values()) == pytest.approx(size.experts, abs=4)
    embed, mlp = model.config.embed_dim, model.config.expert_mlp_dim
    kernels = 2 * model.config.num_experts * len(model.config.sparse_layers)
    # A byte for each input of each kernel, and of an expert 8 bases and an origin.
    assert size.parts["levels"] == kernels * ((embed + mlp) / 2 + 12)
    assert size.parts["codes"] > size.parts["signs"] > size.parts["levels"] > size.parts["lengths"]


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(CheckpointError, match="switch_base_128"):
        public_checkpoints.public_checkpoint("switch-base-128b")


def test_missing_configs_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(public_checkpoints, "CONFIGS", tmp_path)
    with pytest.raises(CheckpointError, match="comes with the package"):
        public_checkpoints._read("devices.json")
