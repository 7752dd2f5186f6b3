"""What a plan is made from: a model known by its metadata, and how many tokens will flow."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from qmoe_jax.calibration.sample_batches import padded_length
from qmoe_jax.calibration.tokens import TokenFile
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import Shape, parameter_shapes
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import T5XCheckpoint, open_t5x_checkpoint
from qmoe_jax.codec.outline import item_bytes
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import TokensError
from qmoe_jax.pipeline.kernel_reader import MAX_CACHE_BYTES
from qmoe_jax.pipeline.samples import Samples
from qmoe_jax.planning.public_checkpoints import PublicCheckpoint
from qmoe_jax.quantization.settings import CompressionSettings


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """A native checkpoint as its metadata describe it.

    Attributes:
      name: folder, or name in the registry.
      config: geometry.
      shapes: shape of every parameter.
      dtypes: name of its dtype.
      chunks: shape of its chunks; None where no checkpoint was opened.
      source: the checkpoint; None where none was opened.
    """

    name: str
    config: SwitchConfig
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    chunks: Mapping[str, Shape] | None
    source: T5XCheckpoint | None = None

    @classmethod
    def from_checkpoint(cls, path: str) -> "ModelFacts":
        """Open a native checkpoint and read its metadata, no weight.

        Raises:
          CheckpointError: no readable Switch checkpoint there.
        """
        source = open_t5x_checkpoint(path)
        return cls(
            name=source.url,
            config=read_config(source),
            shapes=source.shapes,
            dtypes=source.dtype_names,
            chunks={name: source.chunk_shape(name) for name in source.names},
            source=source,
        )

    @classmethod
    def from_registry(
        cls, entry: PublicCheckpoint, dtype: Literal["float32", "bfloat16"]
    ) -> "ModelFacts":
        """Describe a public checkpoint; its stored dtype is assumed, its chunks are unknown."""
        shapes = parameter_shapes(entry.config)
        return cls(entry.name, entry.config, shapes, dict.fromkeys(shapes, dtype), None)

    @property
    def expert_names(self) -> list[str]:
        """Names of the expert kernels."""
        return [name for name in self.shapes if names.is_expert_kernel(name)]

    def num_parameters(self) -> dict[str, int]:
        """Count parameters in `experts` and in all (`total`)."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return {
            "experts": sum(sizes[name] for name in self.expert_names),
            "total": sum(sizes.values()),
        }

    def num_bytes(self) -> dict[str, int]:
        """Count the arrays' bytes by dtype, before the storage's own compression."""
        totals: dict[str, int] = {}
        for name, shape in self.shapes.items():
            dtype = self.dtypes[name]
            totals[dtype] = totals.get(dtype, 0) + math.prod(shape) * item_bytes(dtype)
        return totals

    def expert_itemsize(self) -> int:
        """Return the bytes of a weight of an expert in the source."""
        return max(item_bytes(self.dtypes[name]) for name in self.expert_names)

    def bytes_to_read(self, expert_batch: int) -> int:
        """Count the bytes that a run decodes: each chunk that a slice of experts touches, whole.

        A chunk that holds experts of two batches is read twice, unless the chunks of all kernels of
        a layer fit the cache together.
        """
        kinds = {name.rsplit("/", 2)[-2]: name for name in self.expert_names}
        slabs = (math.prod(self._slab(n)) * item_bytes(self.dtypes[n]) for n in kinds.values())
        cached = sum(slabs) <= MAX_CACHE_BYTES
        total = 0
        for name, shape in self.shapes.items():
            slab = self._slab(name)
            count = math.ceil(shape[0] / slab[0])
            if names.is_expert_kernel(name) and not cached:
                bounds = [*range(0, shape[0], expert_batch), shape[0]]
                count = sum(
                    math.ceil(stop / slab[0]) - start // slab[0]
                    for start, stop in itertools.pairwise(bounds)
                )
            total += count * math.prod(slab) * item_bytes(self.dtypes[name])
        return total

    def largest_chunk_bytes(self) -> int:
        """Return the bytes of the largest chunk of an expert kernel; 0 where it is unknown."""
        if self.chunks is None:
            return 0
        return max(
            math.prod(self.chunks[n]) * item_bytes(self.dtypes[n]) for n in self.expert_names
        )

    def _slab(self, name: str) -> Shape:
        """Return a row of chunks along the first axis: the least that is read of a parameter."""
        shape = self.shapes[name]
        if self.chunks is None:
            return (1, *shape[1:])
        chunk = self.chunks[name]
        rest = zip(shape[1:], chunk[1:], strict=True)
        return (chunk[0], *(math.ceil(size / part) * part for size, part in rest))


