"""The plug-in for T5X: always what needs no t5x, T5X's own programs where it is installed."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import CALIBRATION

import qmoe_jax
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints import names
from qmoe_jax.errors import CheckpointError
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.generation.beam_search import beam_generate
from qmoe_jax.models.load import load_switch
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.t5x_plugin.restore import SwitchCheckpointer
from qmoe_jax.t5x_plugin.variables import checkpoint_shapes, placeholder_variables

REPOSITORY = Path(__file__).parent.parent
FEW = CALIBRATION[:10]
with_t5x = pytest.mark.skipif(
    importlib.util.find_spec("t5x") is None,
    reason="t5x is not installed (docs/t5x.md says how to install it)",
)
with_seqio = pytest.mark.skipif(
    importlib.util.find_spec("seqio") is None, reason="seqio is not installed (the data extra)"
)


@pytest.fixture(scope="module")
def native(golden_checkpoint):
    return golden_checkpoint("base", "t5x_float32_inference")


@pytest.fixture(scope="module")
def compressed(native, tmp_path_factory):
    path = tmp_path_factory.mktemp("compressed") / "checkpoint_42"
    qmoe_jax.compress(native, path, method="rtn", progress=False)
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    write_tokens(path, FEW.tokens, FEW.metadata)
    return path


@pytest.fixture(params=["native", "compressed"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


def fake_state(path):
    """What T5X hands over: a state with shapes, and a way to put arrays in."""
    params = placeholder_variables(checkpoint_shapes(path))["params"]
    return SimpleNamespace(params=params, restore_state=lambda state_dict: state_dict)


# --- Without t5x ---


def test_variables_have_the_shapes_and_axes_that_t5x_wants(checkpoint):
    shapes = checkpoint_shapes(checkpoint)
    variables = jax.eval_shape(lambda: placeholder_variables(shapes)["params"])
    _, expected = load_switch(checkpoint)
    found = {name: (a.shape, a.dtype) for name, a in names.flatten(variables).items()}
    assert found == {
        name: (a.shape, a.dtype) for name, a in names.flatten(expected["params"]).items()
    }
    axes = names.flatten(placeholder_variables(shapes)["params_axes"])
    assert {name.removesuffix("_axes") for name in axes} == shapes.keys()
    assert all(axes[f"{name}_axes"].names == (None,) * len(s.shape) for name, s in shapes.items())


def test_restores_what_load_switch_loads(checkpoint):
    state = SwitchCheckpointer(
        train_state=fake_state(checkpoint),
        partitioner=None,
        directory="/nowhere",
        save_dtype=None,
        keep=None,
        period=None,
    ).restore(path=str(checkpoint), state_transformation_fns=(), fallback_state=None)
    expected = load_switch(checkpoint)[1]["params"]
    jax.tree.map(np.testing.assert_array_equal, state["target"], expected)
    assert int(state["state"]["step"]) == (42 if "42" in checkpoint.name else 500100)


def test_restore_dtype_is_for_dense_parameters_only(compressed):
    checkpointer = SwitchCheckpointer(fake_state(compressed), restore_dtype=jnp.bfloat16)
    restored = names.flatten(checkpointer.restore(compressed)["target"])
    stored = names.flatten(load_switch(compressed)[1]["params"])
    coded = [name for name in stored if "/expert/" in name]
    assert coded
    assert all(restored[name].dtype == stored[name].dtype for name in coded)
    dense = stored.keys() - set(coded)
    assert {restored[name].dtype.name for name in dense} == {"bfloat16"}
    assert {stored[name].dtype.name for name in dense} == {"bfloat16", "float32"}


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ({"state_transformation_fns": [len]}, "state_transformation_fns"),
        ({"fallback_state": {}}, "fallback_to_scratch"),
        ({"lazy_parameters": True}, "lazy_parameters"),
    ],
)
def test_refuses_what_codes_cannot_do(compressed, arguments, asked):
    with pytest.raises(ValueError, match=asked):
        SwitchCheckpointer(fake_state(compressed)).restore(compressed, **arguments)


def test_refuses_a_data_set(compressed):
    with pytest.raises(ValueError, match="restore_dataset"):
        SwitchCheckpointer(fake_state(compressed), dataset_iterator=iter([]))


def test_refuses_the_parameters_of_another_checkpoint(native, compressed):
    with pytest.raises(CheckpointError, match="does not hold the parameters of MODEL: .*expert/wi"):
        SwitchCheckpointer(fake_state(compressed)).restore(native)


def test_refuses_a_name_without_step_where_t5x_would_fail_later(compressed, tmp_path):
    (tmp_path / "compressed").symlink_to(compressed)
    state = fake_state(compressed)
    restored = SwitchCheckpointer(state).restore(tmp_path / "compressed")
    assert int(restored["state"]["step"]) == 0
    with pytest.raises(CheckpointError, match="does not end in checkpoint_<step>"):
        SwitchCheckpointer(state, require_step=True).restore(tmp_path / "compressed")


def test_the_module_is_called_as_t5x_calls_its_modules():
    """The calls of `t5x.models.EncoderDecoderModel`, by keyword where it uses keywords."""
    call = inspect.signature(SwitchTransformer.__call__)
    packed = dict.fromkeys(
        ("encoder_segment_ids", "decoder_segment_ids", "encoder_positions", "decoder_positions")
    )
    call.bind("self", "inputs", "shifted", "targets", **packed, decode=False, enable_dropout=False)
    call.bind(
        "self",
        encoder_input_tokens=0,
        decoder_input_tokens=0,
        decoder_target_tokens=0,
        decode=True,
        enable_dropout=False,
    )
    inspect.signature(SwitchTransformer.encode).bind("self", "inputs", enable_dropout=False)
    inspect.signature(SwitchTransformer.decode).bind(
        "self", "encoded", "inputs", "ids", "ids", enable_dropout=False, decode=True,
        max_decode_length=8,
    )  # fmt: skip


# --- seqio ---


@with_seqio
def test_token_file_as_a_task(tokens):
    code = """
