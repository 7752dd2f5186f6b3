"""Peak host memory and speed of whole compression runs, small model against large.

    python benchmarks/bench_engine.py --json benchmarks/results/engine.json

Writes two synthetic native checkpoints (embed 512, expert MLP 2048, bfloat16): 32 experts in 2
sparse layers, and 128 experts in 8. Each is compressed in a process of its own, on the same tokens
with the same settings. The engine streams: peak memory should not depend on the size of the model,
only on the hidden states and on a few batches of experts. The ceiling of the speed is the least
work of GPTQ (a Cholesky factorisation, a product of all columns with all errors, the Hessians) at
this machine's measured float32 product.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from qmoe_jax.atomic_file import write_json
from qmoe_jax.calibration.tokens import TokenMetadata, from_sequences, write_tokens
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.config import SwitchConfig
from qmoe_jax.formatting import format_table

EMBED, MLP, HEADS, VOCAB = 512, 2048, 8, 1024
# (experts, layers a stack); every second layer is sparse.
SIZES = {"small": (32, 2), "large": (128, 8)}
SETTINGS = {"expert_batch": 8, "batch_size": 16, "token_chunk": 256}

RUN = """
import json, sys
import qmoe_jax
job = json.loads(sys.argv[1])
report = qmoe_jax.compress(
    job["checkpoint"], job["output"], job["tokens"], log=job["log"], **job["settings"])
print(json.dumps(report.to_json()))
"""


def config_of(num_experts: int, num_layers: int) -> SwitchConfig:
    sparse = tuple(range(1, num_layers, 2))
    return SwitchConfig(
        num_embeddings=VOCAB,
        embed_dim=EMBED,
        num_heads=HEADS,
        head_dim=EMBED // HEADS,
        mlp_dim=MLP,
        expert_mlp_dim=MLP,
        num_experts=num_experts,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        encoder_sparse_layers=sparse,
        decoder_sparse_layers=sparse,
    )


def write_checkpoint(folder: pathlib.Path, config: SwitchConfig) -> pathlib.Path:
    """Random weights of the scale of an initialised model."""
    rng = np.random.default_rng(0)
    writer = T5XCheckpointWriter(folder, 1)
    for name, shape in parameter_shapes(config).items():
        router = "/router/" in name
        dtype = "float32" if router else "bfloat16"
        writer.create(name, shape, dtype)
        length = shape[:1][0]
        step = 8 if names.is_expert_kernel(name) else length
        for start in range(0, length, step):
            part = (min(step, length - start), *shape[1:])
            if name.endswith("/scale"):
                values = np.ones(part, np.float32)
            else:
                fan_in = int(np.prod(shape[-2:-1], dtype=np.int64))
                values = rng.standard_normal(part, np.float32) * fan_in**-0.5
            writer.write(name, values.astype(dtype if router else ml_dtypes.bfloat16), start)
    return writer.finish()


def write_calibration(path: pathlib.Path, num_examples: int) -> None:
    rng = np.random.default_rng(1)
    inputs = [rng.integers(3, VOCAB - 100, 128) for _ in range(num_examples)]
    targets = [rng.integers(3, VOCAB - 100, 32) for _ in range(num_examples)]
    batch = from_sequences(inputs, targets, inputs_length=128, targets_length=32)
    metadata = TokenMetadata(
        task="random",
        split="train",
        vocabulary_size=VOCAB,
        sentinel_first=VOCAB - 100,
        sentinel_count=100,
        eos_id=1,
        seed=1,
        source="benchmarks/bench_engine.py",
    )
    write_tokens(path, batch, metadata)


def matmul_gflops() -> float:
    """In a process of its own: this one stays small."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench_gptq; "
        "print(bench_gptq.matmul_gflops())"
    )
    here = str(pathlib.Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", code, here], check=True, capture_output=True, text=True
    )
    return float(result.stdout)


