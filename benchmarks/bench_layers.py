"""Bits at equal output error on made layers of Switch base's widths: lattice beside ternary.

    python benchmarks/bench_layers.py --json benchmarks/results/layers.json

Both grids go through the same GPTQ with default settings, and are stored as a run stores them. The
error |(W - Q) X|^2 / |W X|^2 is taken on tokens that no Hessian has seen; "gained" is the same
behind the best gain of each output: ternary shrinks what it keeps and the lattice does not, which
an error alone holds against the lattice. Its step is searched for the error of ternary; bits are
interpolated between the two nearest steps. An equal layer error says nothing of predictions: for
those see `bench_quality.py`. Times are of GPTQ alone, the least of several turns, in which both
grids take part.
"""

import argparse
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.calibration.hessian import finalize_hessian, init_hessian, update_hessian
from qmoe_jax.formatting import format_row
from qmoe_jax.pipeline.stored_codes import stored_bits
from qmoe_jax.quantization.expert_batch import dequantize_experts, quantize_experts
from qmoe_jax.quantization.settings import CompressionSettings

SHAPES = ((768, 3072), (3072, 768))
KINDS = ("correlated", "rectified")
NUM_EXPERTS = 4
TOKENS_A_WEIGHT_ROW = 4
"""Calibration tokens of an expert, in multiples of its input features."""
HELD_OUT = 2048
CHUNK = 1024
COLUMNS = (
    *("layer", "inputs", "error", "zeros", "ternary bits", "lattice bits", "ratio", "step"),
    *("gained", "lattice bits", "ratio", "ternary s", "lattice s", "time"),
)


class Layer(NamedTuple):
    """Kernels [experts, in, out], Hessians and counts for GPTQ, and unseen tokens."""

    kernels: jax.Array
    hessians: jax.Array
    counts: jax.Array
    unseen: jax.Array


class Outcome(NamedTuple):
    """A grid on a layer: bits a weight, errors on unseen tokens, share of zeros."""

    bits: float
    error: float
    gained: float
    zeros: float


