"""Hugging Face's checkpoints: logits of transformers, round trips, and shards that are refused.

The models in golden/huggingface were written, and their logits computed, by transformers (the
version is in the .npz); `golden_huggingface.py` makes them.
"""

import json
import shutil

import golden_data
import golden_huggingface
import jax
import ml_dtypes
import numpy as np
import pytest
from command import command, refusal

import qmoe_jax
from qmoe_jax.checkpoints import huggingface_config
from qmoe_jax.checkpoints.huggingface import export_huggingface, import_huggingface
from qmoe_jax.checkpoints.huggingface_weights import HuggingFaceWeights
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.errors import CheckpointError

safetensors_numpy = pytest.importorskip("safetensors.numpy")
GOLDEN = golden_data.GOLDEN / "huggingface"
KINDS = tuple(golden_huggingface.KINDS)
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """`native(kind)`: the checkpoint of a golden model; do not write to it."""
    root, made = tmp_path_factory.mktemp("native"), {}

    def make(kind):
        if kind not in made:
            made[kind] = import_huggingface(GOLDEN / kind, root / kind, **QUIET)
        return made[kind]

    return make


def logits(checkpoint, kind):
    """Ours and transformers'."""
    golden = np.load(GOLDEN / f"{kind}.npz")
    module, variables = qmoe_jax.load_switch(checkpoint)
    decoder = golden["decoder_input_tokens"]
    # Which ids are targets is not seen by the logits, only which are padding; none is.
    targets = np.concatenate([decoder[:, 1:], np.ones_like(decoder[:, :1])], axis=1)
    found = jax.jit(module.apply)(variables, golden["encoder_input_tokens"], decoder, targets)
    return np.asarray(found), golden["logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(native, kind):
    found, expected = logits(native(kind), kind)
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_config_is_read(native, kind):
    config = qmoe_jax.load_switch(native(kind))[0].config
    fields = golden_huggingface.COMMON | golden_huggingface.KINDS[kind]
    assert config.encoder_sparse_layers == ((0, 1) if kind == "c" else (1, 3))
    assert config.decoder_sparse_layers == ((0, 1) if kind == "c" else (1,))
    assert config.tied_logits == (kind == "base")
    assert config.mlp_activations == (("gelu", "linear") if kind == "gated" else ("relu",))
    assert (config.num_heads, config.head_dim) == (fields["num_heads"], fields["d_kv"])


@pytest.mark.parametrize("shard_bytes", [10_000, 1 << 30])
@pytest.mark.parametrize("kind", KINDS)
def test_back_to_hugging_face_is_the_same_model(native, kind, shard_bytes, tmp_path):
    """Every value, and the fields that transformers builds the model from."""
    export_huggingface(native(kind), tmp_path / "back", shard_bytes=shard_bytes, **QUIET)
    shards = list((tmp_path / "back").glob("*.safetensors"))
    assert (len(shards) > 5) == (shard_bytes == 10_000)
    before, after = HuggingFaceWeights(GOLDEN / kind), HuggingFaceWeights(tmp_path / "back")
    # Where logits are not tied, transformers itself leaves these out, and warns when it reads.
    copies = {f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    assert after.shapes.keys() - before.shapes.keys() == (set() if kind == "base" else copies)
    assert before.shapes.items() <= after.shapes.items()
    for name in before.shapes:
        np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((GOLDEN / kind / "config.json").read_text())
    for name in original.keys() - {"transformers_version", "dtype", "dropout_rate"}:
        assert fields[name] == original[name], name


def test_compressed_to_hugging_face_and_back(native, tmp_path):
    """The whole way round: logits of the codes, from the folder that transformers would load."""
    compressed = tmp_path / "compressed"
    qmoe_jax.compress(native("base"), compressed, method="rtn", grid="ternary", **QUIET)
    export_huggingface(compressed, tmp_path / "exported", shard_bytes=10_000, **QUIET)
    again = import_huggingface(tmp_path / "exported", tmp_path / "again", **QUIET)
    found, uncompressed = logits(again, "base")
    np.testing.assert_allclose(found, logits(compressed, "base")[0], rtol=0, atol=1e-5)
    assert np.abs(found - uncompressed).max() > 0.01  # so the comparison above can fail
    # Ternary experts are bfloat16 values.
    export_huggingface(compressed, tmp_path / "half", dtype="bfloat16", **QUIET)
    whole = HuggingFaceWeights(tmp_path / "exported")
    half = HuggingFaceWeights(tmp_path / "half")
    assert set(half.dtypes.values()) == {"bfloat16"}
    expert = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"
    np.testing.assert_array_equal(half.read(expert).astype(np.float32), whole.read(expert))


def copied(tmp_path, kind, **tensors):
    """A copy of a golden model in one file, with tensors in place of its own."""
    folder = shutil.copytree(GOLDEN / kind, tmp_path / kind)
    arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays |= safetensors_numpy.load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    arrays |= tensors
    kept = {name: array for name, array in arrays.items() if array is not None}
    safetensors_numpy.save_file(kept, folder / "model.safetensors")
    return folder


def test_half_precision(tmp_path):
    """bfloat16 stays, float16 becomes the float32 that it is."""
    weights = HuggingFaceWeights(GOLDEN / "c")
    norm, router = "encoder.final_layer_norm.weight", "lm_head.weight"
    halves = {
        norm: weights.read(norm).astype(np.float16),
        router: weights.read(router).astype(ml_dtypes.bfloat16),
    }
    path = import_huggingface(copied(tmp_path, "c", **halves), tmp_path / "native", **QUIET)
    checkpoint = open_t5x_checkpoint(path)
    found = checkpoint.read("encoder/encoder_norm/scale")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, halves[norm].astype(np.float32))
    found = checkpoint.read("decoder/logits_dense/kernel")
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, halves[router].T)