def folder_bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(name: str, folder: pathlib.Path, num_examples: int, method: str) -> dict:
    num_experts, num_layers = SIZES[name]
    config = config_of(num_experts, num_layers)
    checkpoint = write_checkpoint(folder / name, config)
    tokens = folder / "tokens.npz"
    write_calibration(tokens, num_examples)
    log = folder / f"{name}.jsonl"
    job = {
        "checkpoint": str(checkpoint),
        "output": str(folder / f"{name}.compressed"),
        "tokens": str(tokens),
        "log": str(log),
        "settings": {**SETTINGS, "method": method},
    }
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(job)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
    )
    seconds = time.monotonic() - started
    report = json.loads(process.stdout.splitlines()[-1])
    layers = [json.loads(line) for line in log.read_text().splitlines()]
    layers = [layer for layer in layers if layer["event"] == "layer"]
    sparse = len(config.sparse_layers)
    rows = num_examples * (128 + 32)
    per_expert = EMBED**3 / 3 + MLP**3 / 3 + EMBED**2 * MLP + MLP**2 * EMBED
    hessians = 2 * rows / 2 * (EMBED**2 + MLP**2) * sparse
    result = {
        "experts": num_experts,
        "sparse_layers": sparse,
        "expert_parameters": num_experts * sparse * 2 * EMBED * MLP,
        "checkpoint_bytes": folder_bytes(checkpoint),
        "compressed_bytes": folder_bytes(folder / f"{name}.compressed"),
        "bits_per_weight": report["bits_per_weight"],
        "peak_host_bytes": report["peak_host_bytes"],
        "bytes_read": report["bytes_read"],
        "peak_host_bytes_by_layer": [layer["peak_host_bytes"] for layer in layers],
        "hidden_state_bytes": rows * EMBED * 4,
        "seconds": seconds,
        "expert_seconds": sum(layer["seconds"] for layer in layers),
        "read_seconds": sum(layer["read_seconds"] for layer in layers),
        "experts_per_second": num_experts * sparse / sum(layer["seconds"] for layer in layers),
        "least_flops": num_experts * sparse * per_expert + hessians,
    }
    shutil.rmtree(folder / name)
    shutil.rmtree(folder / f"{name}.compressed")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of compression runs.")
    parser.add_argument("--json", type=pathlib.Path, help="write the results as JSON")
    parser.add_argument("--num_examples", type=int, default=256)
    parser.add_argument("--method", default="gptq", help="rtn is quicker, and needs less memory")
    parser.add_argument("--folder", type=pathlib.Path, help="for the checkpoints (5 GB)")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in SIZES:
            results[name] = run(name, pathlib.Path(folder), args.num_examples, args.method)
    gflops = matmul_gflops()
    for result in results.values():
        result["gflops"] = result["least_flops"] / result["expert_seconds"] / 1e9
    units = {"bytes": (2**20, "MiB"), "seconds": (1, "s")}
    rows = [["", *SIZES, "unit"]]
    for key in results["small"]:
        if isinstance(results["small"][key], list):
            continue
        scale, unit = next((u for end, u in units.items() if key.endswith(end)), (1, ""))
        rows.append([key, *(f"{results[name][key] / scale:,.2f}" for name in SIZES), unit])
    print(format_table(rows))
    ratio = results["large"]["peak_host_bytes"] / results["small"]["peak_host_bytes"]
    grown = results["large"]["checkpoint_bytes"] / results["small"]["checkpoint_bytes"]
    print(f"\npeak memory of large over small: {ratio:.3f}; checkpoint: {grown:.1f}")
    print(f"float32 product of this machine (the ceiling): {gflops:.1f} GFLOP/s")
    if args.json:
        content = {
            "device": f"CPU, {os.cpu_count()} cores",
            "settings": {**SETTINGS, "method": args.method},
            "num_examples": args.num_examples,
            "matmul_gflops": gflops,
            "peak_memory_ratio": ratio,
            **results,
        }
        write_json(args.json, content)
    if ratio > 1.1:
        sys.exit(f"peak memory grew by {ratio - 1:.1%} with the model; at most 10 % is the aim")


if __name__ == "__main__":
    main()
