"""Coverage-guided inputs for reader and decoders, by atheris (libFuzzer).

    pip install --editable '.[fuzz]'
    python tests/fuzz_coverage.py --target tensors --seconds 600
    python tests/fuzz_coverage.py --target checkpoints --seconds 600
    python tests/fuzz_coverage.py --target tensors --input FILE     # one input again

Not a test module, and nothing that tests need: without atheris it says so and stops. The loops that
numba compiles otherwise run as Python here, so that their branches are seen.

Two readers judge each input: ours, and the one that knows FORMAT.md alone. Both refuse it, or both
decode it to the same; ours by the reference decoder and, of one tensor for each coding, by XLA. All
else is a finding: libFuzzer writes the input to a file, which is to become a golden file.

`tensors`: a byte chooses a valid tensor, ours or a golden one, the bytes behind it are the contents
of its arrays. Only the array of codes has as many elements as there are bytes.
`checkpoints`: bytes are edits of the JSON files of a small checkpoint, and of the bytes of others.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

INSTRUMENTED = ("qmoe_jax.codec", "qmoe_jax.checkpoints", "independent_reader")
FOLDER = Path(__file__).parent / "golden" / "codec"


class Finding(AssertionError):
    """Readers that disagree, or one that fell over."""


# --- Tensors ---


class Tensors:
    """Contents of the arrays of valid tensors."""

    def __init__(self) -> None:
        """Find the valid tensors, and compile XLA's decoders of some."""
        import fuzz_codec
        import independent_reader
        import jax
        import test_codec_golden

        from qmoe_jax.codec import codings
        from qmoe_jax.codec.decode import decode_expert

        self._reader, self._codings = independent_reader, codings
        golden = [test_codec_golden.read(name)[0] for name in sorted(test_codec_golden.names())]
        self.tensors = [*fuzz_codec.valid_tensors(), *golden]
        self._decoders = {}
        for number, coded in enumerate(self.tensors):
            if coded.spec.coding not in {self.tensors[n].spec.coding for n in self._decoders}:
                decoder = jax.jit(functools.partial(decode_expert, coded.spec))
                self._decoders[number] = decoder

    def seeds(self) -> list[bytes]:
        """Every valid tensor as an input."""
        return [
            bytes([number]) + b"".join(array.tobytes() for array in self._ordered(number).values())
            for number in range(len(self.tensors))
        ]

    def _ordered(self, number: int) -> dict[str, np.ndarray]:
        """Arrays of fixed sizes first."""
        coded = self.tensors[number]
        last = self._codings.get_coding(coded.spec.coding).code_array
        names = sorted(coded.arrays, key=lambda name: (name == last, name))
        return {name: coded.arrays[name] for name in names}

    def __call__(self, data: bytes) -> None:
        """Judge an input."""
        from qmoe_jax.codec.tensor import CodedTensor
        from qmoe_jax.errors import CodecError

        if not data:
            return
        number, place = data[0] % len(self.tensors), 1
        valid = self.tensors[number]
        code_array = self._codings.get_coding(valid.spec.coding).code_array
        arrays: dict[str, np.ndarray] = {}
        for name, array in self._ordered(number).items():
            size, shape = array.nbytes, array.shape
            if name == code_array:
                size = (len(data) - place) // array.itemsize * array.itemsize
                shape = (size // array.itemsize,)
            content = data[place : place + size].ljust(size, b"\0")
            arrays[name] = np.frombuffer(content, array.dtype).reshape(shape)
            place += size
        coded = CodedTensor(valid.spec, arrays)
        codes = None
        try:
            self._codings.validate(coded)
            codes = self._codings.get_coding(valid.spec.coding).decode_numpy_reference(coded)
        except CodecError as error:
            ours = str(error)
        other = None
        try:
            other, _ = self._reader.read_tensor(valid.spec.to_json(), arrays)
        except self._reader.Refused as error:
            theirs = str(error)
        if (codes is None) != (other is None):
            who = f"ours refuses ({ours})" if codes is None else f"theirs refuses ({theirs})"
            raise Finding(f"tensor {number}, {valid.spec}: {who}, and the other reader does not")
        if codes is None:
            return
        if not np.array_equal(codes, other):
            raise Finding(f"tensor {number}, {valid.spec}: the readers decode to different codes")
        decoder = self._decoders.get(number)
        same_shapes = all(arrays[n].shape == a.shape for n, a in valid.arrays.items())
        if decoder is not None and same_shapes:
            for expert in range(valid.spec.num_experts):
                if not np.array_equal(np.asarray(decoder(arrays, expert)), codes[expert]):
                    raise Finding(f"tensor {number}, {valid.spec}: XLA decodes to other codes")


# --- Checkpoints ---

VALUES = (
    *(-1, 0, 1, 2, 3, 7, 255, 2**24 + 1, 2**31, 2**60, 2**63, 10**30, 2.0, 1e300, True, False),
    *(None, "", "uint8", "bfloat16", "packed2", "dense/packed", "coded/packed", "../x", "0" * 64),
    *([], {}, [0], [1, 2], [[1, "0" * 64]], {"id": "gzip", "level": 1}, float("nan")),
)


class Checkpoints:
    """Edits of a small checkpoint; some of its arrays are packed."""

    def __init__(self) -> None:
        """Write it."""
        import independent_reader
        from test_inspect import write

        from qmoe_jax.checkpoints import packed_arrays

        self._reader = independent_reader
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._root = tempfile.TemporaryDirectory(dir=shared)
        self.path = Path(self._root.name) / "checkpoint"
        most, packed_arrays.PACKED_BYTES = packed_arrays.PACKED_BYTES, 200
        try:
            write(self.path, "tunstall")
        finally:
            packed_arrays.PACKED_BYTES = most
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        self._files = {file: file.read_bytes() for file in files}
        is_json = [file for file in files if file.suffix == ".json" or file.name == ".zarray"]
        self._documents = {file: json.loads(self._files[file]) for file in is_json}
        # A manifest has most of what there is to edit.
        self._places = [
            (file, place)
            for file, document in self._documents.items()
            for place in _places(document, ())
        ]

    def close(self) -> None:
        """Delete the checkpoint."""
        self._root.cleanup()

    def seeds(self) -> list[bytes]:
        """Edits of every place, one each."""
        rng = np.random.default_rng(0)
        numbers = [n.to_bytes(2, "little") + rng.bytes(4) for n in range(len(self._places))]
        return [*numbers, b"\xff\xff\0\0\1\0", *(rng.bytes(6 * n) for n in range(1, 6))]

    def __call__(self, data: bytes) -> None:
        """Judge an input: six bytes an edit."""
        documents: dict[Path, Any] = {}
        changed: set[Path] = set()
        for start in range(0, min(len(data) - 5, 24), 6):
            self._edit(data[start : start + 6], documents, changed)
        for file, document in documents.items():
            file.write_text(json.dumps(document))
        try:
            self._judge({*changed, *documents})
        finally:
            for file in {*changed, *documents}:
                file.write_bytes(self._files[file])

    def _edit(self, data: bytes, documents: dict[Path, Any], changed: set[Path]) -> None:
        number, kind, value = int.from_bytes(data[:2], "little"), data[2], data[3]
        if number >= 2**15:  # the bytes of a file
            file = list(self._files)[min(value, len(self._files) - 1)]  # the manifest is the last
            content = file.read_bytes()
            at = int.from_bytes(data[4:6], "little") % (len(content) + 1)
            flipped = content[:at] + bytes([kind]) + content[at + 1 :]
            file.write_bytes(content[:at] if kind < 32 else flipped)
            changed.add(file)
            documents.pop(file, None)
            return
        file, place = self._places[number % len(self._places)]
        document = documents.setdefault(file, json.loads(self._files[file]))
        try:
            for key in place[:-1]:
                document = document[key]
            old = document[place[-1]]
        except (KeyError, IndexError, TypeError):
            return  # an edit before this one took the place away
        if isinstance(document, str):
            return  # or put a text there
        new = VALUES[value % len(VALUES)]
        if kind % 4 == 0:
            document[place[-1]] = new
        elif kind % 4 == 1 and isinstance(document, dict):
            del document[place[-1]]
        elif kind % 4 == 2 and isinstance(document, dict):
            document[str(new)] = old
        elif isinstance(old, int):
            document[place[-1]] = old + value - 128
        else:
            other, elsewhere = self._places[int.from_bytes(data[3:5], "little") % len(self._places)]
            copied = self._documents[other]
            for key in elsewhere:
                copied = copied[key]
            document[place[-1]] = json.loads(json.dumps(copied))

    def _has_contents(self, file: Path) -> bool:
        """Whether a file is a gzip stream that holds, but for its end, what it held before."""
        before = self._files[file]
        if before[:2] != b"\x1f\x8b":
            return False
        contents = zlib.decompress(before, 31)
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(31).decompress(file.read_bytes(), len(contents)) == contents
        return False

    def _judge(self, changed: set[Path]) -> None:
        from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
        from qmoe_jax.errors import CheckpointError, CodecError

        dense, ours, theirs = None, "", ""
        try:
            checkpoint = open_compressed_checkpoint(self.path)
            dense = checkpoint.read_dense()
            for name in checkpoint.specs:
                checkpoint.read_coded(name)
        except (CheckpointError, CodecError) as error:
            dense, ours = None, str(error)
        found = None
        try:
            found = self._reader.read_checkpoint(self.path)
        except self._reader.Refused as error:
            theirs = str(error)
        # Readers may understand more of zarr than the page says.
        free = any(file.name == ".zarray" for file in changed)
        # Or take the contents of a gzip stream whose end is damaged.
        free |= all(self._has_contents(file) for file in changed)
        if (dense is None) != (found is None) and not free:
            raise Finding(f"ours: {ours or 'accepted'}; theirs: {theirs or 'accepted'}")
        if dense is None or found is None:
            return
        for name, array in dense.items():
            if not np.array_equal(array.view(np.uint8), found[name].view(np.uint8)):
                raise Finding(f"the readers read different {name}")


def _places(document: Any, front: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found = []
    keys = document if isinstance(document, dict) else range(len(document))
    for key in keys:
        found.append((*front, key))
        if isinstance(document[key], dict | list):
            found += _places(document[key], (*front, key))
    return found


TARGETS: dict[str, Callable[[], Any]] = {"tensors": Tensors, "checkpoints": Checkpoints}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="tensors")
    parser.add_argument("--seconds", type=int, default=600, help="stop after so long (600)")
    parser.add_argument("--corpus", type=Path, help="folder of inputs, kept and added to")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--input", type=Path, help="run this input alone, without atheris")
    arguments = parser.parse_args()
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    if arguments.input:
        TARGETS[arguments.target]()(arguments.input.read_bytes())
        print("nothing found")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print(
            "SKIPPED: coverage-guided fuzzing. atheris is not installed: pip install atheris "
            "(Linux and macOS), then run this again.",
            file=sys.stderr,
        )
        return 0
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        target = TARGETS[arguments.target]()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    corpus = arguments.corpus or Path(tempfile.mkdtemp())
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds()
    for number, seed in enumerate(seeds):
        (corpus / f"seed_{number}").write_bytes(seed)
    options = {
        "max_total_time": arguments.seconds,
        "max_len": max(map(len, seeds)) + 64,
        "len_control": 0,
        "rss_limit_mb": 4000,
        "timeout": 120,
        "report_slow_units": 120,
        "print_final_stats": 1,
        "artifact_prefix": f"{arguments.findings}/{arguments.target}-",
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], target)
    try:
        atheris.Fuzz()
    finally:
        if arguments.corpus is None:
            shutil.rmtree(corpus, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
