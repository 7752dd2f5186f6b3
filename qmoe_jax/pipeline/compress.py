"""The block loop (QMoE section 3): calibrate, quantize and store a model layer by layer."""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from qmoe_jax.calibration.dispatch import Dispatch, dispatch_tokens
from qmoe_jax.calibration.list_buffer import ListBuffer
from qmoe_jax.calibration.sample_batches import SampleBatch, plan_sample_batches
from qmoe_jax.calibration.tokens import TokenBatch, TokenFile, read_tokens
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import CompressedCheckpointWriter
from qmoe_jax.checkpoints.config import SwitchConfig
from qmoe_jax.checkpoints.t5x import T5XCheckpoint, open_t5x_checkpoint
from qmoe_jax.codec import codings, encode, stats
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.errors import TokensError
from qmoe_jax.evaluation.metrics import LossReport, batch_sums
from qmoe_jax.models.switch import DecoderLayer, EncoderLayer
from qmoe_jax.pipeline import dense_pass
from qmoe_jax.pipeline.expert_pass import (
    ExpertBatch,
    KernelResult,
    dequantized_kernel,
    quantize_batch,
    run_batch,
)
from qmoe_jax.pipeline.report import CompressionReport, KernelReport
from qmoe_jax.pipeline.settings import CompressionSettings
from qmoe_jax.quantization.expert_batch import ExpertStatus

Stack = Literal["encoder", "decoder"]
PathLike = str | os.PathLike[str]


def compress(
    checkpoint: PathLike,
    output: PathLike,
    tokens: PathLike | TokenFile | None = None,
    *,
    validation_tokens: PathLike | TokenFile | None = None,
    num_examples: int | None = None,
    overwrite: bool = False,
    buffer_dir: PathLike | None = None,
    progress: bool = True,
    settings: CompressionSettings | None = None,
    **changes: Any,
) -> CompressionReport:
    """Compresses the experts of a native T5X Switch checkpoint.

    Args:
      checkpoint: the native checkpoint, local or gs://.
      output: where the compressed checkpoint goes; it appears there only when it is whole.
      tokens: calibration examples (a token file of `qmoe_jax.prepare_tokens`); needed for GPTQ.
        With method="rtn" they may be left out; then no layer error is reported.
      validation_tokens: examples that flow along and give a loss through the compressed experts;
        they never enter a Hessian and change nothing of the output.
      num_examples: use this many calibration examples; all where None.
      overwrite: replace an existing output.
      buffer_dir: folder for memory-mapped hidden states; in memory where None.
      progress: show progress bars.
      settings: how to compress; the paper's ternary GPTQ where None.
      **changes: single fields of `pipeline.settings.CompressionSettings`, as `grid="2bit"`.

    Returns:
      A report per kernel and in total.

    Raises:
      CheckpointError: the input is no readable Switch checkpoint, or the output exists.
      TokensError: the tokens are unreadable, absent where needed, or of another vocabulary.
      ValueError: a setting out of its range.
    """
    started = time.monotonic()
    chosen = dataclasses.replace(settings or CompressionSettings(), **changes)
    if tokens is None and chosen.method == "gptq":
        raise TokensError(
            'method="gptq" needs calibration tokens; pass tokens=, made by '
            '`python -m qmoe_jax.prepare_tokens`, or use method="rtn"'
        )
    if tokens is None and validation_tokens is not None:
        raise TokensError("validation_tokens without tokens; pass both, or evaluate the output")
    source = open_t5x_checkpoint(checkpoint)
    config = SwitchConfig.from_checkpoint(source)
    samples = None
    if tokens is not None:
        samples = _Samples.build(
            _load_tokens(tokens, config)[slice(num_examples)],
            None if validation_tokens is None else _load_tokens(validation_tokens, config),
            premask_sentinels=chosen.premask_sentinels,
        )
    with CompressedCheckpointWriter(output, overwrite=overwrite) as writer:
        run = _Run(source, config, chosen, samples, writer, buffer_dir, progress)
        report = run.all_layers(os.fspath(output))
        writer.finish(config, {"settings": chosen.to_json(), "tokens": _describe(samples)})
    report.seconds = time.monotonic() - started
    return report


