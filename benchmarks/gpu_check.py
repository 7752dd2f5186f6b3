"""Everything that needs a GPU, in a few minutes, from a bare checkout: `make gpu-check`.

    python benchmarks/gpu_check.py [--peer PATH] [--quick]

Runs tests/gpu (poisoned outputs, fresh random inputs, float64 references), then the kernels' tests
again under compute-sanitizer's memcheck and racecheck where it is on the PATH, then
bench_kernels.py. What came out goes into benchmarks/results/gpu_check.json, the figures into
kernels.json and kernels.md.
Needs what a GPU machine has: Python 3.11 or newer, JAX, Flax, CuPy, numba, pytest and what JAX and
Flax bring. Exit code 0: all checks passed; 1: some failed; 2: there is no GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_bench

from qmoe_jax.atomic_file import write_json

ROOT = gpu_bench.ROOT
RESULTS = ROOT / "benchmarks" / "results"
# Without the repository's conftest.py, which needs beartype; another JAX's warnings are no errors.
PYTEST = [sys.executable, "-m", "pytest", "--confcutdir", str(ROOT / "tests" / "gpu"), "-q", "-rs"]
PYTEST += ["-W", "default", "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "tests" / "gpu")]
# The sanitizer slows kernels down a hundredfold, and JAX's own kernels too: those of CuPy alone.
KERNELS_ONLY = ["-k", "test_damaged or test_encoder or (test_kernels and (33 or 769 or 1500))"]
SANITIZER = ["--error-exitcode", "9", "--target-processes", "all"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, help="sub1_cuda_kernel.cu of QMoE, for the benchmark")
    parser.add_argument("--quick", action="store_true", help="two shapes of the benchmark only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder; default %(default)s")
    options = parser.parse_args()
    gpu = gpu_bench.Gpu(gpu_bench.open_gpu("gpu_check"))
    options.results.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**gpu.facts(), "checks": []}

    def check(name: str, command: list[str], limit: int) -> None:
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        done = _run(command, limit)
        entry = {
            "check": name,
            "passed": done[0] == 0,
            "exit_code": done[0],
            "seconds": round(time.monotonic() - begin, 1),
            "summary": done[1],
        }
        report["checks"].append(entry)
        write_json(options.results / "gpu_check.json", report)

    check("correctness", PYTEST, 420)
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer:
            command = [sanitizer, "--tool", tool, *SANITIZER, *PYTEST, *KERNELS_ONLY]
            check(tool, command, 300)
        else:
            print(f"== {tool}: skipped, compute-sanitizer is not on the PATH")
            report["checks"].append({"check": tool, "passed": None, "summary": "no sanitizer"})
    bench = [sys.executable, str(ROOT / "benchmarks" / "bench_kernels.py")]
    bench += ["--json", str(options.results / "kernels.json")]
    if options.peer:
        bench += ["--peer", str(options.peer)]
    if options.quick:
        bench += ["--shapes", "768x3072", "6144x2080"]
    check("benchmark", bench, 500)
    write_json(options.results / "gpu_check.json", report)
    for entry in report["checks"]:
        mark = {True: "passed", False: "FAILED", None: "skipped"}[entry["passed"]]
        print(f"{mark:8} {entry['check']:12} {entry.get('seconds', 0):6} s  {entry['summary']}")
    return int(any(entry["passed"] is False for entry in report["checks"]))


def _run(command: list[str], limit: int) -> tuple[int, str]:
    """Exit code and the last line, or what the sanitizer counted; prints all as it comes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    begin, lines = time.monotonic(), [""]
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
            if time.monotonic() - begin > limit:
                process.kill()
                return 124, f"stopped after {limit} s"
        code = process.wait()
    finally:
        process.stdout.close()
    counted = [
        line
        for line in lines
        if re.search(r"(ERROR|RACECHECK) SUMMARY|passed|failed|skipped in", line)
    ]
    if code == 0 and any("skipped" in line and "passed" not in line for line in counted):
        return 1, "every test was skipped"
    return code, "; ".join(counted[-2:]) or lines[-1]


if __name__ == "__main__":
    sys.exit(main())
