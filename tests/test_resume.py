"""Runs that were stopped: they go on, end with the same bytes, and spoil nothing."""

import shutil

import golden_data
import pytest
from factories import CALIBRATION, TERNARY, same_tree
from markers import slow

import qmoe_jax
from qmoe_jax.checkpoints import compressed_writer
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.errors import CheckpointError
from qmoe_jax.pipeline import expert_layer


class Stopped(Exception):
    pass


def stop_after(monkeypatch, num_batches):
    """Makes the block loop fall over once so many expert batches are computed and stored."""
    compute = expert_layer.quantize_batch
    computed = []

    def counting(*arguments):
        if len(computed) == num_batches:
            raise Stopped
        computed.append(None)
        return compute(*arguments)

    monkeypatch.setattr(expert_layer, "quantize_batch", counting)


def stop_finish_after(monkeypatch, last):
    """Fall over before the manifest is written, or when so many packed arrays lost their folder."""

    def stop(*_):
        raise Stopped

    def remove(folder, names):
        if "packed" in names[0]:
            return removed(folder, names)
        removed(folder, names[:last])
        raise Stopped

    removed = compressed_writer.remove_arrays
    monkeypatch.setattr(compressed_writer, "remove_arrays", remove)
    if not last:
        monkeypatch.setattr(CompressedCheckpointWriter, "_write_manifest", stop)


class TestResume:
    # 4 sparse layers of 8 experts in batches of 3: 12 batches.
    @pytest.mark.parametrize("stops", [(1,), (3, 5), *slow((2, 2, 2, 5))])
    def test_a_stopped_run_ends_with_the_same_bytes(self, base, gptq, tmp_path, monkeypatch, stops):
        path = tmp_path / "out"
        for stop in stops:
            with monkeypatch.context() as patch:
                stop_after(patch, stop)
                with pytest.raises(Stopped):
                    qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
            assert not path.exists()
        report = qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
        assert report.num_replayed == sum(stops)
        # Finished layers are in the output already, and their kernels are not read again.
        assert report.bytes_read < gptq[1].bytes_read
        assert same_tree(path, gptq[0])
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        # The report too is that of an undisturbed run.
        assert report.kernels == gptq[1].kernels

    def stopped(self, base, path, monkeypatch, **settings):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Stopped):
                qmoe_jax.compress(base, path, CALIBRATION, **TERNARY, **settings)

    def test_other_settings_are_refused_and_named(self, base, gptq, tmp_path, monkeypatch):
        path = tmp_path / "out"
        self.stopped(base, path, monkeypatch, damping=0.2)
        message = r"settings.damping: 0.2 became 0.1"
        with pytest.raises(CheckpointError, match=message):
            qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
        with pytest.raises(CheckpointError, match=r"tokens\.num_examples: 40 became 7"):
            qmoe_jax.compress(base, path, CALIBRATION, num_examples=7, damping=0.2, **TERNARY)
        report = qmoe_jax.compress(base, path, CALIBRATION, overwrite=True, **TERNARY)
        assert report.num_replayed == 0
        assert same_tree(path, gptq[0])

    def test_a_second_run_is_refused(self, base, tmp_path, monkeypatch):
        path = tmp_path / "out"
        compute = expert_layer.quantize_batch

        def meanwhile(*arguments):
            with pytest.raises(CheckpointError, match="another process is writing"):
                qmoe_jax.compress(base, path, CALIBRATION, overwrite=True, **TERNARY)
            raise Stopped

        monkeypatch.setattr(expert_layer, "quantize_batch", meanwhile)
        with pytest.raises(Stopped):
            qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
        monkeypatch.setattr(expert_layer, "quantize_batch", compute)

    def test_a_work_folder_loses_only_what_is_the_run_s(self, base, gptq, tmp_path, monkeypatch):
        path, work = tmp_path / "out", tmp_path / "work"
        work.mkdir()
        (work / "other.txt").write_text("not ours")
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Stopped):
                qmoe_jax.compress(base, path, CALIBRATION, work_dir=work, **TERNARY)
        report = qmoe_jax.compress(base, path, CALIBRATION, work_dir=work, **TERNARY)
        assert report.num_replayed == 2
        assert same_tree(path, gptq[0])
        assert [file.name for file in work.iterdir()] == ["other.txt"]

    def test_a_finished_layer_is_checked(self, base, tmp_path, monkeypatch):
        path = tmp_path / "out"
        with monkeypatch.context() as patch:
            stop_after(patch, 4)  # 3 batches make the first layer
            with pytest.raises(Stopped):
                qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
        (folder,) = path.with_name("out.partial").glob("coded/*encoder.layers_1*.wi/words")
        chunk = folder / "0"
        content = bytearray(chunk.read_bytes())
        content[5] ^= 1
        chunk.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"wi/words .* does not match its checksum"):
            qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)

    def test_stopped_while_arrays_are_packed(self, base, gptq, tmp_path, monkeypatch):
        """Behind the first pack, then with some of the folders gone: the same bytes at last."""
        path = tmp_path / "out"
        for last in (0, 3):
            with monkeypatch.context() as patch:
                stop_finish_after(patch, last)
                with pytest.raises(Stopped):
                    qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
            assert (path.with_name("out.partial") / "dense/packed").exists()
            assert (path.with_name("out.partial") / "manifest.json").exists() == (last > 0)
        report = qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
        assert report.num_replayed == 12
        assert same_tree(path, gptq[0])

    def test_a_damaged_journal_entry_is_named(self, base, tmp_path, monkeypatch):
        path = tmp_path / "out"
        self.stopped(base, path, monkeypatch)
        entry = sorted((tmp_path / "out.partial" / "work").glob("*.npz"))[0]
        entry.write_bytes(entry.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=f"{entry.name} is damaged"):
            qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)
        entry.unlink()
        assert qmoe_jax.compress(base, path, CALIBRATION, **TERNARY).num_replayed == 1

    def test_an_interrupted_overwrite_keeps_the_old_output(self, base, gptq, tmp_path, monkeypatch):
        path = shutil.copytree(gptq[0], tmp_path / "out")
        stop_after(monkeypatch, 2)
        with pytest.raises(Stopped):
            qmoe_jax.compress(base, path, CALIBRATION, overwrite=True, **TERNARY)
        assert same_tree(path, gptq[0])


def test_golden_sizes_are_what_these_tests_assume():
    assert golden_data.load_json("base", "config")["NUM_EXPERTS"] == 8
