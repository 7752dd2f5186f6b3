"""Speed of batched GPTQ, against this machine's matrix product and against the original code.

    python benchmarks/bench_gptq.py
    python benchmarks/bench_gptq.py --peer ~/qmoe --peer_python ~/torch_env/bin/python

`--peer` is a checkout of github.com/IST-DASLab/qmoe; its `batch_gptq` runs in a subprocess, under
a Python that has torch, on the same kernels and Hessians. The kernels are rounded to bfloat16, so
that both sides see the same row extremes. Times are the least of all repeats (`median_...`: their
median), without compilation; both sides take turns, `--rounds` times, since a machine's own speed
varies. `--implementation xla` times the program of accelerators instead of what a CPU runs by
default.
"""

import argparse
import pathlib
import statistics
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.calibration.hessian import finalize_hessian, init_hessian, update_hessian
from qmoe_jax.formatting import format_row
from qmoe_jax.quantization.expert_batch import IMPLEMENTATIONS, quantize_experts
from qmoe_jax.quantization.grids import Ternary

# (experts, in, out): wi and wo of Switch base, and a square one.
SHAPES = ((8, 768, 768), (8, 768, 3072), (8, 3072, 768))
CHUNK = 1024  # tokens per Hessian update

# Runs the original on arrays of a folder. Its imports of transformers and CUDA are not needed.
PEER_SCRIPT = """
import sys, time, types
sys.modules["transformers"] = types.ModuleType("transformers")
import numpy, torch
torch.cuda.synchronize = lambda *args, **kwargs: None
sys.path.insert(0, sys.argv[1])
from gptq import batch_gptq
from quant import Quantizer
folder, repeats, device = sys.argv[2], int(sys.argv[3]), sys.argv[4]
weights = torch.from_numpy(numpy.load(folder + "/weights.npy")).to(device)
hessians = torch.from_numpy(numpy.load(folder + "/hessians.npy")).to(device)
seconds = []
for _ in range(repeats):
    quantizer = Quantizer()
    quantizer.configure(1.5)
    copy = hessians.clone()
    start = time.perf_counter()
    values = batch_gptq(weights, copy, quantizer).cpu()
    seconds.append(time.perf_counter() - start)
numpy.save(folder + "/values.npy", values.numpy())
numpy.save(folder + "/seconds.npy", numpy.array(seconds))
"""


