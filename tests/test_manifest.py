"""A manifest that lacks something or contradicts itself is refused when it is opened."""

import copy
import json
import re

import pytest

import qmoe_jax
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.manifest import check_manifest
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.load import load_switch

WI, WO = (f"encoder/layers_1/mlp/expert/{kernel}" for kernel in ("wi", "wo"))
NORM = "encoder/layers_1/pre_mlp_layer_norm/scale"


@pytest.fixture(scope="module")
def manifest(gptq):
    return json.loads((gptq[0] / "manifest.json").read_text())


def edit(*path, to=None, drop=False):
    """A change of one value."""

    def change(manifest):
        *front, last = path
        for key in front:
            manifest = manifest[key]
        if drop:
            del manifest[last]
        else:
            manifest[last] = to(manifest[last]) if callable(to) else to

    return change


def swap_kernels(manifest):
    coded = manifest["coded"]
    coded[WI], coded[WO] = coded[WO], coded[WI]


def swap_arrays(manifest):
    coded = manifest["coded"]
    coded[WI]["arrays"], coded[WO]["arrays"] = coded[WO]["arrays"], coded[WI]["arrays"]


def dense_too(manifest):
    entry = dict(manifest["dense"][NORM], file="dense/" + f"{WI}/kernel".replace("/", "."))
    manifest["dense"][f"{WI}/kernel"] = entry


WORDS = ("coded", WI, "arrays", "words")
DAMAGE = {
    "no config": (edit("config", drop=True), "'config' is None, not an object"),
    "config": (edit("config", to=3), "'config' is 3, not an object"),
    "empty config": (edit("config", to={}), "the config lacks"),
    "config of another size": (edit("config", "embed_dim", to=32), "shape"),
    "more experts": (edit("config", "num_experts", to=9), "8 experts, but its config 9|shape"),
    "no dense": (edit("dense", to=[]), "'dense' is"),
    "no coded": (edit("coded", drop=True), "'coded' is None"),
    "no compression": (edit("compression", drop=True), "'compression' is None"),
    "a kernel is missing": (edit("coded", WI, drop=True), f"{WI}/kernel is missing"),
    "a norm is missing": (edit("dense", NORM, drop=True), f"{NORM} is missing"),
    "a parameter too many": (
        edit("dense", "encoder/extra", to={}),
        "encoder/extra does not belong",
    ),
    "a kernel too many": (
        edit("coded", "encoder/layers_0/mlp/expert/wi", to={}),
        "layers_0/mlp/expert/wi/kernel is coded, but is no expert kernel",
    ),
    "dense and coded": (dense_too, "is there twice"),
    "kernels change places": (swap_kernels, "belongs in|rows of"),
    "arrays change places": (swap_arrays, "belongs at"),
    "spec": (edit("coded", WI, "spec", drop=True), "spec"),
    "spec lacks a field": (edit("coded", WI, "spec", "coding", drop=True), "fields"),
    "num_experts": (edit("coded", WI, "spec", "num_experts", to=7), "7 experts, but its config 8"),
    "rows": (edit("coded", WI, "spec", "out_features", to=63), "rows of"),
    "width": (edit("coded", WI, "spec", "in_features", to=10**12), r"fewer than 2\^23 weights"),
    "coding": (edit("coded", WI, "spec", "coding", to="lz4"), "'lz4' is unknown"),
    "an array is missing": (edit(*WORDS, drop=True), "requires"),
    "no checksums": (edit(*WORDS, "checksums", drop=True), "has .*not"),
    "empty checksums": (edit(*WORDS, "checksums", to=[]), "checksums"),
    "checksum": (edit(*WORDS, "checksums", 0, 1, to="abc"), "checksums"),
    "checksum ends early": (edit(*WORDS, "checksums", 0, 0, to=lambda n: n - 1), "entries"),
    "file": (edit(*WORDS, "file", to="coded/../../secret"), "belongs in"),
    "dtype": (edit(*WORDS, "dtype", to=3), "has the dtype 3"),
    "dtype that is none": (edit(*WORDS, "dtype", to="float1"), "has the dtype 'float1'"),
    "shape": (edit(*WORDS, "shape", to=[-1]), "has the shape"),
    "huge shape": (edit(*WORDS, "shape", to=[2**62]), "no memory holds|end at"),
    "shape of a norm": (edit("dense", NORM, "shape", to=[63]), "end at|implies"),
    "unknown key": (edit(*WORDS, "compressor", to="gzip"), "has .*not"),
    "unknown key of a kernel": (edit("coded", WI, "scale", to=1), "unknown keys .'scale'"),
    "unknown key of all": (edit("signature", to="abc"), "unknown keys .'signature'"),
    "dtype of objects": (edit("dense", NORM, "dtype", to="object"), "has the dtype 'object'"),
    "layers without end": (
        edit("config", "num_encoder_layers", to=10**15),
        "its config has 10+4 layers, but 'dense' names",
    ),
    "experts without end": (
        edit("coded", WI, "spec", "num_experts", to=2**31),
        "there must be fewer than 2.31",
    ),
    "sparse layers": (edit("config", "encoder_sparse_layers", to=[1, 1]), "they must rise"),
    "a sparse layer behind the last": (
        edit("config", "decoder_sparse_layers", to=[1, 7]),
        "they must rise and be below the number of layers, 4",
    ),
    "three activations": (
        edit("config", "mlp_activations", to=["gelu", "linear", "relu"]),
        "has 3 mlp_activations",
    ),
}