import sys, json, seqio
from qmoe_jax.t5x_plugin.tasks import token_file_task
from qmoe_jax.calibration.tokens import read_tokens
name = token_file_task(sys.argv[1], num_examples=7)
assert token_file_task(sys.argv[1], num_examples=7) == name  # twice is no error
ds = seqio.get_dataset(
    name, {"inputs": 32, "targets": 24}, dataset_split="validation", shuffle=False, num_epochs=1,
    feature_converter=seqio.EncDecFeatureConverter(pack=False))
tokens = read_tokens(sys.argv[1]).tokens
rows = list(ds.as_numpy_iterator())
assert len(rows) == 7, len(rows)
for i, row in enumerate(rows):
    for key in ("encoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"):
        assert (row[key] == getattr(tokens, key)[i]).all(), (i, key)
task = seqio.get_mixture_or_task(name)
example = next(iter(task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()))
assert task.postprocess_fn(-1.5, example=example, is_target=False) == -1.5
counted = task.postprocess_fn([], example=example, is_target=True)
assert counted == tokens.decoder_loss_weights[0].sum()
print(json.dumps(task.metric_fns[0](targets=[2, 3], scores=[-4.0, -6.0])))
"""
    result = run("-c", code, str(tokens))
    assert json.loads(result.stdout) == {"loss_per_target_token": 2.0, "num_target_tokens": 5}


# --- T5X's own programs ---


def run(*arguments):
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def run_t5x(program, checkpoint, tokens, output, *bindings):
    name = "EVAL_OUTPUT_DIR" if program == "eval" else "INFER_OUTPUT_DIR"
    return run(
        "-m",
        f"t5x.{program}",
        f"--gin_file=gin/t5x/{program}.gin",
        "--gin_file=gin/t5x/token_file.gin",
        f"--gin.CHECKPOINT_PATH='{checkpoint}'",
        f"--gin.TOKENS='{tokens}'",
        f"--gin.{name}='{output}'",
        "--gin.utils.DatasetConfig.batch_size=4",  # 10 examples: the last batch is not full
        *bindings,
    )


@with_t5x
def test_t5x_eval_gives_our_loss(checkpoint, tokens, tmp_path):
    result = run_t5x("eval", checkpoint, tokens, tmp_path)
    assert "loss_per_target_token at step" in result.stderr
    metrics = tmp_path / "inference_eval" / "qmoe_jax_token_file-metrics.jsonl"
    found = json.loads(metrics.read_text())
    ours = evaluate_loss(*load_switch(checkpoint), [FEW.tokens.arrays()])
    assert found["num_target_tokens"] == FEW.tokens.num_target_tokens
    assert found["loss_per_target_token"] == pytest.approx(ours.loss, abs=1e-5)


@with_t5x
def test_t5x_infer_gives_our_beams(compressed, tokens, tmp_path):
    length = 8
    run_t5x(
        "infer",
        compressed,
        tokens,
        tmp_path,
        f"--gin.TASK_FEATURE_LENGTHS={{'inputs': 32, 'targets': {length}}}",
    )
    (file,) = tmp_path.glob("*-predict.jsonl-*1")
    found = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
    module, variables = load_switch(compressed)
    inputs = jnp.asarray(FEW.tokens.encoder_input_tokens)
    ours = beam_generate(module, variables, inputs, beam_size=1, max_decode_length=length)
    np.testing.assert_array_equal(np.asarray(found), ours.tokens[:, -1])


@with_t5x
def test_t5x_predicts_our_four_beams(compressed, tokens):
    code = """
