"""Products with stored codes on the cores of a CPU, beside dense float32.

    python benchmarks/bench_cpu.py [--shapes 3072x768 ...] [--json PATH]

For every shape of the QMoE paper, rows x width, an expert is quantized to a lattice (a layer of
`bench_lattice` at c = 4) and, clipped to -1..1, stored as `tunstall` too; the others are copies of
it in memory of their own. Tokens go to one expert, another one at every call, or to each of many.
Before every call a buffer of several times the last-level cache is read, so weights are cold. Times
are the least of several calls, taken in turns with what they are compared with:

- codes: `compressed_product`, implementation "cpu", inside jax.jit, on one core and on all;
- dense: the same with float32 kernels (XLA), with bfloat16 kernels, and NumPy's product by expert;
- expand: implementation "xla" on the codes, for one token an expert.

`G weights/s` counts weights of the experts reached, zeros too, once a call.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from bench_lattice import quantized_layer
from machine import machine_facts

from qmoe_jax import host_threads
from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.decode import decode_expert_weights, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.ops.cpu.products import stored_product
from qmoe_jax.ops.experts import CodedExperts, DenseExperts, Experts
from qmoe_jax.ops.products import compressed_product

SHAPES = ((3072, 768), (768, 3072), (4096, 1024), (1024, 4096), (6144, 2080), (2080, 6144))
TOKENS = (1, 4, 8, 16, 64)
DENSE_BYTES = 2**30
"""Of float32 kernels: there are 64 experts, or as many as fit."""
EVICTED_BYTES = 2**27
Run = Callable[[], Any]


def copies(one: CodedTensor, count: int) -> CodedTensor:
    """The same expert so many times."""
    arrays = {name: np.concatenate([array] * count) for name, array in one.arrays.items()}
    words = one.arrays["words"].size
    arrays["words"] = np.tile(one.arrays["words"], count)
    arrays["expert_offsets"] = (words * np.arange(count + 1)).astype(np.int32)
    spec = one.spec.__class__(
        one.spec.coding, count, one.spec.rows, one.spec.width, one.spec.max_row_codewords
    )
    return CodedTensor(spec, arrays)


def coded_experts(rows: int, width: int, count: int) -> dict[str, CodedExperts]:
    codes, step_index, origin = quantized_layer(rows, width, 4.0, 0)
    levels = {"step_index": step_index[None], "origin": np.array([origin], np.float32)}
    ternary = np.where(codes == 0, 0, 2 - codes % 2).astype(np.uint8)
    pair = np.tile(np.array([-1, 1]), (1, rows, 1)).astype(ml_dtypes.bfloat16)
    found = {
        "lattice": encode(codes[None], levels, "lattice"),
        "tunstall": encode(ternary[None], pair, "tunstall"),
    }
    return {
        name: CodedExperts(copies(one, count).spec, device_arrays(copies(one, count)), width)
        for name, one in found.items()
    }


def product(x: jax.Array, index: jax.Array, experts: Experts, count: int, rows: int, name: str):
    if name == "one core":
        assert isinstance(experts, CodedExperts)
        return stored_product(x, index, experts, num_threads=1)
    return compressed_product(
        x, index, experts, num_experts=count, out_features=rows, implementation=name
    )


class Bench:
    """Runs of one shape."""

    def __init__(self, rows: int, width: int, repeats: int):
        self.rows, self.width, self.repeats = rows, width, repeats
        self.count = int(min(64, DENSE_BYTES // (4 * rows * width)))
        self.coded = coded_experts(rows, width, self.count)
        self.evicted = np.zeros(EVICTED_BYTES // 8)
        lattice = self.coded["lattice"]
        decode = jax.jit(decode_expert_weights, static_argnums=(0, 3))
        weights = decode(lattice.spec, lattice.arrays, 0, jnp.float32)
        self.weights = np.asarray(weights)
        kernel = jnp.tile(weights.T[None], (self.count, 1, 1))
        self.kernels = {"float32": kernel, "bfloat16": kernel.astype(jnp.bfloat16)}
        self.by_numpy = np.asarray(kernel)
        self.jitted: dict[str, Callable[..., jax.Array]] = {}

    def run(
        self, name: str, kind: str, experts: DenseExperts | CodedExperts
    ) -> Callable[..., jax.Array]:
        """The product with experts, compiled once; experts are operands, not constants."""
        if isinstance(experts, DenseExperts):
            key = f"dense {experts.kernel.dtype}"
            if key not in self.jitted:
                self.jitted[key] = jax.jit(
                    lambda x, index, k: product(
                        x, index, DenseExperts(k), self.count, self.rows, name
                    )
                )
            dense, kernel = self.jitted[key], experts.kernel
            return lambda x, index: dense(x, index, kernel)
        key = f"{kind} {name}"
        spec = experts.spec
        if key not in self.jitted:
            self.jitted[key] = jax.jit(
                lambda x, index, arrays: product(
                    x, index, CodedExperts(spec, arrays, self.width), self.count, self.rows, name
                )
            )
        coded, arrays = self.jitted[key], experts.arrays
        return lambda x, index: coded(x, index, arrays)

    def measure(self, tokens: int, reached: int) -> dict[str, Any]:
        """Time everything for so many tokens for each of the experts reached."""
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(tokens * reached, self.width)), jnp.float32)
        calls = iter(range(10**6))

        def index() -> jax.Array:
            if reached > 1:
                return jnp.asarray(np.repeat(np.arange(reached), tokens), jnp.int32)
            return jnp.full(tokens, next(calls) % self.count, jnp.int32)

        runs: dict[str, Callable[..., Any]] = {}
        for kind, experts in self.coded.items():
            runs[kind] = self.run("cpu", kind, experts)
            runs[f"{kind}, one core"] = self.run("one core", kind, experts)
            if tokens == 1:
                runs[f"{kind} expanded"] = self.run("xla", kind, experts)
        for kind, kernel in self.kernels.items():
            runs[f"dense {kind}"] = self.run("xla", kind, DenseExperts(kernel))
        runs["numpy"] = self.numpy_product
        seconds: dict[str, float] = {}
        for name, run in runs.items():
            y = np.asarray(run(x, index()))
            if not name.startswith(("tunstall", "dense bf")):
                expected = np.asarray(x) @ self.weights.T
                error = np.abs(y - expected).max() / np.abs(expected).max()
                assert error < 1e-5, f"{name}: {error}"
        by_numpy = runs.pop("numpy")
        for _ in range(self.repeats):
            for name, run in runs.items():
                repeats = 1 if "expanded" in name and reached > 1 else 2
                for _ in range(repeats):
                    seconds[name] = min(seconds.get(name, 1e9), self.timed(run, x, index()))
        # Apart: OpenBLAS's threads spin for some 10 ms after a product, and slow what is next.
        timings = [self.timed(by_numpy, x, index()) for _ in range(2 * self.repeats)]
        seconds["numpy"] = min(timings)
        time.sleep(0.1)
        weights = reached * self.rows * self.width
        return {
            "shape": [self.rows, self.width],
            "experts": reached,
            "tokens": tokens,
            "seconds": seconds,
            "G weights/s": {name: weights / taken / 1e9 for name, taken in seconds.items()},
        }

    def timed(self, run: Callable[..., Any], x: jax.Array, index: jax.Array) -> float:
        """Seconds of a call with cold weights."""
        jax.block_until_ready(index)
        self.evicted.sum()
        start = time.perf_counter()
        jax.block_until_ready(run(x, index))
        return time.perf_counter() - start

    def numpy_product(self, x: jax.Array, index: jax.Array) -> np.ndarray:
        """Multiply by NumPy, an expert at a time."""
        tokens, experts = np.asarray(x), np.asarray(index)
        y = np.empty((len(tokens), self.rows), np.float32)
        for expert in np.unique(experts):
            own = experts == expert
            y[own] = tokens[own] @ self.by_numpy[expert]
        return y


def overhead_seconds() -> dict[str, float]:
    """A call's way through XLA: a product of a block of 8 columns, beside x * 2."""
    experts = coded_experts(32, 8, 1)["lattice"]
    run = jax.jit(lambda x, i: product(x, i, experts, 1, 32, "cpu"))
    plain = jax.jit(lambda x, i: x * 2)
    operands = jnp.ones((1, 8)), jnp.zeros(1, jnp.int32)
    found = {}
    for name, function in (("product", run), ("x * 2", plain)):
        jax.block_until_ready(function(*operands))
        best = 1e9
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                jax.block_until_ready(function(*operands))
            best = min(best, (time.perf_counter() - start) / 50)
        found[name] = best
    return found