def _load_tokens(tokens: PathLike | TokenFile, config: SwitchConfig) -> TokenFile:
    if isinstance(tokens, TokenFile):
        return tokens
    return read_tokens(tokens, num_embeddings=config.num_embeddings)


def _describe(samples: "_Samples | None") -> dict[str, Any] | None:
    """What the manifest says of the calibration data."""
    if samples is None:
        return None
    return {
        "num_examples": samples.num_calibration,
        "metadata": dataclasses.asdict(samples.metadata),
    }


@dataclasses.dataclass(frozen=True)
class _Samples:
    """Calibration samples, then validation samples, as the list buffers number them.

    Attributes:
      tokens: all examples.
      num_calibration: the first so many calibrate, the rest validate.
      lengths: int64 [samples] of each stack.
      enters_hessian: bool [rows of the list buffer] of each stack.
      metadata: of the calibration tokens.
    """

    tokens: TokenBatch
    num_calibration: int
    lengths: dict[Stack, Int[np.ndarray, "samples"]]
    enters_hessian: dict[Stack, Bool[np.ndarray, "rows"]]
    metadata: Any

    @classmethod
    def build(
        cls, calibration: TokenFile, validation: TokenFile | None, *, premask_sentinels: bool
    ) -> "_Samples":
        files = [calibration] if validation is None else [calibration, validation]
        if len(calibration) == 0:
            raise TokensError("there are no calibration examples; num_examples must be at least 1")
        tokens = _join([file.tokens for file in files])
        encoder, target = tokens.encoder_input_tokens, tokens.decoder_target_tokens
        lengths: dict[Stack, np.ndarray] = {}
        enters: dict[Stack, np.ndarray] = {}
        stacks: dict[Stack, np.ndarray] = {"encoder": encoder, "decoder": target}
        for stack, ids in stacks.items():
            real = ids > 0
            lengths[stack] = _prefix_lengths(real, stack)
            usable = real.copy()
            if premask_sentinels:
                sentinel = calibration.metadata.is_sentinel(ids)
                usable &= ~sentinel
                if stack == "decoder":
                    # A decoder position predicts ids[position]; the last predicts the end.
                    usable[np.arange(len(ids)), lengths[stack] - 1] = False
            usable[len(calibration) :] = False
            enters[stack] = usable[real]
        return cls(tokens, len(calibration), lengths, enters, calibration.metadata)

    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Calibration samples are never batched with validation samples."""
        bounds = (0, self.num_calibration, len(self.tokens))
        for start, stop in itertools.pairwise(bounds):
            yield from plan_sample_batches(
                self.lengths["encoder"][start:stop],
                self.lengths["decoder"][start:stop],
                batch_size=batch_size,
                full_encoder_length=self.tokens.encoder_input_tokens.shape[1],
                full_decoder_length=self.tokens.decoder_input_tokens.shape[1],
                first_sample=start,
            )

    def ids(self, name: str, batch: SampleBatch, length: int) -> Int[np.ndarray, "batch length"]:
        """A token array of a sample batch, padded to its shape."""
        padded = np.zeros((batch.batch_size, length), np.int32)
        padded[: len(batch.samples)] = getattr(self.tokens, name)[batch.samples, :length]
        return padded


def _join(parts: list[TokenBatch]) -> TokenBatch:
    joined = {}
    for name in parts[0].arrays():
        arrays = [part.arrays()[name] for part in parts]
        length = max(array.shape[1] for array in arrays)
        joined[name] = np.concatenate(
            [np.pad(array, ((0, 0), (0, length - array.shape[1]))) for array in arrays]
        )
    return TokenBatch(**joined, num_real=len(joined["encoder_input_tokens"]))


def _prefix_lengths(real: Bool[np.ndarray, "samples length"], stack: str) -> np.ndarray:
    lengths = real.sum(axis=1)
    if not np.array_equal(real, np.arange(real.shape[1])[None] < lengths[:, None]):
        raise TokensError(
            f"some {stack} examples have padding (id 0) before their last token; "
            "each example must be a run of tokens followed by padding"
        )
    if (lengths == 0).any():
        raise TokensError(
            f"example {int(np.flatnonzero(lengths == 0)[0])} has no {stack} token; leave it out"
        )
    return lengths.astype(np.int64)


class _Run:
    """One compression run: the state that the block loop carries from layer to layer."""

    def __init__(
        self,
        source: T5XCheckpoint,
        config: SwitchConfig,
        settings: CompressionSettings,
        samples: _Samples | None,
        writer: CompressedCheckpointWriter,
        buffer_dir: PathLike | None,
        progress: bool,
    ):
        self.source = source
        self.config = config
        self.settings = settings
        self.samples = samples
        self.writer = writer
        self.buffer_dir = buffer_dir
        self.bar = functools.partial(tqdm, disable=not progress, leave=False)
        self.kernels: list[KernelReport] = []
        self.dense_bits = 0
        self.dense_parameters = 0

    def all_layers(self, output: str) -> CompressionReport:
        config = self.config
        self.embedding = self._dense_parameter("token_embedder/embedding")
        total = config.num_encoder_layers + config.num_decoder_layers
        validation = None
        with self.bar(total=total, desc="compress", unit="layer", leave=True) as bar:
            encoded = self._stack("encoder", None, bar)
            decoded = self._stack("decoder", encoded, bar)
        if config.tied_logits:
            head = {"embedding": self.embedding}
        else:
            head = {"kernel": self._dense_parameter("decoder/logits_dense/kernel")}
        if decoded is not None:
            validation = self._validation_loss(decoded, head)
        return CompressionReport(
            output=output,
            settings=self.settings.to_json(),
            kernels=self.kernels,
            dense_bits=self.dense_bits,
            dense_parameters=self.dense_parameters,
            validation=validation,
        )

    def _dense_parameter(self, name: str) -> np.ndarray:
        """Reads a parameter that is not compressed, in its stored form, and stores it."""
        array = self.source.read(name)
        exact = name.endswith("/scale") or "/router/" in name
        if self.settings.dense_dtype == "bfloat16" and not exact:
            array = array.astype(ml_dtypes.bfloat16)
        self.writer.write_dense(name, array)
        self.dense_bits += 8 * array.nbytes
        self.dense_parameters += array.size
        return array

    def _dense_parameters_of(self, stack: Stack, layer: int) -> dict[str, Any]:
        prefix = f"{stack}/layers_{layer}/"
        return names.unflatten(
            {
                name.removeprefix(prefix): self._dense_parameter(name)
                for name in self.source.names
                if name.startswith(prefix) and not names.is_expert_kernel(name)
            }
        )

    def _stack(self, stack: Stack, encoded: ListBuffer | None, bar: Any) -> ListBuffer | None:
        """Runs all layers of a stack; returns its normalised outputs."""
        config = self.config
        rel_embedding = self._dense_parameter(f"{stack}/relpos_bias/rel_embedding")
        scale = self._dense_parameter(f"{stack}/{stack}_norm/scale")
        buffer = None
        if self.samples is not None:
            path = None
            if self.buffer_dir is not None:
                os.makedirs(self.buffer_dir, exist_ok=True)
                path = os.path.join(self.buffer_dir, f"{stack}_hidden_states.bin")
            buffer = ListBuffer(self.samples.lengths[stack], config.embed_dim, path=path)
            self._embed(stack, buffer)
        # bfloat16 activations stay bfloat16 until the first MoE, whose output is float32.
        residual_dtype = self.settings.activation_dtype
        sparse = (
            config.encoder_sparse_layers if stack == "encoder" else config.decoder_sparse_layers
        )
        num_layers = getattr(config, f"num_{stack}_layers")
        for layer in range(num_layers):
            bar.set_postfix_str(f"{stack} layer {layer}")
            params = self._dense_parameters_of(stack, layer)
            routing = None
            if buffer is not None:
                routing = self._dense_pass(
                    stack, layer, params, rel_embedding, buffer, encoded, residual_dtype
                )
            if layer in sparse:
                self._expert_pass(stack, layer, params, buffer, routing)
                residual_dtype = "float32"
            bar.update()
        if buffer is not None:
            self._normalise(buffer, scale, residual_dtype)
        return buffer

    def _sample_batches(self, description: str) -> Any:
        assert self.samples is not None
        batches = list(self.samples.batches(self.settings.batch_size))
        return self.bar(batches, desc=description, unit="batch")

    def _embed(self, stack: Stack, buffer: ListBuffer) -> None:
        assert self.samples is not None
        name = f"{stack}_input_tokens"
        for batch in self._sample_batches(f"{stack}: embed"):
            ids = self.samples.ids(name, batch, getattr(batch, f"{stack}_length"))
            x = dense_pass.embed(
                self.config, self.settings.activation_dtype, jnp.asarray(self.embedding), ids
            )
            buffer.store(batch.samples, np.asarray(x, np.float32))

    def _dense_pass(
        self,
        stack: Stack,
        layer: int,
        params: dict[str, Any],
        rel_embedding: np.ndarray,
        buffer: ListBuffer,
        encoded: ListBuffer | None,
        residual_dtype: str,
    ) -> tuple[Int[np.ndarray, "rows"], Float[np.ndarray, "rows"]] | None:
        """Sends all samples through a layer's dense part; returns the routing of a sparse one."""
        assert self.samples is not None
        samples, config = self.samples, self.config
        dtype = jnp.dtype(self.settings.activation_dtype)
        expert_index = np.zeros(len(buffer.rows), np.int32)
        gate = np.zeros(len(buffer.rows), np.float32)
        params, bias_table = _on_device(params), jnp.asarray(rel_embedding)
        routed = None
        for batch in self._sample_batches(f"{stack} layer {layer}: dense"):
            length = getattr(batch, f"{stack}_length")
            x = jnp.asarray(buffer.padded(batch.samples, length, batch.batch_size), residual_dtype)
            inputs = samples.ids("encoder_input_tokens", batch, batch.encoder_length)
            if stack == "encoder":
                module = EncoderLayer(config, layer in config.encoder_sparse_layers, dtype=dtype)
                y, routed = dense_pass.encoder_block(module, params, bias_table, x, inputs)
            else:
                assert encoded is not None
                module = DecoderLayer(config, layer in config.decoder_sparse_layers, dtype=dtype)
                y, routed = dense_pass.decoder_block(
                    module,
                    params,
                    bias_table,
                    x,
                    jnp.asarray(
                        encoded.padded(batch.samples, batch.encoder_length, batch.batch_size)
                    ),
                    inputs,
                    samples.ids("decoder_input_tokens", batch, length),
                    samples.ids("decoder_target_tokens", batch, length),
                )
            buffer.store(batch.samples, np.asarray(y))
            if routed is not None:
                index, real = buffer.row_index(batch.samples, length)
                rows = len(batch.samples)
                expert_index[index[real]] = np.asarray(routed.expert_index)[:rows][real]
                gate[index[real]] = np.asarray(routed.gate)[:rows][real]
        return None if routed is None else (expert_index, gate)

    def _expert_pass(
        self,
        stack: Stack,
        layer: int,
        params: dict[str, Any],
        buffer: ListBuffer | None,
        routing: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        """Quantizes the experts of a sparse layer, stores their codes, runs them compressed."""
        config, settings = self.config, self.settings
        kernel_names = (*config.wi_names, "wo")
        dispatch: Dispatch | None = None
        if routing is not None:
            assert self.samples is not None
            dispatch = dispatch_tokens(
                routing[0],
                self.samples.enters_hessian[stack],
                num_experts=config.num_experts,
                max_tokens_factor=settings.max_tokens_factor,
            )
        coded: dict[str, list[CodedTensor]] = {name: [] for name in kernel_names}
        results: dict[str, list[KernelResult]] = {name: [] for name in kernel_names}
        starts = range(0, config.num_experts, settings.expert_batch)
        for start in self.bar(starts, desc=f"{stack} layer {layer}: experts", unit="batch"):
            stop = min(start + settings.expert_batch, config.num_experts)
            batch = ExpertBatch(
                experts=range(start, stop),
                kernels={
                    name: jnp.asarray(
                        self.source.read_experts(
                            names.expert_kernel(stack, layer, name), start, stop
                        ),
                        jnp.float32,
                    )
                    for name in kernel_names
                },
                buffer=buffer,
                gate=None if routing is None else routing[1],
                dispatch=dispatch,
                norm_scale=jnp.asarray(params["pre_mlp_layer_norm"]["scale"]),
                activations=config.mlp_activations,
            )
            quantized = quantize_batch(batch, settings)
            for name, result in quantized.items():
                codes, levels = result.quantized.codes, result.quantized.levels
                # Exact: grids round their levels to bfloat16 before they choose codes.
                stored_levels = np.asarray(levels).astype(ml_dtypes.bfloat16)
                coded[name].append(encode.encode(codes, stored_levels, settings.coding))
                results[name].append(result)
            kernels = {name: dequantized_kernel(r, settings) for name, r in quantized.items()}
            run_batch(batch, kernels, settings)
        for name in kernel_names:
            module_path = names.expert_kernel(stack, layer, name).removesuffix("/kernel")
            tensor = codings.concatenate(coded.pop(name))
            self.writer.write_coded(module_path, tensor)
            self.kernels.append(_kernel_report(module_path, tensor, results.pop(name)))

    def _normalise(self, buffer: ListBuffer, scale: np.ndarray, residual_dtype: str) -> None:
        """Applies the final norm of a stack in place, a slab of rows at a time."""
        slab = 1 << 14
        for start in range(0, len(buffer.rows), slab):
            rows = buffer.rows[start : start + slab]
            padded = np.zeros((min(slab, len(buffer.rows)), rows.shape[1]), np.float32)
            padded[: len(rows)] = rows
            y = dense_pass.final_norm(
                self.settings.activation_dtype,
                jnp.asarray(scale),
                jnp.asarray(padded, residual_dtype)[None],
            )
            buffer.rows[start : start + slab] = np.asarray(y)[0, : len(rows)]

    def _validation_loss(self, decoded: ListBuffer, head: dict[str, Any]) -> LossReport | None:
        samples = self.samples
        assert samples is not None
        head = _on_device(head)
        num_validation = len(samples.tokens) - samples.num_calibration
        if num_validation == 0:
            return None
        sums = np.zeros((3, num_validation), np.float64)
        for batch in self._sample_batches("validation loss"):
            if batch.samples[0] < samples.num_calibration:
                continue
            hidden = decoded.padded(batch.samples, batch.decoder_length, batch.batch_size)
            targets = samples.ids("decoder_target_tokens", batch, batch.decoder_length)
            weights = samples.ids("decoder_loss_weights", batch, batch.decoder_length)
            logits = dense_pass.logits(self.config, head, jnp.asarray(hidden))
            places = batch.samples - samples.num_calibration
            for row, part in enumerate(
                batch_sums(logits, jnp.asarray(targets), jnp.asarray(weights))
            ):
                sums[row, places] = np.asarray(part)[: len(places)]
        return LossReport(sums[0], sums[1].astype(np.int64), sums[2].astype(np.int64))


def _on_device(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: _on_device(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}


def _kernel_report(name: str, coded: CodedTensor, results: list[KernelResult]) -> KernelReport:
    def joined(of: Callable[[KernelResult], Any]) -> np.ndarray:
        return np.concatenate([np.asarray(of(result), np.float64) for result in results])

    status = joined(lambda r: r.quantized.status)
    counts = joined(lambda r: r.token_counts)
    weight_energy = joined(lambda r: r.weight_energy).sum()
    layer_energy = (counts * joined(lambda r: r.layer_energy)).sum()
    layer_error = (counts * joined(lambda r: r.quantized.layer_error)).sum()
    return KernelReport(
        name=name,
        num_experts=coded.spec.num_experts,
        num_weights=coded.spec.num_weights,
        bits=stats.bits(coded),
        zeros=float(joined(lambda r: r.quantized.zero_share).mean()),
        relative_weight_error=float(
            joined(lambda r: r.quantized.weight_error).sum() / max(weight_energy, 1e-30)
        ),
        relative_layer_error=float(layer_error / layer_energy) if layer_energy > 0 else None,
        experts_without_tokens=int((status == ExpertStatus.NO_TOKENS).sum()),
        singular_hessians=int((status == ExpertStatus.SINGULAR).sum()),
        nonfinite_experts=int((status == ExpertStatus.NONFINITE_INPUT).sum()),
    )
