"""Fine-tuning over codes beside fine-tuning uncompressed, on a task that every installation has.

    python benchmarks/bench_finetune.py --output benchmarks/results/finetune.json

The task: a function's docstring to its name, from installed packages, whose names never repeat
between training and validation packages. The demo's model, native and compressed, is tuned with the
same examples in the same order; loss per target token and exact match (greedy) are measured on
packages that no training example is of. `--only memory` says what one step needs on a model of
base-128's shapes (fewer layers). `--only recover` wins back what half the paper's bits took. What
is done already in the output is not done again.
"""

import argparse
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.calibration.tokens import TokenFile, TokenMetadata, from_sequences, read_tokens
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.demo.docstrings import demo_tokens
from qmoe_jax.demo.function_names import TRAINING, VALIDATION, function_names
from qmoe_jax.evaluation.divergence import DivergenceReport, measure_divergence
from qmoe_jax.evaluation.metrics import evaluate_loss, per_token
from qmoe_jax.formatting import format_bytes, format_table
from qmoe_jax.generation.sampling import greedy_generate
from qmoe_jax.generation.text import Vocabulary
from qmoe_jax.models.load import load_switch
from qmoe_jax.pipeline.compress import compress
from qmoe_jax.training.finetune import finetune, recover
from qmoe_jax.training.optimizer import make_optimizer
from qmoe_jax.training.settings import FinetuneSettings
from qmoe_jax.training.step import make_step
from qmoe_jax.training.trainable import code_arrays, gradient_masks, split_variables

DEMO = pathlib.Path(__file__).parent.parent / "tests/golden/switch_demo"
CHECKPOINT = DEMO / "checkpoint_4200"
INPUTS, TARGETS = 64, 12
# Bits of a weight: half of what the paper's method takes of this model (docs/verification.md).
HALF = 0.53


def task_tokens(packages: tuple[str, ...], count: int) -> TokenFile:
    """Examples of the task that fit, as the demo's vocabulary spells them."""
    vocabulary = Vocabulary(DEMO / "sentencepiece.model")
    inputs, targets = [], []
    for text, name in function_names(packages):
        answer = vocabulary.encode(name)
        if len(answer) < TARGETS:
            inputs.append(np.array([*vocabulary.encode(text)[: INPUTS - 1], 1]))
            targets.append(np.array([*answer, 1]))
    count = min(count, len(inputs))
    batch = from_sequences(
        inputs[:count], targets[:count], inputs_length=INPUTS, targets_length=TARGETS
    )
    metadata = TokenMetadata(
        "docstring_to_name", "train", len(vocabulary), len(vocabulary) - 100, 100, 1, 0, "installed"
    )
    return TokenFile(batch, metadata)


def exact_match(module: Any, variables: Any, tokens: TokenFile) -> float:
    """Share of examples whose greedy answer is the target, to the token."""
    generate = jax.jit(
        lambda variables, inputs: greedy_generate(
            module, variables, inputs, max_decode_length=TARGETS
        )
    )
    right = 0
    for batch in tokens.batches(64):
        answers = np.asarray(generate(variables, batch.encoder_input_tokens))
        same = (answers == batch.decoder_target_tokens).all(axis=1)
        right += int(same[: batch.num_real].sum())
    return right / len(tokens)


def measure(path: pathlib.Path, held_out: TokenFile) -> dict[str, float]:
    """Loss per target token and exact match of a checkpoint."""
    module, variables = load_switch(path)
    batches = [batch.arrays() for batch in held_out.batches(64)]
    return {
        "loss": evaluate_loss(module, variables, batches).loss,
        "exact_match": exact_match(module, variables, held_out),
    }


