"""How large a compressed checkpoint will be, from geometry and the expected share of zeros.

A sample of independent codes with that share is encoded by the very coders of `codec/`; nothing is
fitted. What independence leaves out is a factor that was measured on real codes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import Shape
from qmoe_jax.checkpoints.packed_arrays import PACKED_BYTES
from qmoe_jax.codec import codings
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits_by_part
from qmoe_jax.codec.tensor import Levels
from qmoe_jax.config import SwitchConfig
from qmoe_jax.pipeline.bit_budget import coded_names, dense_bytes
from qmoe_jax.quantization.groups import stored_shape
from qmoe_jax.quantization.settings import CompressionSettings

# Zero share of GPTQ's codes by (grid, embed_dim) of base-128, large-128 and c-2048, as the QMoE
# paper reports it (arXiv 2310.16795, "Natural sparsity for different compressed models"; means over
# all layers, standard deviation under 5 %).
PAPER_ZERO_SHARES = {
    "ternary": {768: 0.857, 1024: 0.864, 2080: 0.886},
    "2bit": {768: 0.722, 1024: 0.731, 2080: 0.765},
}
_PAPER_MODELS = {(768, 128): "base-128", (1024, 128): "large-128", (2080, 2048): "c-2048"}

# Bits that real codes take, over bits of independent codes with the same zero share. "qmoe": the
# paper's section 4.3.2 has both on c-2048, 20.07x and 21.11x, each with 64 bits a row beside the
# codes: its fixed dictionary pays for zero shares that differ between tensors and rows. The others
# have 1: so measured on GPTQ's codes of the demo's model, whose tensors a coding of several
# dictionaries fits.
_ROW_BITS = 64 / 2 * (1 / 2080 + 1 / 6144)
REAL_OVER_INDEPENDENT = {
    "qmoe": (16 / 20.07 - _ROW_BITS) / (16 / 21.11 - _ROW_BITS),
}

# How non-zero 2-bit codes fall on the two values beside zero and the fourth, in GPTQ's codes of the
# demo's model.
_TWO_BIT_NONZERO = (0.537, 0.444, 0.019)
_TWO_BIT_CODES = np.array([[1, 2, 0, 3], [2, 1, 3, 0]], np.uint8)  # by the row's zero

# Arrays beside codes that have entries for rows, or for blocks of rows.
_GROWING_WITH_ROWS = ("levels", "row_lengths", "block_lengths")

_OFFSET_BYTES = 4  # behind the last expert of a kernel
_METADATA_BYTES = 4096  # of an array: its .zarray and its part of the manifest, at the most
# What the demo's compressed model has: of the manifest for each array, and of .zarray for each
# that is not packed.
_MANIFEST_BYTES, _ZARRAY_BYTES = 300, 180
PARTS: tuple[str, ...] = ("codes", "signs", "levels", "lengths")
"""Of what experts take: signs where a coding stores them apart; steps are levels."""
_SAMPLE_WEIGHTS = 1 << 20
_SAMPLE_EXPERTS = 2
_PUBLISHED_ROW_BITS = 32 + 32  # an int32 offset, two bfloat16 levels
_PUBLISHED_EXPERT_BITS = 32  # the offset behind the last row


@dataclasses.dataclass(frozen=True)
class ZeroShare:
    """Expected codes of a grid.

    Attributes:
      value: share of zero weights.
      source: where the figure is from.
      nonzero: how the others fall on the symbols of 2-bit codes: the two values beside zero, and
        the fourth.
      bits: stored for a weight of the lattice, everything counted; None where the share of zeros is
        all that is known.
    """

    value: float
    source: str
    nonzero: tuple[float, float, float] = _TWO_BIT_NONZERO
    bits: float | None = None


@dataclasses.dataclass(frozen=True)
class CompressedSize:
    """A compressed model in bytes.

    Attributes:
      layout: name of a coding, or "published" for the paper's own files.
      experts: codes, levels and lengths of all experts that are compressed.
      dense: everything else.
      expert_weights: parameters in those experts.
      parameters: parameters of the model.
      bfloat16_bytes: the uncompressed model in bfloat16, in the same layout.
      parts: what `experts` consists of, by PARTS; empty of the published layout.
      container: beside all this: manifest and metadata of arrays; 0 of the published layout.
    """

    layout: str
    experts: int
    dense: int
    expert_weights: int
    parameters: int
    bfloat16_bytes: int
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    container: int = 0

    @property
    def total(self) -> int:
        """Bytes of the whole model."""
        return self.experts + self.dense

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of an expert weight, everything counted."""
        return 8 * self.experts / self.expert_weights

    @property
    def expert_compression(self) -> float:
        """Experts in bfloat16 over experts here."""
        return 16 / self.bits_per_weight

    @property
    def model_compression(self) -> float:
        """Model in bfloat16 over model here."""
        return self.bfloat16_bytes / self.total


