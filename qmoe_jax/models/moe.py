"""The sparse MLP: routing, the experts (dense kernels or codes), and their weighted outputs."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qmoe_jax.checkpoints.config import SwitchConfig
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.decode import decode_expert_weights
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.models import routing
from qmoe_jax.models.layers import StackedKernel, gated_activation
from qmoe_jax.ops.grouped_mlp import KernelFetch, grouped_mlp

# Which expert kernels are stored as codes: name relative to the holding module -> its spec.
# Pairs instead of a dict, so that modules that hold it stay hashable.
CodedKernels = tuple[tuple[str, TensorSpec], ...]


def coded_below(coded: CodedKernels, name: str) -> CodedKernels:
    """The part of `coded` below the child module `name`, with names relative to it."""
    prefix = name + "/"
    return tuple((k.removeprefix(prefix), spec) for k, spec in coded if k.startswith(prefix))


class CodedKernel(nn.Module):
    """The kernels of all experts as codes: the arrays of one coded tensor, read as parameters."""

    spec: TensorSpec

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """Returns the stored arrays by name.

        Raises:
          ValueError: an array is not among the parameters (codes have no initialiser).
        """
        arrays = {}
        for name in get_coding(self.spec.coding).array_names:
            if not self.has_variable("params", name):
                raise ValueError(
                    f"{'/'.join(self.path)} is coded as {self.spec.coding!r} and needs the array "
                    f"{name!r}; load the variables with qmoe_jax.load_switch"
                )
            arrays[name] = self.get_variable("params", name)
        return arrays


class Expert(nn.Module):
    """The kernels of the experts of one layer, under their checkpoint names."""

    config: SwitchConfig
    coded: CodedKernels = ()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, KernelFetch]:
        """A fetch per kernel name: a traced expert index to that expert's [in, out] kernel."""
        config = self.config
        shapes = {name: (config.embed_dim, config.expert_mlp_dim) for name in config.wi_names}
        shapes["wo"] = (config.expert_mlp_dim, config.embed_dim)
        specs = dict(self.coded)
        fetches: dict[str, KernelFetch] = {}
        for name, (fan_in, fan_out) in shapes.items():
            if name in specs:
                arrays = CodedKernel(specs[name], name=name)()
                fetches[name] = functools.partial(
                    _fetch_coded, spec=specs[name], arrays=arrays, fan_in=fan_in, dtype=self.dtype
                )
            else:
                kernel = StackedKernel(config.num_experts, fan_in, fan_out, name=name)()
                fetches[name] = functools.partial(_fetch_dense, kernel=kernel, dtype=self.dtype)
        return fetches


def _fetch_dense(expert: Int[Array, ""], *, kernel: Array, dtype: DTypeLike) -> Array:
    return lax.dynamic_index_in_dim(kernel, expert, keepdims=False).astype(dtype)


def _fetch_coded(
    expert: Int[Array, ""],
    *,
    spec: TensorSpec,
    arrays: dict[str, Array],
    fan_in: int,
    dtype: DTypeLike,
) -> Array:
    # A row of codes may be a group of an output feature's weights: its groups lie side by side.
    return decode_expert_weights(spec, arrays, expert, dtype).reshape(-1, fan_in).T


class MoeLayer(nn.Module):
    """Switch MoE: each token goes through one expert, weighted by its router probability.

    With a capacity factor, routing is flaxformer's to the token: token groups, padding that takes
    capacity, tokens over capacity dropped (output exactly 0). Dropless (capacity factor None)
    every token reaches its expert, as QMoE evaluates.

    Sown into `intermediates`: `router_logits`, `dispatched_expert` (-1 where dropped), `gate`, and
    flaxformer's metrics. With a capacity factor they have the shape [groups, tokens_per_group]
    (padding included), dropless [1, batch * length].

    Attributes:
      config: geometry and routing.
      coded: expert kernels that are stored as codes.
      dtype: activation dtype of the experts; the result is float32 (the combine
        weights are float32 and promote it).
    """

    config: SwitchConfig
    coded: CodedKernels = ()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], *, enable_dropout: bool = False
    ) -> Float[Array, "batch length embed"]:
        """Routes x and returns the combined expert outputs, float32.

        Args:
          x: normalised tokens; padding is exactly zero.
          enable_dropout: use the training capacity factor.
        """
        config = self.config
        batch, length, embed = x.shape
        dropless = config.eval_capacity_factor is None
        if dropless:
            grouped = x.reshape(1, batch * length, embed)
            capacity = batch * length
        else:
            pad_rows, pad_columns = routing.group_padding(batch, length, config.num_experts)
            x = jnp.pad(x, ((0, pad_rows), (0, pad_columns), (0, 0)))
            num_tokens = x.shape[0] * x.shape[1]
            groups = routing.num_token_groups(num_tokens, config.max_group_size, config.num_experts)
            grouped = x.reshape(groups, num_tokens // groups, embed)
            factor = config.eval_capacity_factor
            if enable_dropout:
                factor = config.train_capacity_factor
            assert factor is not None
            capacity = routing.expert_capacity(
                grouped.shape[1], config.num_experts, factor, config.min_expert_capacity
            )

        router_logits = routing.Router(config.num_experts, name="router")(grouped)
        router_probs, expert_index, gate = routing.choose_expert(router_logits)
        if dropless:
            kept = jnp.ones(expert_index.shape, bool)
        else:
            kept = routing.within_capacity(expert_index, config.num_experts, capacity)
        self._sow(router_logits, router_probs, expert_index, gate, kept, capacity)

        # A zero vector gives exactly zero through experts without biases: padding is not sent.
        is_token = jnp.any(grouped != 0, axis=-1)
        dispatched = jnp.where(kept & is_token, expert_index, -1)
        fetches = Expert(config, coded_below(self.coded, "expert"), self.dtype, name="expert")()
        outputs = grouped_mlp(
            grouped.reshape(-1, embed).astype(self.dtype),
            dispatched.reshape(-1),
            num_experts=config.num_experts,
            fetch_wi=[fetches[name] for name in config.wi_names],
            fetch_wo=fetches["wo"],
            activation=lambda hidden: gated_activation(hidden, config.mlp_activations),
        )
        combined = outputs.astype(jnp.float32) * gate.reshape(-1, 1)
        return combined.reshape(x.shape)[:batch, :length]

    def _sow(
        self,
        router_logits: Float[Array, "groups tokens experts"],
        router_probs: Float[Array, "groups tokens experts"],
        expert_index: Int[Array, "groups tokens"],
        gate: Float[Array, "groups tokens"],
        kept: Array,
        capacity: int,
    ) -> None:
        if not self.is_mutable_collection("intermediates") or self.is_initializing():
            return
        self.sow("intermediates", "router_logits", router_logits)
        self.sow("intermediates", "dispatched_expert", jnp.where(kept, expert_index, -1))
        self.sow("intermediates", "gate", gate)
        num_kept = jnp.sum(kept)
        metrics = {
            "auxiliary_loss": routing.load_balancing_loss(router_probs, expert_index),
            "router_z_loss": routing.router_z_loss(router_logits),
            "fraction_tokens_left_behind": 1.0 - num_kept / kept.size,
            "router_confidence": jnp.sum(jnp.where(kept, gate, 0.0)) / num_kept,
            "expert_usage": num_kept / (self.config.num_experts * capacity * kept.shape[0]),
        }
        for name, value in metrics.items():
            # flaxformer's shape, so that T5X's metric functions find what they expect.
            self.sow("intermediates", name, jnp.asarray(value, jnp.float32).reshape(1, 1))