def test_an_intact_one_is_accepted(manifest, gptq):
    config, specs = check_manifest(manifest, "here")
    assert config == read_config(gptq[0])
    assert len(specs) == 8


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_when_it_is_opened(manifest, tmp_path, case):
    change, message = DAMAGE[case]
    damaged = copy.deepcopy(manifest)
    change(damaged)
    (tmp_path / "manifest.json").write_text(json.dumps(damaged))
    for open_it in (open_compressed_checkpoint, read_config, load_switch):
        with pytest.raises(CheckpointError, match=message) as refusal:
            open_it(tmp_path)
        text = str(refusal.value)
        assert re.search(r"manifest\.json: .*damaged: copy the checkpoint again", text)


NO_JSON = {
    "a key twice": (b'{"format": "qmoe_jax", "format": "qmoe_jax"}', "'format' is there twice"),
    "a nested key twice": (b'{"dense": {"a": {}, "a": {}}}', "'a' is there twice"),
    "NaN": (b'{"format": NaN}', "NaN is no number"),
    "overflow": (b'{"format": 1e309}', "1e309 is too large for a number"),
    "Infinity": (b'{"format": -Infinity}', "-Infinity is no number"),
    "UTF-16": ('{"format": "qmoe_jax"}'.encode("utf-16"), "UnicodeDecodeError"),
    "depth": (b"[" * 100_000, "RecursionError"),
    "truncated": (b'{"format": "qmoe', "JSONDecodeError"),
    "a list": (b"[]", "TypeError"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_what_is_no_json_is_no_manifest(tmp_path, case):
    content, message = NO_JSON[case]
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is not a manifest .*{message}"):
        open_compressed_checkpoint(tmp_path)


@pytest.mark.parametrize("version", [1, 3, "2", None, True, 2.0])
def test_other_versions_are_refused(manifest, tmp_path, version):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": version}))
    with pytest.raises(CheckpointError, match="this version reads 'qmoe_jax' version 2"):
        open_compressed_checkpoint(tmp_path)


def test_kernels_in_groups_that_change_places_are_found(base, tmp_path):
    """With groups wi and wo have rows of one width: only their files tell them apart."""
    qmoe_jax.compress(base, tmp_path / "out", grid="ternary", method="rtn", group_size=32)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    specs = [manifest["coded"][kernel]["spec"] for kernel in (WI, WO)]
    assert specs[0]["in_features"] == specs[1]["in_features"] == 32
    swap_kernels(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="belongs at"):
        qmoe_jax.load_switch(tmp_path / "out")
