"""Speed of generation with a KV cache, against a loop that recomputes the prefix at each step.

    python benchmarks/bench_generation.py

The demo's trained model, uncompressed and compressed to ternary by rounding (into a temporary
folder), greedy, no row ending early. The loop that recomputes is a fair one: compiled as a whole,
the encoder run once, one program for all positions (the prefix padded to the full length), logits
computed for the last position alone. Both give the same tokens, which is checked. Times are the
least of `--repeats`, without compilation, the two in turn.
"""

import argparse
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import qmoe_jax
from qmoe_jax.atomic_file import write_json
from qmoe_jax.formatting import format_row
from qmoe_jax.generation.beam_search import beam_generate
from qmoe_jax.generation.reference import greedy_generate_reference
from qmoe_jax.generation.sampling import greedy_generate
from qmoe_jax.generation.streaming import stream_tokens
from qmoe_jax.models.load import dequantized, load_switch

DEMO = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "switch_demo"
NEVER = -1  # an eos that no token is
WIDTHS = [13] * 6  # of the table's columns


def timed(function) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = np.asarray(function())
    return time.perf_counter() - start, result


def compare(module, variables, tokens, args) -> dict:
    """Tokens per second of the ways to generate, and the speed-up over recomputing."""
    keywords = {"max_decode_length": args.length, "eos_id": NEVER}
    ways = {
        "cache": lambda: greedy_generate(module, variables, tokens, **keywords),
        "recompute": lambda: greedy_generate_reference(module, variables, tokens, **keywords),
        "stream": lambda: np.stack(
            list(stream_tokens(module, variables, tokens, **keywords)), axis=1
        ),
        "beam4": lambda: beam_generate(module, variables, tokens, **keywords).tokens[:, -1],
    }
    least: dict[str, float] = {}
    outputs = {}
    for name, way in ways.items():
        least[name], outputs[name] = timed(way)  # compilation
    least = dict.fromkeys(least, float("inf"))
    for _ in range(args.repeats):
        for name, way in ways.items():
            least[name] = min(least[name], timed(way)[0])
    for name in ("recompute", "stream"):
        if not np.array_equal(outputs[name], outputs["cache"]):
            raise SystemExit(f"{name} gives other tokens than the cache: the comparison is void")
    count = tokens.shape[0] * args.length
    speeds = {f"{name}_tokens_per_second": count / seconds for name, seconds in least.items()}
    return {**speeds, "speed_up": least["recompute"] / least["cache"]}


def models(args):
    """The demo model in the ways in which it can be run, by name."""
    checkpoint = args.checkpoint or DEMO / "checkpoint_4200"
    yield "uncompressed", load_switch(checkpoint, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "compressed")
        qmoe_jax.compress(checkpoint, output, method="rtn", progress=False)
        compressed = load_switch(output, args.dtype)
    yield "ternary codes", compressed
    yield "dequantized", dequantized(*compressed, args.dtype)


def main():
    parser = argparse.ArgumentParser(description="Speed of generation.")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="native; the demo's where left out")
    parser.add_argument("--tokens", type=pathlib.Path, default=DEMO / "validation_tokens.npz")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=pathlib.Path, help="write the table as JSON")
    args = parser.parse_args()

    examples = np.load(args.tokens)["encoder_input_tokens"]
    examples = examples.reshape(-1, examples.shape[-1])[: args.batch]
    if len(examples) < args.batch:
        raise SystemExit(f"--batch is {args.batch}, but {args.tokens} has {len(examples)} examples")
    tokens = jnp.asarray(examples, jnp.int32)
    rows = []
    for name, (module, variables) in models(args):
        row = {"model": name, **compare(module, variables, tokens, args)}
        if not rows:
            print(f"{args.batch} prompts of {tokens.shape[1]} tokens, {args.length} generated")
            print(format_row([key.removesuffix("_tokens_per_second") for key in row], WIDTHS))
        rows.append(row)
        print(format_row([v if isinstance(v, str) else f"{v:.1f}" for v in row.values()], WIDTHS))
    print("tokens per second; speed_up is cache over recompute")
    if args.json:
        device = str(jax.devices()[0].device_kind)
        facts = {"device": device, "cpu_count": os.cpu_count(), "dtype": args.dtype}
        shape = {"batch": args.batch, "prompt_length": tokens.shape[1], "generated": args.length}
        write_json(args.json, {**facts, **shape, "rows": rows}, indent=2)


if __name__ == "__main__":
    main()