def run_task(done: dict[str, Any], save: Any, arguments: argparse.Namespace) -> None:
    """Tune every variant; each is kept when it is measured."""
    train, held_out = task_tokens(TRAINING, 20_000), task_tokens(VALIDATION, 512)
    done["task"] = {
        "train_examples": len(train),
        "validation_examples": len(held_out),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": {"dense": arguments.dense_rate, "lora": arguments.lora_rate},
    }
    work = pathlib.Path(arguments.work)
    compressed = work / "compressed"
    if not compressed.exists():
        calibration = demo_tokens(str(DEMO / "sentencepiece.model"), "train", 512)
        compress(CHECKPOINT, compressed, calibration, grid=arguments.grid, progress=True)
    variants = done.setdefault("variants", {})
    for source, path in (("uncompressed", CHECKPOINT), ("compressed", compressed)):
        for kind in (None, "dense", "lora"):
            name = f"{source}, {'not tuned' if kind is None else kind}"
            if name in variants:
                continue
            started = time.monotonic()
            result: dict[str, Any] = {}
            if kind is not None:
                settings = FinetuneSettings(
                    trainable=kind,
                    train_steps=arguments.steps,
                    batch_size=arguments.batch_size,
                    learning_rate=getattr(arguments, f"{kind}_rate"),
                    dropout_rate=0.1,
                    expert_dropout_rate=0.1,
                    save_steps=50,
                    eval_steps=arguments.steps,
                )
                folder = work / name.replace(", ", "_")
                report = finetune(path, folder, train, settings, tensorboard=False)
                result = {name: report[name] for name in ("num_trained", "trained_bytes")}
                path_of_result = folder
            else:
                path_of_result = path
            seconds = time.monotonic() - started
            variants[name] = measure(path_of_result, held_out) | result | {"seconds": seconds}
            print(name, variants[name])
            save()
    gain = {
        source: variants[f"{source}, not tuned"]["loss"] - variants[f"{source}, {kind}"]["loss"]
        for source, kind in (("uncompressed", "dense"), ("compressed", "dense"))
    }
    base = variants["uncompressed, not tuned"]["loss"]
    best = base - variants["uncompressed, dense"]["loss"]
    done["kept"] = {
        name: (base - figures["loss"]) / best
        for name, figures in variants.items()
        if not name.endswith("not tuned")
    }
    done["gain"] = gain
    save()


def run_memory(done: dict[str, Any], save: Any, arguments: argparse.Namespace) -> None:
    """What XLA's compiler says that a step needs, by what is trained."""
    from bench_cpu import copies  # one expert's codes, repeated

    from qmoe_jax.checkpoints import names
    from qmoe_jax.checkpoints.geometry import parameter_shapes
    from qmoe_jax.codec.decode import device_arrays
    from qmoe_jax.codec.encode import encode
    from qmoe_jax.config import SwitchConfig
    from qmoe_jax.models.switch import SwitchTransformer

    config = SwitchConfig(
        num_embeddings=32128,
        embed_dim=768,
        mlp_dim=3072,
        expert_mlp_dim=3072,
        num_heads=12,
        head_dim=64,
        num_experts=128,
        num_encoder_layers=2,
        num_decoder_layers=2,
        encoder_sparse_layers=(1,),
        decoder_sparse_layers=(1,),
        eval_capacity_factor=None,
    )
    rng = np.random.default_rng(0)
    flat: dict[str, Any] = {}
    coded, coded_bytes = [], 0
    encoded = {}
    for name, shape in parameter_shapes(config).items():
        if not names.is_expert_kernel(name):
            flat[name] = np.zeros(shape, "bfloat16" if len(shape) > 1 else np.float32)
            continue
        kernel = name.removesuffix("/kernel")
        _, num_in, num_out = shape
        if (num_in, num_out) not in encoded:
            codes = np.where(rng.random((1, num_out, num_in)) < 0.857, 0, 1).astype(np.uint8)
            codes *= rng.integers(1, 3, codes.shape, np.uint8)
            levels = np.tile(np.array([-0.01, 0.01], "bfloat16"), (1, num_out, 1))
            encoded[num_in, num_out] = copies(encode(codes, levels, "tunstall"), config.num_experts)
        tensor = encoded[num_in, num_out]
        coded.append((kernel, tensor.spec))
        coded_bytes += sum(array.nbytes for array in tensor.arrays.values())
        flat |= {f"{kernel}/{key}": array for key, array in device_arrays(tensor).items()}
    module = SwitchTransformer(config, jax.numpy.bfloat16, tuple(coded))
    flat = {name: jax.numpy.asarray(array) for name, array in flat.items()}
    variables = {"params": names.unflatten(flat)}
    rows = done.setdefault("memory", {})
    stored = sum(array.nbytes for array in flat.values())
    batch = {
        "encoder_input_tokens": jax.ShapeDtypeStruct((1, 4, 512), np.int32),
        **{
            f"decoder_{kind}": jax.ShapeDtypeStruct((1, 4, 114), np.int32)
            for kind in ("input_tokens", "target_tokens", "loss_weights")
        },
    }
    for kind in ("lora", "norms", "gains", "dense"):
        settings = FinetuneSettings(trainable=kind, batch_size=4)
        parts = split_variables(module, variables, settings)
        optimizer = make_optimizer(settings)
        state = jax.eval_shape(optimizer.init, parts.trained)
        step = make_step(
            module,
            optimizer,
            settings.factors,
            coded=code_arrays(module, parts),
            masks=gradient_masks(module, parts),
            seed=0,
        )
        lowered = step.lower(parts.trained, state, parts.frozen, None, batch, np.int32(0))
        analysis = lowered.compile().memory_analysis()
        rows[kind] = {
            "stored_bytes": stored,
            "coded_bytes": coded_bytes,
            "trained_bytes": sum(a.nbytes for a in parts.trained.values()),
            "optimizer_bytes": sum(
                int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
            ),
            "argument_bytes": analysis.argument_size_in_bytes,
            "temporary_bytes": analysis.temp_size_in_bytes,
            "all_experts_expanded_bytes": 2 * sum(spec.num_weights for _, spec in coded),
        }
        print(kind, {name: format_bytes(value) for name, value in rows[kind].items()})
        save()