@dataclasses.dataclass(frozen=True)
class TokenFacts:
    """Tokens of a run.

    Attributes:
      num_calibration: calibration examples.
      num_validation: validation examples.
      tokens: of both together, by stack, without padding.
      hessian_tokens: those that may enter Hessians, by stack.
      validation_targets: target tokens of the validation examples.
      lengths: longest padded example, by stack.
      file_lengths: width of the token arrays, by stack.
      source: where the figures are from.
    """

    num_calibration: int
    num_validation: int
    tokens: Mapping[str, int]
    hessian_tokens: Mapping[str, int]
    validation_targets: int
    lengths: Mapping[str, int]
    file_lengths: Mapping[str, int]
    source: str

    @property
    def num_examples(self) -> int:
        """Calibration and validation examples."""
        return self.num_calibration + self.num_validation

    @classmethod
    def from_means(
        cls,
        num_calibration: int,
        num_validation: int,
        mean_lengths: Mapping[str, float],
        file_lengths: Mapping[str, int],
    ) -> "TokenFacts":
        """Estimate from mean lengths by stack ("encoder", "decoder") and the arrays' width.

        All calibration tokens are taken to enter Hessians; sentinels, which do not, are few.

        Raises:
          TokensError: a count below 0, or a mean that is not in (0, width].
        """
        for name, count in (("num_examples", num_calibration), ("num_validation", num_validation)):
            if count < 0:
                raise TokensError(f"{name} is {count}; it must be at least 0")
        for stack, mean in mean_lengths.items():
            if not 0 < mean <= file_lengths[stack]:
                raise TokensError(
                    f"the mean {stack} length is {mean:g}; it must be above 0 and at most the "
                    f"length of the arrays, {file_lengths[stack]}"
                )
        examples = num_calibration + num_validation
        return cls(
            num_calibration,
            num_validation,
            {s: round(examples * mean) for s, mean in mean_lengths.items()},
            {s: round(num_calibration * mean) for s, mean in mean_lengths.items()},
            round(num_validation * mean_lengths["decoder"]),
            {s: padded_length(length, length) for s, length in file_lengths.items()},
            dict(file_lengths),
            "mean lengths " + ", ".join(f"{s} {mean:g}" for s, mean in mean_lengths.items()),
        )

    @classmethod
    def from_files(
        cls, calibration: TokenFile, validation: TokenFile | None, *, premask_sentinels: bool
    ) -> "TokenFacts":
        """Count in the very examples of the run.

        Raises:
          TokensError: no examples, or bad ones.
        """
        samples = Samples.build(calibration, validation, premask_sentinels=premask_sentinels)
        ids = samples.tokens
        widths = {
            "encoder": ids.encoder_input_tokens.shape[1],
            "decoder": ids.decoder_target_tokens.shape[1],
        }
        lengths: dict[str, np.ndarray] = {**samples.lengths}
        enters: dict[str, np.ndarray] = {**samples.enters_hessian}
        return cls(
            samples.num_calibration,
            len(samples.tokens) - samples.num_calibration,
            {s: int(n.sum()) for s, n in lengths.items()},
            {s: int(n.sum()) for s, n in enters.items()},
            int(lengths["decoder"][samples.num_calibration :].sum()),
            {s: padded_length(int(n.max()), widths[s]) for s, n in lengths.items()},
            widths,
            "token files",
        )


def check_tokens(tokens: TokenFacts, settings: CompressionSettings) -> None:
    """Refuse what `compress` would: GPTQ without calibration, validation without calibration.

    Raises:
      TokensError: GPTQ or validation examples without calibration examples.
    """
    if settings.needs_tokens and tokens.num_calibration == 0:
        raise TokensError('method="gptq" needs calibration examples; give some, or method="rtn"')
    if tokens.num_validation and not tokens.num_calibration:
        raise TokensError("validation examples without calibration examples; give both or neither")
