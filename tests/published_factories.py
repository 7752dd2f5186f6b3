"""Random models in the published QMoE layout, written from its description alone."""

import json

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.codec import reference

BASE = {
    "vocab_size": 40,
    "d_model": 8,
    "d_kv": 6,
    "d_ff": 13,
    "num_heads": 2,
    "num_experts": 3,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 100,
    "model_type": "switch_transformers",
    "dense_act_fn": "relu",
    "layer_norm_epsilon": 1e-6,
}
# As c-2048: every layer sparse, logits not tied, steps that say otherwise.
C = BASE | {
    "d_model": 10,
    "num_layers": 2,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 0,
    "num_sparse_decoder_layers": 2,
    "is_full_sparse": True,
    "tie_word_embeddings": False,
}
GEOMETRIES = {"base": BASE, "c": C}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def is_sparse(fields, layer):
    return "is_full_sparse" in fields or layer % 2 == 1


def random_dense(fields, rng, dtype=BFLOAT16):
    """Parameters of noexp.pt by Hugging Face name."""
    embed, inner = fields["d_model"], fields["d_kv"] * fields["num_heads"]
    mlp, experts = fields["d_ff"], fields["num_experts"]
    shapes = {"shared.weight": (fields["vocab_size"], embed)}
    for stack, count in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        buckets = (fields["relative_attention_num_buckets"], fields["num_heads"])
        first = f"{stack}.block.0.layer.0.SelfAttention"
        shapes[f"{first}.relative_attention_bias.weight"] = buckets
        shapes[f"{stack}.final_layer_norm.weight"] = (embed,)
        attentions = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder")
        for layer in range(fields[count]):
            block = f"{stack}.block.{layer}.layer"
            for place, attention in enumerate(attentions):
                shapes[f"{block}.{place}.layer_norm.weight"] = (embed,)
                for projection in "qkv":
                    shapes[f"{block}.{place}.{attention}.{projection}.weight"] = (inner, embed)
                shapes[f"{block}.{place}.{attention}.o.weight"] = (embed, inner)
            last = f"{block}.{len(attentions)}"
            shapes[f"{last}.layer_norm.weight"] = (embed,)
            if is_sparse(fields, layer):
                shapes[f"{last}.mlp.router.classifier.weight"] = (experts, embed)
            else:
                shapes[f"{last}.mlp.wi.weight"] = (mlp, embed)
                shapes[f"{last}.mlp.wo.weight"] = (embed, mlp)
    arrays = {
        name: (rng.standard_normal(shape) * (1 if "norm" in name else 0.4)).astype(dtype)
        for name, shape in shapes.items()
    }
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        arrays[name] = arrays["shared.weight"]
    arrays["lm_head.weight"] = arrays["shared.weight"]
    if not fields.get("tie_word_embeddings", True):
        arrays["lm_head.weight"] = rng.standard_normal(shapes["shared.weight"]).astype(dtype)
    return arrays


def expert_kernels(fields):
    """(index of the file, module, out, in) of each expert kernel."""
    index = 0
    for stack, count in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        for layer in range(fields[count]):
            if not is_sparse(fields, layer):
                continue
            place = 1 if stack == "encoder" else 2
            for expert in range(fields["num_experts"]):
                module = f"{stack}.block.{layer}.layer.{place}.mlp.experts.expert_{expert}"
                yield index, f"{module}.wi", fields["d_ff"], fields["d_model"]
                yield index, f"{module}.wo", fields["d_model"], fields["d_ff"]
            index += 1


def write_published(folder, fields, seed=0, dtype=BFLOAT16):
    """Writes a random model; returns its dense arrays and expert weights [out, in] by HF name."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)

    def bfloat16(array):
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    dense = random_dense(fields, rng, dtype)
    as_torch = bfloat16 if dtype == BFLOAT16 else torch.from_numpy
    torch.save({name: as_torch(array) for name, array in dense.items()}, folder / "noexp.pt")
    files, sizes, weights = {}, {}, {}
    for index, module, rows, width in expert_kernels(fields):
        codes = rng.choice(3, (rows, width), p=(0.7, 0.15, 0.15))
        levels = np.sort(rng.standard_normal((rows, 2)), axis=1).astype(ml_dtypes.bfloat16)
        coded_rows = [reference.encode_row(row.tolist()) for row in codes]
        codewords = np.concatenate(coded_rows).astype(np.uint16)
        row_off = np.cumsum([0, *map(len, coded_rows)], dtype=np.int32)
        sizes[module] = len(codewords)
        files.setdefault(index, {}).update(
            {
                f"{module}.w_comp": torch.from_numpy(codewords.view(np.int16)),
                f"{module}.row_off": torch.from_numpy(row_off),
                f"{module}.ter_minmax": bfloat16(levels.reshape(-1)),
                f"{module}.weight": torch.zeros(0, dtype=torch.bfloat16),
            }
        )
        low, high = np.split(levels.astype(np.float32), 2, axis=1)
        weights[module] = np.select([codes == 1, codes == 2], [low, high], np.float32(0))
    for index, tensors in files.items():
        torch.save(tensors, folder / f"exp{index:02d}.pt")
    torch.save(sizes, folder / "sizes.pt")
    return dense, weights