def zero_share(config: SwitchConfig, grid: str, bits: float | None = None) -> ZeroShare:
    """Return the paper's zero share for its three models; for others that of the nearest width.

    Args:
      config: geometry.
      grid: "ternary" or "2bit"; or
        "lattice": codes of one step up or down whose entropy is so many bits.
      bits: stored for a weight of the lattice.
    """
    if grid == "lattice":
        assert bits is not None
        return ZeroShare(_zeros_of_bits(bits), f"codes of {bits:.2f} bits a weight", bits=bits)
    shares = PAPER_ZERO_SHARES[grid]
    width = min(shares, key=lambda known: abs(math.log(known / config.embed_dim)))
    known = {w: name for (w, _), name in _PAPER_MODELS.items()}[width]
    if (config.embed_dim, config.num_experts) in _PAPER_MODELS:
        return ZeroShare(shares[width], f"the QMoE paper's for {known}")
    return ZeroShare(shares[width], f"assumed: the QMoE paper's for {known}, nearest in width")


def _zeros_of_bits(bits: float) -> float:
    """Return the zero share at which codes 0, and 1 and 2 alike, have this entropy."""
    low, high = 1 / 3, 1 - 1e-9
    for _ in range(50):
        zeros = (low + high) / 2
        entropy = -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)
        low, high = (zeros, high) if entropy > bits else (low, zeros)
    return low


def expert_kernel_shapes(config: SwitchConfig) -> dict[str, tuple[int, int]]:
    """Return (out, in) of each kernel of an expert, in the orientation of the codec."""
    embed, mlp = config.embed_dim, config.expert_mlp_dim
    return {name: (mlp, embed) for name in config.wi_names} | {"wo": (embed, mlp)}


def layer_settings(
    config: SwitchConfig, settings: CompressionSettings
) -> dict[tuple[str, int], CompressionSettings]:
    """Return the settings of each sparse layer."""
    return {at: settings.for_layer(*at) for at in config.sparse_layers}


def layer_bytes(
    config: SwitchConfig, settings: CompressionSettings, zeros: Mapping[str, ZeroShare]
) -> float:
    """Estimate the coded bytes of all experts of one sparse layer; see `layer_parts`."""
    return sum(layer_parts(config, settings, zeros).values())


def layer_parts(
    config: SwitchConfig, settings: CompressionSettings, zeros: Mapping[str, ZeroShare]
) -> dict[str, float]:
    """Estimate the coded bytes of all experts of one sparse layer, by PARTS.

    Args:
      config: geometry.
      settings: of the layer.
      zeros: what codes are expected, by grid.
    """
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    if settings.method == "none":
        return found
    for out, width in expert_kernel_shapes(config).values():
        rows, row_width = stored_shape(width, out, settings.group_size)
        own = _expert_bits(settings.coding, rows, row_width, zeros[settings.grid])
        for part in PARTS:
            found[part] += config.num_experts * own[part] / 8
    return found


def most_layer_bytes(config: SwitchConfig, settings: CompressionSettings) -> int:
    """Bound the coded bytes of all experts of one sparse layer, whatever their weights.

    Args:
      config: geometry.
      settings: of the layer.
    """
    if settings.method == "none":
        return 0
    coding = codings.get_coding(settings.coding)
    total = 0
    for out, width in expert_kernel_shapes(config).values():
        rows = stored_shape(width, out, settings.group_size)
        total += config.num_experts * coding.most_bytes(*rows) + _OFFSET_BYTES
    return total


