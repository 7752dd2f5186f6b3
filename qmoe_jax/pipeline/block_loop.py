"""The block loop (QMoE section 3): every layer in turn, dense part, then experts batch by batch."""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qmoe_jax.calibration.dispatch import dispatch_tokens
from qmoe_jax.calibration.list_buffer import ListBuffer
from qmoe_jax.calibration.sample_batches import SampleBatch
from qmoe_jax.checkpoints import names
from qmoe_jax.evaluation.metrics import LossReport, batch_sums, worse_than_guessing
from qmoe_jax.models.switch import DecoderLayer, EncoderLayer
from qmoe_jax.pipeline import dense_pass
from qmoe_jax.pipeline.bit_budget import bit_budget
from qmoe_jax.pipeline.dense_parameters import DenseParameters
from qmoe_jax.pipeline.expert_layer import LayerResult, run_expert_layer
from qmoe_jax.pipeline.kernel_reader import KernelReader
from qmoe_jax.pipeline.layer_tokens import LayerTokens
from qmoe_jax.pipeline.report import CompressionReport
from qmoe_jax.pipeline.run import Run
from qmoe_jax.pipeline.run_log import RunLog, peak_host_bytes, return_free_memory
from qmoe_jax.pipeline.samples import Samples, Stack
from qmoe_jax.pipeline.schedule import LayerSchedule
from qmoe_jax.progress import Progress

Routing = tuple[Int[np.ndarray, "rows"], Float[np.ndarray, "rows"]]


