"""Generation and evaluation from stored codes on a CPU, beside the uncompressed float32 model.

    python benchmarks/bench_cpu_generation.py [--json PATH]

A made model of Switch-base-128's shape: 24 layers, 12 of them sparse, 128 experts, random dense
parameters and routers; every expert has the weights of one made layer of `bench_lattice` (lattice,
c = 4), so that both models generate the same tokens, which is checked. Codes lie in memory for
every expert of every layer. Float32 experts of all layers share one layer's arrays, 2.4 GB: 29 GB
would be needed. They are as cold as their own would be, being many times the last-level cache.

Each model runs in a process of its own. Seconds are the least of `--repeats`, without compilation:

- generation: greedy, for each batch; the encoder's part is timed apart and subtracted;
- evaluation: a forward pass, `--examples` of 256 input and 64 target tokens;
- of a step of the first batch: experts' products, dense MLPs and logits, timed alone; "all else" is
  what remains: attention, norms, routing, sampling.

Memory is what the parameters take, with every layer's own experts and as they lie here, and the
most that the process held while it ran, beyond what it held before there was a model.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_cpu import copies
from bench_lattice import quantized_layer
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.codec.decode import decode_expert_weights, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.config import SwitchConfig
from qmoe_jax.formatting import format_row
from qmoe_jax.generation.sampling import greedy_generate
from qmoe_jax.generation.step import encode_prompts
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.ops.experts import CodedExperts, DenseExperts, Experts
from qmoe_jax.ops.products import expert_mlp

CONFIG = SwitchConfig(
    num_embeddings=32128,
    embed_dim=768,
    mlp_dim=3072,
    expert_mlp_dim=3072,
    num_heads=12,
    head_dim=64,
    num_experts=128,
    num_encoder_layers=12,
    num_decoder_layers=12,
    encoder_sparse_layers=tuple(range(1, 12, 2)),
    decoder_sparse_layers=tuple(range(1, 12, 2)),
    eval_capacity_factor=None,
)
MODELS = ("float32", "lattice")
NEVER = -1  # an eos that no token is
LENGTHS = {"prompt": 64, "generated": 32, "evaluated inputs": 256, "evaluated targets": 64}


def made_expert(rows: int, width: int) -> CodedTensor:
    """One expert whose weights are about 1 / sqrt(width)."""
    codes, step_index, origin = quantized_layer(rows, width, 4.0, 0)
    coded = encode(
        codes[None], {"step_index": step_index[None], "origin": np.array([origin])}, "lattice"
    )
    weights = decode_expert_weights(coded.spec, device_arrays(coded), 0, jnp.float32)
    coded.arrays["origins"] = coded.arrays["origins"] / np.float32(np.std(weights) * width**0.5)
    return coded


def make_model(name: str) -> tuple[SwitchTransformer, dict[str, Any]]:
    """The module and its variables; random but for the experts."""
    rng = np.random.default_rng(0)
    shapes = {"wi": (3072, 768), "wo": (768, 3072)}
    one = {kind: made_expert(*shape) for kind, shape in shapes.items()}
    kernels = {}
    if name == "float32":
        for kind, coded in one.items():
            weights = decode_expert_weights(coded.spec, device_arrays(coded), 0, jnp.float32)
            tile = jax.jit(lambda w: jnp.tile(w.T[None], (CONFIG.num_experts, 1, 1)))
            kernels[kind] = jax.block_until_ready(tile(weights))
    flat: dict[str, Any] = {}
    specs = []
    for path, shape in parameter_shapes(CONFIG).items():
        kernel = path.removesuffix("/kernel")
        kind = kernel.rsplit("/", 1)[-1]
        if not names.is_expert_kernel(path):
            scale = 1.0 if len(shape) < 2 or "embed" in path else shape[-2] ** -0.5
            values = rng.standard_normal(shape, np.float32) * np.float32(scale)
            flat[path] = jnp.asarray(np.ones(shape, np.float32) if len(shape) < 2 else values)
        elif name == "float32":
            flat[path] = kernels[kind]
        else:
            coded = copies(one[kind], CONFIG.num_experts)
            specs.append((kernel, coded.spec))
            flat |= {f"{kernel}/{key}": value for key, value in device_arrays(coded).items()}
    module = SwitchTransformer(CONFIG, jnp.float32, tuple(sorted(specs)), "cpu")
    return module, {"params": names.unflatten(flat)}


def least(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call; one more compiles before."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


def resident_bytes(which: str) -> int:
    """`VmRSS` or, since `forget_peak`, `VmHWM` of this process, on Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{which}:")[1].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def experts_of(module: SwitchTransformer, variables: Any, layer: int) -> list[Experts]:
    """Kernels wi and wo of a decoder layer."""
    found = variables["params"]["decoder"][f"layers_{layer}"]["mlp"]["expert"]
    specs = dict(module.coded)
    kernels: list[Experts] = []
    for kind, in_features in (("wi", 768), ("wo", 3072)):
        spec = specs.get(f"decoder/layers_{layer}/mlp/expert/{kind}")
        own = found[kind]
        kernels.append(
            DenseExperts(own["kernel"]) if spec is None else CodedExperts(spec, own, in_features)
        )
    return kernels