def most_output_bytes(
    config: SwitchConfig,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    settings: CompressionSettings,
) -> int:
    """Bound the bytes of all files of the checkpoint that `compress` writes; see its arguments."""
    layers = layer_settings(config, settings)
    coded = sum(most_layer_bytes(config, own) for own in layers.values())
    dense = dense_bytes(shapes, dtypes, config, settings)
    arrays = _num_coded_arrays(config, settings) + len(shapes)
    return coded + dense + arrays * _METADATA_BYTES


def _num_coded_arrays(config: SwitchConfig, settings: CompressionSettings) -> int:
    coded = [own for own in layer_settings(config, settings).values() if own.method != "none"]
    stored = sum(len(codings.get_coding(own.coding).array_names) for own in coded)
    return stored * len(expert_kernel_shapes(config))


def container_bytes(
    config: SwitchConfig, shapes: Mapping[str, Shape], settings: CompressionSettings
) -> int:
    """Estimate what manifest and metadata of arrays take; see `compressed_size`."""
    coded = coded_names(config, settings)
    large = [name for name, shape in shapes.items() if 2 * math.prod(shape) >= PACKED_BYTES]
    arrays = _num_coded_arrays(config, settings) + len(shapes) - len(coded)
    return _MANIFEST_BYTES * arrays + _ZARRAY_BYTES * (len(large) + 2)


def _expert_bits(coding: str, out: int, width: int, zeros: ZeroShare) -> dict[str, float]:
    """Bits of an expert, by PARTS."""
    sample = sample_bits(coding, out, width, zeros.value, zeros.nonzero)
    codes = out * width * sample.codes_per_weight * REAL_OVER_INDEPENDENT.get(coding, 1.0)
    levels = out * sample.levels_per_row + sample.levels_per_expert
    lengths = out * sample.per_row + sample.per_expert - levels
    if zeros.bits is not None:
        # The whole is known. Steps and lengths are as many whatever the codes are.
        total = out * width * zeros.bits
        share = min(1.0, total / (levels + lengths))
        levels, lengths = share * levels, share * lengths
        codes = total - levels - lengths
    signs = codes * sample.signs
    return {"codes": codes - signs, "signs": signs, "levels": levels, "lengths": lengths}


@dataclasses.dataclass(frozen=True)
class SampleBits:
    """What a coding stores of independent codes: bits a weight, a row and an expert.

    Attributes:
      codes_per_weight: of the array of codes.
      per_row: of the other arrays that grow with the number of rows.
      per_expert: of the others.
      levels_per_row: the part of `per_row` that is levels.
      levels_per_expert: the part of `per_expert` that is levels.
      signs: share of the array of codes that is signs.
    """

    codes_per_weight: float
    per_row: float
    per_expert: float
    levels_per_row: float
    levels_per_expert: float
    signs: float


