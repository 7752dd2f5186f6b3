"""Nothing that is resumed or kept is of another model, text or number of examples."""

import os
import shutil

import numpy as np
import pytest
import tensorstore as ts
from factories import CALIBRATION, TERNARY
from test_resume import Stopped, stop_after

import qmoe_jax
import qmoe_jax.evaluation.evaluate
from qmoe_jax.checkpoints.fingerprint import fingerprint
from qmoe_jax.checkpoints.storage import Folder, kvstore_spec, make_context
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.errors import CheckpointError, TokensError

EVALUATION = {"batch_size": 8, "progress": False, "tensorboard": False}


@pytest.fixture
def model(golden_copy):
    """A native checkpoint of its own."""
    return golden_copy("base", "t5x_float32_inference")


def change_in_place(model):
    """Another embedding in the same files, of the same sizes."""
    path = model / "target.token_embedder.embedding"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}
    array = ts.open(spec, open=True).result()
    array.write(np.flip(array.read().result(), axis=0)).result()


def replaced(model):
    """The checkpoint of another training run, moved to the same path."""
    other = model.with_name("other")
    shutil.copytree(model, other)
    change_in_place(other)
    shutil.rmtree(model)
    other.rename(model)


def of(path):
    return fingerprint(Folder(kvstore_spec(path), make_context(cache_bytes=0)))


class TestFingerprint:
    def test_it_is_the_same_while_the_files_are(self, model):
        assert of(model) == of(f"{model}/") == open_t5x_checkpoint(model).fingerprint()

    @pytest.mark.parametrize("change", [change_in_place, replaced])
    def test_it_changes_with_the_model(self, model, change):
        before = of(model)
        change(model)
        assert of(model) != before

    def test_sizes_times_and_names_count(self, tmp_path):
        (tmp_path / "a").write_text("1")
        seen = {of(tmp_path)}
        os.utime(tmp_path / "a", ns=(5, 5))
        seen.add(of(tmp_path))
        (tmp_path / "a").write_text("12")
        os.utime(tmp_path / "a", ns=(5, 5))
        seen.add(of(tmp_path))
        (tmp_path / "a").rename(tmp_path / "b")
        seen.add(of(tmp_path))
        assert len(seen) == 4

    def test_a_folder_that_cannot_be_listed(self, tmp_path):
        with pytest.raises(CheckpointError, match="cannot list"):
            of(tmp_path / "absent")


class TestCompress:
    def test_a_checkpoint_that_was_replaced_is_refused(self, model, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Stopped):
                qmoe_jax.compress(model, tmp_path / "out", CALIBRATION, **TERNARY)
        change_in_place(model)
        with pytest.raises(CheckpointError, match=r"checkpoint\.fingerprint: .* became"):
            qmoe_jax.compress(model, tmp_path / "out", CALIBRATION, **TERNARY)

    @pytest.mark.parametrize("count", [-3, 0, 41, 5000, True])
    def test_a_number_of_examples_that_there_are_not(self, base, tmp_path, count):
        with pytest.raises(TokensError, match="num_examples is .*, but there are 40 examples"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, num_examples=count, **TERNARY)
        assert list(tmp_path.iterdir()) == []


class TestEvaluate:
    @pytest.mark.parametrize("change", [change_in_place, replaced])
    def test_a_checkpoint_that_was_replaced(self, model, tmp_path, change):
        evaluate = qmoe_jax.evaluation.evaluate.evaluate
        tokens, output = CALIBRATION[:8], tmp_path / "out"
        first = evaluate(model, tokens, output=output, **EVALUATION)["models"][0]["loss"]
        change(model)
        with pytest.raises(CheckpointError, match=r"fingerprint: .* became"):
            evaluate(model, tokens, output=output, **EVALUATION)
        fresh = evaluate(model, tokens, **EVALUATION)["models"][0]["loss"]
        assert fresh != pytest.approx(first, abs=0.01)
        again = evaluate(model, tokens, output=output, overwrite=True, **EVALUATION)
        assert again["models"][0]["loss"] == fresh

    def test_overwrite_computes_anew_even_if_nothing_seems_changed(self, model, tmp_path):
        """A file may be put back with its old size and time."""
        evaluate = qmoe_jax.evaluation.evaluate.evaluate
        tokens, output = CALIBRATION[:8], tmp_path / "out"
        times = {p: p.stat() for p in model.rglob("*") if p.is_file()}
        first = evaluate(model, tokens, output=output, **EVALUATION)["models"][0]["loss"]
        change_in_place(model)
        for path, status in times.items():
            if path.stat().st_size == status.st_size:
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        again = evaluate(model, tokens, output=output, overwrite=True, **EVALUATION)
        assert again["models"][0]["loss"] != pytest.approx(first, abs=0.01)

    @pytest.mark.parametrize("count", [-3, 0, 9, True])
    def test_a_number_of_examples_that_there_are_not(self, base, count):
        with pytest.raises(TokensError, match="num_examples is .*, but there are 8 examples"):
            qmoe_jax.evaluation.evaluate.evaluate(base, CALIBRATION[:8], num_examples=count)


class TestFillValues:
    """Zarr arrays whose chunks equal to the fill value are not stored."""

    def rewrite(self, model, fill_value):
        name = "target.encoder.layers_1.mlp.expert.wi.kernel"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(model / name)}}
        values = ts.open(spec, open=True).result().read().result()
        values[2] = 0.0
        metadata = {"shape": list(values.shape), "chunks": [1, *values.shape[1:]], "dtype": "<f4"}
        metadata |= {"fill_value": fill_value, "compressor": None}
        array = ts.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()
        array.write(values).result()
        return model / name, values

    def test_an_absent_chunk_is_its_fill_value(self, model):
        folder, values = self.rewrite(model, 0.0)
        assert not (folder / "2.0.0").exists()
        source = open_t5x_checkpoint(model)
        kernel = "encoder/layers_1/mlp/expert/wi/kernel"
        np.testing.assert_array_equal(source.read(kernel), values)
        np.testing.assert_array_equal(source.read_experts(kernel, 1, 4), values[1:4])

    def test_without_a_fill_value_it_is_damage(self, model):
        folder, _ = self.rewrite(model, None)
        (folder / "2.0.0").unlink()
        source = open_t5x_checkpoint(model)
        with pytest.raises(CheckpointError, match="A chunk is missing"):
            source.read("encoder/layers_1/mlp/expert/wi/kernel")
