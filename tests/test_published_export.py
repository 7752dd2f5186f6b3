"""Export to the published QMoE layout: round trips, refusals, and the command."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from command import command
from published_factories import BASE, GEOMETRIES, write_published

from qmoe_jax.checkpoints import names, published_config, torch_files
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.published import export_published, import_published
from qmoe_jax.codec import encode
from qmoe_jax.errors import CheckpointError


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
        before = torch_files.load(tmp_path / "published" / name)
        after = torch_files.load(tmp_path / "exported" / name)
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
        for tensor in torch_files.load(file).values():
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
    exported = tmp_path / "exported"
    export_published(tmp_path / "compressed", exported, progress=False)
    with pytest.raises(CheckpointError, match="exists already"):
        export_published(tmp_path / "compressed", exported, progress=False)
    export_published(tmp_path / "compressed", exported, overwrite=True, progress=False)
    assert not (tmp_path / "exported.partial").exists()
    with pytest.raises(CheckpointError, match="not a model that this package exported"):
        export_published(tmp_path / "compressed", published, overwrite=True, progress=False)


def test_command(published, tmp_path, capsys):
    compressed, exported = str(tmp_path / "compressed"), str(tmp_path / "exported")
    assert (
        command("convert")(["published", "import", str(published), compressed, "--no-progress"])
        == 0
    )
    assert command("convert")(["published", "export", compressed, exported, "--no-progress"]) == 0
    assert command("convert")(["published", "import", exported, compressed, "--no-progress"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (
        command("convert")(
            ["published", "import", exported, compressed, "--no-progress", "--overwrite"]
        )
        == 0
    )


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from qmoe_jax.__main__ import main; main(['convert', '--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "published QMoE models" in " ".join(result.stdout.split())
