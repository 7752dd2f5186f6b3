"""Everything that needs a GPU, in parts of a few minutes, from a bare checkout: `make gpu-check`.

    python benchmarks/gpu_check.py [--only PART ...] [--results FOLDER] [--peer PATH]

Parts, in this order:

- correctness: tests/gpu (poisoned outputs, fresh random inputs, float64 references), and what goes
  through JAX once more with every launch in one of XLA's command buffers;
- sanitizers: the kernels' tests under compute-sanitizer's memcheck and racecheck, where it is on
  the PATH;
- fragments: bench_fragments.py, into fragments.json;
- generation: gpu_generation.py, into gpu_generation.json;
- kernels: bench_kernels.py, into kernels.json and kernels.md;
- tune: tune_kernels.py, which writes configs/kernel_launch.json. Only where --only names it.

After every part gpu_check.json is written anew; what a check prints goes into its own .log there.
A check that outlasts its limit is ended with all its children, also when it prints nothing.
Needs what a GPU machine has: Python 3.11 or newer, JAX, Flax, CuPy, numba, pytest and what JAX and
Flax bring. Exit code 0: all checks passed; 1: some failed; 2: there is no GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout will do

from qmoe_jax.atomic_file import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("correctness", "sanitizers", "fragments", "generation", "kernels", "tune")
# Without the repository's conftest.py, which needs beartype; another JAX's warnings are no errors.
PYTEST = [sys.executable, "-m", "pytest", "--confcutdir", str(ROOT / "tests" / "gpu"), "-q", "-rs"]
PYTEST += ["-W", "default", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
THROUGH_JAX = ["-k", "through_jax or mlp_in_a_loop or logits or graph"]
ALL_IN_GRAPHS = {"XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1"}
# The sanitizer slows kernels down a hundredfold, JAX's too: only tests that CuPy alone runs.
# racecheck has crashed on more than a few tests in one process: each of these has its own.
SANITIZED = (
    "test_damaged_codes",
    "test_damaged_fragments",
    "test_encoder",
    "test_kernels and 33",
    "test_kernels and 769",
    "test_tensor_cores and 1040",
    "test_tensor_cores and 768",
    "test_fragment_kernels and 31",
    "test_fragment_kernels and 1500",
    "test_ternary_fragment_kernels",
)
# CuPy and XLA probe for what a driver may lack: such calls are no fault of a kernel.
SANITIZER = ["--error-exitcode", "9", "--target-processes", "all", "--report-api-errors", "no"]
OUR_KERNELS = ("fused_", "matmul_", "expand_", "encode_", "find_")
TABLE_LINES = 60


class Check(NamedTuple):
    """A command of a part.

    Attributes:
      name: what it is called in the report.
      command: arguments.
      limit: seconds after which it is ended.
      environment: variables beside those there are.
    """

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str]


class Outcome(NamedTuple):
    """What a check came to.

    Attributes:
      exit_code: of the command; 124 where it was ended.
      summary: the lines that count, or the last.
      seconds: that it ran.
    """

    exit_code: int
    summary: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS[:-1], help="parts; default %(default)s"
    )
    parser.add_argument("--peer", type=Path, help="sub1_cuda_kernel.cu of QMoE, for the benchmark")
    parser.add_argument("--quick", action="store_true", help="two shapes of the benchmarks only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder; default %(default)s")
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), help="tests at a time (with xdist)"
    )
    parser.add_argument("--limit", type=int, help="seconds a check at most; default: its own")
    options = parser.parse_args()
    import gpu_bench

    gpu = gpu_bench.Gpu(gpu_bench.open_gpu("gpu_check"))
    options.results.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**gpu.facts(), "checks": []}
    parts = {
        "correctness": correctness(options.jobs),
        "sanitizers": sanitizers(shutil.which("compute-sanitizer")),
        "fragments": [fragments(options.results, options.quick)],
        "generation": [generation(options.results)],
        "kernels": [kernels(options.results, options.peer, options.quick)],
        "tune": [_script("tune", "tune_kernels.py", [], 450)],
    }
    for part in PARTS:
        if part not in options.only:
            continue
        if not parts[part]:
            report["checks"].append(
                {"check": part, "passed": None, "summary": "compute-sanitizer is not on the PATH"}
            )
        checks = [c._replace(limit=options.limit or c.limit) for c in parts[part]]
        for check, outcome in run_checks(checks, options.results):
            report["checks"].append(
                {
                    "check": check.name,
                    "passed": outcome.exit_code == 0,
                    "exit_code": outcome.exit_code,
                    "seconds": outcome.seconds,
                    "summary": outcome.summary,
                }
            )
        write_json(options.results / "gpu_check.json", report)
    print(table(report, options.results))
    return int(any(entry["passed"] is False for entry in report["checks"]))


def correctness(jobs: int) -> list[Check]:
    """The tests, several at a time where xdist is there, and those through JAX in graphs."""
    spread = ["-n", str(jobs)] if importlib.util.find_spec("xdist") else []
    return [
        Check("correctness", [*PYTEST, *spread], 400, {}),
        Check("command_buffers", [*PYTEST, *THROUGH_JAX], 400, ALL_IN_GRAPHS),
    ]


def sanitizers(program: str | None) -> list[Check]:
    """memcheck and racecheck of the project's kernels; none where there is no sanitizer."""
    if program is None:
        return []
    checks = []
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, *SANITIZER, *_kernel_filter(program), *PYTEST]
        if tool == "memcheck":
            tests = " or ".join(f"({chosen})" for chosen in SANITIZED)
            checks.append(Check(tool, [*command, "-k", tests], 420, {}))
        else:
            checks += [
                Check(f"{tool}_{number}", [*command, "-k", chosen], 420, {})
                for number, chosen in enumerate(SANITIZED)
            ]
    return checks