def parts_of_a_step(
    module: SwitchTransformer, variables: Any, batch: int, repeats: int
) -> dict[str, float]:
    """Seconds of what a decoding step consists of, each timed alone over all decoder layers."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((batch, CONFIG.embed_dim)), jnp.float32)
    layers = CONFIG.decoder_sparse_layers
    kernels = [experts_of(module, variables, layer) for layer in layers]
    layouts = [[(kernel.layout(), kernel.by_name) for kernel in pair] for pair in kernels]

    @jax.jit
    def run_experts(x: Any, index: Any, arrays: Any) -> Any:
        for number, pair in enumerate(layouts):
            wi, wo = (layout(own) for (layout, _), own in zip(pair, arrays[number], strict=True))
            x = x + expert_mlp(
                x, index[number], num_experts=CONFIG.num_experts, wi=[wi], wo=wo,
                activation=lambda hidden: jax.nn.relu(hidden[0]), implementation="cpu",
            )  # fmt: skip
        return x

    arrays = [[own for _, own in pair] for pair in layouts]
    # New experts at every call: their kernels are cold.
    indices = iter(
        jnp.asarray(index, jnp.int32)
        for index in rng.integers(0, CONFIG.num_experts, (repeats + 1, len(layers), batch))
    )
    seconds = {"experts": least(lambda: run_experts(x, next(indices), arrays), repeats)}

    params = variables["params"]
    dense = [layer for layer in range(CONFIG.num_decoder_layers) if layer not in layers]
    mlps = [params["decoder"][f"layers_{layer}"]["mlp"] for layer in dense]

    @jax.jit
    def run_mlps(x: Any, mlps: Any) -> Any:
        for mlp in mlps:
            x = x + jax.nn.relu(x @ mlp["wi"]["kernel"]) @ mlp["wo"]["kernel"]
        return x

    seconds["dense MLPs"] = least(lambda: run_mlps(x, mlps), repeats)
    embedding = params["token_embedder"]["embedding"]
    logits = jax.jit(lambda x, embedding: jnp.argmax(x @ embedding.T, axis=-1))
    seconds["logits"] = least(lambda: logits(x, embedding), repeats)
    return seconds


def generation(
    module: SwitchTransformer, variables: Any, tokens: jax.Array, repeats: int
) -> tuple[np.ndarray, float, float]:
    """Tokens, and seconds of the encoder and of everything."""
    encoder = jax.jit(lambda v, t: encode_prompts(module, v, t))
    keywords = {"max_decode_length": LENGTHS["generated"], "eos_id": NEVER}
    outputs = np.asarray(greedy_generate(module, variables, tokens, **keywords))
    encoding = least(lambda: encoder(variables, tokens), repeats)
    whole = least(lambda: greedy_generate(module, variables, tokens, **keywords), repeats)
    return outputs, encoding, whole


def measure(name: str, batches: list[int], examples: int, repeats: int) -> dict[str, Any]:
    """Everything of one model, in this process."""
    before = resident_bytes("VmRSS")
    module, variables = make_model(name)
    forget_peak()
    arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(variables)}
    row: dict[str, Any] = {"model": name}
    row["parameter_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    row["held_bytes"] = sum(arrays.values())
    rng = np.random.default_rng(2)
    steps = LENGTHS["generated"]
    for batch in batches:
        tokens = jnp.asarray(rng.integers(3, 32000, (batch, LENGTHS["prompt"])), jnp.int32)
        outputs, encoding, whole = generation(module, variables, tokens, repeats)
        step = (whole - encoding) / steps
        parts = parts_of_a_step(module, variables, batch, repeats)
        row[f"tokens, batch {batch}"] = outputs.tolist()
        row[f"tokens/s, batch {batch}"] = batch * steps / whole
        row[f"step seconds, batch {batch}"] = step
        row[f"parts of a step, batch {batch}"] = parts | {"all else": step - sum(parts.values())}
    inputs, targets = (LENGTHS[f"evaluated {what}"] for what in ("inputs", "targets"))
    example = [
        jnp.asarray(rng.integers(3, 32000, (examples, length)), jnp.int32)
        for length in (inputs, targets, targets)
    ]

    @jax.jit
    def forward(variables: Any, *tokens: jax.Array) -> jax.Array:
        logits: Any = module.apply(variables, *tokens, enable_dropout=False)
        return logits.max()

    seconds = least(lambda: forward(variables, *example), repeats)
    row["evaluated tokens/s"] = examples * (inputs + targets) / seconds
    row["peak_bytes"] = resident_bytes("VmHWM") - before
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation from codes on a CPU.")
    parser.add_argument("--model", choices=MODELS, help="only this one, as JSON")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.model:
        row = measure(args.model, args.batches, args.examples, args.repeats)
        print(json.dumps(row))
        return
    rows = []
    for model in MODELS:
        command = [sys.executable, __file__, "--model", model, "--repeats", str(args.repeats)]
        command += ["--examples", str(args.examples), "--batches", *map(str, args.batches)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=-1).stdout))
    outputs = [[row.pop(f"tokens, batch {batch}") for batch in args.batches] for row in rows]
    same = [np.mean(np.equal(a, b)) for a, b in zip(*outputs, strict=True)]
    if min(same) < 0.9:
        raise SystemExit(f"the models generate different tokens ({same}): the comparison is void")
    print(format_row(["", *MODELS], [34, 12, 12]))
    for key, value in rows[0].items():
        if isinstance(value, dict):
            for part in value:
                figures = [f"{1e3 * row[key][part]:.2f} ms" for row in rows]
                print(format_row([f"{part}, {key.rsplit(', ')[-1]}", *figures], [34, 12, 12]))
        elif key != "model":
            figures = [f"{row[key]:.4g}" for row in rows]
            print(format_row([key, *figures], [34, 12, 12]))
    if args.json:
        results = {
            "machine": machine_facts(),
            "config": dataclasses.asdict(CONFIG),
            "lengths": LENGTHS,
            "load_average": os.getloadavg(),  # about 2 where nothing else ran
            "same_tokens": same,
            "rows": rows,
        }
        write_json(args.json, results, indent=2)


if __name__ == "__main__":
    main()
