"""No thread of a product with stored codes touches what another one writes, as Helgrind sees it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = Path(__file__).with_name("race_program.py")
# What Valgrind knows, so that it finds in numba's cache what ran without it.
_FEATURES = (
    "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+lzcnt,+fma,+movbe,"
    "+cx16,+sahf,+f16c"
)


def _has_avx2():
    facts = Path("/proc/cpuinfo")
    return facts.exists() and " avx2 " in facts.read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="there is no valgrind")
@pytest.mark.skipif(not _has_avx2(), reason="no machine with AVX2")
def test_helgrind_finds_nothing_but_the_race_that_is_meant(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_PROGRAM.parent), *sys.path]),
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": _FEATURES,
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
        "JAX_PLATFORMS": "cpu",
    }
    (folder := tmp_path / "operands").mkdir()
    program = [sys.executable, str(_PROGRAM), str(folder)]
    checked = ["valgrind", "--tool=helgrind", "--smc-check=all-non-file", "--error-limit=no"]
    checked += ["--fair-sched=yes", f"--log-file={tmp_path / 'log'}", *program]
    for command in (program, checked):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = done.stdout.split()
        assert printed[:4] == ["multiplied", "lattice", "multiplied", "tunstall"]
    found = re.findall(
        r"data race during \w+ of size \d+ at 0x(\w+)", (tmp_path / "log").read_text()
    )
    assert {int(address, 16) for address in found} == {int(printed[-1])}
