"""Import of published QMoE models: weights, logits, and damage that is refused."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_factories import BASE, GEOMETRIES, write_published

import qmoe_jax
from qmoe_jax.checkpoints import huggingface_names, names
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.published import import_published
from qmoe_jax.codec import reference
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError


@pytest.fixture(params=["base", "c"])
def geometry(request):
    return GEOMETRIES[request.param]


@pytest.fixture
def published(geometry, tmp_path):
    write_published(tmp_path / "published", geometry)
    return tmp_path / "published"


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
        for name, (hf_name, transposed) in huggingface_names.dense_parameters(config).items()
    }
    for stack, layer in huggingface_names.sparse_layers(config):
        for kernel in ("wi", "wo"):
            flat[names.expert_kernel(stack, layer, kernel)] = np.stack(
                [
                    weights[huggingface_names.expert_kernel(stack, layer, expert, kernel)].T
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
