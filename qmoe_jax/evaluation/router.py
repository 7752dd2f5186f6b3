"""What the routers did: per sparse layer, over real tokens and as flaxformer counts."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.checkpoints import names
from qmoe_jax.models import routing

# Means over a layer's token groups; they count padding, which takes capacity as tokens do.
T5X_METRICS = (
    "auxiliary_loss",
    "router_z_loss",
    "fraction_tokens_left_behind",
    "expert_usage",
    "router_confidence",
)


def router_sums(
    intermediates: Mapping[str, Any],
    encoder_tokens: Bool[Array, "batch encoder_length"],
    decoder_tokens: Bool[Array, "batch length"],
) -> dict[str, dict[str, Array]]:
    """Sum over a batch for each sparse layer, by module path (`encoder/layers_1/mlp`).

    Args:
      intermediates: what `models.moe.MoeLayer` sows.
      encoder_tokens: True where the encoder has a token, False at padding.
      decoder_tokens: True where the decoder has a target.

    Returns:
      For each layer `tokens_per_expert` (int32 [experts], real tokens by the expert they choose,
      dropped ones too), `num_dropped` (int32, real tokens over capacity), `confidence` (float32,
      sum of router probabilities over real tokens that were not dropped), and flaxformer's
      `T5X_METRICS` (float32).
    """
    sown: dict[str, Any] = names.flatten(intermediates)
    layers = {}
    for key in sown:
        layer, _, name = key.rpartition("/")
        if name == "router_logits":
            is_token = encoder_tokens if layer.startswith("encoder/") else decoder_tokens
            one = {n: sown[f"{layer}/{n}"][0] for n in ("dispatched_expert", "gate", *T5X_METRICS)}
            layers[layer] = _layer_sums(sown[key][0], one, is_token)
    return layers


def _layer_sums(
    router_logits: Float[Array, "groups tokens experts"],
    sown: Mapping[str, Array],
    is_token: Bool[Array, "batch length"],
) -> dict[str, Array]:
    num_experts = router_logits.shape[-1]
    num_routed = router_logits.shape[0] * router_logits.shape[1]
    if num_routed != is_token.size:
        # The layer has appended rows or columns so that the tokens divide by the experts.
        batch, length = is_token.shape
        rows, columns = routing.group_padding(batch, length, num_experts)
        is_token = jnp.pad(is_token, ((0, rows), (0, columns)))
    is_token = is_token.reshape(router_logits.shape[:2])
    _, chosen, _ = routing.choose_expert(router_logits)
    dropped = sown["dispatched_expert"] < 0
    sums = {
        "tokens_per_expert": jnp.zeros(num_experts, jnp.int32)
        .at[chosen.reshape(-1)]
        .add(is_token.reshape(-1).astype(jnp.int32)),
        "num_dropped": jnp.sum(is_token & dropped, dtype=jnp.int32),
        "confidence": jnp.sum(jnp.where(is_token & ~dropped, sown["gate"], 0.0)),
    }
    return sums | {name: jnp.mean(sown[name]) for name in T5X_METRICS}


def router_report(
    layers: Mapping[str, Mapping[str, np.ndarray]], whole_batches: Int[np.ndarray, "whole"]
) -> dict[str, Any]:
    """Return the router statistics of an evaluation from the sums of its batches.

    Args:
      layers: for each layer the arrays of `router_sums`, stacked over batches on a first axis.
      whole_batches: the batches without filler rows; flaxformer's means are taken over these.

    Returns:
      `layers` and `total`, each with

      - num_tokens: real tokens that were routed.
      - dropped_fraction: share of them over their expert's capacity.
      - confidence: mean router probability of those that were not dropped.
      - max_load: tokens of the fullest expert over the mean of all; `total` has the highest
        layer's.
      - unused_experts: share of the experts that no real token chose.
      - auxiliary_loss, router_z_loss, fraction_tokens_left_behind, expert_usage,
        router_confidence: as T5X logs them (before factors): means over whole batches, in `total`
        also over layers, with padding counted as tokens.
    """
    reports = {}
    for layer in sorted(layers, key=_natural_order):
        sums = layers[layer]
        load = sums["tokens_per_expert"].sum(axis=0, dtype=np.int64)
        num_tokens = int(load.sum())
        num_dropped = int(sums["num_dropped"].sum(dtype=np.int64))
        kept = num_tokens - num_dropped
        confidence = float(sums["confidence"].sum(dtype=np.float64))
        reports[layer] = {
            "num_tokens": num_tokens,
            "num_dropped": num_dropped,
            "dropped_fraction": num_dropped / num_tokens,
            "confidence": confidence / kept if kept else 0.0,
            "max_load": float(load.max() / load.mean()),
            "unused_experts": float(np.mean(load == 0)),
        }
        for name in T5X_METRICS:
            reports[layer][name] = float(sums[name][whole_batches].mean(dtype=np.float64))
    return {"total": _total(list(reports.values())), "layers": reports}


def _total(layers: list[dict[str, Any]]) -> dict[str, Any]:
    num_tokens = sum(layer["num_tokens"] for layer in layers)
    num_dropped = sum(layer["num_dropped"] for layer in layers)
    kept = [layer["num_tokens"] - layer["num_dropped"] for layer in layers]
    confidence = sum(n * layer["confidence"] for n, layer in zip(kept, layers, strict=True))
    total = {
        "num_tokens": num_tokens,
        "num_dropped": num_dropped,
        "dropped_fraction": num_dropped / num_tokens,
        "confidence": confidence / sum(kept) if sum(kept) else 0.0,
        "max_load": max(layer["max_load"] for layer in layers),
        "unused_experts": float(np.mean([layer["unused_experts"] for layer in layers])),
    }
    return total | {name: float(np.mean([layer[name] for layer in layers])) for name in T5X_METRICS}


def _natural_order(layer: str) -> tuple[bool, int]:
    """Return the encoder first, and layer 2 before layer 10."""
    found = re.search(r"layers_(\d+)", layer)
    return not layer.startswith("encoder/"), int(found[1]) if found else 0
