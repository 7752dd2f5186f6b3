"""The published QMoE layout: names, import, export, and what is refused."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qmoe_jax
from qmoe_jax.checkpoints import names, published_config, published_files, published_names
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.published import export_published, import_published
from qmoe_jax.cli.convert import main
from qmoe_jax.codec import encode, reference
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

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


# --- A published model, written from the description alone ---


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


@pytest.fixture(params=["base", "c"])
def geometry(request):
    return GEOMETRIES[request.param]


@pytest.fixture
def published(geometry, tmp_path):
    write_published(tmp_path / "published", geometry)
    return tmp_path / "published"


def same_checkpoint(a, b):
    a, b = open_compressed_checkpoint(a), open_compressed_checkpoint(b)
    assert a.config == b.config
    assert a.specs == b.specs
    assert a.dense_names == b.dense_names
    for name, array in a.read_dense().items():
        other = b.read_dense([name])[name]
        assert array.dtype == other.dtype
        assert array.tobytes() == other.tobytes()
    for name in a.specs:
        first, second = a.read_coded(name), b.read_coded(name)
        assert first.arrays.keys() == second.arrays.keys()
        for key in first.arrays:
            assert first.arrays[key].dtype == second.arrays[key].dtype
            assert first.arrays[key].tobytes() == second.arrays[key].tobytes()


# --- Names and config ---


def test_every_parameter_has_one_name(geometry):
    config = published_config.config_from_hf(geometry)
    dense = published_names.dense_parameters(config)
    shapes = parameter_shapes(config)
    experts = {name for name in shapes if names.is_expert_kernel(name)}
    assert dense.keys() | experts == shapes.keys()
    hf = [parameter.name for parameter in dense.values()]
    copies = published_names.embedding_copies(config)
    expected = random_dense(geometry, np.random.default_rng(0))
    assert sorted([*hf, *copies]) == sorted(expected)  # each once, none left over
    for name, (hf_name, transposed) in dense.items():
        shape = shapes[name][::-1] if transposed else shapes[name]
        assert expected[hf_name].shape == shape, name
    assert {
        f"{names.mlp_prefix(stack, layer)}/expert/{kernel}/kernel"
        for stack, layer in published_names.sparse_layers(config)
        for kernel in ("wi", "wo")
    } == experts


def test_config_of_the_public_models():
    c_2048 = C | {"d_model": 2080, "d_ff": 6144, "num_heads": 30, "d_kv": 64, "num_experts": 2048}
    c_2048 |= {"vocab_size": 32128, "num_layers": 15, "num_decoder_layers": 15}
    config = published_config.config_from_hf(c_2048)
    assert config.encoder_sparse_layers == config.decoder_sparse_layers == tuple(range(15))
    assert (config.mlp_dim, config.tied_logits) == (0, False)
    assert (config.max_group_size, config.min_expert_capacity) == (2048, 2)
    base_128 = BASE | {"num_layers": 12, "num_decoder_layers": 12, "num_experts": 128}
    config = published_config.config_from_hf(base_128)
    assert config.encoder_sparse_layers == (1, 3, 5, 7, 9, 11)
    assert config.tied_logits
    without_step = {k: v for k, v in base_128.items() if not k.endswith("_sparse_step")}
    without_step |= {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    assert published_config.config_from_hf(without_step) == config


def test_config_round_trip(geometry):
    config = published_config.config_from_hf(geometry)
    fields = published_config.config_to_hf(config)
    assert published_config.config_from_hf(json.loads(json.dumps(fields))) == config
    assert ("is_full_sparse" in fields) == ("is_full_sparse" in geometry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'"),
        ({"router_bias": True}, "router_bias is True"),
        ({"d_model": None}, "d_model is None"),
        ({"num_experts": "3"}, "num_experts is '3'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"encoder_sparse_step": -1}, "encoder_sparse_step is -1"),
        (
            {"encoder_sparse_step": None, "num_sparse_encoder_layers": None},
            "neither encoder_sparse_step nor num_sparse_encoder_layers",
        ),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        published_config.config_from_hf(BASE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_activations": ("gelu", "linear")}, "gated MLPs"),
        ({"mlp_dim": 99}, "dense MLPs are 99 wide"),
        ({"encoder_sparse_layers": (0, 2)}, r"layers \[0, 2\] of the 4 encoder layers"),
        ({"encoder_sparse_layers": (0, 1, 2, 3)}, r"all layers of both stacks"),
    ],
)
def test_geometries_that_the_layout_cannot_hold(change, message):
    config = dataclasses.replace(published_config.config_from_hf(BASE), **change)
    with pytest.raises(CheckpointError, match=message):
        published_config.config_to_hf(config)


# --- Import and export ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_imported_weights_are_those_of_the_files(geometry, tmp_path, dtype):
    dense, weights = write_published(tmp_path / "published", geometry, dtype=np.dtype(dtype))
    import_published(tmp_path / "published", tmp_path / "compressed", progress=False)
    checkpoint = open_compressed_checkpoint(tmp_path / "compressed")
    assert checkpoint.config.relpos_max_distance == 100
    expected = flax_parameters(checkpoint.config, dense, weights)
    found = checkpoint.read_dense()
    for name in checkpoint.specs:
        coded = checkpoint.read_coded(name)
        found[f"{name}/kernel"] = reference.dequantize(
            coded, reference.decode_qmoe(coded)
        ).transpose(0, 2, 1)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def flax_parameters(config, dense, weights):
    """The dense model's parameters by Flax name."""
    flat = {
        name: dense[hf_name].T if transposed else dense[hf_name]
        for name, (hf_name, transposed) in published_names.dense_parameters(config).items()
    }
    for stack, layer in published_names.sparse_layers(config):
        for kernel in ("wi", "wo"):
            flat[names.expert_kernel(stack, layer, kernel)] = np.stack(
                [
                    weights[published_names.expert_kernel(stack, layer, expert, kernel)].T
                    for expert in range(config.num_experts)
                ]
            )
    return flat


