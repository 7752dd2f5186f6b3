"""The work of a planned run: tokens, bytes to read, operations, seconds."""

import dataclasses
import math

import pytest
from factories import CALIBRATION, random_tokens
from plan_factories import facts, resources, some_tokens

from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.errors import TokensError
from qmoe_jax.planning import inputs
from qmoe_jax.planning.inputs import ModelFacts, TokenFacts
from qmoe_jax.planning.plan import make_plan
from qmoe_jax.planning.text import format_plan
from qmoe_jax.planning.time import device_work
from qmoe_jax.quantization.settings import CompressionSettings


@pytest.mark.parametrize("cache_bytes", [0, 1 << 40])
@pytest.mark.parametrize("layout", ["t5x_float32_multichunk", "t5x_bfloat16"])
def test_bytes_to_read_count_every_chunk(golden_checkpoint, monkeypatch, layout, cache_bytes):
    monkeypatch.setattr(inputs, "MAX_CACHE_BYTES", cache_bytes)
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


def test_operations_by_hand():
    model = facts("switch_base_8")
    lengths = {"encoder": 512, "decoder": 128}
    tokens = TokenFacts.from_means(
        32, 0, {"encoder": 512.0, "decoder": 128.0}, lengths
    )  # 16,384 and 4,096 tokens: 2,048 and 512 an expert, both whole chunks of 256
    work = device_work(model, tokens, CompressionSettings())
    layers, experts, embed, mlp = 6, 8, 768, 3072
    count = layers * (16384 + 4096)
    assert work["Hessians"].flops == 2 * count * (embed**2 + mlp**2)
    assert work["experts' outputs"].flops == 2 * 2 * count * embed * mlp
    assert work["Cholesky"].flops == pytest.approx(2 * layers * experts * (embed**3 + mlp**3) / 3)
    assert work["sweep"].flops == 2 * layers * experts * (embed**2 * mlp + mlp**2 * embed)
    # 16 experts a batch take all 8 at once: a step a column.
    assert work["sweep"].steps == 2 * layers * (embed + mlp)
    halves = device_work(model, tokens, CompressionSettings(expert_batch=4))
    assert halves["sweep"].steps == 2 * work["sweep"].steps


def test_a_generated_token_by_hand():
    model, tokens, cpu = facts("switch_base_128"), some_tokens(), resources("cpu")
    plan = make_plan(model, tokens, CompressionSettings(), cpu)
    embed, mlp, layers = 768, 3072, 12
    dense = layers * 6 * embed * embed + 6 * 2 * embed * mlp + 6 * embed * 128
    parts = plan.seconds_a_token
    device = cpu.device
    assert parts == {
        "experts from codes": 6 * 2 * embed * mlp / device.coded_weights_per_second,
        "experts kept dense": 0,
        "attention, dense MLPs, routers": 4 * dense / device.bytes_per_second,
        "logits": 4 * 32128 * embed / device.bytes_per_second,
    }
    per_second = f"{1 / sum(parts.values()):.3g} tokens/s"
    assert "at 1.1e+10 weights/s" in format_plan(plan)
    assert per_second in format_plan(plan)
    kept = make_plan(model, tokens, CompressionSettings(skip="decoder"), cpu).seconds_a_token
    kept_weights = 6 * 2 * embed * mlp
    assert kept == parts | {
        "experts from codes": 0,
        "experts kept dense": 4 * kept_weights / device.bytes_per_second,
    }
    # Elsewhere, and with codes that are expanded, nobody has measured it.
    other = CompressionSettings(grid="ternary", expert_coding="qmoe")
    for settings, found in ((CompressionSettings(), resources()), (other, cpu)):
        plan = make_plan(model, tokens, settings, found)
        assert plan.seconds_a_token is None
        assert "tokens/s" not in format_plan(plan)