def test_embedding_under_another_of_its_names(native, tmp_path):
    weights = HuggingFaceWeights(GOLDEN / "base")
    embedding = weights.read("shared.weight")
    names = {"shared.weight": None, "lm_head.weight": embedding}
    folder = copied(tmp_path, "base", **names, **{"encoder.embed_tokens.weight": embedding})
    path = import_huggingface(folder, tmp_path / "native", **QUIET)
    found = open_t5x_checkpoint(path).read("token_embedder/embedding")
    np.testing.assert_array_equal(found, embedding)


def _cut(folder, shard="model-00002-of-00004.safetensors"):
    content = (folder / shard).read_bytes()
    (folder / shard).write_bytes(content[: len(content) - 100])


def _pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 26488\n"
    (folder / "model-00002-of-00004.safetensors").write_text(text)


def _missing(folder):
    (folder / "model-00003-of-00004.safetensors").unlink()


def _foreign(folder):
    """A shard of another model, which has parameters of other names."""
    shutil.copy(GOLDEN / "c" / "model.safetensors", folder / "model-00002-of-00004.safetensors")


def _swapped(folder):
    """Two shards under each other's names."""
    one, two = (folder / f"model-0000{i}-of-00004.safetensors" for i in (1, 2))
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def _other_size(folder):
    """A shard of a model of the same names, wider."""
    file = folder / "model-00004-of-00004.safetensors"
    arrays = safetensors_numpy.load_file(file)
    wider = {name: np.repeat(array, 2, axis=-1) for name, array in arrays.items()}
    safetensors_numpy.save_file(wider, file)


def _nan(folder):
    file = folder / "model-00004-of-00004.safetensors"
    arrays = safetensors_numpy.load_file(file)
    safetensors_numpy.save_file({n: np.full_like(a, np.nan) for n, a in arrays.items()}, file)


def _integers(folder):
    file = folder / "model-00004-of-00004.safetensors"
    arrays = safetensors_numpy.load_file(file)
    safetensors_numpy.save_file({n: a.astype(np.int8) for n, a in arrays.items()}, file)


