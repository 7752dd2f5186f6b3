"""The plan of a run against the paper, T5X's documentation, real runs and XLA's account."""

import dataclasses
import json
import math
import re
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_compress import CALIBRATION, QUICK, random_tokens

import qmoe_jax
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.cli import plan as command
from qmoe_jax.codec import codings
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.planning import inputs as plan_inputs
from qmoe_jax.planning import memory as plan_memory
from qmoe_jax.planning import public_checkpoints as registry
from qmoe_jax.planning import sizes as plan_sizes
from qmoe_jax.planning import time as plan_work
from qmoe_jax.planning.inputs import ModelFacts, TokenFacts
from qmoe_jax.planning.limits import Resources, fits_memory
from qmoe_jax.planning.plan import make_plan
from qmoe_jax.quantization import host_gptq
from qmoe_jax.quantization.expert_batch import quantize_experts
from qmoe_jax.quantization.grids import Ternary
from qmoe_jax.quantization.settings import CompressionSettings

# The QMoE paper (arXiv 2310.16795), "Compression rates and sizes for ternary models": experts'
# compression, GB in bfloat16, GB compressed.
PAPER_SIZES = {
    "switch_base_128": (17.06, 14.9, 1.27),
    "switch_large_128": (18.34, 52.7, 3.96),
    "switch_c_2048": (20.07, 3142.0, 158.6),
}
# T5X docs/models.md, "Converted Mesh Tensorflow checkpoints": gin file of flaxformer, location
# under gs://t5-data/pretrained_models/t5x/moe/switch_classic/.
T5X_DOCUMENTATION = {
    "switch_base_8": ("switch_base.gin", "base/e8/checkpoint_500100"),
    "switch_base_16": ("switch_base.gin", "base/e16/checkpoint_550000"),
    "switch_base_32": ("switch_base.gin", "base/e32/checkpoint_550000"),
    "switch_base_64": ("switch_base.gin", "base/e64/checkpoint_550000"),
    "switch_base_128": ("switch_base.gin", "base/e128/checkpoint_550000"),
    "switch_base_256": ("switch_base.gin", "base/e256/checkpoint_550000"),
    "switch_large_128": ("switch_large.gin", "large/e128/checkpoint_483100"),
    "switch_xxl_128": ("switch_xxl.gin", "xxl/e128/checkpoint_634600"),
    "switch_c_2048": ("switch_c.gin", "c/e2048/checkpoint_611800"),
}
# Those gin files: layers of each stack, sparse ones, embed, mlp, heads, head_dim, activations, and
# whether logits are of their own.
GIN_GEOMETRY = {
    "switch_base.gin": (12, 6, 768, 3072, 12, 64, ("relu",), False),
    "switch_large.gin": (24, 12, 1024, 4096, 16, 64, ("relu",), False),
    "switch_xxl.gin": (24, 12, 4096, 10240, 64, 64, ("gelu", "linear"), True),
    "switch_c.gin": (15, 15, 2080, 6144, 30, 64, ("relu",), True),
}
# Billions of parameters by name: the papers round to these (Switch Transformer's table 1 counts C
# as 1,571B and XXL as 395B; QMoE has base-128 as 7B and large-128 as 26B).
BILLIONS = {"base_128": 7.4, "large_128": 26.3, "xxl_128": 395, "c_2048": 1571}


ZEROS = {"ternary": 0.857}


def facts(name="switch_base_128"):
    return ModelFacts.from_registry(registry.public_checkpoint(name), "float32")


def some_tokens(count=1000, validation=0):
    lengths = {"encoder": 512, "decoder": 114}
    return TokenFacts.from_means(
        count, validation, {s: float(n) for s, n in lengths.items()}, lengths
    )


def resources(device="h100", **changes):
    found = registry.devices()[device]
    return Resources(device=found, device_bytes=found.memory_bytes, **changes)


# --- Geometry and sizes ---


def test_the_registry_agrees_with_the_documentation_of_t5x():
    known = registry.public_checkpoints()
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
    zeros = plan_sizes.zero_share(model.config, "ternary")
    assert not zeros.source.startswith("assumed")
    size = plan_sizes.published_size(model.config, model.shapes, zeros.value)
    assert size.bfloat16_bytes / 1e9 == pytest.approx(in_bfloat16, rel=0.005)
    assert size.total / 1e9 == pytest.approx(compressed, rel=0.05)
    assert size.expert_compression == pytest.approx(compression, rel=0.05)


