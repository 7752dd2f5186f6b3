"""What fine-tuning is planned to need, against what runs hold and XLA says of compiled steps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
from plan_factories import facts, resources

import qmoe_jax
from qmoe_jax.__main__ import main
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.load import load_switch
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.planning.finetuning import TunedModel, held_memory, plan_finetuning, step_memory
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.training.optimizer import make_optimizer
from qmoe_jax.training.settings import FinetuneSettings
from qmoe_jax.training.step import make_step
from qmoe_jax.training.trainable import split_variables

LENGTHS = {"encoder": 512, "decoder": 114}
PUBLIC = ["plan", "switch_base_8", "--host_gb", "64", "--disk_gb", "100", "--device", "h100"]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return tiny_switch.write_checkpoint(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def compressed(native, tmp_path_factory):
    """`compressed(grid)`: path of a checkpoint."""
    folder, found = tmp_path_factory.mktemp("compressed"), {}

    def make(grid):
        if grid not in found:
            found[grid] = folder / grid
            qmoe_jax.compress(native, found[grid], grid=grid, method="rtn", progress=False)
        return found[grid]

    return make


@pytest.mark.parametrize(
    ("grid", "kinds", "optimizer"),
    [
        ("2bit", ("lora",), "adafactor"),
        ("lattice", ("norms", "gains"), "adam"),
        ("ternary", ("dense", "gains"), "adafactor"),
        (None, ("experts",), "adam"),
    ],
)
def test_what_is_held_is_counted(native, compressed, grid, kinds, optimizer):
    """To the byte, of what a run loads and begins with."""
    settings = FinetuneSettings(trainable=kinds, optimizer=optimizer)
    path = native if grid is None else compressed(grid)
    if grid is None:
        model = TunedModel.from_native(ModelFacts.from_checkpoint(str(path)))
    else:
        model = TunedModel.from_compressed(str(path))
    module, variables = load_switch(path)
    parts = split_variables(module, variables, settings)
    state = make_optimizer(settings).init(parts.trained)
    held, num_trained, corrections = held_memory(model, settings)
    bytes_of = {name: a.nbytes for name, a in parts.frozen.items()}
    assert held["experts, as codes"] == sum(
        n for name, n in bytes_of.items() if grid and "/expert/" in name
    )
    frozen = held["experts, as codes"] + held["frozen parameters, as stored"]
    assert frozen == sum(bytes_of.values())
    assert held["trained, float32"] == sum(a.nbytes for a in parts.trained.values())
    assert held["optimizer"] == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    assert num_trained == sum(a.size for a in parts.trained.values())
    assert corrections == sum(a.nbytes for n, a in parts.trained.items() if "adapters/" in n)
    assert model.stored_bytes == sum(a.nbytes for a in jax.tree.leaves(variables))


@pytest.mark.parametrize("grid", ["ternary", "2bit", "lattice"])
def test_a_native_checkpoint_is_taken_as_compressed(native, compressed, grid):
    """Floats are those that the compressed one has; codes are an estimate, of tiny kernels here."""
    model = ModelFacts.from_checkpoint(str(native))
    planned = TunedModel.as_compressed(model, CompressionSettings(grid=grid, method="rtn"))
    real = TunedModel.from_compressed(str(compressed(grid)))

    def floats(tuned):
        return {
            (name, array.shape, str(array.dtype))
            for name, array in tuned.variables.items()
            if jnp.issubdtype(array.dtype, jnp.floating)
        }

    assert floats(planned) == floats(real)
    for kinds in (("gains",), ("dense",), ("lora", "norms")):
        settings = FinetuneSettings(trainable=kinds)
        for part in ("trained, float32", "optimizer", "frozen parameters, as stored"):
            assert held_memory(planned, settings)[0][part] == held_memory(real, settings)[0][part]


SMALL = SwitchConfig(
    num_embeddings=512,
    embed_dim=128,
    mlp_dim=256,
    expert_mlp_dim=256,
    num_heads=4,
    head_dim=32,
    num_experts=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(1,),
)


def compiled_memory(config, settings, lengths, dtype):
    """What XLA says that a step on dense kernels takes: arguments and temporary arrays."""
    module = SwitchTransformer(config, jnp.dtype(dtype), dropout=settings.dropout)
    shapes = {
        f"params/{name}": jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for name, shape in parameter_shapes(config).items()
    }
    optimizer = make_optimizer(settings)

    def begin(flat):
        parts = split_variables(module, names.unflatten(flat), settings)
        return parts.trained, optimizer.init(parts.trained), parts.frozen

    rows = settings.batch_size // settings.microbatches
    shape = {"encoder_input_tokens": lengths["encoder"]} | {
        f"decoder_{name}": lengths["decoder"]
        for name in ("input_tokens", "target_tokens", "loss_weights")
    }
    batch = {
        name: jax.ShapeDtypeStruct((settings.microbatches, rows, length), jnp.int32)
        for name, length in shape.items()
    }
    step = make_step(module, optimizer, settings.factors, coded={}, masks={}, seed=0)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = step.lower(*jax.eval_shape(begin, shapes), None, batch, number)
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    arguments = analysis.argument_size_in_bytes - sum(4 * np.prod(b.shape) for b in batch.values())
    return arguments, analysis.temp_size_in_bytes


def compare(lengths=None, dtype="float32", changes=(), **chosen):
    lengths = lengths or {"encoder": 64, "decoder": 32}
    settings = FinetuneSettings(**{"trainable": "norms", "batch_size": 8, **chosen})
    config = dataclasses.replace(SMALL, **dict(changes))
    variables = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16))
        for name, shape in parameter_shapes(config).items()
    }
    model = TunedModel("small", config, (), variables, True)
    held, num_trained, _ = held_memory(model, settings)
    planned = step_memory(
        model, settings, lengths, num_trained=num_trained, activation_dtype=dtype, on_host=True
    )
    arguments, temporary = compiled_memory(config, settings, lengths, dtype)
    # Nothing is held that nobody counted; XLA aligns what there is.
    assert sum(held.values()) == pytest.approx(arguments, rel=0.01)
    assert temporary < 1.05 * sum(planned.values())
    # An estimate that is far above says nothing.
    assert sum(planned.values()) < 1.6 * temporary


def test_a_step_is_what_xla_says():
    compare()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"trainable": "lora"},
        {"trainable": "dense"},
        {"trainable": "dense", "microbatches": 2, "batch_size": 16},
        {"lengths": {"encoder": 256, "decoder": 32}},
        {"lengths": {"encoder": 64, "decoder": 256}},
        {"dtype": "bfloat16", "lengths": {"encoder": 256, "decoder": 32}},
        {"changes": {"num_embeddings": 8192}},
        {"changes": {"mlp_dim": 2048}},
        {"changes": {"num_experts": 64}},  # 64 times the kernels, and not more than one expert
        {"changes": {"num_encoder_layers": 4, "encoder_sparse_layers": (1, 3)}},
    ],
    ids=str,
)
def test_other_steps(arguments):
    compare(**arguments)


def test_the_parts_of_a_public_model():
    """Codes, not expanded experts: the whole is a third of the model's bfloat16 weights."""
    settings = FinetuneSettings(trainable="lora", batch_size=8)
    model = TunedModel.as_compressed(facts(), CompressionSettings())
    plan = plan_finetuning(model, settings, LENGTHS, resources(), activation_dtype="bfloat16")
    assert not plan.problems
    assert plan.held["optimizer"] < 1.1 * plan.held["trained, float32"]
    assert plan.peak < 2 * facts().num_parameters()["total"] / 2
    wide = dataclasses.replace(settings, batch_size=1024)
    too_wide = plan_finetuning(model, wide, LENGTHS, resources())
    assert too_wide.held == plan.held
    assert "Give more microbatches, or activation_dtype" in too_wide.problems[0]
    cut = dataclasses.replace(wide, microbatches=128)
    assert not plan_finetuning(model, cut, LENGTHS, resources()).problems