def test_imported_logits_are_those_of_the_dense_model(geometry, tmp_path):
    dense, weights = write_published(tmp_path / "published", geometry)
    import_published(tmp_path / "published", tmp_path / "compressed", progress=False)
    module, variables = qmoe_jax.load_switch(tmp_path / "compressed")
    flat = flax_parameters(module.config, dense, weights)
    expected = {"params": names.unflatten(jax.tree.map(jnp.asarray, flat))}
    tokens = np.random.default_rng(1).integers(1, 40, (3, 2, 9))
    dense_module = dataclasses.replace(module, coded=())
    logits = jax.jit(lambda v: dense_module.apply(v, *tokens))(expected)
    assert np.isfinite(logits).all()
    through_codes = jax.jit(lambda v: module.apply(v, *tokens))(variables)
    np.testing.assert_allclose(through_codes, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip(geometry, tmp_path, dtype):
    write_published(tmp_path / "published", geometry, dtype=np.dtype(dtype))
    import_published(tmp_path / "published", tmp_path / "first", progress=False)
    export_published(tmp_path / "first", tmp_path / "exported", progress=False)
    import_published(tmp_path / "exported", tmp_path / "second", progress=False)
    same_checkpoint(tmp_path / "first", tmp_path / "second")

    expected_files = {file.name for file in (tmp_path / "published").iterdir()}
    assert {file.name for file in (tmp_path / "exported").iterdir()} == expected_files
    for name in expected_files - {"config.json"}:
        before = published_files.load(tmp_path / "published" / name)
        after = published_files.load(tmp_path / "exported" / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, int):
                assert after[key] == value
                continue
            assert value.dtype == after[key].dtype
            assert value.shape == after[key].shape
            assert (value == after[key]).all(), key


def test_round_trip_of_what_our_encoder_wrote(tmp_path):
    pytest.importorskip("torch")
    config = published_config.config_from_hf(BASE | {"d_model": 64, "d_ff": 300})
    write_compressed(tmp_path / "first", config)
    export_published(tmp_path / "first", tmp_path / "exported", progress=False)
    import_published(tmp_path / "exported", tmp_path / "second", progress=False)
    same_checkpoint(tmp_path / "first", tmp_path / "second")


def write_compressed(path, config, coding="qmoe", leave_out=()):
    rng = np.random.default_rng(0)
    writer = CompressedCheckpointWriter(path)
    for name, shape in parameter_shapes(config).items():
        if name in leave_out:
            continue
        if not names.is_expert_kernel(name):
            writer.write_dense(name, rng.standard_normal(shape).astype(np.float32))
            continue
        experts, width, rows = shape
        codes = rng.choice(3, (experts, rows, width), p=(0.8, 0.1, 0.1)).astype(np.uint8)
        levels = rng.standard_normal((experts, rows, 2)).astype(ml_dtypes.bfloat16)
        writer.write_coded(name.removesuffix("/kernel"), encode.encode(codes, levels, coding))
    writer.finish(config, {})


def test_the_files_hold_no_more_than_their_tensors(tmp_path):
    pytest.importorskip("torch")
    write_compressed(tmp_path / "compressed", published_config.config_from_hf(BASE))
    export_published(tmp_path / "compressed", tmp_path / "exported", progress=False)
    for file in (tmp_path / "exported").glob("exp*.pt"):
        for tensor in published_files.load(file).values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_export_refuses_another_coding(tmp_path):
    pytest.importorskip("torch")
    write_compressed(tmp_path / "packed", published_config.config_from_hf(BASE), "packed2")
    with pytest.raises(CheckpointError, match="coding packed2.*compress the model again with"):
        export_published(tmp_path / "packed", tmp_path / "exported", progress=False)
    assert not (tmp_path / "exported").exists()


def test_export_refuses_an_incomplete_checkpoint(tmp_path):
    pytest.importorskip("torch")
    missing = "encoder/layers_1/mlp/expert/wo/kernel"
    config = published_config.config_from_hf(BASE)
    write_compressed(tmp_path / "partial", config, leave_out=(missing,))
    with pytest.raises(CheckpointError, match=missing):
        export_published(tmp_path / "partial", tmp_path / "exported", progress=False)


def test_neither_way_overwrites_unasked(published, tmp_path):
    import_published(published, tmp_path / "compressed", progress=False)
    with pytest.raises(CheckpointError, match="exists already"):
        import_published(published, tmp_path / "compressed", progress=False)
    import_published(published, tmp_path / "compressed", overwrite=True, progress=False)
    with pytest.raises(CheckpointError, match="exists already"):
        export_published(tmp_path / "compressed", published, progress=False)
    export_published(tmp_path / "compressed", published, overwrite=True, progress=False)
    assert not (tmp_path / "published.partial").exists()


# --- What import refuses ---


def edited(file, change):
    """Applies `change` to the dict in a file."""
    torch = pytest.importorskip("torch")
    content = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in torch.load(file, weights_only=True).items()
    }
    change(content)
    torch.save(content, file)


