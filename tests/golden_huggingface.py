"""Makes tests/golden/huggingface: small random models, written and computed by transformers.

    python tests/golden_huggingface.py tests/golden/huggingface

It needs PyTorch and transformers; the tests need neither. `tests/test_huggingface_parity.py` makes
models again where transformers is installed, of that version.
"""

import copy
import sys
from pathlib import Path

import numpy as np

COMMON = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_heads": 3,
    "num_experts": 4,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "dropout_rate": 0.0,
    # A token more than these would be dropped; here there are fewer.
    "expert_capacity": 1024,
    "decoder_start_token_id": 0,
    "router_jitter_noise": 0.0,
}
KINDS = {
    # As switch-base: every other layer sparse, ReLU, tied logits.
    "base": {},
    # As switch-xxl: gated MLPs, logits of their own.
    "gated": {
        "dense_act_fn": "gelu_new",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "tie_word_embeddings": False,
    },
    # As switch-c: all layers sparse, heads of another width than the model, logits of their own.
    "c": {
        "d_model": 20,
        "num_layers": 2,
        "num_sparse_decoder_layers": 2,
        "tie_word_embeddings": False,
    },
}
# base in shards, as the large public models are.
SHARD_SIZES = {"base": "24KB", "gated": "5GB", "c": "5GB"}


def make_model(kind):
    """A random model in float32, of a kind; every parameter is random, norms too."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    # transformers' Switch models have no gated MLP; its T5's stands in where the ReLU MLP would.
    plain = modeling.SwitchTransformersDenseActDense
    sparse = modeling.SwitchTransformersSparseMLP
    defaults = sparse.__init__.__defaults__
    base = modeling.SwitchTransformersPreTrainedModel
    initialize = base._init_weights
    try:
        base._init_weights = lambda self, module: None  # it knows no wi_0, and all is random below
        if kind == "gated":
            modeling.SwitchTransformersDenseActDense = T5DenseGatedActDense
            if defaults:
                sparse.__init__.__defaults__ = (T5DenseGatedActDense,)
        config = SwitchTransformersConfig(**COMMON | KINDS[kind])
        model = SwitchTransformersForConditionalGeneration(config).eval()
    finally:
        base._init_weights = initialize
        modeling.SwitchTransformersDenseActDense = plain
        sparse.__init__.__defaults__ = defaults
    generator = torch.Generator().manual_seed(list(KINDS).index(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layer_norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_((0.6 if "router" in name else 0.2) * noise)
        for stack in (
            model.encoder,
            model.decoder,
        ):  # of their own since transformers 5, if not tied
            stack.embed_tokens.weight.copy_(model.shared.weight)
    return model


def make_tokens(seed):
    """Encoder tokens [3, 40], some of them padding, and decoder tokens [3, 20]."""
    rng = np.random.default_rng(seed)
    encoder, decoder = rng.integers(2, 64, (3, 40)), rng.integers(2, 64, (3, 20))
    encoder[1, 25:] = 0
    decoder[:, 0] = 0
    return encoder.astype(np.int32), decoder.astype(np.int32)


def logits_of(model, encoder, decoder):
    """Logits [batch, length, vocab] of transformers' model, in float64.

    In float32 transformers itself is 7e-5 from this on the gated model with larger weights.
    """
    import torch

    with torch.no_grad():
        found = copy.deepcopy(model).double()(
            input_ids=torch.tensor(encoder).long(),
            attention_mask=torch.tensor(encoder > 0).long(),
            decoder_input_ids=torch.tensor(decoder).long(),
        )
    return found.logits.numpy()


def main(folder):
    import transformers

    for kind in KINDS:
        model = make_model(kind)
        tokens = make_tokens(0)
        model.save_pretrained(folder / kind, max_shard_size=SHARD_SIZES[kind])
        (folder / kind / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(
            folder / f"{kind}.npz",
            encoder_input_tokens=tokens[0],
            decoder_input_tokens=tokens[1],
            logits=logits_of(model, *tokens).astype(np.float32),
            transformers=transformers.__version__,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
