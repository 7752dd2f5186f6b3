"""The CUDA sources compile with NVRTC for every architecture that is supported. Needs no GPU."""

import importlib.util
import sys

import pytest
from cuda_emulation import emulator
from markers import slow

_SPEC = importlib.util.spec_from_file_location("nvrtc", emulator.KERNEL_FOLDER / "nvrtc.py")
assert _SPEC is not None
assert _SPEC.loader is not None
nvrtc = sys.modules.setdefault("nvrtc", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(nvrtc)

pytestmark = pytest.mark.skipif(
    nvrtc.find_library() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc"
)

KERNELS = {
    "fused_tunstall.cu": {
        f"fused_tunstall_{t}_{r}" for t in ("t2", "t16") for r in ("rows1", "rows4")
    },
    "fused_tunstall_2bit.cu": {
        f"fused_tunstall_2bit_{t}_{r}" for t in ("t2", "t16") for r in ("rows1", "rows4")
    },
    "fused_qmoe.cu": {"fused_qmoe_t2", "fused_qmoe_t16"},
    "fused_packed2.cu": {"fused_packed2_t2", "fused_packed2_t16"},
    "fused_lattice.cu": {"fused_lattice_t2", "fused_lattice_t16"},
    "matmul_tunstall.cu": {f"matmul_tunstall_t{t}" for t in (8, 16, 32, 64)},
    "matmul_fragments.cu": {
        f"matmul_fragments_{grid}_t{t}" for grid in ("lattice", "ternary") for t in (8, 16, 32, 64)
    },
    "matmul_lattice.cu": {f"matmul_lattice_t{t}" for t in (8, 16, 32)},
    "expand.cu": {
        f"expand_{c}" for c in ("tunstall", "tunstall_2bit", "qmoe", "packed2", "lattice")
    },
    "encode.cu": {
        "encode_tunstall_sizes",
        "encode_tunstall_rows",
        "encode_packed2",
        "find_row_block_starts",
        "find_lattice_cursors",
    },
}


# The sources do not ask for the architecture: the oldest and a common one stand for all. What takes
# a quarter of a minute waits.
DEFAULT = [(s, a) for s in nvrtc.SOURCES for a in (75, 90) if (s, a) != ("fused_lattice.cu", 75)]
OTHERS = [(s, a) for s in nvrtc.SOURCES for a in (75, 80, 86, 89, 100) if (s, a) not in DEFAULT]


@pytest.mark.parametrize("case", [*DEFAULT, *slow(*OTHERS)], ids=str)
def test_compiles(case):
    source, architecture = case
    if architecture not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    cubin = nvrtc.compile_file(source, architecture)
    assert cubin.data[:4] == b"\x7fELF"
    assert set(cubin.resources) == KERNELS[source]
    for name, resources in cubin.resources.items():
        assert name.encode() in cubin.data
        # 256 threads must fit, two blocks of them: 65,536 registers a multiprocessor. Of the one
        # kernel whose blocks have 128 threads three.
        assert resources.registers <= (168 if "fragments" in name and name.endswith("t64") else 128)
        assert resources.spilled_bytes <= 64


def test_every_source_is_compiled_and_emulated():
    on_disk = {path.name for path in emulator.KERNEL_FOLDER.glob("*.cu")}
    assert on_disk == set(nvrtc.SOURCES) == set(emulator.SOURCES) == set(KERNELS)


def test_a_bad_source_is_refused_with_its_log():
    with pytest.raises(nvrtc.CompileError, match=r"broken\.cu.*sm_80(.|\n)*undefined"):
        nvrtc.compile_source("__global__ void f() { undefined_name(); }", 80, "broken.cu")
