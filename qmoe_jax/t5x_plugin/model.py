"""T5X's encoder-decoder model around our Switch Transformer. Needs t5x (docs/t5x.md)."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import seqio
from flax.core import FrozenDict, freeze
from jax.typing import DTypeLike
from t5x import decoding, models  # pyright: ignore[reportMissingImports]

from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.t5x_plugin.variables import checkpoint_shapes, placeholder_variables


def switch_module(
    checkpoint: str | os.PathLike[str],
    activation_dtype: DTypeLike = "float32",
    expert_capacity_factor: float | None = None,
) -> SwitchTransformer:
    """Make the module of a checkpoint, without parameters: geometry, which kernels are codes."""
    dtype = jnp.dtype(activation_dtype)
    config = read_config(checkpoint, eval_capacity_factor=expert_capacity_factor)
    if not is_compressed_checkpoint(checkpoint):
        return SwitchTransformer(config, dtype)
    specs = open_compressed_checkpoint(checkpoint).specs
    return SwitchTransformer(config, dtype, tuple(sorted(specs.items())))


class SwitchModel(models.EncoderDecoderModel):
    """`MODEL` in a gin file: what T5X's programs evaluate and infer with.

    Parameters come through `restore.SwitchCheckpointer`. The experts stay codes in memory. For
    inference only: `loss_fn` says why.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        *,
        activation_dtype: DTypeLike = "float32",
        expert_capacity_factor: float | None = None,
        decode_fn: Callable[..., Any] = decoding.beam_search,
        feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: Any = None,
        default_decoder_params: Any = None,
    ):
        """Read metadata of the checkpoint.

        Args:
          checkpoint: compressed or native checkpoint, local or gs://; the one that
            `RestoreCheckpointConfig.path` names.
          input_vocabulary: of the task; T5X compares them.
          output_vocabulary: of the task.
          activation_dtype: "float32" or "bfloat16".
          expert_capacity_factor: T5X's `EVAL_EXPERT_CAPACITY_FACTOR`; None is dropless.
          decode_fn: T5X's `decoding.beam_search` or `decoding.temperature_sample`.
          feature_converter_cls: as `t5x.models.EncoderDecoderModel` takes it.
          label_smoothing: as `EncoderDecoderModel` takes it.
          z_loss: its factor in the loss that T5X's training evaluation reports.
          loss_normalizing_factor: as `EncoderDecoderModel` takes it.
          default_decoder_params: as `EncoderDecoderModel` takes it.

        Raises:
          CheckpointError: nothing readable at `checkpoint`.
        """
        self._shapes = checkpoint_shapes(checkpoint)
        super().__init__(
            module=switch_module(checkpoint, activation_dtype, expert_capacity_factor),
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=None,
            decode_fn=decode_fn,
            feature_converter_cls=feature_converter_cls,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            loss_normalizing_factor=loss_normalizing_factor,
            default_decoder_params=default_decoder_params,
        )

    def eval_fn(self, params: Any, batch: Mapping[str, Any]) -> Any:
        """Compute T5X's loss and metrics, without dropout."""
        return models.EncoderDecoderModel.loss_fn(self, params, batch, None)

    @property
    def loss_fn(self) -> Callable[..., Any]:
        """Refuse: T5X asks for it to take gradients.

        T5X takes those of all that a checkpoint holds, at once, and codes are integers, of which
        there are none.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "t5x.train cannot train a SwitchModel: it takes gradients of every parameter, and its "
            "optimizer holds every one, but the codes of experts are integers. Fine-tune with "
            "`qmoe-jax finetune` (docs/finetune.md), whose loss and optimizer are T5X's; "
            "t5x.eval and t5x.infer take what it writes"
        )

    def get_initial_variables(
        self,
        rng: Any,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> FrozenDict[str, Any]:
        """Shapes and axes for T5X, as zeros: see `variables.placeholder_variables`."""
        del rng, input_shapes, input_types
        return freeze(placeholder_variables(self._shapes))