def test_memory_at_work_by_hand():
    model, tokens, settings = facts("switch_base_128"), some_tokens(), CompressionSettings()
    plan = make_plan(model, tokens, settings, resources())
    held, experts, layers = plan.memory_at_work, 128, 12
    # Blocks of 32 rows, visited columns and their number, where strings stand.
    wi = 4 * experts * (96 + 769 + 96 * 8 * (1 + 4))
    wo = 4 * experts * (24 + 3073 + 24 * 8 * (1 + 13))
    assert held.derived == layers * (wi + wo)
    # 2 bits a weight, an extra chunk of 640 bytes for 32 rows, places; starts, and chunks behind.
    chunks = experts * 2 * 768 * 3072 // 4 + experts * 640 * (96 + 24) + 4 * experts * (768 + 3072)
    starts = 4 * (2 * (experts + 1) + experts * (96 + 24) + 2) + 2 * 640
    assert held.fragments == layers * (chunks + starts + 2 * 64 * 512)
    assert held.experts == plan.sizes[0].experts
    assert held.uncompressed == 2 * 7_415_217_408
    text = format_plan(plan)
    assert "uncompressed in bfloat16 14.83 GB" in text
    assert "more, with implementation='cuda_fragments', as 'auto' is here" in text
    assert "It does not fit there" not in text
    on_cpu = make_plan(model, tokens, settings, resources("cpu"))
    without = {"derived": 0, "fragments": None, "fragments_by_default": False}
    assert on_cpu.memory_at_work == dataclasses.replace(held, **without)
    assert "fragments" not in format_plan(on_cpu)
    # Of groups of columns, which XLA decodes, and of 2 bits, which have no fragments.
    for changes in ({"grid": "ternary", "group_size": 64}, {"grid": "2bit"}):
        other = make_plan(model, tokens, CompressionSettings(**changes), resources()).memory_at_work
        assert other.fragments is None
        assert (other.derived > 0) == ("group_size" not in changes)


@pytest.mark.parametrize(
    ("device", "grid", "has_fragments", "by_default"),
    [
        ("t4", "lattice", True, True),
        ("t4", "ternary", False, False),
        ("l4", "ternary", True, False),
        ("cpu", "lattice", False, False),
    ],
)
def test_what_a_device_multiplies_as_fragments(device, grid, has_fragments, by_default):
    settings, there = CompressionSettings(grid=grid), resources(device)
    held = make_plan(facts("switch_base_128"), some_tokens(), settings, there).memory_at_work
    assert (held.fragments is not None) == has_fragments
    assert held.fragments_by_default == by_default


def test_half_of_what_is_left_is_for_fragments():
    model, settings = facts("switch_base_128"), CompressionSettings()
    plan = make_plan(model, some_tokens(), settings, resources())
    enough = plan.sizes[0].total + 2 * (plan.memory_at_work.fragments or 0)
    for limit, by_default in ((enough, True), (enough - 1, False), (None, False)):
        there = dataclasses.replace(plan.resources, device_bytes=limit)
        held = make_plan(model, some_tokens(), settings, there).memory_at_work
        assert held.fragments_by_default == by_default


def test_an_output_that_its_device_does_not_hold():
    plan = make_plan(
        facts("switch_c_2048"), some_tokens(), CompressionSettings(expert_batch=8), resources()
    )
    assert not plan.problems
    assert "  It does not fit there: JAX may use 80 GB." in format_plan(plan)


def test_layers_that_stay_dense_cost_no_quantization():
    model, tokens = facts("switch_base_8"), some_tokens(validation=16)
    both = make_plan(model, tokens, CompressionSettings(grid="ternary"), resources())
    half = make_plan(
        model, tokens, CompressionSettings(grid="ternary", skip="decoder"), resources()
    )
    assert half.work["Cholesky"].flops == both.work["Cholesky"].flops / 2
    assert half.work["experts' outputs"] == both.work["experts' outputs"]
    kept = model.num_parameters()["experts"] // 2
    assert half.sizes[0].expert_weights == kept
    assert half.sizes[0].dense == both.sizes[0].dense + 2 * kept
    assert [size.layout for size in half.sizes] == ["tunstall"]
    mixed = {"decoder/*": {"grid": "2bit"}}
    plan = make_plan(
        model, tokens, CompressionSettings(grid="ternary", layer_overrides=mixed), resources()
    )
    assert plan.sizes[0].layout == "tunstall + tunstall_2bit"
    assert set(plan.zero_shares) == {"ternary", "2bit"}
    assert plan.sizes[0].total > both.sizes[0].total


def test_round_to_nearest_without_tokens_only_reads_codes_and_writes():
    model, tokens = facts("switch_base_8"), some_tokens(0)
    plan = make_plan(model, tokens, CompressionSettings(method="rtn"), resources())
    assert plan.work == {}
    assert "Hessians" not in plan.device
    assert plan.total_seconds > 0


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