def _index(change):
    def apply(folder):
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def _fields(**fields):
    def apply(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return apply


def _outside(content):
    content["weight_map"]["shared.weight"] = "../model.safetensors"


DAMAGE = {
    "truncated": (_cut, "model-00002-of-00004.safetensors cannot be read .*truncated"),
    "pointer": (_pointer, "model-00002-of-00004.safetensors cannot be read"),
    "missing": (_missing, "model-00003-of-00004.safetensors is missing"),
    "foreign": (_foreign, "model-00002-of-00004.safetensors lacks .*shard is of another model"),
    "swapped": (_swapped, "model-00001-of-00004.safetensors lacks .*by the index"),
    "other size": (_other_size, r"model-00004-of-00004.*has shape \[.*config.json implies"),
    "nan": (_nan, "model-00004-of-00004.safetensors: .*NaN"),
    "integers": (_integers, "model-00004-of-00004.safetensors: .* is I8, expected F32"),
    "index without map": (_index(dict.clear), "index.json is no index with a weight_map"),
    "index out of the folder": (_index(_outside), "says that shared.weight is in '../model"),
    "layers": (_fields(num_layers=5), "lacks encoder.block.4.*5 encoder and 2 decoder"),
    "fewer experts": (_fields(num_experts=3), "expert_3.* is no parameter of this model"),
    "max distance": (_fields(relative_attention_max_distance=64), "max_distance is 64.*128"),
    "d_ff": (_fields(d_ff=21), "has shape .*config.json implies"),
    "not tied": (_fields(tie_word_embeddings=False), "lacks lm_head.weight"),
    "model_type": (_fields(model_type="t5"), "config.json: model_type is 't5'"),
    "activation": (_fields(dense_act_fn="silu"), "config.json: dense_act_fn is 'silu'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case, tmp_path):
    change, message = DAMAGE[case]
    folder = shutil.copytree(GOLDEN / "base", tmp_path / "base")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        import_huggingface(folder, tmp_path / "native", **QUIET)
    assert not list((tmp_path / "native").glob("*"))


def test_other_models_are_named(tmp_path):
    folder = copied(tmp_path, "gated")
    _fields(dense_act_fn="relu")(folder)
    with pytest.raises(CheckpointError, match="dense_act_fn is 'relu', but the MLPs are gated"):
        import_huggingface(folder, tmp_path / "native", **QUIET)
    copy = {"lm_head.weight": np.zeros((64, 16), np.float32)}
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from shared.weight"):
        import_huggingface(copied(tmp_path, "base", **copy), tmp_path / "native", **QUIET)
    with pytest.raises(CheckpointError, match="holds no parameters: expected model.safetensors"):
        HuggingFaceWeights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_dim": 99}, "dense MLPs are 99 wide"),
        ({"encoder_sparse_layers": (0, 2)}, r"layers \[0, 2\] of the 4 encoder layers"),
    ],
)
def test_geometries_that_hugging_face_cannot_hold(native, change, message):
    import dataclasses

    config = qmoe_jax.load_switch(native("base"))[0].config
    with pytest.raises(CheckpointError, match=message):
        huggingface_config.config_to_hf(dataclasses.replace(config, **change), "float32")


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_files(native, sharded, tmp_path):
    torch = pytest.importorskip("torch")
    weights = HuggingFaceWeights(GOLDEN / "base")
    tensors = {name: torch.from_numpy(weights.read(name).copy()) for name in weights.shapes}
    tensors["lm_head.weight"] = tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(GOLDEN / "base" / "config.json", folder)
    if sharded:
        ordered = sorted(tensors)
        places = {}
        for i in range(3):
            file = f"pytorch_model-0000{i + 1}-of-00003.bin"
            torch.save({name: tensors[name] for name in ordered[i::3]}, folder / file)
            places |= dict.fromkeys(ordered[i::3], file)
        index = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    found = open_t5x_checkpoint(import_huggingface(folder, tmp_path / "native", **QUIET))
    expected = open_t5x_checkpoint(native("base"))
    assert found.names == expected.names
    for name in found.names:
        np.testing.assert_array_equal(found.read(name), expected.read(name), err_msg=name)
    file = sorted(folder.glob("*.bin"))[0]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
        import_huggingface(folder, tmp_path / "truncated", **QUIET)


# --- The command ---


def test_command_both_ways(tmp_path, capsys):
    """With the demo's model, which has a vocabulary."""
    pytest.importorskip("sentencepiece")
    hf, native, back = (tmp_path / name for name in ("hf", "native", "back"))
    convert = command("convert")
    vocabulary = str(golden_data.DEMO / "sentencepiece.model")
    quiet = "--no-progress"
    export = ["huggingface", str(golden_data.DEMO / "checkpoint_4200"), "--vocabulary", vocabulary]
    assert convert([*export, str(hf), quiet]) == 0
    assert sorted(path.name for path in hf.iterdir()) == [
        "config.json",
        "model.safetensors",
        "spiece.model",
        "tokenizer_config.json",
    ]
    # The demo's vocabulary holds its sentinels: transformers is not to put more above them.
    assert json.loads((hf / "tokenizer_config.json").read_text())["extra_ids"] == 0
    assert convert(["huggingface", str(hf), str(native), "--step", "7", quiet]) == 0
    assert f"{native / 'checkpoint_7'} written" in capsys.readouterr().out
    assert (native / "spiece.model").read_bytes() == (hf / "spiece.model").read_bytes()
    expected = open_t5x_checkpoint(golden_data.DEMO / "checkpoint_4200")
    found = open_t5x_checkpoint(native)
    assert (found.names, found.step) == (expected.names, 7)
    for name in found.names:
        np.testing.assert_array_equal(found.read(name), expected.read(name).astype(np.float32))
    source = str(GOLDEN / "c")
    import_huggingface(source, tmp_path / "c", **QUIET)
    capsys.readouterr()
    line = refusal(capsys, "convert", *export, str(hf), quiet)
    assert "exists already" in line
    other = ["huggingface", str(tmp_path / "c"), str(back)]
    line = refusal(capsys, "convert", *other, "--vocabulary", vocabulary)
    assert "pieces, but the model 64 embeddings" in line
    assert convert([*other[:2], str(hf), "--overwrite", quiet]) == 0
    assert not (hf / "spiece.model").exists()


def test_command_refuses(tmp_path, capsys):
    source, native = str(GOLDEN / "c"), str(tmp_path / "native")

    def refused(*arguments):
        return refusal(capsys, "convert", *arguments)

    assert "SRC DST; what SRC is decides" in refused("huggingface", "import", source, native)
    assert "--dtype is for" in refused("huggingface", source, native, "--dtype", "bfloat16")
    assert "--step is for" in refused("huggingface", str(tmp_path), native, "--step", "3")
    assert "--step is for convert huggingface" in refused(
        *("coding", "qmoe", source, native, "--step", "3")
    )
    assert "exists already" not in refused("huggingface", source, source + "/config.json")
    # A vocabulary of the user's own stays.
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "spiece.model").write_text("mine")
    copy = shutil.copytree(GOLDEN / "c", tmp_path / "c")
    shutil.copy(golden_data.DEMO / "sentencepiece.model", copy / "spiece.model")
    assert "is not such a file" in refused("huggingface", str(copy), native)
    assert (folder / "spiece.model").read_text() == "mine"
    assert len(list(folder.iterdir())) == 1


def test_without_safetensors_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    line = refusal(capsys, "convert", "huggingface", str(GOLDEN / "c"), str(tmp_path / "x"))
    assert line.endswith("pip install 'qmoe-jax[huggingface]'")


def test_a_source_that_is_not_there(tmp_path, capsys):
    line = refusal(capsys, "convert", "huggingface", str(tmp_path / "hub"), str(tmp_path / "x"))
    assert "hub is not a folder; give a Hugging Face folder to read, or a checkpoint" in line
