"""Parameter names and shapes of a Switch Transformer: from its config, and the config from them."""

import re
from collections.abc import Mapping
from typing import Any

from qmoe_jax.checkpoints import names
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

Shape = tuple[int, ...]

_LOGITS = "decoder/logits_dense/kernel"
_MOST_LISTED = 5


def parameter_shapes(config: SwitchConfig) -> dict[str, Shape]:
    """Shape of every parameter of a Switch Transformer, by sorted '/'-joined name."""
    embed = config.embed_dim
    shapes: dict[str, Shape] = {names.EMBEDDING: (config.num_embeddings, embed)}
    if not config.tied_logits:
        shapes[_LOGITS] = (embed, config.num_embeddings)
    stacks = (
        ("encoder", config.num_encoder_layers, config.encoder_sparse_layers),
        ("decoder", config.num_decoder_layers, config.decoder_sparse_layers),
    )
    for stack, num_layers, sparse_layers in stacks:
        shapes[f"{stack}/{stack}_norm/scale"] = (embed,)
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (config.num_heads, config.relpos_buckets)
        for layer in range(num_layers):
            shapes |= _attention_shapes(config, stack, layer)
            shapes |= _mlp_shapes(config, stack, layer, sparse=layer in sparse_layers)
    return dict(sorted(shapes.items()))


def _attention_shapes(config: SwitchConfig, stack: str, layer: int) -> dict[str, Shape]:
    """Attention kernels and all norms of a layer."""
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    if stack == "encoder":
        attentions = {"attention": "pre_attention_layer_norm"}
    else:
        attentions = {
            "self_attention": "pre_self_attention_layer_norm",
            "encoder_decoder_attention": "pre_cross_attention_layer_norm",
        }
    prefix = f"{stack}/layers_{layer}"
    shapes: dict[str, Shape] = {f"{prefix}/pre_mlp_layer_norm/scale": (embed,)}
    for attention, norm in attentions.items():
        shapes[f"{prefix}/{norm}/scale"] = (embed,)
        for projection in ("query", "key", "value"):
            shapes[f"{prefix}/{attention}/{projection}/kernel"] = (embed, joined)
        shapes[f"{prefix}/{attention}/out/kernel"] = (joined, embed)
    return shapes


def _mlp_shapes(config: SwitchConfig, stack: str, layer: int, *, sparse: bool) -> dict[str, Shape]:
    embed, experts = config.embed_dim, config.num_experts
    if not sparse:
        prefix, mlp = names.mlp_prefix(stack, layer), config.mlp_dim
        shapes: dict[str, Shape] = {f"{prefix}/{wi}/kernel": (embed, mlp) for wi in config.wi_names}
        return shapes | {f"{prefix}/wo/kernel": (mlp, embed)}
    mlp = config.expert_mlp_dim
    shapes = {names.router_kernel(stack, layer): (embed, experts)}
    for wi in config.wi_names:
        shapes[names.expert_kernel(stack, layer, wi)] = (experts, embed, mlp)
    return shapes | {names.expert_kernel(stack, layer, "wo"): (experts, mlp, embed)}


def infer_config(shapes: Mapping[str, Shape]) -> SwitchConfig:
    """Geometry of the Switch Transformer that has exactly the parameters in `shapes`.

    Sizes are read off a few parameters; all names and shapes are then compared with those that the
    result implies. What shapes cannot tell is flaxformer's: `relpos_max_distance` 128, and for
    routing the values of the gin file that the geometry belongs to, the first match of

      =======================  ==============  ===================  =====  ====  ==================
      model                    max_group_size  min_expert_capacity  train  eval  gin file
      =======================  ==============  ===================  =====  ====  ==================
      every layer is sparse              2048                    2    1.0   2.0  switch_c.gin
      gated MLPs                         4096                    2   1.25   4.0  switch_xxl.gin
      embed_dim >= 1024                  4096                    4   1.25   2.0  switch_large.gin
      any other                          8192                    4   1.25   2.0  switch_base.gin
      =======================  ==============  ===================  =====  ====  ==================

    where train and eval are the capacity factors.

    Args:
      shapes: shape of every parameter by '/'-joined name.

    Raises:
      CheckpointError: layer-stacked ("scanned") parameters, no experts, a missing layer or
        parameter, a parameter that does not belong, or shapes that disagree.
    """
    num_layers = {stack: _num_layers(stack, shapes) for stack in ("encoder", "decoder")}
    sparse = {stack: _sparse_layers(stack, shapes) for stack in ("encoder", "decoder")}
    experts = [name for name in sorted(shapes) if names.is_expert_kernel(name)]
    if not experts:
        raise CheckpointError(
            "the checkpoint has no expert kernels (<stack>/layers_<i>/mlp/expert/*/kernel): "
            "it is not a Switch Transformer, so there is nothing to compress."
        )
    gated = any(re.search(r"/mlp/(expert/)?wi_0/kernel$", name) for name in shapes)
    wi = "wi_0" if gated else "wi"
    # The first of each kind tells the size; the comparison below holds the others against it.
    first_experts = next((name for name in experts if name.endswith(f"/{wi}/kernel")), experts[0])
    num_experts, _, expert_mlp_dim = _axes(shapes, first_experts, 3)
    dense = [name for name in sorted(shapes) if re.search(rf"layers_\d+/mlp/{wi}/kernel$", name)]
    num_embeddings, embed_dim = _axes(shapes, names.EMBEDDING, 2)
    num_heads, relpos_buckets = _axes(shapes, "encoder/relpos_bias/rel_embedding", 2)
    query = "encoder/layers_0/attention/query/kernel"
    joined = _axes(shapes, query, 2)[1]
    if joined % num_heads:
        raise CheckpointError(
            f"parameter {query} has {joined} columns, which {num_heads} heads (the rows of "
            "encoder/relpos_bias/rel_embedding) do not divide: they are of two models."
        )
    all_sparse = all(len(sparse[stack]) == num_layers[stack] for stack in num_layers)
    config = SwitchConfig(
        num_embeddings=num_embeddings,
        embed_dim=embed_dim,
        mlp_dim=_axes(shapes, dense[0], 2)[1] if dense else 0,
        expert_mlp_dim=expert_mlp_dim,
        num_heads=num_heads,
        head_dim=joined // num_heads,
        num_experts=num_experts,
        num_encoder_layers=num_layers["encoder"],
        num_decoder_layers=num_layers["decoder"],
        encoder_sparse_layers=sparse["encoder"],
        decoder_sparse_layers=sparse["decoder"],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        tied_logits=_LOGITS not in shapes,
        relpos_buckets=relpos_buckets,
        **_routing(all_sparse=all_sparse, gated=gated, embed_dim=embed_dim),
    )
    _compare(shapes, config)
    return config