@functools.lru_cache(maxsize=256)
def sample_bits(
    coding: str,
    out: int,
    width: int,
    zeros: float,
    nonzero: tuple[float, float, float] = _TWO_BIT_NONZERO,
) -> SampleBits:
    """Encode a fixed sample of independent codes; cached in the process.

    Args:
      coding: one of `codec.codings.coding_names()`.
      out: rows of an expert; fewer are sampled where that would be over a million weights.
      width: weights in a row.
      zeros: share of zeros.
      nonzero: see `ZeroShare`.
    """
    rows = max(1, min(out, _SAMPLE_WEIGHTS // (_SAMPLE_EXPERTS * width)))
    codes, levels = _independent_codes(coding, rows, width, zeros, nonzero)
    coded = encode(codes, levels, coding)
    kinds = codings.get_coding(coding).array_kinds
    found: dict[tuple[str, bool], int] = {}
    for name, array in coded.arrays.items():
        key = (kinds[name], name in _GROWING_WITH_ROWS)
        found[key] = found.get(key, 0) + 8 * array.nbytes
    in_codes = sum(n for (kind, _), n in found.items() if kind == "codes")
    by_row = sum(n for (kind, grows), n in found.items() if grows and kind != "codes")
    by_expert = sum(found.values()) - in_codes - by_row
    signs = bits_by_part(coded).get("signs", 0)
    return SampleBits(
        codes_per_weight=in_codes / codes.size,
        per_row=by_row / (_SAMPLE_EXPERTS * rows),
        per_expert=by_expert / _SAMPLE_EXPERTS,
        levels_per_row=found.get(("levels", True), 0) / (_SAMPLE_EXPERTS * rows),
        levels_per_expert=found.get(("levels", False), 0) / _SAMPLE_EXPERTS,
        signs=signs / in_codes if in_codes else 0.0,
    )


def _independent_codes(
    coding: str, rows: int, width: int, zeros: float, nonzero: tuple[float, float, float]
) -> tuple[np.ndarray, Levels]:
    """Codes uint8 [experts, rows, width] and levels, of a fixed seed."""
    rng = np.random.default_rng(0)
    draws = rng.random((_SAMPLE_EXPERTS, rows, width))
    levels = np.ones((_SAMPLE_EXPERTS, rows, 2))
    grid = codings.get_coding(coding).grid
    if grid == "lattice":  # ones alone: what larger multiples take is within the estimate's error
        codes = (draws >= zeros).astype(np.uint8) + (draws >= (1 + zeros) / 2)
        steps = np.zeros((_SAMPLE_EXPERTS, width), np.uint8)
        return codes, {"step_index": steps, "origin": np.ones(_SAMPLE_EXPERTS, np.float32)}
    if grid == "ternary":
        codes = (draws >= zeros).astype(np.uint8) + (draws >= (1 + zeros) / 2)
    else:
        shares = [zeros, *(zeros + (1 - zeros) * np.cumsum(nonzero)[:2])]
        levels[..., 1] = rng.integers(1, 3, levels.shape[:2])
        codes = _TWO_BIT_CODES[levels[..., 1, None].astype(int) - 1, np.searchsorted(shares, draws)]
    return codes.astype(np.uint8), levels.astype(ml_dtypes.bfloat16)


def compressed_size(
    config: SwitchConfig,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    settings: CompressionSettings,
    zeros: Mapping[str, ZeroShare],
) -> CompressedSize:
    """Return the checkpoint that `compress` writes.

    Args:
      config: geometry.
      shapes: of all parameters.
      dtypes: name of each parameter's dtype in the source.
      settings: of the run.
      zeros: what codes are expected, by grid.
    """
    coded = [own for own in layer_settings(config, settings).values() if own.method != "none"]
    weights = sum(math.prod(shapes[name]) for name in coded_names(config, settings))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    layers = [layer_parts(config, own, zeros) for own in coded]
    return CompressedSize(
        layout=" + ".join(sorted({own.coding for own in coded})),
        experts=round(sum(sum(own.values()) for own in layers)),
        dense=dense_bytes(shapes, dtypes, config, settings),
        expert_weights=weights,
        parameters=parameters,
        bfloat16_bytes=2 * parameters,
        parts={part: round(sum(own[part] for own in layers)) for part in PARTS},
        container=container_bytes(config, shapes, settings),
    )


def published_size(
    config: SwitchConfig, shapes: Mapping[str, Shape], zeros: float
) -> CompressedSize:
    """Return the paper's own files: coding "qmoe" with row offsets, all else in bfloat16.

    `checkpoints/published.py` describes the layout. Hugging Face's models, from which it is made,
    hold a matrix of output logits also where ours take the embedding.
    """
    bits = 0.0
    for out, width in expert_kernel_shapes(config).values():
        codes = sample_bits("qmoe", out, width, zeros).codes_per_weight
        codes *= REAL_OVER_INDEPENDENT["qmoe"]
        bits += out * (width * codes + _PUBLISHED_ROW_BITS) + _PUBLISHED_EXPERT_BITS
    experts = len(config.sparse_layers) * config.num_experts * bits / 8
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    weights = sum(size for name, size in sizes.items() if names.is_expert_kernel(name))
    parameters = sum(sizes.values())
    copies = config.num_embeddings * config.embed_dim if config.tied_logits else 0
    return CompressedSize(
        layout="published",
        experts=round(experts),
        dense=2 * (parameters - weights + copies),
        expert_weights=weights,
        parameters=parameters,
        bfloat16_bytes=2 * (parameters + copies),
    )