WI = "encoder.block.1.layer.1.mlp.experts.expert_1.wi"
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"


def _set(key, change):
    def apply(content):
        content[key] = change(content[key])

    return apply


def _in_place(key, index, value):
    def apply(content):
        content[key][index] = value

    return apply


def _rows_that_fall(content):
    content[f"{WI}.row_off"][1:3] = content[f"{WI}.row_off"][[2, 1]] + 1


def _fifth_expert(content):
    for part in ("w_comp", "row_off", "ter_minmax", "weight"):
        content[f"{WI}.{part}".replace("expert_1", "expert_3")] = content[f"{WI}.{part}"]


DAMAGE = {
    "noexp: key missing": ("noexp.pt", lambda c: c.pop(QUERY), QUERY),
    "noexp: key too many": ("noexp.pt", lambda c: c.update(x=c[QUERY]), "unexpected x"),
    "noexp: dtype": ("noexp.pt", _set(QUERY, lambda t: t.half()), f"{QUERY} is float16"),
    "noexp: shape": ("noexp.pt", _set(QUERY, lambda t: t[:-1]), rf"{QUERY} is bfloat16 \[11, "),
    "noexp: transposed": ("noexp.pt", _set(QUERY, lambda t: t.T), rf"{QUERY} is bfloat16 \["),
    "noexp: NaN": ("noexp.pt", _in_place(QUERY, 0, float("nan")), f"{QUERY} holds NaN"),
    "noexp: no tensor": ("noexp.pt", _set(QUERY, lambda t: 3), f"{QUERY} is a int"),
    "noexp: embedding copies": (
        "noexp.pt",
        _in_place("decoder.embed_tokens.weight", 0, 7.0),
        "decoder.embed_tokens.weight differs from shared.weight",
    ),
    "sizes: missing": ("sizes.pt", lambda c: c.pop(WI), re.escape(WI)),
    "sizes: no number": ("sizes.pt", _set(WI, lambda n: -n), f"{WI} is -"),
    "sizes: other": ("sizes.pt", _set(WI, lambda n: n + 1), rf"{WI}.w_comp has \d+ codewords"),
    "exp: key missing": ("exp00.pt", lambda c: c.pop(f"{WI}.weight"), f"lacks {WI}.weight"),
    "exp: more experts": ("exp00.pt", _fifth_expert, "unexpected .*expert_3.*3 experts"),
    "exp: w_comp dtype": (
        "exp00.pt",
        _set(f"{WI}.w_comp", lambda t: t.int()),
        f"{WI}.w_comp is int32",
    ),
    "exp: w_comp cut": ("exp00.pt", _set(f"{WI}.w_comp", lambda t: t[:-1]), f"{WI}.w_comp has"),
    "exp: row_off falls": ("exp00.pt", _rows_that_fall, f"{WI}.row_off fall"),
    "exp: row_off start": ("exp00.pt", _in_place(f"{WI}.row_off", 0, 1), "row_off start at 1"),
    "exp: row_off end": ("exp00.pt", _in_place(f"{WI}.row_off", -1, 999), "row_off end at 999"),
    "exp: row_off shape": (
        "exp00.pt",
        _set(f"{WI}.row_off", lambda t: t[:-1]),
        f"{WI}.row_off is int32",
    ),
    "exp: levels dtype": (
        "exp00.pt",
        _set(f"{WI}.ter_minmax", lambda t: t.float()),
        f"{WI}.ter_minmax is float32",
    ),
    "exp: levels shape": (
        "exp00.pt",
        _set(f"{WI}.ter_minmax", lambda t: t.reshape(-1, 2)),
        f"{WI}.ter_minmax is bfloat16",
    ),
    "exp: levels NaN": (
        "exp00.pt",
        _in_place(f"{WI}.ter_minmax", 0, float("inf")),
        r"exp00.pt: encoder.block.1, experts' wi .*levels\[1, 0, 0\] is inf",
    ),
    "exp: weight": ("exp00.pt", _set(f"{WI}.weight", lambda t: t.new_zeros(1)), f"{WI}.weight is"),
    "exp: codewords": (
        "exp00.pt",
        _in_place(f"{WI}.w_comp", slice(None), 0),
        "experts' wi .*Row 0 of expert 1 decodes to",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case, tmp_path):
    file, change, message = DAMAGE[case]
    folder = tmp_path / "published"
    write_published(folder, BASE)
    edited(folder / file, change)
    with pytest.raises(CheckpointError, match=message):
        import_published(folder, tmp_path / "compressed", progress=False)
    assert not (tmp_path / "compressed").exists()


def test_files_that_are_missing_or_too_many(published, geometry, tmp_path):
    def check(message):
        with pytest.raises(CheckpointError, match=message):
            import_published(published, tmp_path / "compressed", progress=False)

    (published / "exp07.pt").write_bytes(b"")
    check("exp07.pt, but config.json says")
    (published / "exp07.pt").unlink()
    (published / "exp01.pt").rename(published / "hidden")
    check("lacks exp01.pt")
    (published / "hidden").rename(published / "exp01.pt")
    for name in ("noexp.pt", "sizes.pt", "config.json"):
        (published / name).rename(published / "hidden")
        check(f"{name} (is missing|does not exist)")
        (published / "hidden").rename(published / name)
    (published / "config.json").write_text("{")
    check("config.json is no JSON")
    (published / "config.json").write_text("[]")
    check("config.json holds a list")
    (published / "config.json").write_text(json.dumps(geometry | {"num_experts": 4}))
    check(r"sizes.pt lacks .*expert_3.*4 experts")


@pytest.mark.parametrize("name", ["noexp.pt", "exp00.pt", "sizes.pt"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "pickle", "list"])
def test_files_that_are_damaged(name, damage, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "published"
    write_published(folder, BASE)
    content = bytearray((folder / name).read_bytes())
    if damage == "truncated":
        (folder / name).write_bytes(content[: len(content) * 2 // 3])
    elif damage == "flipped":
        # In the middle of the first record's contents.
        content[200] ^= 1
        (folder / name).write_bytes(content)
    elif damage == "text":
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "pickle":
        torch.save({"x": SwitchConfig.from_json}, folder / name)
    else:
        torch.save([1], folder / name)
    with pytest.raises(CheckpointError, match=name):
        import_published(folder, tmp_path / "compressed", progress=False)
    assert not (tmp_path / "compressed").exists()


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    write_published(tmp_path / "published", BASE)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'qmoe-jax\[torch\]'"):
        import_published(tmp_path / "published", tmp_path / "compressed", progress=False)


# --- The command ---


def test_command(published, tmp_path, capsys):
    compressed, exported = str(tmp_path / "compressed"), str(tmp_path / "exported")
    assert main(["import", str(published), compressed, "--no-progress"]) == 0
    assert main(["export", compressed, exported, "--no-progress"]) == 0
    assert main(["import", exported, compressed, "--no-progress"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["import", exported, compressed, "--no-progress", "--overwrite"]) == 0


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from qmoe_jax.cli.convert import main; main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "published QMoE models" in result.stdout
