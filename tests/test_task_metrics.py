"""A seqio task's own metrics while training: what seqio computes from a model's answers."""

import json
import textwrap

import pytest
import tiny_switch

import qmoe_jax
from qmoe_jax.__main__ import main

pytest.importorskip("seqio")
pytest.importorskip("gin")

LENGTHS = {"inputs": 8, "targets": 3}
# What a user's module looks like.
_MODULE = """
    import numpy as np
    import seqio
    import tensorflow as tf
    import tiny_switch

    FILES = {
        "train": tiny_switch.copying_tokens(0, 64),
        "validation": tiny_switch.copying_tokens(1, 20),
    }

    def dataset(split, shuffle_files, seed=None):
        tokens = FILES[split].tokens
        def examples():
            rows = zip(tokens.encoder_input_tokens, tokens.decoder_target_tokens)
            for number, (inputs, targets) in enumerate(rows):
                yield {"inputs": np.trim_zeros(inputs, "b"), "targets": np.trim_zeros(targets, "b"),
                       "number": number}
        ids = tf.TensorSpec([None], tf.int32)
        signature = {"inputs": ids, "targets": ids, "number": tf.TensorSpec([], tf.int32)}
        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    def answer(output, example, is_target=False):
        ids = example["targets"] if is_target else output
        return [int(i) for i in np.trim_zeros(np.asarray(ids), "b")]

    def matches(targets, predictions):
        assert len(targets) == 20
        return {"matches": 100 * np.mean([t == p for t, p in zip(targets, predictions)])}

    def likelihood(targets, scores):
        tokens = sum(map(len, targets))
        return {"loss": seqio.metrics.Scalar(-np.sum(scores) / tokens), "tokens": tokens,
                "note": seqio.metrics.Text("of scores")}

    def confidence(targets, predictions, aux_values):
        assert len(predictions) == len(aux_values["scores"]) == len(targets)
        return {"confidence": np.mean(np.exp(aux_values["scores"]))}

    vocabulary = seqio.PassThroughVocabulary(60, 1)
    vocabulary.decode = list
    feature = seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)
    for name, metrics in (("copying", [matches, likelihood, confidence]), ("plain", [])):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(dataset, splits=tuple(FILES)),
            preprocessors=[],
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=answer,
            metric_fns=metrics,
        )
    seqio.MixtureRegistry.add("both", [("copying", 3), ("plain", 1)])
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    native = tiny_switch.write_checkpoint(folder)
    settings = {"grid": "2bit", "expert_coding": "packed2", "method": "rtn"}
    qmoe_jax.compress(native, folder / "2bit", **settings, progress=False)
    return folder / "2bit"


@pytest.fixture(scope="module")
def train(compressed, tmp_path_factory):
    """`train(task, output, **bindings)`: runs the command; returns its exit status."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "copying_tasks.py").write_text(textwrap.dedent(_MODULE))

    def run(task, output, **bindings):
        given = {
            "INITIAL_CHECKPOINT": str(compressed),
            "MIXTURE_OR_TASK": task,
            "TASK_MODULE": "copying_tasks",
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "OUTPUT": str(output),
            "TRAIN_STEPS": 12,
            "BATCH_SIZE": 8,
            "LEARNING_RATE": 0.01,
            "TRAINABLE": "dense",
            "DROPOUT_RATE": 0.0,
            "EXPERT_DROPOUT_RATE": 0.0,
            "EVAL_STEPS": 6,
            **bindings,
        }
        return main(["finetune", *(f"--gin.{name}={value!r}" for name, value in given.items())])

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield run


@pytest.fixture(scope="module")
def tuned(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "run"
    assert train("copying", folder) == 0
    return folder


def test_metrics_are_those_of_answers_and_scores(tuned):
    """Of greedy answers and of likelihoods, which other code counts from the tokens."""
    report = json.loads((tuned / "report.json").read_bytes())
    assert list(report["validation"]) == ["before", "after", "written"]
    for figures in report["validation"].values():
        metrics = figures["metrics"]
        assert set(metrics) == {"matches", "loss", "tokens", "note", "confidence"}
        assert metrics["loss"] == pytest.approx(figures["loss"], rel=1e-5)
        assert metrics["matches"] == pytest.approx(100 * figures["exact_match"])
        assert metrics["tokens"] == 40
        assert metrics["note"] == "of scores"
        assert 0 < metrics["confidence"] < 1
    before, after = (report["validation"][when]["metrics"] for when in ("before", "written"))
    assert after["loss"] < before["loss"]
    assert after["confidence"] > before["confidence"]


def test_metrics_are_in_the_log_and_in_tensorboard(tuned):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    logged = {x["step"]: x["validation"]["metrics"] for x in lines if "validation" in x}
    assert list(logged) == [0, 6, 12]
    (events,) = tuned.glob("events.out.tfevents.*")
    data, found = events.read_bytes(), {}
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    for step, metrics in logged.items():
        for name in ("matches", "loss", "confidence"):
            tag = f"validation/metrics/{name}"
            assert found[step, tag] == pytest.approx(metrics[name], rel=1e-6)
    assert not any(tag.endswith("note") for _, tag in found)


def test_the_same_command_says_it_again(train, tuned, capsys):
    assert train("copying", tuned) == 0
    printed = capsys.readouterr().out
    assert "validation metrics/matches: " in printed
    assert train("copying", tuned, TASK_METRICS=False) == 2
    assert "task_metrics" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bindings",
    [{"MIXTURE_OR_TASK": "plain"}, pytest.param({"TASK_METRICS": False}, marks=pytest.mark.slow)],
)
def test_without_metrics_losses_are_left(train, tmp_path, bindings):
    assert train("copying", tmp_path / "run", TRAIN_STEPS=1, **bindings) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_bytes())
    assert set(report["validation"]["written"]) == {"loss", "accuracy", "exact_match"}


def test_a_mixture_has_the_metrics_of_its_tasks(train, tmp_path):
    """And is drawn from until there are as many examples as were asked for."""
    folder = tmp_path / "run"
    numbers = {"NUM_EXAMPLES": 100, "NUM_VALIDATION_EXAMPLES": 20}
    assert train("both", folder, TRAIN_STEPS=1, **numbers) == 0
    report = json.loads((folder / "report.json").read_bytes())
    metrics = report["validation"]["written"]["metrics"]
    assert set(metrics) == {f"copying/{name}" for name in ("matches", "loss", "tokens", "note")} | {
        "copying/confidence"
    }
    assert metrics["copying/tokens"] == 40
