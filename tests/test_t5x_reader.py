"""The reader of native T5X checkpoints: every layout, every slice, every error."""

import json
import shutil
import zlib
from pathlib import Path

import golden_data
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from fake_gcs import run_with_gcs
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.storage import Folder, kvstore_spec, make_context
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.errors import CheckpointError

WI = "encoder/layers_1/mlp/expert/wi/kernel"
WI_FOLDER = "target.encoder.layers_1.mlp.expert.wi.kernel"
NORM = "encoder/encoder_norm/scale"
NORM_FOLDER = "target.encoder.encoder_norm.scale"

_KINDS = {"orbax_float32": "orbax_zarr"}


@pytest.fixture(scope="module")
def reference(golden_checkpoint):
    """Parameters of a model as float32, read from T5X's own layout."""
    cache = {}

    def read(model):
        if model not in cache:
            checkpoint = open_t5x_checkpoint(golden_checkpoint(model, "t5x_float32"))
            cache[model] = checkpoint.read_many(checkpoint.names)
        return cache[model]

    return read


def write_array(folder: Path, values: np.ndarray, chunks: tuple[int, ...], dtype=None) -> None:
    """Replaces a zarr array by `values`, in T5X's form with other chunks."""
    shutil.rmtree(folder)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {"compressor": {"id": "gzip", "level": 1}, "chunks": chunks},
    }
    array = ts.open(spec, create=True, dtype=dtype or values.dtype, shape=values.shape).result()
    array.write(values).result()


def edit_msgpack(folder: Path, edit) -> None:
    path = folder / "checkpoint"
    tree = serialization.msgpack_restore(path.read_bytes())
    edit(tree)
    path.write_bytes(serialization.msgpack_serialize(tree))


# Layouts


@pytest.mark.parametrize(("model", "layout"), golden_data.LAYOUTS)
def test_layouts_hold_the_same_parameters(model, layout, golden_checkpoint, reference):
    checkpoint = open_t5x_checkpoint(golden_checkpoint(model, layout))
    expected = reference(model)
    kind = "t5x" if layout.startswith("t5x") else _KINDS.get(layout, "orbax_ocdbt")
    assert checkpoint.layout == kind
    assert checkpoint.step == 500100
    axes = names.flatten(golden_data.load_json(model, "params_axes"))
    assert set(checkpoint.names) == {name.removesuffix("_axes") for name in axes}
    assert checkpoint.names == tuple(sorted(expected))
    dtype = np.dtype(ml_dtypes.bfloat16 if "bfloat16" in layout else np.float32)
    for name, values in checkpoint.read_many(checkpoint.names).items():
        assert values.dtype == checkpoint.dtypes[name] == dtype
        assert values.shape == checkpoint.shapes[name]
        # astype rounds to nearest even, as T5X does on saving.
        assert values.tobytes() == expected[name].astype(dtype).tobytes()


def test_paths(golden_checkpoint, golden_copy):
    folder = golden_checkpoint("base", "t5x_float32_inference")
    for path in (folder, str(folder), f"{folder}/", f"file://{folder}", folder.parent):
        assert open_t5x_checkpoint(path).url == str(folder)
    orbax = golden_checkpoint("base", "orbax_head_float32_inference")
    for path in (orbax, orbax.parent, orbax / "state"):
        assert open_t5x_checkpoint(path).url == str(orbax / "state")
    copy = golden_copy("base", "t5x_float32_inference")
    shutil.copytree(copy, copy.parent / "checkpoint_99")
    assert open_t5x_checkpoint(copy.parent).step == 500100
    (copy.parent / "checkpoint_600000").mkdir()
    (copy.parent / "checkpoint_600000" / "junk").touch()
    with pytest.raises(CheckpointError, match=r"checkpoint_600000.*incomplete.*500100"):
        open_t5x_checkpoint(copy.parent)


def test_a_parent_of_links_to_checkpoints(golden_checkpoint, tmp_path):
    folder = golden_checkpoint("base", "t5x_float32_inference")
    (tmp_path / "checkpoint_500100").symlink_to(folder)
    (tmp_path / "checkpoint_600000").mkdir()  # holds nothing yet
    (tmp_path / "checkpoint_700000").symlink_to(tmp_path / "absent")
    assert open_t5x_checkpoint(tmp_path).step == 500100


def test_params(golden_checkpoint, reference):
    checkpoint = open_t5x_checkpoint(golden_checkpoint("base", "t5x_float32"))
    params = checkpoint.params(
        dtype=ml_dtypes.bfloat16, include=lambda name: not names.is_expert_kernel(name)
    )
    flat = names.flatten(params)
    assert set(flat) == {name for name in checkpoint.names if "/expert/" not in name}
    assert flat[NORM].dtype == ml_dtypes.bfloat16
    assert names.flatten(checkpoint.params())[WI].tobytes() == reference("base")[WI].tobytes()


