"""Codes that quantization really makes, for measuring codings: of models, and of made layers.

Models are compressed as `qmoe-jax compress` does, on calibration text (the demo's) or random tokens
(golden models of random weights). Layers are those of `bench_layers`: random weights whose rows and
columns differ in scale, GPTQ's sweep on inputs that are correlated.
"""

import pathlib
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_layers import make_layer, quantize
from jaxtyping import UInt8

from qmoe_jax.calibration.tokens import TokenFile, TokenMetadata, from_sequences
from qmoe_jax.checkpoints.compressed import CompressedCheckpoint
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.decode import decode_expert, device_arrays
from qmoe_jax.demo.docstrings import demo_tokens
from qmoe_jax.pipeline.compress import compress
from qmoe_jax.pipeline.stored_codes import encode_codes
from qmoe_jax.quantization.settings import CompressionSettings

GOLDEN = pathlib.Path(__file__).parent.parent / "tests/golden"
GRIDS = ("lattice", "ternary", "2bit")
SHAPES = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024))
"""(in, out) of made layers: Switch base's and large's."""


class Kernel(NamedTuple):
    """Codes of the experts of one kernel, and their levels as `codec.encode` takes them."""

    name: str
    coding: str
    codes: UInt8[np.ndarray, "experts rows width"]
    levels: Any


def compress_demo(output: pathlib.Path, grid: str) -> None:
    """Compress the demo's model by GPTQ on the demo's calibration text, at default settings."""
    tokens = demo_tokens(str(GOLDEN / "switch_demo/sentencepiece.model"), "train", 1280)
    source = GOLDEN / "switch_demo/checkpoint_4200"
    compress(source, output, tokens, grid=grid, progress=False)


def compress_golden(output: pathlib.Path, grid: str) -> None:
    """Compress a model of Switch XXL's kind: gated, eight experts of 64 x 160, random weights."""
    rng = np.random.default_rng(0)
    inputs = [np.append(rng.integers(3, 284, 63), 1) for _ in range(256)]
    targets = [np.append(rng.integers(3, 284, 31), 1) for _ in range(256)]
    batch = from_sequences(inputs, targets, inputs_length=64, targets_length=32)
    metadata = TokenMetadata(
        task="random",
        split="train",
        vocabulary_size=384,
        sentinel_first=284,
        sentinel_count=100,
        eos_id=1,
        seed=0,
        source="uniform ids",
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(GOLDEN / "switch_xxl/t5x.tar.xz") as tar:
            tar.extractall(folder, filter="data")
        source = f"{folder}/t5x_float32_inference/checkpoint_500100"
        compress(source, output, TokenFile(batch, metadata), grid=grid, progress=False)


MODELS: Mapping[str, Callable[[pathlib.Path, str], None]] = {
    "demo": compress_demo,
    "golden xxl": compress_golden,
}


def kernels_of(checkpoint: CompressedCheckpoint) -> Iterator[Kernel]:
    """Decode all kernels of a compressed checkpoint."""
    decode = jax.jit(decode_expert, static_argnums=0)
    for name, spec in checkpoint.specs.items():
        coded = checkpoint.read_coded(name)
        arrays = device_arrays(coded)
        codes = np.stack([np.asarray(decode(spec, arrays, e)) for e in range(spec.num_experts)])
        yield Kernel(name, spec.coding, codes, get_coding(spec.coding).levels_of(coded))


def made_kernels(grids: Sequence[str], num_experts: int, seed: int = 0) -> Iterator[Kernel]:
    """Quantize layers of SHAPES to the grids, with default settings."""
    for num_in, num_out in SHAPES:
        layer = make_layer(num_in, num_out, "correlated", seed, num_experts)
        for grid in grids:
            settings = CompressionSettings(grid=grid)
            result = quantize(layer, settings)
            levels = jax.tree.map(np.asarray, result.levels)
            if isinstance(levels, np.ndarray):
                levels = levels.astype(jnp.bfloat16)  # exact: grids round before they choose codes
            coded = encode_codes(np.asarray(result.codes), levels, settings.coding)
            stored = get_coding(settings.coding).levels_of(coded)
            name = f"{num_in}x{num_out}"
            yield Kernel(name, settings.coding, np.asarray(result.codes), stored)


def signed_codes(kernel: Kernel) -> tuple[UInt8[np.ndarray, "experts rows width"], np.ndarray]:
    """Return codes as lattice codes are, and step indices, for `adaptive_bound`.

    Codes of 2 bits count from their row's zero: 0, then -1, 1, -2, ... Ternary ones are so already,
    low being -1. Neither has steps.
    """
    codes = kernel.codes
    if isinstance(kernel.levels, Mapping):
        return codes, np.asarray(kernel.levels["step_index"])
    if get_coding(kernel.coding).grid == "2bit":
        zeros = np.asarray(kernel.levels, np.float32)[..., 1:].astype(np.int64)
        multiples = codes.astype(np.int64) - zeros
        codes = np.where(multiples < 0, -2 * multiples - 1, 2 * multiples).astype(np.uint8)
    return codes, np.zeros((codes.shape[0], codes.shape[2]), np.uint8)
