"""Tokens a second of a model from codes, and of the same model dense in bfloat16, on a GPU.

    python benchmarks/gpu_generation.py --json benchmarks/results/gpu_generation.json

A synthetic model of random weights with the sparse layers of the public base-128 (768 x 3072,
128 experts, every other layer), `--layers` of each stack. Greedy, no row ends early. All run in
bfloat16 through the same module: experts dense in XLA's loop over those that tokens reach, or codes
by the CUDA kernels: `codes` as they are stored ("cuda"), and, of codings that can, `fragments` as
they may be laid out at loading ("cuda_fragments"). The rate is the median of `--repeats` runs,
without compilation, encoder included. What random weights generate means nothing; how long it takes
does.
Needs a CUDA device, CuPy and JAX; a bare checkout will do.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import gpu_bench
import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.atomic_file import write_json
from qmoe_jax.checkpoints import names
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.decode import device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.config import SwitchConfig
from qmoe_jax.formatting import format_row
from qmoe_jax.generation.sampling import greedy_generate
from qmoe_jax.models.moe import DERIVED
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.ops.cuda import kernels
from qmoe_jax.ops.cuda.fragments import derive_fragments

PROGRAM = "gpu_generation"
NEVER = -1  # an eos that no token is
WAYS = {"codes": "cuda", "fragments": "cuda_fragments"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--coding", default="lattice", choices=gpu_bench.CODINGS, help="default %(default)s"
    )
    parser.add_argument("--layers", type=int, default=4, help="of each stack; default %(default)s")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=32, help="tokens generated a row")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    gpu = gpu_bench.Gpu(gpu_bench.open_gpu(PROGRAM))
    sparse = tuple(range(1, options.layers, 2))
    config = SwitchConfig(
        num_embeddings=32128, embed_dim=768, mlp_dim=3072, expert_mlp_dim=3072, num_heads=12,
        head_dim=64, num_experts=options.experts, num_encoder_layers=options.layers,
        num_decoder_layers=options.layers, encoder_sparse_layers=sparse,
        decoder_sparse_layers=sparse, eval_capacity_factor=None,
    )  # fmt: skip
    dense = SwitchTransformer(config, jnp.bfloat16)
    dense_variables = {"params": random_params(dense)}
    models = {"dense": (dense, dense_variables)}
    for way, implementation in WAYS.items():
        if way == "codes" or get_coding(options.coding).grid in gpu_bench.FRAGMENT_GRIDS:
            models[way] = coded_model(
                gpu, config, dense_variables["params"], options.coding, implementation
            )
    sizes = {way: tree_bytes(variables) for way, (_, variables) in models.items()}
    results: dict[str, Any] = {
        **gpu.facts(),
        "layers": options.layers,
        "coding": options.coding,
        "bytes": sizes,
        "rates": [],
    }
    held = ", ".join(f"{way} {size / 1e9:.2f} GB" for way, size in sizes.items())
    print(f"{results['device']}, codes of {options.coding!r}: {held}")
    headings = ["batch", "length"]
    for way in models:
        headings += [f"{way}, tokens/s"] + ["faster"] * (way != "dense")
    widths = [max(8, len(heading)) for heading in headings]
    print(format_row(headings, widths))
    for batch in options.batches:
        rng = np.random.default_rng(batch)
        tokens = jnp.asarray(rng.integers(2, 32000, (batch, 64)), jnp.int32)
        rates: dict[str, float] = {}
        cells = [str(batch), str(options.length)]
        for way, (module, variables) in models.items():
            rates[way] = batch * options.length / seconds(module, variables, tokens, options)
            cells.append(f"{rates[way]:.0f}")
            if way != "dense":
                cells.append(f"{rates[way] / rates['dense']:.2f}x")
        results["rates"].append({"batch": batch, "length": options.length, **rates})
        print(format_row(cells, widths), flush=True)
        if options.json:
            write_json(options.json, results)


def summary(results: dict[str, Any]) -> list[str]:
    """A line for each batch."""
    lines = [f"tokens a second of generation, codes of {results['coding']!r}"]
    for rates in results["rates"]:
        parts = [f"{way} {rates[way]:.0f}" for way in results["bytes"]]
        lines.append(f"batch {rates['batch']}: {', '.join(parts)}")
    return lines


def seconds(module: Any, variables: Any, tokens: jax.Array, options: argparse.Namespace) -> float:
    """Median time of a run."""
    run = jax.jit(
        functools.partial(greedy_generate, module, max_decode_length=options.length, eos_id=NEVER)
    )
    jax.block_until_ready(run(variables, tokens))
    times = []
    for _ in range(options.repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(variables, tokens))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def random_params(module: SwitchTransformer) -> Any:
    """Parameters of the module, bfloat16, of about unit gain; routers and norms are float32."""
    one = jnp.ones((1, 4), jnp.int32)
    init = functools.partial(module.init, enable_dropout=False)
    shapes = names.flatten(jax.eval_shape(init, jax.random.key(0), one, one, one)["params"])
    flat = {}
    for number, (name, leaf) in enumerate(sorted(shapes.items())):
        key = jax.random.key(number)
        keeps = name.endswith("scale") or "/router/" in name
        if name.endswith("scale"):
            flat[name] = jnp.ones(leaf.shape, jnp.float32)
            continue
        size = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        draw = jax.random.normal(key, leaf.shape, jnp.float32 if keeps else jnp.bfloat16)
        flat[name] = draw * draw.dtype.type(size**-0.5)
    return names.unflatten(flat)


def coded_model(
    gpu: gpu_bench.Gpu, config: SwitchConfig, params: Any, coding: str, implementation: str
) -> tuple[SwitchTransformer, Any]:
    """The same with random codes of `gpu_bench.random_codes` for the experts' kernels."""
    flat = {k: v for k, v in names.flatten(params).items() if not names.is_expert_kernel(k)}
    wi, wo = config.expert_mlp_dim, config.embed_dim
    made = {
        out: random_experts(gpu, coding, out, width, config.num_experts, implementation)
        for out, width in ((wi, wo), (wo, wi))
    }
    coded, all_derived = [], {}
    for name in sorted(k for k in names.flatten(params) if names.is_expert_kernel(k)):
        kernel = name.removesuffix("/kernel")
        spec, arrays, derived = made[wo if kernel.endswith("/wo") else wi]
        flat |= {f"{kernel}/{key}": jnp.array(array) for key, array in arrays.items()}
        all_derived |= {f"{kernel}/{key}": jnp.array(array) for key, array in derived.items()}
        coded.append((kernel, spec))
    variables = {"params": names.unflatten(flat), DERIVED: names.unflatten(all_derived)}
    return SwitchTransformer(config, jnp.bfloat16, tuple(coded), implementation), variables


def random_experts(
    gpu: gpu_bench.Gpu, coding: str, out: int, width: int, num_experts: int, implementation: str
) -> tuple[TensorSpec, dict[str, np.ndarray], dict[str, Any]]:
    """Codes, a few experts again and again, and what kernels derive of them."""
    shape = (gpu_bench.UNIQUE_EXPERTS, out, width)
    some = encode(*gpu_bench.random_codes(coding, shape), coding)
    spec, arrays = gpu_bench.repeat_experts(some, num_experts)
    derived: dict[str, Any] = dict(kernels.derive(gpu.launcher, spec, arrays))
    if implementation == "cuda_fragments":
        stored = device_arrays(some)
        own = kernels.derive(gpu.launcher, some.spec, stored)
        found = derive_fragments(gpu.launcher, some.spec, stored, own)
        derived |= gpu_bench.repeat_fragments(found, num_experts // gpu_bench.UNIQUE_EXPERTS)
    return spec, arrays, derived


def tree_bytes(tree: Any) -> int:
    """Of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