def test_names():
    for name in (WI, NORM, "token_embedder/embedding"):
        assert names.to_dotted(name) == "target." + name.replace("/", ".")
    assert names.to_dotted(WI) == WI_FOLDER
    assert names.expert_kernel("encoder", 1, "wi") == WI
    assert names.layer_of(WI) == ("encoder", 1)
    assert names.layer_of("decoder/layers_12/self_attention/key/kernel") == ("decoder", 12)
    assert names.layer_of(NORM) is None
    assert names.is_expert_kernel(WI)
    assert not names.is_expert_kernel(names.router_kernel("encoder", 1))


# Slices


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("layout", ["t5x_float32_multichunk", "orbax_ocdbt_float32"])
def test_slices_equal_slices_of_the_whole(layout, data, golden_checkpoint, reference):
    checkpoint = open_t5x_checkpoint(golden_checkpoint("base", layout))
    name = data.draw(st.sampled_from([WI, "decoder/layers_3/mlp/expert/wo/kernel", NORM]))
    whole = reference("base")[name]
    entries = []
    for size in whole.shape[: data.draw(st.integers(0, whole.ndim))]:
        positive_step = st.slices(size).filter(lambda s: s.step is None or s.step > 0)
        entries.append(data.draw(positive_step | st.integers(-size, size - 1)))
    np.testing.assert_array_equal(checkpoint.read(name, tuple(entries)), whole[tuple(entries)])
    start = data.draw(st.integers(0, 7))
    stop = data.draw(st.integers(start + 1, 8))
    np.testing.assert_array_equal(
        checkpoint.read_experts(WI, start, stop), reference("base")[WI][start:stop]
    )


def test_slice_reads_only_the_chunks_that_it_touches(golden_copy, reference):
    folder = golden_copy("base", "t5x_float32_multichunk")
    chunks = folder / WI_FOLDER
    assert len(list(chunks.iterdir())) == 1 + 4 * 8
    for chunk in chunks.glob("0.*"):
        if not chunk.name.startswith("0.1."):
            chunk.unlink()
    checkpoint = open_t5x_checkpoint(folder)
    assert checkpoint.chunk_shape(WI) == (8, 16, 16)
    part = checkpoint.read(WI, (slice(2, 5), slice(16, 32)))
    np.testing.assert_array_equal(part, reference("base")[WI][2:5, 16:32])
    with pytest.raises(CheckpointError, match=rf"{WI}.*missing"):
        checkpoint.read(WI, (slice(2, 5), slice(16, 33)))


def test_experts_are_read_without_the_chunks_of_others(golden_copy, reference):
    folder = golden_copy("base", "t5x_float32")
    whole = reference("base")[WI]
    write_array(folder / WI_FOLDER, whole, chunks=(2, 64, 128))
    for chunk in ("0.0.0", "3.0.0"):
        (folder / WI_FOLDER / chunk).write_bytes(b"")
    checkpoint = open_t5x_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.read_experts(WI, 3, 6), whole[3:6])
    with pytest.raises(CheckpointError, match=WI):
        checkpoint.read_experts(WI, 1, 3)


def test_bad_slices(golden_checkpoint):
    checkpoint = open_t5x_checkpoint(golden_checkpoint("base", "t5x_float32"))
    with pytest.raises(ValueError, match="experts 0 to 7"):
        checkpoint.read_experts(WI, 4, 9)
    with pytest.raises(ValueError, match="non-empty"):
        checkpoint.read_experts(WI, 4, 4)
    with pytest.raises(ValueError, match="no expert kernel"):
        checkpoint.read_experts(NORM, 0, 1)
    with pytest.raises(IndexError, match="out of bounds for 8"):
        checkpoint.read(WI, 8)
    with pytest.raises(IndexError, match="3 axes"):
        checkpoint.read(WI, (0, 0, 0, 0))
    with pytest.raises(IndexError, match="positive"):
        checkpoint.read(WI, slice(None, None, -1))
    with pytest.raises(CheckpointError, match=r"did you mean .*layers_1/mlp/expert/wi/kernel"):
        checkpoint.read("encoder/layers_1/mlp/expert/wi")


