"""The QMoE paper's kernel, compiled from a copy of its source that the user names.

Of `sub1_cuda_kernel.cu` only the kernel is taken; launch sizes are those of its own table. Nothing
of it is kept here.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# (out, in): rows of a block, warps of a block, as its dispatch has them.
LAUNCHES = {
    (768, 3072): (10, 10),
    (3072, 768): (38, 32),
    (1024, 4096): (13, 13),
    (4096, 1024): (50, 32),
    (2080, 6144): (26, 26),
    (6144, 2080): (75, 32),
}


class PaperKernel:
    """Products of one token and one expert, codes of the coding "qmoe".

    Raises:
      ValueError: the source is not the one that is meant, or does not compile.
    """

    def __init__(self, cupy: Any, path: Path):
        text = path.read_text()
        begin = [at for at in range(len(text)) if text.startswith("template <", at)]
        end = text.find("// The efficiency of packing")
        if len(begin) < 2 or end < 0 or "Sub1MatVec" not in text:
            raise ValueError(f"{path} is not the sub1_cuda_kernel.cu of QMoE")
        code = "#include <cuda_bf16.h>\ntypedef unsigned short ushort;\n" + text[begin[1] : end]
        names = {shape: f"Sub1MatVec<{r}, {w}, {shape[0]}, {shape[1]}>"
                 for shape, (r, w) in LAUNCHES.items()}  # fmt: skip
        options = tuple(f"-I{folder}" for folder in _header_folders())
        module = cupy.RawModule(
            code=code, options=("-std=c++17", *options), name_expressions=tuple(names.values())
        )
        try:
            self._kernels = {shape: module.get_function(name) for shape, name in names.items()}
            self.shapes = tuple(names)
        except cupy.cuda.compiler.CompileException as error:
            raise ValueError(f"{path} does not compile: {error}") from error

    def launch(
        self, shape: tuple[int, int], table: Any, codes: Any, offsets: Any, levels: Any,
        x: int, y: int,
    ) -> Callable[[], None]:  # fmt: skip
        """A product. Arguments are addresses; it adds to y, bfloat16 [out]."""
        rows, warps = LAUNCHES[shape]
        pointers = [np.uintp(p) for p in (table, codes, offsets, levels, x, y)]
        grid, block = (-(-shape[0] // rows),), (32 * warps,)
        return lambda: self._kernels[shape](grid, block, pointers)


def _header_folders() -> Iterator[Path]:
    """Where cuda_bf16.h lies: the toolkit, or NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = [path for folder in wheels for path in sorted(folder.glob("*/include"))]
    for folder in (Path("/usr/local/cuda/include"), *found):
        if (folder / "cuda_bf16.h").exists():
            yield folder
            return
