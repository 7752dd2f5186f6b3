"""The scripts for a GPU machine, without one: on a CuPy that refuses what the real one refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from cuda_emulation import lattice_fragments
from cuda_emulation.launcher import EmulatedLauncher
from markers import slow

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.encode import encode
from qmoe_jax.ops.cuda import launch_settings
from qmoe_jax.ops.cuda.launcher import use_launcher

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import bench_fragments  # noqa: E402
import bench_kernels  # noqa: E402
import gpu_bench  # noqa: E402
import gpu_check  # noqa: E402
import gpu_generation  # noqa: E402
import tune_kernels  # noqa: E402


class FakeLauncher(EmulatedLauncher):
    """Kernels on the CPU, on the arrays of the fake CuPy."""

    array_module = fake_cupy


@pytest.fixture
def cublas(monkeypatch):
    """A GPU for the scripts, small; the C functions of cuBLAS that they call."""
    library = fake_cupy.Cublas()
    monkeypatch.setattr(gpu_bench, "open_gpu", lambda program: FakeLauncher())
    monkeypatch.setattr(gpu_bench, "_load_cublas", lambda: library)
    monkeypatch.setattr(gpu_bench, "MIN_COLD_BYTES", 1)
    for module in (gpu_bench, bench_fragments, bench_kernels, tune_kernels):
        monkeypatch.setattr(module, "NUM_EXPERTS", 4)
    return library


class TestOnAFakeGpu:
    def test_benchmark(self, cublas, monkeypatch, tmp_path):
        """Products are checked against cuBLAS's; cuBLAS is timed inside captures as kernels are."""
        target = tmp_path / "kernels.json"
        shapes = ["--shapes", "9x40", "--tokens", "1", "3"]
        monkeypatch.setattr(sys, "argv", ["bench_kernels", "--json", str(target), *shapes])
        bench_kernels.main()
        results = json.loads(target.read_text())
        found = {(p["coding"], p["experts"], p["tokens"]) for p in results["products"]}
        assert found == {(c, e, t) for c in gpu_bench.CODINGS for e in (1, 4) for t in (1, 3)}
        assert all(p["error"] < 1e-2 for p in results["products"])
        assert len(results["expansions"]) == len(gpu_bench.CODINGS)
        assert {name for name, captured in cublas.calls if captured} == {
            "cublasGemmEx",
            "cublasGemmStridedBatchedEx",
        }
        assert target.with_suffix(".md").exists()
        assert len(bench_kernels.summary(results)) == 1 + 2 * len(gpu_bench.CODINGS)

    def test_an_ended_benchmark_leaves_what_it_has(self, cublas, monkeypatch, tmp_path):
        target = tmp_path / "kernels.json"
        shapes = ["--shapes", "9x40", "--tokens", "1", "--codings", "tunstall"]
        monkeypatch.setattr(sys, "argv", ["bench_kernels", "--json", str(target), *shapes])

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(bench_kernels, "bench_encoder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench_kernels.main()
        assert len(json.loads(target.read_text())["products"]) == 2

    @pytest.mark.parametrize("coding", ["lattice", *slow("tunstall")])
    def test_fragments(self, cublas, monkeypatch, tmp_path, coding):
        """Alone and in programs; outputs are compared, kernels are those that are meant."""
        launcher = FakeLauncher()
        monkeypatch.setattr(gpu_bench, "open_gpu", lambda program: launcher)
        target = tmp_path / "fragments.json"
        shapes = ["--shapes", "40x90", "--in_jax", "40x90", "--tokens", "3"]
        arguments = ["bench_fragments", "--json", str(target), *shapes, "--repeats", "1"]
        monkeypatch.setattr(sys, "argv", [*arguments, "--coding", coding])
        bench_fragments.main()
        results = json.loads(target.read_text())
        keys = {(1, 3), (4, 3)}
        products = results["products"]
        for way in ("fragments", "stored"):
            own = [p for p in products if (p["way"] == "fragments") == (way == "fragments")]
            assert {(p["experts"], p["tokens"]) for p in own} == keys
        assert all(p["error"] < 1e-2 and p["cublas_seconds"] > 0 for p in products)
        assert {(e["implementation"], e["experts"], e["tokens"]) for e in results["in_jax"]} == {
            (i, *key) for i in ("cuda", "cuda_fragments") for key in keys
        }
        names = {name for name, in_jit in launcher.calls if in_jit}
        grid = get_coding(coding).grid
        assert {name.rpartition("_")[0] for name in names if "fragments" in name} == {
            f"matmul_fragments_{grid}"
        }
        stored = (f"fused_{coding}", f"matmul_{coding}", f"expand_{coding}")
        assert any(name.startswith(stored) for name in names)
        assert results["bits"][0]["of_a_weight"] > 1
        text = "\n".join(bench_fragments.summary(results))
        assert "40x90" in text
        assert "nan" not in text

    def test_repeated_fragments_are_those_of_repeated_experts(self, cublas, monkeypatch):
        gpu = gpu_bench.Gpu(FakeLauncher())
        monkeypatch.setattr(gpu_bench, "UNIQUE_EXPERTS", 2)
        found = gpu_bench.make_fragment_codes(gpu, "lattice", 150, 70).arrays
        codes, levels = gpu_bench.random_codes("lattice", (2, 150, 70))
        twice = {name: np.concatenate([array, array]) for name, array in levels.items()}
        coded = encode(np.concatenate([codes, codes]), twice, "lattice")
        expected = lattice_fragments.made(coded)
        assert expected["extra_starts"][-1] > 0
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)

    def test_tuner(self, cublas, monkeypatch, tmp_path):
        target = tmp_path / "kernel_launch.json"
        monkeypatch.setattr(launch_settings, "settings_path", lambda: target)
        monkeypatch.setattr(gpu_bench, "SHAPES", ((9, 40),))
        tried = {"THREADS": (32,), "ROWS": (4, 8), "CROSSOVER": (2,), "FRAGMENT_TOKENS": (2,)}
        tried |= {"FRAGMENT_WARPS": (2, 4), "FRAGMENT_BLOCKS": (1, 64)}
        for name, values in tried.items():
            monkeypatch.setattr(tune_kernels, name, values)
        monkeypatch.setattr(sys, "argv", ["tune_kernels", "--codings", "tunstall", "lattice"])
        tune_kernels.main()
        found = launch_settings.launch_settings("emulated", "9.0", "tunstall")
        assert found.few.threads == found.many.threads == found.expand.threads == 32
        found = launch_settings.launch_settings("emulated", "9.0", "lattice")
        assert found.few.threads == 32
        assert (found.fragment_warps, found.fragment_blocks) in {
            (w, b) for w in (2, 4) for b in (1, 64)
        }

    def test_the_tuner_takes_the_fastest_way_to_share_rows(self, cublas, monkeypatch, capsys):
        """Fast are two warps a block that both take the same rows."""
        gpu = gpu_bench.Gpu(FakeLauncher())
        tried = []

        def launches(gpu, codes, own, placed, tile, settings):
            call = gpu_bench.fragment_call(codes, own, tile, settings)
            return [call.threads, tune_kernels._row_parts(call)]

        def seconds(given):
            tried.append(tuple(given))
            return gpu_bench.Timing(1e-6 if given == [64, 2] else 2e-6, 0.0)

        monkeypatch.setattr(gpu_bench, "fragment_launches", launches)
        monkeypatch.setattr(gpu, "time", seconds)
        monkeypatch.setattr(tune_kernels, "FRAGMENT_TOKENS", (2,))
        settings = launch_settings.LaunchSettings(few_tokens=7)
        found = tune_kernels.tune_fragments(gpu, "lattice", settings, [(40, 200)])
        assert found.few_tokens == 7
        assert found.fragment_warps == 2
        assert set(tried) == {(32 * w, s) for w in (2, 4, 8) for s in (1, 2)}  # three chunks
        assert "2/2 1.0" in capsys.readouterr().out
        # All alike: the default.
        monkeypatch.setattr(gpu, "time", lambda given: gpu_bench.Timing(1e-6, 0.0))
        assert tune_kernels.tune_fragments(gpu, "lattice", settings, [(40, 200)]) == settings

    @pytest.mark.parametrize("coding", ["lattice", *slow("tunstall", "packed2")])
    def test_generation(self, cublas, monkeypatch, tmp_path, coding):
        """Dense, from codes and from fragments; the model is small."""
        full = gpu_generation.SwitchConfig
        small = {"embed_dim": 64, "mlp_dim": 96, "expert_mlp_dim": 96, "num_heads": 2}
        monkeypatch.setattr(gpu_generation, "SwitchConfig", lambda **k: full(**{**k, **small}))
        target = tmp_path / "generation.json"
        options = ["--layers", "2", "--experts", "4", "--batches", "2", "--length", "2"]
        arguments = ["gpu_generation", "--json", str(target), *options, "--repeats", "1"]
        monkeypatch.setattr(sys, "argv", [*arguments, "--coding", coding])
        launcher = EmulatedLauncher()
        with use_launcher(launcher):
            gpu_generation.main()
        results = json.loads(target.read_text())
        has_fragments = coding != "packed2"
        ways = ["dense", "codes", *["fragments"] * has_fragments]
        assert list(results["bytes"]) == ways
        assert results["bytes"]["codes"] < results["bytes"]["dense"]
        assert [r["batch"] for r in results["rates"]] == [2]
        assert all(results["rates"][0][way] > 0 for way in ways)
        names = {name for name, _ in launcher.calls}
        assert any(name.startswith("matmul_fragments") for name in names) == has_fragments
        assert any(name.startswith(f"fused_{coding}") for name in names)
        assert len(gpu_generation.summary(results)) == 2

    def test_without_git(self, cublas, monkeypatch):
        gpu = gpu_bench.Gpu(FakeLauncher())
        monkeypatch.setenv("PATH", "")
        assert gpu.facts()["commit"] == "unknown"
        monkeypatch.setenv("QMOE_COMMIT", "abc")
        assert gpu.facts()["commit"] == "abc"

    def test_the_fake_refuses_what_cupy_refuses(self):
        stream = fake_cupy.Stream()
        stream.begin_capture()
        try:
            with pytest.raises(NotImplementedError):
                fake_cupy.cuda.device.get_cublas_handle()
            with pytest.raises(RuntimeError, match="allocation"):
                fake_cupy.zeros(3, "u1")
        finally:
            stream.end_capture()


