"""The block loop (QMoE section 3): every layer in turn, dense part, then experts batch by batch."""

import os
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from qmoe_jax.calibration.dispatch import dispatch_tokens
from qmoe_jax.calibration.list_buffer import ListBuffer
from qmoe_jax.calibration.sample_batches import SampleBatch
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.evaluation.metrics import LossReport, batch_sums
from qmoe_jax.models.switch import DecoderLayer, EncoderLayer
from qmoe_jax.pipeline import dense_pass
from qmoe_jax.pipeline.expert_layer import ExpertLayers
from qmoe_jax.pipeline.host_memory import peak_host_bytes, return_free_memory
from qmoe_jax.pipeline.layer_tokens import LayerTokens
from qmoe_jax.pipeline.report import CompressionReport
from qmoe_jax.pipeline.run_log import RunLog
from qmoe_jax.pipeline.samples import Samples, Stack
from qmoe_jax.quantization.settings import CompressionSettings


class BlockLoop:
    """One compression run: what is carried from layer to layer."""

    def __init__(
        self,
        source: T5XCheckpoint,
        config: SwitchConfig,
        settings: CompressionSettings,
        samples: Samples | None,
        experts: ExpertLayers,
        log: RunLog,
        buffer_dir: str | os.PathLike[str] | None,
    ):
        self.source = source
        self.config = config
        self.settings = settings
        self.samples = samples
        self.experts = experts
        self.log = log
        self.writer = experts.writer
        self.devices = experts.devices
        self.processes = experts.processes
        self.bar = experts.bar
        self.buffer_dir = buffer_dir
        self.batch_size = self.devices.rounded_up(settings.batch_size)
        self.dense_bits = 0
        self.dense_parameters = 0
        self.dense_bytes = 0
        self.dense_seconds = 0.0

    def all_layers(self, output: str) -> CompressionReport:
        """Compress the whole model into the writer; `output` only names it in the report."""
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
            kernels=self.experts.kernels,
            dense_bits=self.dense_bits + self.experts.dense_bits,
            dense_parameters=self.dense_parameters + self.experts.dense_parameters,
            num_replayed=self.experts.num_replayed,
            bytes_read=self.dense_bytes + self.experts.reader.num_bytes,
            validation=validation,
        )

    def _dense_parameter(self, name: str) -> np.ndarray:
        """Read a parameter that is not compressed, in its stored form, and store it."""
        array = self.source.read(name)
        self.dense_bytes += array.nbytes
        exact = name.endswith("/scale") or "/router/" in name
        if self.settings.dense_dtype == "bfloat16" and not exact:
            array = array.astype(ml_dtypes.bfloat16)
        if self.processes.is_primary:
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
        """Run all layers of a stack; return its normalised outputs."""
        config = self.config
        rel_embedding = self._dense_parameter(f"{stack}/relpos_bias/rel_embedding")
        scale = self._dense_parameter(f"{stack}/{stack}_norm/scale")
        buffer = None
        if self.samples is not None:
            path = None
            if self.buffer_dir is not None:
                os.makedirs(self.buffer_dir, exist_ok=True)
                name = f"{stack}_hidden_states_{self.processes.index}.bin"
                path = os.path.join(self.buffer_dir, name)
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

    def _sample_batches(self, description: str, stack: Stack) -> Iterator[SampleBatch]:
        """All sample batches, with a bar that counts the stack's tokens."""
        assert self.samples is not None
        lengths = self.samples.lengths[stack]
        with self.bar(
            total=int(lengths.sum()), desc=description, unit="token", unit_scale=True
        ) as bar:
            for batch in self.samples.batches(self.batch_size):
                yield batch
                bar.update(int(lengths[batch.samples].sum()))

    def _embed(self, stack: Stack, buffer: ListBuffer) -> None:
        assert self.samples is not None
        name = f"{stack}_input_tokens"
        embedding = self.devices.replicate(self.embedding)
        for batch in self._sample_batches(f"{stack}: embed", stack):
            ids = self.samples.ids(name, batch, getattr(batch, f"{stack}_length"))
            ids = self.devices.spread(ids)
            x = dense_pass.embed(self.config, self.settings.activation_dtype, embedding, ids)
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
        """Send all samples through a layer's dense part; return the routing of a sparse one."""
        assert self.samples is not None
        samples, config = self.samples, self.config
        dtype = jnp.dtype(self.settings.activation_dtype)
        expert_index = np.zeros(len(buffer.rows), np.int32)
        gate = np.zeros(len(buffer.rows), np.float32)
        params, bias_table = self.devices.replicate((params, rel_embedding))
        spread = self.devices.spread
        started = time.monotonic()
        routed = None
        for batch in self._sample_batches(f"{stack} layer {layer}: dense", stack):
            length = getattr(batch, f"{stack}_length")
            rows = buffer.padded(batch.samples, length, batch.batch_size)
            x = spread(rows.astype(jnp.dtype(residual_dtype)))
            inputs = spread(samples.ids("encoder_input_tokens", batch, batch.encoder_length))
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
                    spread(encoded.padded(batch.samples, batch.encoder_length, batch.batch_size)),
                    inputs,
                    spread(samples.ids("decoder_input_tokens", batch, length)),
                    spread(samples.ids("decoder_target_tokens", batch, length)),
                )
            buffer.store(batch.samples, np.asarray(y))
            if routed is not None:
                index, real = buffer.row_index(batch.samples, length)
                rows = len(batch.samples)
                expert_index[index[real]] = np.asarray(routed.expert_index)[:rows][real]
                gate[index[real]] = np.asarray(routed.gate)[:rows][real]
        self.dense_seconds = time.monotonic() - started
        return None if routed is None else (expert_index, gate)

    def _expert_pass(
        self,
        stack: Stack,
        layer: int,
        params: dict[str, Any],
        buffer: ListBuffer | None,
        routing: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        """Quantize the experts of a sparse layer, store their codes, run them compressed."""
        tokens = None
        if buffer is not None and routing is not None:
            assert self.samples is not None
            gather = self.processes.gather
            gates = gather(routing[1])
            lengths = [len(part) for part in gates]
            tokens = LayerTokens(
                buffer=buffer,
                dispatch=dispatch_tokens(
                    np.concatenate(gather(routing[0])),
                    np.concatenate(gather(self.samples.enters_hessian[stack])),
                    num_experts=self.config.num_experts,
                    max_tokens_factor=self.settings.max_tokens_factor,
                ),
                gate=np.concatenate(gates),
                processes=self.processes,
                first_rows=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            )
        scale = params["pre_mlp_layer_norm"]["scale"]
        facts = self.experts.run(stack, layer, np.asarray(scale), tokens)
        return_free_memory()
        if self.processes.is_primary:
            self.log.write(
                "layer",
                **facts,
                dense_seconds=round(self.dense_seconds, 3),
                tokens=None if tokens is None else len(tokens.gate),
                peak_host_bytes=peak_host_bytes(),
            )

    def _normalise(self, buffer: ListBuffer, scale: np.ndarray, residual_dtype: str) -> None:
        """Apply the final norm of a stack in place, a slab of rows at a time."""
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
        head = self.devices.replicate(head)
        num_validation = len(samples.tokens) - samples.num_calibration
        sums = np.zeros((num_validation, 3), np.float64)
        for batch in self._sample_batches("validation loss", "decoder"):
            if batch.samples[0] < samples.num_calibration:
                continue
            spread = self.devices.spread
            hidden = decoded.padded(batch.samples, batch.decoder_length, batch.batch_size)
            targets = samples.ids("decoder_target_tokens", batch, batch.decoder_length)
            weights = samples.ids("decoder_loss_weights", batch, batch.decoder_length)
            logits = dense_pass.logits(self.config, head, spread(hidden))
            places = batch.samples - samples.num_calibration
            parts = batch_sums(logits, spread(targets), spread(weights))
            for column, part in enumerate(parts):
                sums[places, column] = np.asarray(part)[: len(places)]
        sums = np.concatenate(self.processes.gather(sums))
        if not len(sums):
            return None
        return LossReport(sums[:, 0], sums[:, 1].astype(np.int64), sums[:, 2].astype(np.int64))