def unseen_divergence(path: pathlib.Path, tokens: TokenFile) -> DivergenceReport:
    """KL from the uncompressed model, example by example."""
    batches = [batch.arrays() for batch in tokens.batches(32)]
    return measure_divergence(*load_switch(path), *load_switch(CHECKPOINT), batches)


def run_recover(done: dict[str, Any], save: Any, arguments: argparse.Namespace) -> None:
    """KL before and after on text that nothing has seen, at half the paper's bits."""
    vocabulary = str(DEMO / "sentencepiece.model")

    def text(path: str | None, split: str, count: int) -> TokenFile:
        return demo_tokens(vocabulary, split, count) if path is None else read_tokens(path)

    train = text(arguments.calibration, "train", 1280)
    unseen = text(arguments.validation, "validation", 512)
    held_out = unseen.first(128)
    work = pathlib.Path(arguments.work)
    half = work / "half"
    if not half.exists():
        compress(
            CHECKPOINT, half, train, grid="lattice", target_bits_per_weight=HALF, progress=True
        )
    rows = done.setdefault("recover", {})
    specs = open_compressed_checkpoint(half)
    stored = sum(
        sum(array.nbytes for array in specs.read_coded(kernel).arrays.values())
        for kernel in specs.specs
    )
    weights = sum(spec.num_weights for spec in specs.specs.values())
    rows["compressed"] = {
        "bits_per_weight": 8 * stored / weights,
        "calibration_examples": len(train),
        "validation_examples": len(unseen),
        "validation_target_tokens": unseen.tokens.num_target_tokens,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
    }
    before: DivergenceReport | None = None
    # Ten times as much made KL larger: predictions are near the reference's from the first step on.
    for kinds, rate in ((("norms", "gains"), 3e-4), (("lora",), 1e-4), (("dense",), 1e-4)):
        name = f"{' + '.join(kinds)}, {rate:g}"
        if name in rows:
            continue
        started = time.monotonic()
        settings = FinetuneSettings(
            trainable=kinds,
            train_steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=rate,
            dropout_rate=0.0,
            expert_dropout_rate=0.0,
            z_loss=0.0,
            auxiliary_loss=0.0,
            eval_steps=arguments.steps,
            save_steps=5,
            log_steps=1,
        )
        report = recover(
            half,
            CHECKPOINT,
            work / f"recover_{'_'.join(kinds)}_{rate:g}",
            train,
            settings,
            validation_tokens=held_out,
            tensorboard=False,
        )
        seconds = time.monotonic() - started
        counts = {name: report[name] for name in ("num_trained", "trained_bytes")}
        before = before or unseen_divergence(half, unseen)
        after = unseen_divergence(pathlib.Path(report["checkpoint"]), unseen)
        difference, error = per_token(after.kl - before.kl, after.losses.num_target_tokens)
        rows["compressed"]["kl"] = before.divergence[0]
        rows[name] = counts | {
            "kl": after.divergence[0],
            "kl_difference": difference,
            "kl_difference_standard_error": error,
            "learning_rate": rate,
            "seconds": seconds,
        }
        print(name, rows[name])
        save()


PARTS = {"task": run_task, "memory": run_memory, "recover": run_recover}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="benchmarks/results/finetune.json")
    parser.add_argument("--work", help="folder for runs; a temporary one where not given")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--calibration", help="token file for recover; made anew if not given")
    parser.add_argument("--validation", help="token file to measure recover on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--grid", default="ternary")
    parser.add_argument("--dense_rate", type=float, default=1e-3)
    parser.add_argument("--lora_rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    output = pathlib.Path(arguments.output)
    done = json.loads(output.read_bytes()) if output.exists() else {}
    done["machine"] = machine_facts()
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or folder
        pathlib.Path(arguments.work).mkdir(parents=True, exist_ok=True)
        for part in arguments.only or PARTS:
            PARTS[part](done, lambda: write_json(output, done), arguments)
    if "variants" in done:
        rows = [
            [name, f"{v['loss']:.4f}", f"{100 * v['exact_match']:.1f} %"]
            for name, v in done["variants"].items()
        ]
        print(format_table([["", "loss", "exact match"], *rows]))


if __name__ == "__main__":
    main()