import sys, json, numpy as np, jax, seqio
from qmoe_jax.calibration.tokens import read_tokens
from qmoe_jax.models.load import load_switch
from qmoe_jax.t5x_plugin.model import SwitchModel
vocabulary = seqio.PassThroughVocabulary(512, 1)
model = SwitchModel(sys.argv[1], vocabulary, vocabulary)
assert model.module == load_switch(sys.argv[1], implementation="xla")[0]
params = load_switch(sys.argv[1])[1]["params"]
batch = read_tokens(sys.argv[2]).tokens.arrays()
batch["decoder_input_tokens"] = batch["decoder_input_tokens"][:, :8]
ids, aux = jax.jit(lambda p, b: model.predict_batch_with_aux(
    p, b, return_all_decodes=True, num_decodes=4))(params, batch)
print(json.dumps([np.asarray(ids).tolist(), np.asarray(aux["scores"]).tolist()]))
"""
    ids, scores = json.loads(run("-c", code, str(compressed), str(tokens)).stdout)
    module, variables = load_switch(compressed)
    inputs = jnp.asarray(FEW.tokens.encoder_input_tokens)
    ours = beam_generate(module, variables, inputs, beam_size=4, max_decode_length=8)
    np.testing.assert_array_equal(np.asarray(ids), ours.tokens)
    np.testing.assert_allclose(np.asarray(scores), ours.scores, rtol=1e-5)


@with_t5x
def test_t5x_takes_no_gradients_but_evaluates(compressed, tokens):
    code = """
import sys, json, types, jax, numpy as np, seqio
from t5x import trainer
from qmoe_jax.calibration.tokens import read_tokens
from qmoe_jax.models.load import load_switch
from qmoe_jax.t5x_plugin.model import SwitchModel
vocabulary = seqio.PassThroughVocabulary(512, 1)
model = SwitchModel(sys.argv[1], vocabulary, vocabulary)
params = load_switch(sys.argv[1])[1]["params"]
batch = read_tokens(sys.argv[2]).tokens.arrays()
loss, _ = jax.jit(model.eval_fn)(params, batch)
state = types.SimpleNamespace(params=params, flax_mutables=None)
try:
    trainer.accumulate_grads_microbatched(model, state, batch, jax.random.key(0), None)
except ValueError as error:
    print(json.dumps([float(loss), str(error)]))
"""
    loss, message = json.loads(run("-c", code, str(compressed), str(tokens)).stdout)
    ours = evaluate_loss(*load_switch(compressed), [FEW.tokens.arrays()])
    # T5X's is the sum over target tokens where no normalisation is set.
    assert loss / FEW.tokens.num_target_tokens == pytest.approx(ours.loss, rel=1e-5)
    assert "t5x.train cannot train a SwitchModel" in message
    assert "qmoe-jax finetune" in message