def copy_bytes_per_second() -> float:
    """Bytes read and written a second by a copy on one core."""
    source, target = np.zeros(EVICTED_BYTES // 8), np.zeros(EVICTED_BYTES // 8)
    best = 1e9
    for _ in range(8):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * EVICTED_BYTES / best


def main() -> None:
    parser = argparse.ArgumentParser(description="Products with codes on a CPU.")
    parser.add_argument("--shapes", nargs="+", default=[f"{r}x{w}" for r, w in SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": machine_facts(),
        "threads": host_threads.num_threads(),
        "copy bytes/s": copy_bytes_per_second(),
        "overhead seconds": overhead_seconds(),
        "products": [],
    }
    print({name: results[name] for name in ("machine", "copy bytes/s", "overhead seconds")})
    for shape in arguments.shapes:
        rows, width = map(int, shape.split("x"))
        bench = Bench(rows, width, arguments.repeats)
        for reached in (1, bench.count):
            for tokens in arguments.tokens:
                entry = bench.measure(tokens, reached)
                results["products"].append(entry)
                rates = entry["G weights/s"].items()
                print(
                    f"{shape} experts {reached} tokens {tokens}:",
                    ", ".join(f"{name} {rate:.2f}" for name, rate in rates),
                    flush=True,
                )
                if arguments.json is not None:
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    write_json(arguments.json, results, indent=2)
        del bench


if __name__ == "__main__":
    main()