def _routing(*, all_sparse: bool, gated: bool, embed_dim: int) -> dict[str, Any]:
    """Return the table in `infer_config`."""
    columns = (
        "max_group_size",
        "min_expert_capacity",
        "train_capacity_factor",
        "eval_capacity_factor",
    )
    if all_sparse:
        row = (2048, 2, 1.0, 2.0)
    elif gated:
        row = (4096, 2, 1.25, 4.0)
    elif embed_dim >= 1024:
        row = (4096, 4, 1.25, 2.0)
    else:
        row = (8192, 4, 1.25, 2.0)
    return dict(zip(columns, row, strict=True))


def _num_layers(stack: str, shapes: Mapping[str, Shape]) -> int:
    layers = {layer for s, layer in filter(None, map(names.layer_of, shapes)) if s == stack}
    if not layers:
        if any(re.match(rf"{stack}/.*(attention|mlp)", name) for name in shapes):
            raise CheckpointError(
                f"the {stack} has no parameters {stack}/layers_<i>/..., but some of another form: "
                "a scanned (layer-stacked) checkpoint, which is not supported. Unstack its layers "
                "into layers_0, layers_1, ... first; the public Switch checkpoints are not scanned."
            )
        raise CheckpointError(
            f"the checkpoint has no {stack} layers ({stack}/layers_<i>/...): expected a Switch "
            "Transformer with an encoder and a decoder."
        )
    missing = sorted(set(range(max(layers) + 1)) - layers)
    if missing:
        raise CheckpointError(
            f"the {stack} has layers up to {max(layers)}, but no {stack}/layers_{missing[0]}/... "
            f"(missing layers: {missing}): the checkpoint is incomplete, copy it again."
        )
    return max(layers) + 1


def _sparse_layers(stack: str, shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    """Layers with a router or any expert kernel: if only one is there, the other is missing."""
    found = set()
    for name in shapes:
        layer = names.layer_of(name)
        if layer and layer[0] == stack and re.search(r"/mlp/(expert|router)/", name):
            found.add(layer[1])
    return tuple(sorted(found))


def _axes(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    """Return the shape of a parameter, which must be there and have `rank` axes."""
    if name not in shapes:
        raise CheckpointError(
            f"parameter {name} is missing: the checkpoint is incomplete or not a Switch "
            "Transformer of flaxformer."
        )
    if len(shapes[name]) != rank:
        more = " A scanned (layer-stacked) checkpoint is not supported."
        raise CheckpointError(
            f"parameter {name} has shape {list(shapes[name])}, expected {rank} axes."
            + (more if len(shapes[name]) == rank + 1 else "")
        )
    return shapes[name]


def _compare(shapes: Mapping[str, Shape], config: SwitchConfig) -> None:
    """Raise unless `shapes` are those of `config`, all of them and no others."""
    expected = parameter_shapes(config)
    problems = [
        f"parameter {name} is missing, expected with shape {list(expected[name])}"
        for name in expected.keys() - shapes.keys()
    ]
    problems += [
        f"parameter {name} {list(shapes[name])} does not belong to a Switch Transformer"
        for name in shapes.keys() - expected.keys()
    ]
    problems += [
        f"parameter {name} has shape {list(shapes[name])}, the others imply {list(expected[name])}"
        for name in expected.keys() & shapes.keys()
        if tuple(shapes[name]) != expected[name]
    ]
    if problems:
        problems.sort()
        shown = "; ".join(problems[:_MOST_LISTED])
        more = f"; and {len(problems) - _MOST_LISTED} more" if len(problems) > _MOST_LISTED else ""
        raise CheckpointError(
            f"the parameters do not fit one geometry: {shown}{more}. The checkpoint is "
            "incomplete, mixed from two, or of another architecture."
        )