def test_independent_codes_cost_what_the_paper_says():
    """Section 4.3.2: 21.11x for matrices of c-2048 sampled with 88.5 % zeros."""
    shapes = plan_sizes.expert_kernel_shapes(facts("switch_c_2048").config).values()
    per_weight = [
        plan_sizes.sample_bits("qmoe", out, width, 0.885).codes_per_weight + 64 / width
        for out, width in shapes
    ]
    assert 16 / np.mean(per_weight) == pytest.approx(21.11, rel=0.01)


def test_zero_shares_of_the_other_models_are_said_to_be_assumed():
    for name in T5X_DOCUMENTATION.keys() - PAPER_SIZES:
        zeros = plan_sizes.zero_share(facts(name).config, "ternary")
        assert zeros.source.startswith("assumed")
        assert zeros.value in plan_sizes.PAPER_ZERO_SHARES["ternary"].values()


@pytest.mark.parametrize("coding", codings.coding_names())
@pytest.mark.parametrize(("out", "width", "zeros"), [(96, 1024, 0.886), (64, 37, 0.7), (5, 6, 0.5)])
def test_the_sample_s_size_is_that_of_whole_tensors(coding, out, width, zeros):
    """A tensor of other codes, all of it encoded and counted by `codec.stats`."""
    rng = np.random.default_rng(7)
    experts = 16
    draws = rng.random((experts, out, width))
    levels = np.ones((experts, out, 2))
    if codings.get_coding(coding).num_symbols == 3:
        codes = (draws > zeros).astype(np.uint8) + (draws > (1 + zeros) / 2)
    else:
        first, second, _ = plan_sizes._TWO_BIT_NONZERO
        bounds = [zeros, zeros + (1 - zeros) * first, zeros + (1 - zeros) * (first + second)]
        codes = np.array([1, 2, 0, 3])[np.searchsorted(bounds, draws)]
    coded = encode(codes.astype(np.uint8), levels.astype(ml_dtypes.bfloat16), coding)
    predicted = plan_sizes.sample_bits(coding, out, width, zeros).per_weight(out, width)
    tolerance = 0.01 if out * width > 50_000 else 0.06
    assert predicted == pytest.approx(bits(coded)["bits_per_weight"], rel=tolerance)


@pytest.mark.parametrize(("method", "grid"), [("gptq", "ternary"), ("rtn", "2bit")])
def test_the_plan_s_size_is_that_of_a_real_run(golden_checkpoint, tmp_path, method, grid):
    """Coded bytes within 3 % given the run's own zero share; dense bytes to the byte."""
    source = golden_checkpoint("base", "t5x_float32_inference")
    report = qmoe_jax.compress(
        source, tmp_path / "out", CALIBRATION, method=method, grid=grid, **QUICK
    )
    weights = sum(kernel.num_weights for kernel in report.kernels)
    zeros = sum(kernel.zeros * kernel.num_weights for kernel in report.kernels) / weights
    settings = CompressionSettings(method=method, grid=grid)
    model = ModelFacts.from_checkpoint(str(source))
    size = plan_sizes.compressed_size(
        model.config, model.shapes, model.dtypes, settings, {grid: zeros}
    )
    stored = open_compressed_checkpoint(tmp_path / "out").num_bytes()
    assert size.expert_weights == weights
    assert size.dense == stored["dense"]
    assert size.experts == pytest.approx(stored["coded"], rel=0.03)


# --- Reading ---


