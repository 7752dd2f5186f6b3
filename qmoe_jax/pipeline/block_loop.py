"""The block loop (QMoE section 3): every layer in turn, dense part, then experts batch by batch."""

import functools
import os
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from qmoe_jax.calibration.dispatch import Dispatch, dispatch_tokens
from qmoe_jax.calibration.list_buffer import ListBuffer
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import CompressedCheckpointWriter
from qmoe_jax.checkpoints.config import SwitchConfig
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.codec import codings, stats
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.evaluation.metrics import LossReport, batch_sums
from qmoe_jax.models.switch import DecoderLayer, EncoderLayer
from qmoe_jax.pipeline import dense_pass
from qmoe_jax.pipeline.expert_pass import (
    ExpertBatch,
    QuantizedKernels,
    quantize_batch,
    run_batch,
)
from qmoe_jax.pipeline.journal import Journal
from qmoe_jax.pipeline.report import CompressionReport, KernelReport
from qmoe_jax.pipeline.samples import Samples, Stack
from qmoe_jax.pipeline.settings import CompressionSettings
from qmoe_jax.quantization.expert_batch import ExpertStatus


class BlockLoop:
    """One compression run: what is carried from layer to layer."""

    def __init__(
        self,
        source: T5XCheckpoint,
        config: SwitchConfig,
        settings: CompressionSettings,
        samples: Samples | None,
        writer: CompressedCheckpointWriter,
        journal: Journal | None,
        buffer_dir: str | os.PathLike[str] | None,
        progress: bool,
    ):
        self.source = source
        self.config = config
        self.settings = settings
        self.samples = samples
        self.writer = writer
        self.journal = journal
        self.buffer_dir = buffer_dir
        self.bar = functools.partial(tqdm, disable=not progress, leave=False)
        self.kernels: list[KernelReport] = []
        self.dense_bits = 0
        self.dense_parameters = 0

    def all_layers(self, output: str) -> CompressionReport:
        """Compresses the whole model into the writer; `output` only names it in the report."""
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
        statistics: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in kernel_names}
        starts = range(0, config.num_experts, settings.expert_batch)
        for start in self.bar(starts, desc=f"{stack} layer {layer}: experts", unit="batch"):
            experts = range(start, min(start + settings.expert_batch, config.num_experts))
            batch = ExpertBatch(
                experts=experts,
                buffer=buffer,
                gate=None if routing is None else routing[1],
                dispatch=dispatch,
                norm_scale=jnp.asarray(params["pre_mlp_layer_norm"]["scale"]),
                activations=config.mlp_activations,
            )
            quantized = self._quantized_kernels(stack, layer, batch)
            for name, kernel in quantized.items():
                coded[name].append(encode(kernel.codes, kernel.levels, settings.coding))
                statistics[name].append(kernel.statistics)
            run_batch(batch, quantized, settings)
        for name in kernel_names:
            module_path = names.expert_kernel(stack, layer, name).removesuffix("/kernel")
            tensor = codings.concatenate(coded.pop(name))
            self.writer.write_coded(module_path, tensor)
            self.kernels.append(_kernel_report(module_path, tensor, statistics.pop(name)))

    def _quantized_kernels(self, stack: Stack, layer: int, batch: ExpertBatch) -> QuantizedKernels:
        """The codes of a batch of experts: from the journal, or computed and put there."""
        experts = batch.experts
        entry = f"{stack}_layer_{layer}_experts_{experts.start}_{experts.stop}"
        quantized = None if self.journal is None else self.journal.load(entry)
        if quantized is None:
            kernels = {
                name: jnp.asarray(
                    self.source.read_experts(
                        names.expert_kernel(stack, layer, name), experts.start, experts.stop
                    ),
                    jnp.float32,
                )
                for name in (*self.config.wi_names, "wo")
            }
            quantized = quantize_batch(batch, kernels, self.settings)
            if self.journal is not None:
                self.journal.save(entry, quantized)
        return quantized

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


def _kernel_report(
    name: str, coded: CodedTensor, batches: list[dict[str, np.ndarray]]
) -> KernelReport:
    joined = {
        key: np.concatenate([batch[key] for batch in batches]).astype(np.float64)
        for key in batches[0]
    }
    counts, status = joined["token_counts"], joined["status"]
    layer_energy = (counts * joined["layer_energy"]).sum()
    layer_error = (counts * joined["layer_error"]).sum()
    return KernelReport(
        name=name,
        num_experts=coded.spec.num_experts,
        num_weights=coded.spec.num_weights,
        bits=stats.bits(coded),
        zeros=float(joined["zero_share"].mean()),
        relative_weight_error=float(
            joined["weight_error"].sum() / max(joined["weight_energy"].sum(), 1e-30)
        ),
        relative_layer_error=float(layer_error / layer_energy) if layer_energy > 0 else None,
        experts_without_tokens=int((status == ExpertStatus.NO_TOKENS).sum()),
        singular_hessians=int((status == ExpertStatus.SINGULAR).sum()),
        nonfinite_experts=int((status == ExpertStatus.NONFINITE_INPUT).sum()),
    )
