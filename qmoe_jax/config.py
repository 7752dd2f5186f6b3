"""The geometry of a Switch Transformer and how it routes: plain values, no file behind them."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from qmoe_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """Sizes of a Switch Transformer, and how it routes.

    The first block is read off a checkpoint's parameter names and shapes
    (`checkpoints.read_config`). The second is not in any
    checkpoint: its defaults are those of flaxformer's `switch_{base,large,xxl,c}.gin`.

    Attributes:
      num_embeddings: rows of the token embedding (32128 for the public models).
      embed_dim: width of the residual stream.
      mlp_dim: hidden width of the dense MLPs (0 where every layer is sparse).
      expert_mlp_dim: hidden width of an expert.
      num_heads: attention heads.
      head_dim: width of a head; num_heads * head_dim need not equal embed_dim.
      num_experts: experts in a sparse layer.
      num_encoder_layers: encoder layers, dense and sparse.
      num_decoder_layers: decoder layers, dense and sparse.
      encoder_sparse_layers: ascending indices of the encoder layers whose MLP is a MoE.
      decoder_sparse_layers: the same for the decoder.
      mlp_activations: `("relu",)`, or `("gelu", "linear")` for gated MLPs (wi_0, wi_1).
      tied_logits: logits come from the token embedding; else from `logits_dense`.
      relpos_buckets: buckets of the relative position bias.

      relpos_max_distance: distance from which on all positions share the last bucket.
      max_group_size: upper bound on the tokens of a token group (`GROUP_SIZE`).
      train_capacity_factor: expert capacity factor with `enable_dropout=True`.
      eval_capacity_factor: expert capacity factor with `enable_dropout=False`; None is dropless
        (always, also with `enable_dropout=True`).
      min_expert_capacity: minimum capacity of an expert in a token group.
    """

    num_embeddings: int
    embed_dim: int
    mlp_dim: int
    expert_mlp_dim: int
    num_heads: int
    head_dim: int
    num_experts: int
    num_encoder_layers: int
    num_decoder_layers: int
    encoder_sparse_layers: tuple[int, ...]
    decoder_sparse_layers: tuple[int, ...]
    mlp_activations: tuple[str, ...] = ("relu",)
    tied_logits: bool = True
    relpos_buckets: int = 32

    relpos_max_distance: int = 128
    max_group_size: int = 8192
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float | None = 2.0
    min_expert_capacity: int = 4

    @property
    def sparse_layers(self) -> tuple[tuple[str, int], ...]:
        """(stack, layer) of every layer whose MLP is a MoE, in the order of the data flow."""
        return tuple(("encoder", layer) for layer in self.encoder_sparse_layers) + tuple(
            ("decoder", layer) for layer in self.decoder_sparse_layers
        )

    @property
    def wi_names(self) -> tuple[str, ...]:
        """Names of the input kernels of an MLP: `("wi",)`, or `("wi_0", "wi_1")` when gated."""
        if len(self.mlp_activations) == 1:
            return ("wi",)
        return tuple(f"wi_{i}" for i in range(len(self.mlp_activations)))

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON object; tuples become lists."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "SwitchConfig":
        """Inverse of `to_json`; every field must be there, with a value of its type.

        Raises:
          CheckpointError: a field is missing, unknown or of another type.
        """
        types = typing.get_type_hints(cls)
        if missing := sorted(types.keys() - fields.keys()):
            raise CheckpointError(f"the config lacks {missing}: all fields must be given")
        if unknown := sorted(fields.keys() - types.keys()):
            raise CheckpointError(
                f"the config has unknown fields {unknown}: it was written by a newer version, "
                "or one is misspelt"
            )
        return cls(**{name: _checked(name, types[name], fields[name]) for name in types})


ROUTING_FIELDS = (
    "relpos_max_distance",
    "max_group_size",
    "train_capacity_factor",
    "eval_capacity_factor",
    "min_expert_capacity",
)


def _checked(name: str, kind: Any, value: Any) -> Any:
    """Return a JSON value as the Python value of a field whose annotation is `kind`."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    is_list = isinstance(value, (list, tuple))
    if is_int and abs(value) >= 2**63:
        raise CheckpointError(f"the config's {name} is {value!s:.40}, expected less than 2^63")
    if kind is int and is_int and value >= 0:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind == float | None and value is None:
        return None
    if kind in (float, float | None) and (is_int or isinstance(value, float)):
        return float(value)
    if (
        kind == tuple[int, ...]
        and is_list
        and all(type(v) is int and 0 <= v < 2**63 for v in value)
    ):
        return tuple(value)
    if kind == tuple[str, ...] and is_list and value and all(isinstance(v, str) for v in value):
        return tuple(value)
    expected = kind.__name__ if isinstance(kind, type) else str(kind)
    raise CheckpointError(f"the config's {name} is {value!r}, expected {expected}")