@pytest.mark.parametrize("cache_bytes", [0, 1 << 40])
@pytest.mark.parametrize("layout", ["t5x_float32_multichunk", "t5x_bfloat16"])
def test_bytes_to_read_count_every_chunk(golden_checkpoint, monkeypatch, layout, cache_bytes):
    monkeypatch.setattr(plan_inputs, "CACHE_BYTES", cache_bytes)
    path = golden_checkpoint("base", layout)
    model, source = ModelFacts.from_checkpoint(str(path)), open_t5x_checkpoint(path)
    expected = 0
    for name in source.names:
        chunk, shape = source.chunk_shape(name), source.shapes[name]
        size = math.prod(chunk) * source.dtypes[name].itemsize
        others = math.prod(math.ceil(n / c) for n, c in zip(shape[1:], chunk[1:], strict=True))
        touched = [range(shape[0])]
        if "/expert/" in name and not cache_bytes:
            touched = [range(s, min(s + 3, shape[0])) for s in range(0, shape[0], 3)]
        expected += sum(len({row // chunk[0] for row in rows}) for rows in touched) * others * size
    assert model.bytes_to_read(3) == expected
    if layout == "t5x_bfloat16":
        assert model.bytes_to_read(1 << 20) >= sum(model.num_bytes().values())


# --- Memory ---


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", ["switch_base_8", "switch_xxl_128", "switch_c_2048"])
def test_memory_grows_with_the_expert_batch(name, method, on_cpu):
    model, tokens = facts(name), some_tokens(100, 10)
    before = (0, 0)
    for batch in range(1, 9):
        settings = CompressionSettings(expert_batch=batch, method=method)
        host = sum(
            plan_memory.host_memory(
                model, tokens, settings, zeros=ZEROS, buffers_on_disk=False
            ).values()
        )
        phases = plan_memory.device_memory(model, tokens, settings, on_cpu=on_cpu)
        now = (host, sum(phases["quantize"].values()))
        assert now[0] > before[0]
        assert now[1] > before[1]
        before = now


@pytest.mark.parametrize(
    ("device", "host_gb"), [("t4", None), ("h100", 40.0), ("cpu", 60.0), ("t4", 2.0)]
)
def test_the_largest_expert_batch_is_the_largest_that_fits(device, host_gb):
    model, tokens, settings = facts(), some_tokens(), CompressionSettings()
    there = resources(device, host_bytes=None if host_gb is None else round(1e9 * host_gb))
    largest = make_plan(model, tokens, settings, there).largest_expert_batch

    def fits(batch):
        changed = dataclasses.replace(settings, expert_batch=batch)
        return fits_memory(model, tokens, changed, there, ZEROS)

    by_trying = [batch for batch in range(1, model.config.num_experts + 1) if fits(batch)]
    assert largest == max(by_trying, default=0)


@pytest.mark.parametrize(
    ("experts", "width", "out", "at_once"), [(2, 128, 320, 2), (2, 256, 64, 1), (3, 256, 128, 3)]
)
def test_workspace_against_xla_s_own_account(experts, width, out, at_once):
    """Not below what XLA allots, up to a tenth for what does not grow; not above twice that."""

    def quantize(kernels, hessians, counts):
        return quantize_experts(
            kernels, hessians, counts, grid=Ternary(), experts_at_once=at_once
        ).codes

    shapes = [(experts, width, out), (experts, width, width), (experts,)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(quantize).lower(*arguments).compile()
    allotted = compiled.memory_analysis().temp_size_in_bytes
    predicted = plan_memory.gptq_workspace(width, out, at_once)
    assert predicted > 0.9 * allotted
    assert predicted < 2 * allotted


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("width", "out", "threads"), [(512, 256, 1), (256, 1000, 2)])
def test_host_workspace_against_what_is_allocated(width, out, threads, act_order):
    """Not below it, and not above twice that."""
    kernels = np.random.default_rng(0).normal(size=(4, width, out)).astype(np.float32)
    hessians = np.broadcast_to(np.eye(width, dtype=np.float32), (4, width, width))
    values = np.zeros((4, 1, 3, out), np.float32)

    def quantize():
        return host_gptq.host_gptq(
            kernels, hessians, values, range(4), act_order=act_order, threads=threads
        )

    quantize()  # compiles
    tracemalloc.start()
    codes = quantize().codes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    predicted = host_gptq.workspace_bytes(width, out, threads)
    # Index arrays, a tile of codes and Python's own do not grow with the kernel's area.
    assert predicted > 0.9 * (peak - codes.nbytes)
    assert predicted < 2.1 * (peak - codes.nbytes)


def test_hidden_states_and_buffers():
    model, tokens = facts(), some_tokens(100, 20)
    hidden = plan_memory.hidden_state_bytes(model, tokens)
    assert hidden == {"encoder": 120 * 512 * 768 * 4, "decoder": 120 * 114 * 768 * 4}
    settings = CompressionSettings()
    held = {
        on_disk: plan_memory.host_memory(
            model, tokens, settings, zeros=ZEROS, buffers_on_disk=on_disk
        )["hidden states"]
        for on_disk in (False, True)
    }
    assert held == {False: sum(hidden.values()), True: 0}
    output, buffers = plan_memory.disk(
        model, tokens, settings, 5, zeros=ZEROS, buffers_on_disk=True, journal=False
    )
    assert output == {"compressed checkpoint": 5}
    assert sum(buffers.values()) == sum(hidden.values())


# --- Work ---


def test_operations_by_hand():
    model = facts("switch_base_8")
    lengths = {"encoder": 512, "decoder": 128}
    tokens = TokenFacts.from_means(
        32, 0, {"encoder": 512.0, "decoder": 128.0}, lengths
    )  # 16,384 and 4,096 tokens: 2,048 and 512 an expert, both whole chunks of 256
    work = plan_work.device_work(model, tokens, CompressionSettings())
    layers, experts, embed, mlp = 6, 8, 768, 3072
    count = layers * (16384 + 4096)
    assert work["Hessians"].flops == 2 * count * (embed**2 + mlp**2)
    assert work["experts' outputs"].flops == 2 * 2 * count * embed * mlp
    assert work["Cholesky"].flops == pytest.approx(2 * layers * experts * (embed**3 + mlp**3) / 3)
    assert work["sweep"].flops == 2 * layers * experts * (embed**2 * mlp + mlp**2 * embed)
    # 16 experts a batch take all 8 at once: a step a column.
    assert work["sweep"].steps == 2 * layers * (embed + mlp)
    halves = plan_work.device_work(model, tokens, CompressionSettings(expert_batch=4))
    assert halves["sweep"].steps == 2 * work["sweep"].steps


def test_layers_that_stay_dense_cost_no_quantization():
    model, tokens = facts("switch_base_8"), some_tokens(validation=16)
    both = make_plan(model, tokens, CompressionSettings(), resources())
    half = make_plan(model, tokens, CompressionSettings(skip="decoder"), resources())
    assert half.work["Cholesky"].flops == both.work["Cholesky"].flops / 2
    assert half.work["experts' outputs"] == both.work["experts' outputs"]
    kept = model.num_parameters()["experts"] // 2
    assert half.sizes[0].expert_weights == kept
    assert half.sizes[0].dense == both.sizes[0].dense + 2 * kept
    assert [size.layout for size in half.sizes] == ["tunstall"]
    mixed = {"decoder/*": {"grid": "2bit"}}
    plan = make_plan(model, tokens, CompressionSettings(layer_overrides=mixed), resources())
    assert plan.sizes[0].layout == "tunstall + tunstall_2bit"
    assert set(plan.zero_shares) == {"ternary", "2bit"}
    assert plan.sizes[0].total > both.sizes[0].total


def test_round_to_nearest_without_tokens_only_reads_codes_and_writes():
    model, tokens = facts("switch_base_8"), some_tokens(0)
    plan = make_plan(model, tokens, CompressionSettings(method="rtn"), resources())
    assert plan.work == {}
    assert "Hessians" not in plan.device
    assert plan.total_seconds > 0


# --- What is refused ---


def test_token_lengths_are_those_of_the_run(tmp_path):
    validation = random_tokens(1, 7)
    found = TokenFacts.from_files(CALIBRATION, validation, premask_sentinels=True)
    both = (CALIBRATION.tokens, validation.tokens)
    assert found.num_calibration == 40
    assert found.num_validation == 7
    assert found.tokens["encoder"] == sum(int((t.encoder_input_tokens > 0).sum()) for t in both)
    assert found.validation_targets == int((validation.tokens.decoder_target_tokens > 0).sum())
    assert 0 < found.hessian_tokens["decoder"] < found.tokens["decoder"]


def test_gptq_without_calibration_is_refused():
    with pytest.raises(TokensError, match="needs calibration examples"):
        make_plan(facts(), some_tokens(0), CompressionSettings(), resources())


def test_mean_lengths_must_fit_the_arrays():
    with pytest.raises(TokensError, match="at most the length"):
        TokenFacts.from_means(1, 0, {"encoder": 600.0}, {"encoder": 512})


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(CheckpointError, match="switch_base_128"):
        registry.public_checkpoint("switch-base-128b")


def test_missing_configs_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "CONFIGS", tmp_path)
    with pytest.raises(CheckpointError, match="run from a checkout"):
        registry._read("devices.json")


AMPLE = ["--host_gb", "4000", "--disk_gb", "9000", "--device", "h100"]


@pytest.mark.parametrize("name", T5X_DOCUMENTATION)
def test_a_table_for_every_public_checkpoint(capsys, name):
    assert command.main([name, *AMPLE, "--expert_batch", "4"]) == 0
    out = capsys.readouterr().out
    total = facts(name).num_parameters()["total"]
    assert f"{total:,}" in out
    assert "The run fits" in out
    assert ("assumed: the QMoE paper's" in out) == (name not in PAPER_SIZES)


def test_every_setting_is_an_option_with_its_meaning(capsys):
    """As the docstring has it; an option that may be None takes what it may be besides."""
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.partition("settings of the run")[2].split())
    for field in dataclasses.fields(CompressionSettings):
        assert re.search(rf"--{field.name}(, --no-{field.name})? ", text), field.name
    assert "experts that are quantized together (default: 16)" in text
    for name, meaning in command._meanings(CompressionSettings).items():
        assert len(meaning.split()) > 2, name


def test_small_groups_cost_what_they_store(tmp_path):
    bits = []
    for arguments in ([], ["--group_size", "32"]):
        file = tmp_path / "plan.json"
        assert command.main(["switch_base_8", *AMPLE, "--json", str(file), *arguments]) == 0
        sizes = {size["layout"]: size for size in json.loads(file.read_text())["sizes"]}
        assert ("published" in sizes) == (not arguments)  # has no place for groups
        bits.append(sizes["tunstall"]["bits_per_weight"])
    # Two bfloat16 levels for 32 weights instead of a row.
    assert 1.0 < bits[1] - bits[0] < 2.5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["switch_c_2048", *AMPLE, "--host_gb", "64"], "NO: host memory"),
        (["switch_xxl_128", *AMPLE, "--device", "t4"], "NO: device memory"),
        (["switch_base_128", *AMPLE, "--disk_gb", "1"], "NO: disk"),
        (["switch_base_8", *AMPLE, "--batch_size", "4096"], "Lower batch_size"),
    ],
)
def test_a_run_that_cannot_fit_is_told_no(capsys, arguments, reason):
    assert command.main(arguments) == 1
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "neither a folder nor a public checkpoint"),
        (["nowhere/checkpoint_1"], "nowhere"),
        (["switch_base_8", "--device", "abacus"], "abacus"),
        (["switch_base_8", "--grid", "decimal"], "decimal"),
        (["switch_base_8", "--expert_batch", "0"], "expert_batch is 0"),
        (["switch_base_8", "--zero_share", "1.5"], "zero_share is 1.5"),
        (["switch_base_8", "--num_examples", "0"], "needs calibration"),
        (["switch_base_8", "--method", "none"], "no layer is left to compress"),
        (["switch_base_8", "--memory_fraction", "2"], "memory_fraction is 2.0"),
        (["switch_base_8", "--read_gbps", "0"], "read_gbps is 0.0"),
        (["switch_base_8", "--tokens", "no_such.npz"], "no_such.npz"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [("--layer_overrides", "nope"), ("--layer_overrides", '{"decoder/*": 1}'), ("--damping", "x")],
)
def test_what_argparse_refuses_is_one_line_too(capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        command.main(["switch_base_8", option, value])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert error.count("\n") == 1


def test_the_list_has_all_nine(capsys):
    assert command.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in T5X_DOCUMENTATION)
    assert out.count("%*") == 6


def test_a_checkpoint_with_token_files_as_json(golden_checkpoint, tmp_path, capsys):
    tokens = tmp_path / "tokens.npz"
    write_tokens(tokens, CALIBRATION.tokens, CALIBRATION.metadata)
    path, target = golden_checkpoint("base", "t5x_float32_inference"), tmp_path / "plan.json"
    arguments = [str(path), "--tokens", str(tokens), "--validation_tokens", str(tokens)]
    arguments += ["--num_examples", "30", "--expert_batch", "2", "--json", str(target)]
    arguments += ["--buffer_dir", str(tmp_path / "buffers"), "--output", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    assert [p.name for p in tmp_path.glob("plan*")] == ["plan.json"]
    assert not (tmp_path / "out").exists()
    written = json.loads(target.read_text())
    assert written["fits"] is True
    assert written["tokens"]["num_calibration"] == 30
    assert written["tokens"]["num_validation"] == 40
    assert written["parameters"]["total"] == sum(
        math.prod(shape)
        for shape in parameter_shapes(ModelFacts.from_checkpoint(str(path)).config).values()
    )
    assert written["seconds"]["total"] > 0
    assert "whole chunks" in capsys.readouterr().out
