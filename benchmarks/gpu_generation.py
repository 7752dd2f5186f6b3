"""Tokens a second of a model from codes, and of the same model dense in bfloat16, on a GPU.

    python benchmarks/gpu_generation.py --json benchmarks/results/gpu_generation.json

A synthetic model of random weights with the sparse layers of the public base-128 (768 x 3072,
128 experts, every other layer), `--layers` of each stack. Greedy, no row ends early. Both run in
bfloat16 through the same module: experts dense in XLA's loop over those that tokens reach, or codes
by the CUDA kernels. The rate is the median of `--repeats` runs, without compilation, encoder
included. What random weights generate means nothing; how long it takes does.
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
from qmoe_jax.codec.encode import encode
from qmoe_jax.config import SwitchConfig
from qmoe_jax.formatting import format_row
from qmoe_jax.generation.sampling import greedy_generate
from qmoe_jax.models.moe import DERIVED
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.ops.experts import find_row_block_starts

PROGRAM = "gpu_generation"
NEVER = -1  # an eos that no token is
UNIQUE_EXPERTS = 4
WIDTHS = [8, 8, 18, 18, 10]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
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
    coded, coded_variables = coded_model(config, dense_variables["params"])
    sizes = {"dense": tree_bytes(dense_variables), "codes": tree_bytes(coded_variables)}
    results: dict[str, Any] = {**gpu.facts(), "layers": options.layers, "bytes": sizes, "rates": []}
    print(f"{results['device']}: dense {sizes['dense'] / 1e9:.2f} GB, codes "
          f"{sizes['codes'] / 1e9:.2f} GB")  # fmt: skip
    print(format_row(["batch", "length", "dense, tokens/s", "codes, tokens/s", "faster"], WIDTHS))
    for batch in options.batches:
        rng = np.random.default_rng(batch)
        tokens = jnp.asarray(rng.integers(2, 32000, (batch, 64)), jnp.int32)
        rates = {
            name: batch * options.length / seconds(module, variables, tokens, options)
            for name, module, variables in (
                ("dense", dense, dense_variables),
                ("codes", coded, coded_variables),
            )
        }
        results["rates"].append({"batch": batch, "length": options.length, **rates})
        cells = [str(batch), str(options.length), f"{rates['dense']:.0f}", f"{rates['codes']:.0f}"]
        print(format_row([*cells, f"{rates['codes'] / rates['dense']:.2f}x"], WIDTHS), flush=True)
        if options.json:
            write_json(options.json, results)


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


def coded_model(config: SwitchConfig, params: Any) -> tuple[SwitchTransformer, Any]:
    """The same with random codes of `gpu_bench.random_codes` for the experts' kernels."""
    flat = {k: v for k, v in names.flatten(params).items() if not names.is_expert_kernel(k)}
    coded, derived = [], {}
    made = {}
    wi, wo = config.expert_mlp_dim, config.embed_dim
    for out, width in ((wi, wo), (wo, wi)):
        made[out] = encode(
            *gpu_bench.random_codes("tunstall", (UNIQUE_EXPERTS, out, width)), "tunstall"
        )
    for name in sorted(k for k in names.flatten(params) if names.is_expert_kernel(k)):
        kernel = name.removesuffix("/kernel")
        some = made[config.embed_dim if kernel.endswith("/wo") else config.expert_mlp_dim]
        spec, arrays = gpu_bench.repeat_experts(some, config.num_experts)
        on_device = {key: jnp.array(array) for key, array in arrays.items()}
        flat |= {f"{kernel}/{key}": array for key, array in on_device.items()}
        derived[f"{kernel}/row_block_starts"] = find_row_block_starts(spec, on_device)
        coded.append((kernel, spec))
    variables = {"params": names.unflatten(flat), DERIVED: names.unflatten(derived)}
    return SwitchTransformer(config, jnp.bfloat16, tuple(coded), "cuda"), variables


def tree_bytes(tree: Any) -> int:
    """Of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