# Errors


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_t5x_checkpoint(tmp_path / "absent")
    with pytest.raises(
        CheckpointError, match=r"is no T5X checkpoint: looked for .*state/_METADATA"
    ):
        open_t5x_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_t5x_checkpoint(tmp_path / "file")
    of_the_hub = Path(__file__).parent / "golden" / "huggingface" / "base"
    with pytest.raises(CheckpointError, match=r"is a Hugging Face folder; .* convert huggingface"):
        open_t5x_checkpoint(of_the_hub)
    with pytest.raises(CheckpointError, match="scheme s3"):
        open_t5x_checkpoint("s3://bucket/checkpoint_1")


@pytest.mark.parametrize("name", ["", "checkpoint_7"])
def test_compressed_and_unfinished_checkpoints_are_named_as_such(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a compressed checkpoint; a native one is"):
        open_t5x_checkpoint(tmp_path)
    (tmp_path / "out.partial" / "work").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"out\.partial is unfinished: .*started again"):
        open_t5x_checkpoint(tmp_path / "out.partial")


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_truncated_msgpack(keep, golden_copy):
    folder = golden_copy("base", "t5x_float32_inference")
    path = folder / "checkpoint"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"checkpoint_500100/checkpoint .*truncated or corr"):
        open_t5x_checkpoint(folder)


def test_msgpack_of_something_else(golden_copy):
    folder = golden_copy("base", "t5x_float32_inference")
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize({"params": {"a": 1}}))
    with pytest.raises(CheckpointError, match=r"\['params'\].*not written by T5X"):
        open_t5x_checkpoint(folder)


@pytest.mark.parametrize("version", [2, 4, None])
def test_unsupported_version(version, golden_copy):
    folder = golden_copy("base", "t5x_float32_inference")
    edit_msgpack(folder, lambda tree: tree.update(version=version))
    with pytest.raises(CheckpointError, match=f"version {version}, expected 3"):
        open_t5x_checkpoint(folder)


def test_malformed_specs(golden_copy):
    folder = golden_copy("base", "t5x_float32_inference")

    def norm_of(tree):
        return tree["optimizer"]["target"]["encoder"]["encoder_norm"]

    edit_msgpack(folder, lambda tree: norm_of(tree)["scale"].pop("metadata"))
    with pytest.raises(CheckpointError, match=rf"{NORM}.*malformed.*metadata\.shape"):
        open_t5x_checkpoint(folder)
    edit_msgpack(folder, lambda tree: norm_of(tree)["scale"].update(driver="n5"))
    with pytest.raises(CheckpointError, match=rf"{NORM}.*'n5', expected 'zarr'"):
        open_t5x_checkpoint(folder)
    edit_msgpack(folder, lambda tree: norm_of(tree).update(scale=np.ones(64, np.float32)))
    with pytest.raises(CheckpointError, match=rf"{NORM}.*ndarray, expected a TensorStore spec"):
        open_t5x_checkpoint(folder)


@pytest.mark.parametrize("layout", ["t5x_float32", "orbax_float32"])
def test_missing_array(layout, golden_copy):
    folder = golden_copy("base", layout)
    state = folder / "state" if layout.startswith("orbax") else folder
    shutil.rmtree(state / WI_FOLDER)
    with pytest.raises(CheckpointError, match=rf"parameter {WI}.*does not exist.*copy"):
        open_t5x_checkpoint(folder)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_chunk(damage, golden_copy):
    folder = golden_copy("base", "t5x_float32")
    chunk = folder / WI_FOLDER / "0.0.0"
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[: 1000 if damage == "truncated" else 0])
    checkpoint = open_t5x_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"parameter {WI} .*0\.0\.0.*copy"):
        checkpoint.read_experts(WI, 0, 1)
    assert checkpoint.read(NORM).shape == (64,)


def test_truncated_ocdbt(golden_copy):
    folder = golden_copy("base", "orbax_head_float32_inference")
    largest = max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    checkpoint = open_t5x_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"parameter .*OCDBT.*copy"):
        checkpoint.read_many(checkpoint.names)
    metadata = folder / "state" / "_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"_METADATA \(1000 bytes\).*truncated"):
        open_t5x_checkpoint(folder)
    metadata.write_text(json.dumps({"tree_metadata": {}, "use_zarr3": True}))
    with pytest.raises(CheckpointError, match="use_zarr3"):
        open_t5x_checkpoint(folder)
    metadata.write_text(json.dumps({"tree_metadata": {}}))
    with pytest.raises(CheckpointError, match="names no parameters"):
        open_t5x_checkpoint(folder)