@pytest.fixture
def check(tmp_path):
    """Runs a program as a check; its log is x.log in `tmp_path`."""

    def run(program: str, limit: int = 20) -> gpu_check.Outcome:
        found = gpu_check.Check("x", [sys.executable, "-c", program], limit, {})
        return gpu_check.run_check(found, tmp_path)

    return run


class TestChecks:
    def test_a_silent_child_is_ended_with_its_own(self, check, tmp_path):
        """It prints nothing, and has a child that would outlive it."""
        file = tmp_path / "pid"
        program = (
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(file)!r}, 'w').write(str(child.pid))\n"
            "time.sleep(600)"
        )
        begin = time.monotonic()
        outcome = check(program, limit=2)
        assert outcome.exit_code == 124
        assert outcome.summary == "ended after 2 s"
        assert time.monotonic() - begin < 30
        self.assert_ended(int(file.read_text()))

    def test_a_child_that_is_left_behind_is_ended(self, check, tmp_path):
        """Its end is not waited for, though it holds the output open."""
        file = tmp_path / "pid"
        program = (
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(file)!r}, 'w').write(str(child.pid)); print('done')"
        )
        assert check(program)[:2] == (0, "done")
        assert (tmp_path / "x.log").read_text() == "done\n"
        self.assert_ended(int(file.read_text()))

    def assert_ended(self, pid: int) -> None:
        for _ in range(200):
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                return
            if state == "Z":
                return
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a child outlived its check")

    def test_what_counts_in_an_output(self, check):
        outcome = check("print('a'); print('3 passed, 1 skipped in 2 s'); print('bye')")
        assert outcome.summary == "3 passed, 1 skipped in 2 s"
        assert check("print('5 skipped in 1 s')").exit_code == 1
        failed = check("print('2 failed, 3 passed'); raise SystemExit(1)")
        assert failed[:2] == (1, "2 failed, 3 passed")

    def test_the_table_is_short(self, tmp_path):
        """The machine's owner may cap the output: 12,000 characters are enough for all of it."""
        for i in range(9):
            (tmp_path / f"c{i}.log").write_text(("x" * 400 + "\n") * 300)
        entries = [
            {"check": f"c{i}", "passed": False, "seconds": 1.0, "summary": "y" * 500}
            for i in range(9)
        ]
        report = {"device": "d", "cupy": "1", "commit": "c", "checks": entries}
        text = gpu_check.table(report, tmp_path)
        assert len(text.splitlines()) <= 60
        assert len(text) < 12_000

    def test_every_part_is_known_and_short(self):
        """Each part stays below eight minutes, whatever its checks do."""
        one = gpu_check.kernels(Path("results"), None, quick=False)
        others = [
            gpu_check.fragments(Path("results"), False),
            gpu_check.generation(Path("results")),
        ]
        for part in (gpu_check.correctness(4), [one], others):
            assert all(c.limit < 480 for c in part)

    def test_the_table_ends_with_figures(self, tmp_path):
        """Those of a whole run fit; figures of parts that did not run are not shown."""
        keys = [(e, t) for e in (1, 64) for t in bench_fragments.TOKENS]
        own = [{"shape": [o, i], "experts": e, "tokens": t, "seconds": 1e-5, "cublas_seconds": 2e-5}
               for o, i in gpu_bench.SHAPES for e, t in keys]  # fmt: skip
        ways = ("matmul", "fragments")
        in_jax = [f for f in own if "x".join(map(str, f["shape"])) in bench_fragments.IN_JAX]
        figures = {
            "fragments.json": {
                "coding": "lattice",
                "products": [{**entry, "way": way} for entry in own for way in ways],
                "in_jax": [
                    {**entry, "implementation": name}
                    for entry in in_jax
                    for name in bench_fragments.IMPLEMENTATIONS
                ],
            },
            "gpu_generation.json": {
                "coding": "lattice",
                "bytes": {"dense": 2, "codes": 1},
                "rates": [{"batch": 1, "dense": 10.0, "codes": 30.0}],
            },
            "kernels.json": {
                "products": [{**entry, "coding": c} for entry in own for c in gpu_bench.CODINGS]
            },
        }
        facts = {"device": "d", "commit": "c"}
        for name, content in figures.items():
            (tmp_path / name).write_text(json.dumps(facts | content))
        parts = ("correctness", "command_buffers", "memcheck", "fragments", "generation")
        parts += tuple(f"racecheck_{i}" for i in range(len(gpu_check.SANITIZED)))
        entries = [{"check": p, "passed": True, "seconds": 1.0, "summary": "x"} for p in parts]
        report = {"device": "d", "cupy": "1", "commit": "c", "checks": entries}
        text = gpu_check.table(report, tmp_path)
        assert "batch 1: dense 10, codes 30" in text
        assert "1.00 (1.00-1.00)  2.00 (2.00-2.00)" in text
        assert "times faster than cuBLAS's bfloat16" not in text
        report["checks"].append({**entries[0], "check": "kernels"})
        text = gpu_check.table(report, tmp_path)
        assert "times faster than cuBLAS's bfloat16" in text
        assert len(text.splitlines()) <= gpu_check.TABLE_LINES
        assert "... the rest stands" not in text
        text = gpu_check.table({**report, "commit": "another"}, tmp_path)
        assert "batch 1" not in text

    def test_gpu_tests_start_without_beartype(self, tmp_path):
        """As on a machine that has JAX and pytest, but not what the repository's tests need."""
        (tmp_path / "beartype.py").write_text("raise ImportError('not installed')\n")
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        done = subprocess.run(
            [*gpu_check.PYTEST, "--collect-only"],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "test_gpu_kernels.py" in done.stdout


def fake_sanitizer(folder: Path, usage: str) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\necho '{usage}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex"])
def test_the_sanitizer_checks_our_kernels_only(tmp_path, option):
    checks = gpu_check.sanitizers(fake_sanitizer(tmp_path, f"  {option} arg"))
    assert [c.command[2] for c in checks] == ["memcheck"] + ["racecheck"] * (len(checks) - 1)
    for found in checks:
        assert found.limit < 480
        at = found.command.index(option)
        assert found.command[at + 1] == "kernel_substring=fused_"
        assert found.command[found.command.index("--report-api-errors") + 1] == "no"


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("make") is None, reason="needs git and make"
)
def test_the_bundle_is_small_and_whole():
    """`make gpu-bundle` of the last commit: what the GPU's tests and benchmarks read."""
    done = subprocess.run(["make", "gpu-bundle"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bundle = ROOT / "dist" / "qmoe_jax_gpu.tar.gz"
    assert bundle.stat().st_size < 40 * 2**20
    with tarfile.open(bundle) as archive:
        names = set(archive.getnames())
    for needed in (
        "kernels_cuda/multiply.cuh",
        "configs/public_checkpoints.json",
        "benchmarks/gpu_check.py",
        "tests/gpu/test_gpu_kernels.py",
        "tests/golden_data.py",
        "tests/golden/switch_base/t5x.tar.xz",
        "tests/golden/switch_base/golden.npz.xz",
        "tests/golden/switch_demo/checkpoint_4200/checkpoint",
    ):
        assert f"qmoe_jax/{needed}" in names