def make_layer(
    num_in: int, num_out: int, kind: str, seed: int, num_experts: int = NUM_EXPERTS
) -> Layer:
    """Weights whose rows and columns differ in scale; inputs with a power-law spectrum."""
    keys = jax.random.split(jax.random.key(seed), 6)
    kernels = jax.random.normal(keys[0], (num_experts, num_in, num_out)) / num_in**0.5
    kernels *= jnp.exp(0.25 * jax.random.normal(keys[1], (num_experts, num_in, 1)))
    kernels *= jnp.exp(0.2 * jax.random.normal(keys[2], (num_experts, 1, num_out)))
    mixing = jax.random.normal(keys[3], (num_experts, num_in, num_in)) / num_in**0.5
    spectrum = jnp.arange(1, num_in + 1, dtype=jnp.float32) ** -0.5

    @jax.jit
    def make_tokens(key: jax.Array) -> jax.Array:
        one, other = jax.random.split(key)
        tokens = (jax.random.normal(one, (num_experts, CHUNK, num_in)) * spectrum) @ mixing
        tokens += 0.02 * jax.random.normal(other, tokens.shape)
        return jax.nn.relu(tokens) if kind == "rectified" else tokens

    state = init_hessian(num_experts, num_in)
    mask = jnp.ones((num_experts, CHUNK), bool)
    for key in jax.random.split(keys[4], TOKENS_A_WEIGHT_ROW * num_in // CHUNK):
        state = update_hessian(state, make_tokens(key), mask)
    unseen = [make_tokens(key) for key in jax.random.split(keys[5], HELD_OUT // CHUNK)]
    hessians, counts = finalize_hessian(state)
    return Layer(kernels, hessians, counts, jnp.concatenate(unseen, axis=1))


def quantize(layer: Layer, settings: CompressionSettings) -> Any:
    return jax.block_until_ready(
        quantize_experts(
            layer.kernels,
            layer.hessians,
            layer.counts,
            grid=settings.quantization_grid,
            damping=settings.damping,
            step=settings.step,
        )
    )


@jax.jit
def relative_errors(kernels: jax.Array, quantized: jax.Array, tokens: jax.Array) -> tuple:
    """The error as it is, and behind the best gain of each output of each expert."""
    wanted, found = tokens @ kernels, tokens @ quantized
    scale = jnp.sum(wanted**2)
    products, squares = jnp.sum(wanted * found, axis=1), jnp.sum(found**2, axis=1)
    explained = jnp.where(squares > 0, products**2 / jnp.maximum(squares, 1e-30), 0.0)
    return jnp.sum((wanted - found) ** 2) / scale, 1 - jnp.sum(explained) / scale


def outcome(layer: Layer, settings: CompressionSettings) -> Outcome:
    result = quantize(layer, settings)
    values = dequantize_experts(
        settings.quantization_grid, result.codes, result.levels, num_in=layer.kernels.shape[1]
    )
    levels = jax.tree.map(np.asarray, result.levels)
    if isinstance(levels, np.ndarray):
        levels = levels.astype(jnp.bfloat16)  # exact: grids round them before they choose codes
    bits = stored_bits(np.asarray(result.codes), levels, settings.coding)
    error, gained = relative_errors(layer.kernels, values, layer.unseen)
    zeros = float(result.zero_share.mean())
    return Outcome(bits / layer.kernels.size, float(error), float(gained), zeros)


def at_error(layer: Layer, name: str, error: float) -> tuple[float, float]:
    """Return bits and step of the lattice where the error of that name is this."""
    low, high = 0.5, 16.0
    found = {}
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        found[middle] = outcome(layer, CompressionSettings(grid="lattice", step=middle))
        low, high = (low, middle) if getattr(found[middle], name) > error else (middle, high)
    nearest = sorted((abs(math.log(getattr(o, name) / error)), step) for step, o in found.items())
    (_, a), (_, b) = nearest[:2]
    left, right = (math.log(getattr(found[step], name)) for step in (a, b))
    share = (math.log(error) - left) / (right - left)
    bits = found[a].bits + share * (found[b].bits - found[a].bits)
    return bits, a * (b / a) ** share


def seconds(layer: Layer, kinds: list[CompressionSettings], turns: int = 4) -> list[float]:
    """Return the least seconds of GPTQ for each of the settings, which take turns."""
    least = [math.inf] * len(kinds)
    for _ in range(turns):
        for number, settings in enumerate(kinds):
            start = time.perf_counter()
            quantize(layer, settings)
            least[number] = min(least[number], time.perf_counter() - start)
    return least


def measure(num_in: int, num_out: int, kind: str, seed: int) -> dict[str, Any]:
    layer = make_layer(num_in, num_out, kind, seed)
    ternary = CompressionSettings(grid="ternary")
    paper = outcome(layer, ternary)
    bits, step = at_error(layer, "error", paper.error)
    gained_bits, _ = at_error(layer, "gained", paper.gained)
    times = seconds(layer, [ternary, CompressionSettings(grid="lattice", step=step)])
    return {
        "layer": f"{num_in}x{num_out}",
        "inputs": kind,
        "error": paper.error,
        "zeros": paper.zeros,
        "ternary bits": paper.bits,
        "lattice bits": bits,
        "ratio": bits / paper.bits,
        "step": step,
        "gained": paper.gained,
        "lattice bits, gained": gained_bits,
        "ratio, gained": gained_bits / paper.bits,
        "ternary s": times[0],
        "lattice s": times[1],
        "time": times[1] / times[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits at equal output error on made layers.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="write the table as JSON")
    arguments = parser.parse_args()
    machine = machine_facts()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{NUM_EXPERTS} experts; bits a weight, everything that is stored counted\n")
    widths = [max(10, len(column)) for column in COLUMNS]
    print(format_row(COLUMNS, widths))
    results = []
    for num_in, num_out in SHAPES:
        for kind in KINDS:
            results.append(measure(num_in, num_out, kind, arguments.seed))
            cells = [v if isinstance(v, str) else f"{v:.4f}" for v in results[-1].values()]
            print(format_row(cells, widths), flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"machine": machine, "results": results}, indent=2)


if __name__ == "__main__":
    main()