def test_shape_and_dtype_must_be_as_recorded(golden_copy):
    folder = golden_copy("base", "t5x_float32")
    write_array(folder / NORM_FOLDER, np.ones(60, np.float32), chunks=(60,))
    with pytest.raises(CheckpointError, match=rf"{NORM} has shape \[60\].*says \[64\]"):
        open_t5x_checkpoint(folder)
    write_array(folder / NORM_FOLDER, np.ones(64, ml_dtypes.bfloat16), (64,), ts.bfloat16)
    with pytest.raises(CheckpointError, match=rf"{NORM} is bfloat16.*says float32"):
        open_t5x_checkpoint(folder)
    write_array(folder / NORM_FOLDER, np.ones(64, np.uint16), chunks=(64,))
    with pytest.raises(CheckpointError, match=rf"{NORM}.*uint16, expected float32 or bfloat16"):
        open_t5x_checkpoint(folder)
    write_array(folder / NORM_FOLDER, np.ones(64, np.float64), chunks=(64,))
    with pytest.raises(CheckpointError, match=rf"{NORM}.*float64, expected float32 or bfloat16"):
        open_t5x_checkpoint(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_values_must_be_finite(bad, dtype, golden_copy):
    folder = golden_copy("base", "t5x_float32" if dtype == np.float32 else "t5x_bfloat16")
    values = np.ones(64, dtype)
    values[5] = bad
    write_array(
        folder / NORM_FOLDER, values, (64,), ts.float32 if dtype == np.float32 else ts.bfloat16
    )
    checkpoint = open_t5x_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{NORM}.*holds 1 NaN or infinite values of 64"):
        checkpoint.params()
    assert not np.isfinite(checkpoint.read(NORM, check_finite=False)).all()
    assert checkpoint.read(NORM, slice(6, None)).shape == (58,)


# gs://


def test_gcs_spec():
    spec = {"driver": "gcs", "bucket": "bucket", "path": "a/checkpoint_1/"}
    for url in ("gs://bucket/a/checkpoint_1", "gs://bucket/a/checkpoint_1/"):
        assert kvstore_spec(url) == spec
    assert kvstore_spec("gs://bucket") == {"driver": "gcs", "bucket": "bucket", "path": ""}
    with pytest.raises(CheckpointError, match="names no bucket"):
        kvstore_spec("gs:///a")
    folder = Folder(spec, make_context(0))
    assert folder.url == "gs://bucket/a/checkpoint_1"
    array = ts.Spec({"driver": "zarr", "kvstore": folder.child("target.x").spec})
    assert array.kvstore.url == "gs://bucket/a/checkpoint_1/target.x/"


_READ_FROM_GCS = f"""
import sys, zlib
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
for path in sys.argv[1:]:
    checkpoint = open_t5x_checkpoint(path)
    experts = checkpoint.read_experts("{WI}", 2, 4)
    print(checkpoint.layout, checkpoint.step, zlib.crc32(experts))
"""


def test_gcs_reads_anonymously(golden_checkpoint, reference, tmp_path):
    root = golden_checkpoint("base", "t5x_float32_gcsspec").parents[2]
    golden_checkpoint("base", "orbax_ocdbt_float32")
    paths = [
        "gs://bucket/t5x/t5x_float32_gcsspec",
        "gs://bucket/orbax/orbax_ocdbt_float32/checkpoint_500100/",
    ]
    crc = zlib.crc32(reference("base")[WI][2:4])
    found = run_with_gcs(_READ_FROM_GCS, paths, root, tmp_path)
    assert found == [f"t5x 500100 {crc}", f"orbax_ocdbt 500100 {crc}"]


_OPEN_COMPRESSED = """
import sys
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.training_lengths import training_lengths
for path in sys.argv[1:]:
    if is_compressed_checkpoint(path):
        checkpoint = open_compressed_checkpoint(path)
        checkpoint.read_dense(["encoder/encoder_norm/scale"])
        print(checkpoint.url, training_lengths(checkpoint.url))
    else:
        print("none")
"""


def test_compressed_steps_on_gcs(gptq, tmp_path):
    for step in (7, 12):
        shutil.copytree(gptq[0], tmp_path / "root" / "mine" / f"checkpoint_{step}")
    (tmp_path / "root" / "other" / "checkpoint_3").mkdir(parents=True)
    (tmp_path / "root" / "other" / "checkpoint_3" / "notes.txt").write_text("mine")
    lengths = "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 14}"
    (tmp_path / "root" / "mine" / "config.gin").write_text(lengths)
    paths = ["gs://bucket/mine", "gs://bucket/mine/checkpoint_7/", "gs://bucket/other"]
    found = run_with_gcs(_OPEN_COMPRESSED, paths, tmp_path / "root", tmp_path)
    said = "TrainingLengths(inputs=48, targets=14, source='gs://bucket/mine/config.gin')"
    assert found == [
        f"gs://bucket/mine/checkpoint_12 {said}",
        f"gs://bucket/mine/checkpoint_7 {said}",
        "none",
    ]