def _kernel_filter(program: str) -> list[str]:
    """Only kernels of these names; the option is spelt as this release has it, if at all."""
    said = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    for option in ("--kernel-name", "--kernel-regex"):
        if re.search(rf"{option}\b", said.stdout + said.stderr):
            return [part for name in OUR_KERNELS for part in (option, f"kernel_substring={name}")]
    return []


def fragments(results: Path, quick: bool) -> Check:
    """The benchmark of fragments."""
    arguments = ["--json", str(results / "fragments.json")]
    return _script("fragments", "bench_fragments.py", [*arguments, *_shapes(quick)], 450)


def generation(results: Path) -> Check:
    """The benchmark of generation, codes of the lattice."""
    arguments = ["--json", str(results / "gpu_generation.json")]
    return _script("generation", "gpu_generation.py", arguments, 450)


def _shapes(quick: bool) -> list[str]:
    return ["--shapes", "768x3072", "6144x2080"] if quick else []


def kernels(results: Path, peer: Path | None, quick: bool) -> Check:
    """The benchmark."""
    arguments = ["--json", str(results / "kernels.json")]
    if peer:
        arguments += ["--peer", str(peer)]
    return _script("kernels", "bench_kernels.py", [*arguments, *_shapes(quick)], 450)


def _script(name: str, script: str, arguments: list[str], limit: int) -> Check:
    return Check(name, [sys.executable, str(ROOT / "benchmarks" / script), *arguments], limit, {})


def run_checks(checks: Sequence[Check], results: Path) -> list[tuple[Check, Outcome]]:
    """Outcomes in order; the checks of a part run side by side (none that is timed has another)."""
    with ThreadPoolExecutor(max(1, len(checks))) as pool:
        outcomes = pool.map(lambda check: run_check(check, results), checks)
        return list(zip(checks, outcomes, strict=True))


def run_check(check: Check, results: Path) -> Outcome:
    """Run a command in a process group of its own, which ends with it or at its limit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log, begin = results / f"{check.name}.log", time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            check.command,
            cwd=ROOT,
            env=environment | check.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(check.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    seconds = round(time.monotonic() - begin, 1)
    if code is None:
        return Outcome(124, f"ended after {check.limit} s", seconds)
    said = log.read_text(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [""]
    counted = [
        line
        for line in lines
        if re.search(r"(ERROR|RACECHECK) SUMMARY|\d (passed|failed|skipped|errors?)\b", line)
    ]
    if code == 0 and any("skipped" in line and "passed" not in line for line in counted[-1:]):
        return Outcome(1, "every test was skipped", seconds)
    return Outcome(code, "; ".join(counted[-2:]) or lines[-1][:300], seconds)


def _end_group(process: subprocess.Popen[Any]) -> None:
    """End the process and its children, which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(report: dict[str, Any], results: Path) -> str:
    """What to read first: the checks, ends of what failed, and where the rest stands."""
    lines = [f"{report['device']}, CuPy {report['cupy']}, commit {report['commit']}"]
    for entry in report["checks"]:
        mark = {True: "passed", False: "FAILED", None: "skipped"}[entry["passed"]]
        seconds = entry.get("seconds", 0)
        lines.append(f"{mark:8} {entry['check']:16} {seconds:6} s  {entry['summary'][:120]}")
    for entry in report["checks"]:
        if entry["passed"] is False:
            said = (results / f"{entry['check']}.log").read_text(errors="replace").splitlines()
            lines += [f"-- the end of {entry['check']}:", *(line[:160] for line in said[-12:])]
    import bench_fragments
    import bench_kernels
    import gpu_generation

    summaries = {
        "fragments": ("fragments.json", bench_fragments.summary),
        "generation": ("gpu_generation.json", gpu_generation.summary),
        "kernels": ("kernels.json", bench_kernels.summary),
    }
    for part, (name, summary) in summaries.items():
        if (results / name).exists() and any(e["check"] == part for e in report["checks"]):
            # Of an ended run too: what it came to. But there may be those of an earlier one.
            figures = json.loads((results / name).read_text())
            if all(figures.get(fact) == report[fact] for fact in ("device", "commit")):
                lines += summary(figures)
    if len(lines) > TABLE_LINES:
        lines = [*lines[: TABLE_LINES - 1], f"... the rest stands in {results}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