class TestCommand:
    def test_a_compressed_checkpoint(self, compressed, tmp_path, capsys):
        file = tmp_path / "plan.json"
        arguments = ["plan", str(compressed("2bit")), "--finetune", "lora,norms"]
        assert main([*arguments, "--batch_size", "4", "--json", str(file), "--host_gb", "8"]) == 0
        printed = capsys.readouterr().out
        assert "The run fits" in printed
        assert "is expected" not in printed
        plan = json.loads(file.read_text())
        assert plan["settings"]["trainable"] == ["lora", "norms"]
        assert plan["memory_peak"] == sum(plan["held_memory"].values()) + sum(
            plan["step_memory"].values()
        )
        assert main([*arguments, "--json", str(file), "--host_gb", "0.001"]) == 1
        assert "NO: memory: a step needs" in capsys.readouterr().out

    @pytest.mark.parametrize("kind", ["lora", "dense", "norms", "gains", "experts"])
    def test_a_public_checkpoint(self, capsys, kind):
        assert main([*PUBLIC, "--finetune", kind, "--batch_size", "8"]) == 0
        assert ("is expected" in capsys.readouterr().out) == (kind != "experts")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--finetune", "all"], "trainable is 'all'; it must be of lora"),
            (["--finetune", "lora", "--lora_kernels", "*/none"], "which is no kernel"),
            (["--finetune", "lora", "--microbatches", "3"], "3 microbatches do not divide"),
            (["--microbatches", "2"], "--microbatches without --finetune"),
        ],
    )
    def test_what_is_refused(self, capsys, arguments, message):
        assert main([*PUBLIC, *arguments]) == 2
        assert message in capsys.readouterr().err