class BlockLoop:
    """What is carried from layer to layer of one compression run."""

    def __init__(
        self,
        run: Run,
        reader: KernelReader,
        schedule: Sequence[LayerSchedule],
        samples: Samples | None,
        log: RunLog,
        buffer_dir: str | os.PathLike[str] | None,
    ):
        """Begin before the first layer.

        Args:
          run: what the parts share.
          reader: of expert kernels, by `schedule`.
          schedule: of all sparse layers.
          samples: examples that flow along; None without calibration.
          log: gets a line a sparse layer.
          buffer_dir: folder for memory-mapped hidden states; in memory where None.
        """
        self.run = run
        self.reader = reader
        self.layers = {(layer.stack, layer.layer): layer for layer in schedule}
        self.samples = samples
        self.log = log
        self.buffer_dir = buffer_dir
        self.batch_size = run.devices.rounded_up(run.settings.batch_size)
        self.dense = DenseParameters(run)
        self.budget = bit_budget(run)
        self.results: list[LayerResult] = []
        self.logged_reads = (0, 0.0)

    def all_layers(self, output: str) -> CompressionReport:
        """Compress the whole model into the writer; `output` only names it in the report."""
        config, dense = self.run.config, self.dense
        embedding = dense.read(names.EMBEDDING)
        total = config.num_encoder_layers + config.num_decoder_layers
        validation = None
        with self.run.progress(total=total, title="compress", unit="layers", each=True) as bar:
            encoded = self._stack("encoder", embedding, None, bar)
            decoded = self._stack("decoder", embedding, encoded, bar)
        if config.tied_logits:
            head = {"embedding": embedding}
        else:
            head = {"kernel": dense.read("decoder/logits_dense/kernel")}
        if decoded is not None:
            validation = self._validation_loss(decoded, head)
        warning = None
        if validation is not None and self.samples is not None:
            lengths = self.samples.tokens.lengths
            warning = worse_than_guessing(validation.loss, config.num_embeddings, *lengths)
        results = self.results
        return CompressionReport(
            output=output,
            settings=self.run.settings.to_json(),
            kernels=[kernel for result in results for kernel in result.kernels],
            dense_bits=dense.num_bits + sum(result.dense_bits for result in results),
            dense_parameters=dense.num_parameters
            + sum(result.dense_parameters for result in results),
            num_replayed=sum(result.batches_replayed for result in results),
            bytes_read=dense.num_bytes_read + self.reader.num_bytes,
            validation=validation,
            validation_warning=warning,
        )

    def _stack(
        self, stack: Stack, embedding: np.ndarray, encoded: ListBuffer | None, bar: Progress
    ) -> ListBuffer | None:
        """Run all layers of a stack; return its normalised outputs."""
        config = self.run.config
        rel_embedding = self.dense.read(f"{stack}/relpos_bias/rel_embedding")
        scale = self.dense.read(f"{stack}/{stack}_norm/scale")
        buffer = None
        if self.samples is not None:
            path = None
            if self.buffer_dir is not None:
                os.makedirs(self.buffer_dir, exist_ok=True)
                name = f"{stack}_hidden_states_{self.run.processes.index}.bin"
                path = os.path.join(self.buffer_dir, name)
            buffer = ListBuffer(self.samples.lengths[stack], config.embed_dim, path=path)
            self._embed(stack, embedding, buffer)
        # bfloat16 activations stay bfloat16 until the first MoE, whose output is float32.
        residual_dtype = self.run.settings.activation_dtype
        num_layers = getattr(config, f"num_{stack}_layers")
        for layer in range(num_layers):
            bar.note(f"{stack} layer {layer}")
            params = self.dense.read_layer(stack, layer)
            routing = None
            started = time.monotonic()
            if buffer is not None:
                routing = self._dense_pass(
                    stack, layer, params, rel_embedding, buffer, encoded, residual_dtype
                )
            if (stack, layer) in self.layers:
                dense_seconds = time.monotonic() - started
                self._expert_pass(stack, layer, params, buffer, routing, dense_seconds)
                residual_dtype = "float32"
            bar.update()
        if buffer is not None:
            self._normalise(buffer, scale, residual_dtype)
        return buffer

    def _sample_batches(self, description: str, stack: Stack) -> Iterator[SampleBatch]:
        """All sample batches, with a bar that counts the stack's tokens."""
        assert self.samples is not None
        lengths = self.samples.lengths[stack]
        with self.run.progress(
            total=int(lengths.sum()), title=description, unit="tokens", scaled=True, inner=True
        ) as bar:
            for batch in self.samples.batches(self.batch_size):
                yield batch
                bar.update(int(lengths[batch.samples].sum()))

    def _embed(self, stack: Stack, embedding: np.ndarray, buffer: ListBuffer) -> None:
        assert self.samples is not None
        name = f"{stack}_input_tokens"
        on_devices = self.run.devices.replicate(embedding)
        for batch in self._sample_batches(f"{stack}: embed", stack):
            ids = self.samples.ids(name, batch, getattr(batch, f"{stack}_length"))
            ids = self.run.devices.spread(ids)
            x = dense_pass.embed(
                self.run.config, self.run.settings.activation_dtype, on_devices, ids
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
    ) -> Routing | None:
        """Send all samples through a layer's dense part; return the routing of a sparse one."""
        assert self.samples is not None
        samples, config = self.samples, self.run.config
        dtype = jnp.dtype(self.run.settings.activation_dtype)
        expert_index = np.zeros(len(buffer.rows), np.int32)
        gate = np.zeros(len(buffer.rows), np.float32)
        params, bias_table = self.run.devices.replicate((params, rel_embedding))
        spread = self.run.devices.spread
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
        return None if routed is None else (expert_index, gate)

    def _expert_pass(
        self,
        stack: Stack,
        layer: int,
        params: dict[str, Any],
        buffer: ListBuffer | None,
        routing: Routing | None,
        dense_seconds: float,
    ) -> None:
        """Quantize the experts of a sparse layer, store their codes, run them compressed."""
        started = time.monotonic()
        tokens = None
        if buffer is not None and routing is not None:
            tokens = self._layer_tokens(stack, buffer, routing)
        scale = np.asarray(params["pre_mlp_layer_norm"]["scale"])
        scheduled = self.layers[stack, layer]
        result = run_expert_layer(self.run, self.reader, scheduled, scale, tokens, self.budget)
        self.results.append(result)
        return_free_memory()
        if not self.run.processes.is_primary:
            return
        seconds = time.monotonic() - started
        # Since the line before: part of this was read while that layer was worked on.
        bytes_before, seconds_before = self.logged_reads
        self.logged_reads = self.reader.num_bytes, self.reader.seconds
        self.log.write(
            "layer",
            stack=stack,
            layer=layer,
            method=self.run.settings.for_layer(stack, layer).method,
            kernels=[dataclasses.asdict(kernel) for kernel in result.kernels],
            batches_replayed=result.batches_replayed,
            seconds=round(seconds, 3),
            experts_per_second=round(len(self.run.experts) / seconds, 3),
            bytes_read=self.logged_reads[0] - bytes_before,
            read_seconds=round(self.logged_reads[1] - seconds_before, 3),
            dense_seconds=round(dense_seconds, 3),
            tokens=None if tokens is None else len(tokens.gate),
            peak_host_bytes=peak_host_bytes(),
        )

    def _layer_tokens(self, stack: Stack, buffer: ListBuffer, routing: Routing) -> LayerTokens:
        """Tell all processes the routing of a layer, and which rows enter Hessians."""
        assert self.samples is not None
        gather = self.run.processes.gather
        expert_index, gate = routing
        gates = gather(gate)
        lengths = [len(part) for part in gates]
        return LayerTokens(
            buffer=buffer,
            dispatch=dispatch_tokens(
                np.concatenate(gather(expert_index)),
                np.concatenate(gather(self.samples.enters_hessian[stack])),
                num_experts=self.run.config.num_experts,
                max_tokens_factor=self.run.settings.max_tokens_factor,
            ),
            gate=np.concatenate(gates),
            processes=self.run.processes,
            first_rows=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        )

    def _normalise(self, buffer: ListBuffer, scale: np.ndarray, residual_dtype: str) -> None:
        """Apply the final norm of a stack in place, a slab of rows at a time."""
        slab = 1 << 14
        for start in range(0, len(buffer.rows), slab):
            rows = buffer.rows[start : start + slab]
            padded = np.zeros((min(slab, len(buffer.rows)), rows.shape[1]), np.float32)
            padded[: len(rows)] = rows
            y = dense_pass.final_norm(
                self.run.settings.activation_dtype,
                jnp.asarray(scale),
                jnp.asarray(padded, residual_dtype)[None],
            )
            buffer.rows[start : start + slab] = np.asarray(y)[0, : len(rows)]

    def _validation_loss(self, decoded: ListBuffer, head: dict[str, Any]) -> LossReport | None:
        samples = self.samples
        assert samples is not None
        head = self.run.devices.replicate(head)
        num_validation = len(samples.tokens) - samples.num_calibration
        sums = np.zeros((num_validation, 3), np.float64)
        for batch in self._sample_batches("validation loss", "decoder"):
            if batch.samples[0] < samples.num_calibration:
                continue
            spread = self.run.devices.spread
            hidden = decoded.padded(batch.samples, batch.decoder_length, batch.batch_size)
            targets = samples.ids("decoder_target_tokens", batch, batch.decoder_length)
            weights = samples.ids("decoder_loss_weights", batch, batch.decoder_length)
            logits = dense_pass.logits(self.run.config, head, spread(hidden))
            places = batch.samples - samples.num_calibration
            parts = batch_sums(logits, spread(targets), spread(weights))
            for column, part in enumerate(parts):
                sums[places, column] = np.asarray(part)[: len(places)]
        sums = np.concatenate(self.run.processes.gather(sums))
        if not len(sums):
            return None
        return LossReport(sums[:, 0], sums[:, 1].astype(np.int64), sums[:, 2].astype(np.int64))