def make_inputs(num_experts: int, num_in: int, num_out: int):
    """Kernels, Hessians and token counts: inputs are correlated, half of them also rectified."""
    keys = jax.random.split(jax.random.key(num_in * 7 + num_out), 4)
    kernels = jax.random.normal(keys[0], (num_experts, num_in, num_out)) / num_in**0.5
    kernels = kernels.astype(jnp.bfloat16).astype(jnp.float32)
    # A power-law spectrum, as of hidden states of a language model.
    mixing = jax.random.normal(keys[1], (num_in, num_in)) / num_in**0.5
    spectrum = jnp.arange(1, num_in + 1, dtype=jnp.float32) ** -0.5

    @jax.jit
    def make_tokens(key):
        tokens = jax.random.normal(key, (num_experts, CHUNK, num_in)) * spectrum
        tokens = tokens @ mixing + 0.02 * jax.random.normal(key, tokens.shape)
        rectified = jnp.arange(num_experts)[:, None, None] % 2 == 1
        return jnp.where(rectified, jax.nn.relu(tokens), tokens)

    state = init_hessian(num_experts, num_in)
    mask = jnp.ones((num_experts, CHUNK), bool)
    for key in jax.random.split(keys[2], 2 * num_in // CHUNK + 1):
        state = update_hessian(state, make_tokens(key), mask)
    return kernels, *finalize_hessian(state)


def seconds_of(function, repeats: int) -> list[float]:
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_gflops() -> float:
    """The ceiling: a square float32 product in full precision."""
    size = 2048
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return 2 * size**3 / min(seconds_of(lambda: product(a), 10)) / 1e9


def run_peer(args, kernels, hessians) -> tuple[list[float], np.ndarray]:
    """Seconds and values [experts, out, in] of the original."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/weights.npy", np.swapaxes(np.asarray(kernels), 1, 2).copy())
        np.save(f"{folder}/hessians.npy", np.asarray(hessians))
        subprocess.run(
            [
                *(args.peer_python, "-c", PEER_SCRIPT, str(args.peer)),
                *(folder, str(args.peer_repeats), args.peer_device),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return np.load(f"{folder}/seconds.npy").tolist(), np.load(f"{folder}/values.npy")


def bench(args, shape: tuple[int, int, int]) -> dict:
    num_experts, num_in, num_out = shape
    grid = Ternary()
    inputs = jax.block_until_ready(make_inputs(*shape))

    def run():
        return quantize_experts(
            *inputs, grid=grid, act_order=args.act_order, implementation=args.implementation
        )

    start = time.perf_counter()
    result = jax.block_until_ready(run())
    first = time.perf_counter() - start
    seconds = seconds_of(run, args.repeats)
    row = {}
    if args.peer:
        peer_runs = []
        for _ in range(max(1, args.rounds)):
            peer_runs.append(run_peer(args, inputs[0], inputs[1]))
            seconds += seconds_of(run, args.repeats)
        peer_seconds = [second for of_run, _ in peer_runs for second in of_run]
        peer_values = peer_runs[-1][1]
        dequantize = jax.vmap(lambda codes, levels: grid.dequantize(codes.T, levels).T)
        values = np.asarray(dequantize(result.codes, result.levels))
        row = {
            "peer_seconds": min(peer_seconds),
            "median_peer_seconds": statistics.median(peer_seconds),
            "speed_up": min(peer_seconds) / min(seconds),
            "median_speed_up": statistics.median(peer_seconds) / statistics.median(seconds),
            "agreement": float(np.mean(values == peer_values)),
        }
    ceiling = matmul_gflops()
    # The least work: a Cholesky factorisation, and one product of all columns with all errors.
    work = num_experts * (num_in**3 / 3 + num_in**2 * num_out)
    return {
        "experts": num_experts,
        "in": num_in,
        "out": num_out,
        "seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "weights_per_second": num_experts * num_in * num_out / min(seconds),
        "gflops": work / min(seconds) / 1e9,
        "matmul_gflops": ceiling,
        "compile_seconds": first - min(seconds),
        "statuses_not_ok": int(np.sum(np.asarray(result.status) != 0)),
        "zero_share": float(np.mean(np.asarray(result.zero_share))),
        **row,
    }


def main():
    parser = argparse.ArgumentParser(description="Speed of batched GPTQ.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--implementation", choices=(*IMPLEMENTATIONS, "auto"), default="auto")
    parser.add_argument("--act_order", action="store_true", help="time ours with act-order")
    parser.add_argument("--json", type=pathlib.Path, help="write the table as JSON")
    parser.add_argument("--peer", type=pathlib.Path, help="checkout of the original")
    parser.add_argument("--peer_python", default="python", help="a Python that has torch")
    parser.add_argument("--peer_repeats", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of ours and the original in turn")
    parser.add_argument("--peer_device", default="cpu")
    args = parser.parse_args()

    rows, widths = [], []
    for shape in SHAPES:
        row = bench(args, shape)
        rows.append(row)
        if len(rows) == 1:
            widths = [max(12, len(name)) for name in row]
            print(format_row(list(row), widths, num_left=0))
        cells = [f"{value:.6g}" for value in row.values()]
        print(format_row(cells, widths, num_left=0), flush=True)
    if args.json:
        results = {"machine": machine_facts(), "rows": rows}
        write_json(args.json, results, indent=2)


if __name__ == "__main__":
    main()
