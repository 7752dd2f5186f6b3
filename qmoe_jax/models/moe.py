"""The sparse MLP: routing, the experts (dense kernels or codes), and their weighted outputs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models import routing
from qmoe_jax.models.layers import ADAPTERS, StackedKernel, gated_activation
from qmoe_jax.ops.cuda.fragments import Fragments
from qmoe_jax.ops.expert_parallel import split_expert_mlp
from qmoe_jax.ops.experts import AdaptedExperts, CodedExperts, DenseExperts, Experts
from qmoe_jax.ops.products import expert_mlp

# Which expert kernels are stored as codes: name relative to the holding module -> its spec.
# Pairs instead of a dict, so that modules that hold it stay hashable.
CodedKernels = tuple[tuple[str, TensorSpec], ...]


def coded_below(coded: CodedKernels, name: str) -> CodedKernels:
    """Return the part of `coded` below the child module `name`, with names relative to it."""
    prefix = name + "/"
    return tuple((k.removeprefix(prefix), spec) for k, spec in coded if k.startswith(prefix))


# Collection beside `params` of what CUDA kernels need and the checkpoint does not store. Only
# `load_switch` fills it where the implementation is one of `ops.products.CUDA`; without it, each
# call computes it again, and fragments are not used.
DERIVED = "derived"


class CodedKernel(nn.Module):
    """The kernels of all experts as codes: the arrays of one coded tensor, read as parameters."""

    spec: TensorSpec
    in_features: int

    @nn.compact
    def __call__(self) -> CodedExperts:
        """Return the stored arrays, and what follows from them if the collection `derived` has it.

        Raises:
          ValueError: an array is not among the parameters (codes have no initialiser).
        """
        arrays = {}
        coding = get_coding(self.spec.coding)
        for name in coding.array_names:
            if not self.has_variable("params", name):
                raise ValueError(
                    f"{'/'.join(self.path)} is coded as {self.spec.coding!r} and needs the array "
                    f"{name!r}; load the variables with qmoe_jax.load_switch"
                )
            arrays[name] = self.get_variable("params", name)
        names = (*coding.cuda.derived_names, *Fragments._fields) if coding.cuda else ()
        found = [name for name in names if self.has_variable(DERIVED, name)]
        derived = {name: self.get_variable(DERIVED, name) for name in found}
        return CodedExperts(self.spec, arrays, self.in_features, derived)


class Expert(nn.Module):
    """The kernels of the experts of one layer, under their checkpoint names."""

    config: SwitchConfig
    coded: CodedKernels = ()

    @nn.compact
    def __call__(self) -> dict[str, Experts]:
        """Return the kernels of all experts, by name."""
        config = self.config
        shapes = {name: (config.embed_dim, config.expert_mlp_dim) for name in config.wi_names}
        shapes["wo"] = (config.expert_mlp_dim, config.embed_dim)
        specs = dict(self.coded)
        kernels: dict[str, Experts] = {}
        for name, (fan_in, fan_out) in shapes.items():
            if name in specs:
                kernel = CodedKernel(specs[name], fan_in, name=name)()
            else:
                stacked = StackedKernel(config.num_experts, fan_in, fan_out, name=name)()
                kernel = DenseExperts(stacked)
            kernels[name] = kernel
            if self.has_variable(ADAPTERS, name):
                adapter = self.get_variable(ADAPTERS, name)
                kernels[name] = AdaptedExperts(kernel, adapter["a"], adapter["b"])
        return kernels


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
      implementation: of the experts' products (`ops.products.IMPLEMENTATIONS`).
      mesh: over which experts are split (`ops.expert_parallel`); None: they are not.
      dropout_rate: of experts' hidden layers; the tokens of an expert share a mask.
    """

    config: SwitchConfig
    coded: CodedKernels = ()
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    mesh: Mesh | None = None
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], *, enable_dropout: bool = False
    ) -> Float[Array, "batch length embed"]:
        """Route x and return the combined expert outputs, float32.

        Args:
          x: normalised tokens; padding is exactly zero.
          enable_dropout: use the training capacity factor, and dropout.
        """
        config = self.config
        batch, length, embed = x.shape
        if config.eval_capacity_factor is None:
            grouped = x.reshape(1, batch * length, embed)
            capacity = None
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
        if capacity is None:
            kept = jnp.ones(expert_index.shape, bool)
        else:
            kept = routing.within_capacity(expert_index, config.num_experts, capacity)
        self._sow(router_logits, router_probs, expert_index, gate, kept, capacity)

        # A zero vector gives exactly zero through experts without biases: padding is not sent.
        is_token = jnp.any(grouped != 0, axis=-1)
        dispatched = jnp.where(kept & is_token, expert_index, -1)
        kernels = Expert(config, coded_below(self.coded, "expert"), name="expert")()
        run = expert_mlp
        if self.mesh is not None:
            run = functools.partial(split_expert_mlp, mesh=self.mesh)
        outputs = run(
            grouped.reshape(-1, embed).astype(self.dtype),
            dispatched.reshape(-1),
            num_experts=config.num_experts,
            wi=[kernels[name] for name in config.wi_names],
            wo=kernels["wo"],
            activation=lambda hidden: gated_activation(hidden, config.mlp_activations),
            hidden_scale=self._dropout(enable_dropout),
            implementation=self.implementation,
        )
        combined = outputs.astype(jnp.float32) * gate.reshape(-1, 1)
        return combined.reshape(x.shape)[:batch, :length]

    def _dropout(self, enable_dropout: bool) -> Float[Array, "experts mlp"] | None:
        """Return factors of the experts' hidden layers: 0, or what makes up for the zeros."""
        if not enable_dropout or not self.dropout_rate:
            return None
        config, keep = self.config, 1 - self.dropout_rate
        shape = (config.num_experts, config.expert_mlp_dim)
        return jax.random.bernoulli(self.make_rng("dropout"), keep, shape) / jnp.float32(keep)

    def _sow(
        self,
        router_logits: Float[Array, "groups tokens experts"],
        router_probs: Float[Array, "groups tokens experts"],
        expert_index: Int[Array, "groups tokens"],
        gate: Float[Array, "groups tokens"],
        kept: Array,
        capacity: int | None,
    ) -> None:
        if not self.is_mutable_collection("intermediates") or self.is_initializing():
            return
        self.sow("intermediates", "router_logits", router_logits)
        self.sow("intermediates", "dispatched_expert", jnp.where(kept, expert_index, -1))
        self.sow("intermediates", "gate", gate)
        num_kept = jnp.sum(kept)
        places = kept.shape[1] if capacity is None else capacity
        metrics = {
            "auxiliary_loss": routing.load_balancing_loss(router_probs, expert_index),
            "router_z_loss": routing.router_z_loss(router_logits),
            "fraction_tokens_left_behind": 1.0 - num_kept / kept.size,
            "router_confidence": jnp.sum(jnp.where(kept, gate, 0.0)) / num_kept,
            "expert_usage": num_kept / (self.config.num_experts * places * kept.shape[0]),
        }
        for name, value in metrics.items():
            # flaxformer's shape, so that T5X's metric functions find what they expect.
            self.sow("intermediates", name, jnp.asarray(value, jnp.float32).reshape(1, 1))
