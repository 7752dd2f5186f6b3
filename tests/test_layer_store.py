"""Journal, output and record of one layer, and resuming between any two of them; no model runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.errors import CheckpointError
from qmoe_jax.pipeline.devices import Devices
from qmoe_jax.pipeline.expert_pass import QuantizedKernel
from qmoe_jax.pipeline.journal import Journal
from qmoe_jax.pipeline.layer_store import KeptLayer, LayerStore
from qmoe_jax.pipeline.processes import Processes
from qmoe_jax.pipeline.run import Run
from qmoe_jax.progress import progress
from qmoe_jax.quantization.settings import CompressionSettings

BATCHES = (range(0, 3), range(3, 6), range(6, 8))


@pytest.fixture(scope="module")
def source(golden_checkpoint):
    return open_t5x_checkpoint(golden_checkpoint("base", "t5x_float32_inference"))


@pytest.fixture
def begin(source, tmp_path):
    """Starts a run in the same folders, as a new process would."""
    journals = []

    def start(**settings):
        for journal in journals:
            journal.close()
        chosen = CompressionSettings(grid="ternary", expert_batch=3, **settings)
        writer = CompressedCheckpointWriter(tmp_path / "out")
        journal = Journal(writer.work_folder, {"settings": chosen.to_json()}, discard=False)
        journals.append(journal)
        config = read_config(source)
        return Run(source, config, chosen, writer, journal, Devices.local(1), Processes(), progress)

    yield start
    for journal in journals:
        journal.close()


def kernels(run, experts, grid="ternary"):
    """Codes of a batch, that depend on its experts alone."""
    config = run.config
    shapes = {"wi": (config.expert_mlp_dim, config.embed_dim)}
    shapes["wo"] = shapes["wi"][::-1]
    made = {}
    for name, (rows, width) in shapes.items():
        draws = [np.random.default_rng([e, rows]) for e in experts]
        codes = np.stack([d.integers(0, 3, (rows, width), np.uint8) for d in draws])
        levels = np.stack([d.normal(size=(rows, 2)) for d in draws]).astype(bfloat16)
        count = len(experts)
        statistics = {
            "status": np.zeros(count, np.int8),
            "token_counts": np.full(count, 5.0, np.float32),
            "zero_share": (codes == 0).mean(axis=(1, 2), dtype=np.float32),
            "weight_error": np.full(count, 1.0, np.float32),
            "weight_energy": np.full(count, 4.0, np.float32),
            "layer_error": np.full(count, 1.0, np.float32),
            "layer_energy": np.full(count, 2.0, np.float32),
        }
        made[name] = QuantizedKernel(codes, levels, width, statistics)
    return made


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].codes, b[name].codes)
        np.testing.assert_array_equal(a[name].levels, b[name].levels)
        assert a[name].in_features == b[name].in_features


def whole_layer(run):
    """Compresses encoder layer 1 without a stop."""
    store = LayerStore(run, "encoder", 1)
    for experts in BATCHES:
        store.save_batch(experts, kernels(run, experts))
    return store.finish()


def stored(run):
    """Every array of the layer as it lies in the output."""
    root = Path(run.writer.folder.spec["path"]) / "coded"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_layer_leaves_codes_in_the_output_and_a_record_in_the_journal(begin):
    run = begin()
    reports = whole_layer(run)
    finished = run.journal.finished()
    assert finished.layers == {"encoder_layer_1"}
    assert finished.batches == frozenset()
    assert [report.name.rpartition("/")[2] for report in reports] == ["wi", "wo"]
    assert all(report.num_experts == 8 for report in reports)
    assert reports[0].relative_weight_error == pytest.approx(0.25)
    assert reports[0].relative_layer_error == pytest.approx(0.5)
    for experts in BATCHES:
        assert_same(LayerStore(run, "encoder", 1).read_batch(experts), kernels(run, experts))


@pytest.mark.parametrize("num_done", [1, 2, 3])
def test_a_run_stopped_between_batches_ends_with_the_same_bytes(begin, tmp_path, num_done):
    run = begin()
    store = LayerStore(run, "encoder", 1)
    for experts in BATCHES[:num_done]:
        store.save_batch(experts, kernels(run, experts))
    run = begin()  # the stores of the first process are gone
    assert len(run.journal.finished().batches) == num_done
    store = LayerStore(run, "encoder", 1)
    for number, experts in enumerate(BATCHES):
        if number < num_done:
            assert_same(store.load_batch(experts), kernels(run, experts))
        else:
            store.save_batch(experts, kernels(run, experts))
    reports, resumed = store.finish(), stored(run)
    run.journal.clear()
    fresh = begin()
    assert [dataclasses.asdict(r) for r in whole_layer(fresh)] == [
        dataclasses.asdict(r) for r in reports
    ]
    assert stored(fresh) == resumed


def test_a_run_stopped_before_the_record_writes_the_output_again(begin, monkeypatch):
    run = begin()

    def killed(name, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.journal, "save_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        whole_layer(run)
    first = stored(run)
    run = begin()
    assert len(run.journal.finished().batches) == 3
    assert run.journal.finished().layers == frozenset()
    store = LayerStore(run, "encoder", 1)
    for experts in BATCHES:
        store.load_batch(experts)
    store.finish()
    assert stored(run) == first


def test_a_run_stopped_after_the_record_forgets_the_batches(begin, monkeypatch):
    run = begin()
    monkeypatch.setattr(run.journal, "forget_batches", lambda names: None)
    expected = whole_layer(run)
    run = begin()
    assert len(run.journal.finished().batches) == 3
    assert LayerStore(run, "encoder", 1).reopen() == expected
    assert run.journal.finished().batches == frozenset()


def test_a_reopened_layer_is_checked(begin, tmp_path):
    run = begin()
    whole_layer(run)
    (chunk,) = (tmp_path / "out.partial" / "coded").glob("*layers_1*wi/words/0")
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        LayerStore(begin(), "encoder", 1).reopen()


def test_a_damaged_batch_is_named_with_the_remedy(begin, tmp_path):
    run = begin()
    LayerStore(run, "encoder", 1).save_batch(BATCHES[0], kernels(run, BATCHES[0]))
    (entry,) = (tmp_path / "out.partial" / "work").glob("*.npz")
    for content in (entry.read_bytes()[:-40], b"", b"not a zip"):
        entry.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"experts_0_3\.npz is damaged.*delete it"):
            LayerStore(run, "encoder", 1).load_batch(BATCHES[0])


def test_codes_in_the_journal_are_checked_too(begin):
    run = begin()
    store = LayerStore(run, "encoder", 1)
    store.save_batch(BATCHES[0], kernels(run, BATCHES[0]))
    (name,) = run.journal.finished().batches
    arrays = run.journal.load_batch(name, "")
    arrays["wi/coded/words"] = arrays["wi/coded/words"][:-1]
    run.journal.save_batch(name, arrays)
    with pytest.raises(CheckpointError, match="damaged"):
        LayerStore(run, "encoder", 1).load_batch(BATCHES[0])
    spec = json.dumps({"coding": "of the future"}).encode()
    run.journal.save_batch(name, arrays | {"wi/spec": np.frombuffer(spec, np.uint8)})
    with pytest.raises(CheckpointError, match="damaged"):
        LayerStore(run, "encoder", 1).load_batch(BATCHES[0])


@pytest.mark.parametrize(("dense_dtype", "bits"), [("bfloat16", 16), ("source", 32)])
def test_a_kept_layer_is_the_source_s_in_its_dtype(begin, source, tmp_path, dense_dtype, bits):
    run = begin(dense_dtype=dense_dtype, skip="decoder")
    store = KeptLayer(run, "decoder", 1)
    names = {n: f"decoder/layers_1/mlp/expert/{n}/kernel" for n in ("wi", "wo")}
    whole = {n: source.read(name) for n, name in names.items()}
    for experts in BATCHES:
        part = {n: kernel[experts.start : experts.stop] for n, kernel in whole.items()}
        kept = store.append(part)
        for n, kernel in kept.items():
            np.testing.assert_array_equal(kernel, part[n].astype(kernel.dtype))
    parameters, stored_bits = store.close()
    assert parameters == sum(kernel.size for kernel in whole.values())
    assert stored_bits == bits * parameters
    for name in source.names:
        if name not in names.values():
            run.writer.write_dense(name, source.read(name))
    run.writer.finish(run.config, {})
    read = open_compressed_checkpoint(tmp_path / "out").read_dense(list(names.values()))
    dtype = bfloat16 if bits == 16 else np.float32
    for n, name in names.items():
        np.testing.assert_array_equal(read[name], whole[n].astype(dtype))
