"""The reader by FORMAT.md alone agrees with ours: golden files, whole checkpoints."""

import gzip
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from factories import CALIBRATION, TERNARY
from independent_reader import DTYPES, Refused
from test_inspect import write

import qmoe_jax
from qmoe_jax.checkpoints import names, packed_arrays
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.codec.codings import coding_names, validate
from qmoe_jax.codec.decode import decode_expert_weights
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CheckpointError, CodecError
from qmoe_jax.models.load import dequantized

FOLDER = Path(__file__).parent / "golden" / "codec"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
BROKEN = [name for name in NAMES if name.startswith("broken_")]


def read(name):
    """Spec, arrays and, of a valid file, codes."""
    stored = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    arrays = {
        key: np.frombuffer(bytes.fromhex(array["bytes"]), DTYPES[array["dtype"]]).reshape(
            array["shape"]
        )
        for key, array in stored["arrays"].items()
    }
    codes = np.array([[int(code) for code in row] for row in stored.get("codes", [])])
    return stored["spec"], arrays, codes


def our_weights(spec, arrays):
    coded = CodedTensor(TensorSpec.from_json(spec), arrays)
    validate(coded)
    weights = np.zeros((spec["num_experts"], spec["out_features"], spec["in_features"]), np.float32)
    for expert in range(len(weights)):
        weights[expert] = decode_expert_weights(coded.spec, arrays, expert, np.float32)
    return weights


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BROKEN])
def test_valid(name):
    spec, arrays, stored = read(name)
    codes, weights = independent_reader.read_tensor(spec, arrays)
    np.testing.assert_array_equal(codes.reshape(stored.shape), stored)
    np.testing.assert_array_equal(weights, our_weights(spec, arrays))


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name):
    spec, arrays, _ = read(name)
    with pytest.raises(Refused):
        independent_reader.read_tensor(spec, arrays)


def test_it_stands_alone():
    text = Path(independent_reader.__file__).read_text("utf-8")
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    assert imported <= sys.stdlib_module_names | {"numpy", "ml_dtypes"}


def assert_same_parameters(path):
    """Ours, and the independent reader's."""
    _, dense = dequantized(*qmoe_jax.load_switch(path))
    ours = names.flatten(dense["params"])
    found = independent_reader.read_checkpoint(path)
    assert found.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), np.float32(array), name)


@pytest.mark.parametrize("coding", coding_names())
def test_checkpoints(tmp_path, coding):
    write(tmp_path / "out", coding)
    assert_same_parameters(tmp_path / "out")


def test_a_compressed_model(gptq):
    assert_same_parameters(gptq[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": "lattice", "step": 3.0},
        {"grid": "2bit", "group_size": 32},
        {"expert_coding": "qmoe", "skip": "encoder", "dense_dtype": "source"},
    ],
    ids=["lattice", "groups", "dense experts"],
)
def test_settings(base, tmp_path, settings):
    qmoe_jax.compress(
        base, tmp_path / "out", CALIBRATION[:8], **TERNARY | {"method": "rtn"} | settings
    )
    assert_same_parameters(tmp_path / "out")


# --- Damaged checkpoints ---

WI = "encoder/layers_1/mlp/expert/wi"
NORM = "encoder/encoder_norm/scale"
OTHER = "decoder/layers_1/mlp/expert/wi"
WORDS = ("coded", WI, "arrays", "words")
WORDS_FILE = f"coded/{WI.replace('/', '.')}/words"
NORM_FILE = f"dense/{NORM.replace('/', '.')}"


def edit(*path, to):
    """Set a value of the manifest; what `to` returns for it, if it is a function."""

    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to(place[path[-1]]) if callable(to) else to
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def drop(*path):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        place = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def rewrite(file, to):
    """Set a file's contents; what `to` returns for them."""
    return lambda folder: (folder / file).write_bytes(to((folder / file).read_bytes()))


def twice(content):
    return content.replace(b'"format":', b'"format": "qmoe_jax", "format":', 1)


def other_metadata(**values):
    return lambda content: json.dumps(json.loads(content) | values).encode()


def in_compression(value):
    """Put JSON that json.dumps would not write in the place of `compression`."""

    def change(content):
        manifest = json.loads(content)
        return json.dumps(manifest | {"compression": "HERE"}).encode().replace(b'"HERE"', value)

    return rewrite("manifest.json", change)


def two_streams(content):
    data = gzip.decompress(content)
    return gzip.compress(data[:10]) + gzip.compress(data[10:])


def flip(content):
    return content[:7] + bytes([content[7] ^ 1]) + content[8:]


def embeddings_without_end(folder):
    """Fewer than 2^60 elements, but not so few bytes."""
    edit("config", "num_embeddings", to=2**54)(folder)
    edit("dense", "token_embedder/embedding", "shape", to=[2**54, 48])(folder)
    edit("dense", "token_embedder/embedding", "checksums", to=[[2**54, "0" * 64]])(folder)


def no_pack(folder):
    shutil.rmtree(folder / "coded/packed")


def longer_pack(folder):
    """Chunks of 2^25 bytes, which is above the limit; no such byte is read."""
    metadata = other_metadata(shape=[2**25], chunks=[2**25])
    rewrite("coded/packed/.zarray", metadata)(folder)
    rewrite("coded/packed/0", lambda content: content.ljust(2**25, b"\0"))(folder)


def swapped_places(folder):
    """Two arrays of one size take each other's place."""
    manifest = json.loads((folder / "manifest.json").read_text())
    arrays = manifest["coded"][WI]["arrays"]
    arrays["dictionaries"] = manifest["coded"][OTHER]["arrays"]["dictionaries"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


PACK_DAMAGE = {
    "start": edit(*WORDS, "start", to=lambda start: start + 4),
    "start as a fraction": edit(*WORDS, "start", to=float),
    "start below 0": edit("dense", "decoder/decoder_norm/scale", "start", to=-2),
    "start that is true": edit("dense", NORM, "start", to=True),
    "no start": drop(*WORDS, "start"),
    "places exchanged": swapped_places,
    "file": edit(*WORDS, "file", to=WORDS_FILE),
    "the other pack": edit(*WORDS, "file", to="dense/packed"),
    "the other pack for dense ones": edit("dense", NORM, "file", to="coded/packed"),
    "a pack of objects": edit("dense", NORM, "dtype", to="object"),
    "a checksum": edit(*WORDS, "checksums", 0, 1, to="0" * 64),
    "a pack without end": edit("dense", NORM, "shape", to=[2**62]),
    "bytes without end": embeddings_without_end,
    "no pack": no_pack,
    "no chunk": lambda folder: (folder / "coded/packed/0").unlink(),
    "no metadata": lambda folder: (folder / "coded/packed/.zarray").unlink(),
    "a short pack": rewrite(
        "coded/packed/.zarray", lambda content: json.dumps(shorter(json.loads(content))).encode()
    ),
    "two axes": rewrite("coded/packed/.zarray", other_metadata(shape=[9, 9], chunks=[9, 9])),
    "words as elements": rewrite("coded/packed/.zarray", other_metadata(dtype="<u2")),
    "chunks above the limit": longer_pack,
    "a chunk too short": rewrite("coded/packed/0", lambda content: content[:-1]),
    "a flipped bit": rewrite("coded/packed/0", flip),
    "a compressed chunk that is none": rewrite("dense/packed/0", lambda content: bytes(96)),
}
DAMAGE = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "truncated": rewrite("manifest.json", lambda content: content[:-9]),
    "UTF-16": rewrite("manifest.json", lambda content: content.decode().encode("utf-16")),
    "byte order mark": rewrite("manifest.json", lambda content: b"\xef\xbb\xbf" + content),
    "a list": rewrite("manifest.json", lambda content: b"[" + content + b"]"),
    "a key twice": rewrite("manifest.json", twice),
    "a key twice in compression": in_compression(b'{"a": 1, "a": 1}'),
    "NaN": edit("config", "train_capacity_factor", to=float("nan")),
    "Infinity in compression": in_compression(b'{"a": -Infinity}'),
    "a number beyond binary64": in_compression(b'{"a": 1e400}'),
    "format": edit("format", to="qmoe"),
    "version": edit("format_version", to=1),
    "version as a fraction": edit("format_version", to=2.0),
    "another key": edit("more", to=1),
    "no compression": drop("compression"),
    "compression as a list": edit("compression", to=[]),
    "dense as a list": edit("dense", to=[]),
    "coded as null": edit("coded", to=None),
    "a config of more layers": edit("config", "num_encoder_layers", to=3),
    "a config of 10^15 layers": edit("config", "num_encoder_layers", to=10**15),
    "a config without a field": drop("config", "tied_logits"),
    "a config of more": edit("config", "dropout_rate", to=0.1),
    "true for a number": edit("config", "num_heads", to=True),
    "a number below 0": edit("config", "min_expert_capacity", to=-1),
    "a number of 2^63": edit("config", "max_group_size", to=2**63),
    "a capacity of 10^400": edit("config", "eval_capacity_factor", to=10**400),
    "a sparse layer of 2^63": edit("config", "encoder_sparse_layers", to=[1, 2**63]),
    "a capacity that is text": edit("config", "eval_capacity_factor", to="2.0"),
    "a capacity that is true": edit("config", "train_capacity_factor", to=True),
    "no train capacity": edit("config", "train_capacity_factor", to=None),
    "a number for a boolean": edit("config", "tied_logits", to=1),
    "sparse layers fall": edit("config", "encoder_sparse_layers", to=[1, 0]),
    "a sparse layer twice": edit("config", "encoder_sparse_layers", to=[1, 1]),
    "a sparse layer beyond the last": edit("config", "encoder_sparse_layers", to=[1, 2]),
    "sparse layers as a number": edit("config", "encoder_sparse_layers", to=1),
    "three activations": edit("config", "mlp_activations", to=["relu"] * 3),
    "no activation": edit("config", "mlp_activations", to=[]),
    "an activation without name": edit("config", "mlp_activations", to=[3]),
    "activations as text": edit("config", "mlp_activations", to="relu"),
    "no kernel": drop("coded", WI),
    "no norm": drop("dense", NORM),
    "another norm": edit("dense", to=lambda dense: dense | {"encoder/more": dense[NORM]}),
    "a kernel twice": edit("dense", to=lambda dense: dense | {f"{WI}/kernel": dense[NORM]}),
    "a norm of another shape": edit("dense", NORM, "shape", to=[48, 1]),
    "a kernel of more": edit("coded", WI, "scale", to=1.0),
    "a kernel without spec": drop("coded", WI, "spec"),
    "arrays as a list": edit("coded", WI, "arrays", to=[]),
    "an array of more": edit("coded", WI, "arrays", to=lambda a: a | {"more": a["words"]}),
    "a description of more": edit(*WORDS, "compressor", to="gzip"),
    "a description without dtype": drop(*WORDS, "dtype"),
    "a description as text": edit("dense", NORM, to="float32"),
    "coding": edit("coded", WI, "spec", "coding", to="lz4"),
    "width": edit("coded", WI, "spec", "in_features", to=10**12),
    "experts": edit("coded", WI, "spec", "num_experts", to=4),
    "groups that do not fit": edit("coded", WI, "spec", "in_features", to=7),
    "a spec of more": edit("coded", WI, "spec", to=lambda spec: spec | {"more": 0}),
    "a bound too high": edit("coded", WI, "spec", "max_row_codewords", to=161),
    "no array": drop(*WORDS),
    "file": edit(*WORDS, "file", to="../words"),
    "dtype": edit(*WORDS, "dtype", to="int32"),
    "dtype that is none": edit("dense", NORM, "dtype", to="object"),
    "shape": edit(*WORDS, "shape", to=lambda shape: [shape[0] - 1]),
    "shape without end": edit(*WORDS, "shape", to=[2**62]),
    "checksum": edit(*WORDS, "checksums", 0, 1, to="0" * 64),
    "checksum that is none": edit(*WORDS, "checksums", 0, 1, to="0" * 63),
    "checksum in capitals": edit(*WORDS, "checksums", 0, 1, to=lambda digits: digits.upper()),
    "checksum as a number": edit(*WORDS, "checksums", 0, 1, to=7),
    "a checksum of three": edit(*WORDS, "checksums", 0, to=lambda pair: [*pair, 0]),
    "checksums as an object": edit(*WORDS, "checksums", to={}),
    "a stop below 0": edit(*WORDS, "checksums", to=lambda all: [[-1, "0" * 64], *all]),
    "stops that do not rise": edit(*WORDS, "checksums", to=lambda all: [*all, *all]),
    "a stop that is a fraction": edit(*WORDS, "checksums", 0, 0, to=float),
    "a size that is true": edit("dense", NORM, "shape", to=[True]),
    "a size below 0": edit(*WORDS, "shape", to=[-1]),
    "checksum of less": edit(*WORDS, "checksums", 0, 0, to=lambda stop: stop - 1),
    "no checksum": edit(*WORDS, "checksums", to=[]),
    "a flipped bit": rewrite(f"{WORDS_FILE}/0", flip),
    "a chunk too short": rewrite(f"{WORDS_FILE}/0", lambda content: content[:-1]),
    "a chunk too long": rewrite(f"{WORDS_FILE}/0", lambda content: content + b"\0"),
    "no chunk": lambda folder: (folder / WORDS_FILE / "0").unlink(),
    "no metadata": lambda folder: (folder / WORDS_FILE / ".zarray").unlink(),
    "metadata that are no JSON": rewrite(f"{WORDS_FILE}/.zarray", lambda content: content[1:]),
    "metadata of zarr 3": rewrite(f"{WORDS_FILE}/.zarray", other_metadata(zarr_format=3)),
    "chunks of two axes": rewrite(f"{WORDS_FILE}/.zarray", other_metadata(chunks=[9, 9])),
    "chunks as a number": rewrite(f"{WORDS_FILE}/.zarray", other_metadata(chunks=9)),
    "metadata of another shape": rewrite(f"{WORDS_FILE}/.zarray", other_metadata(shape=[1])),
    "metadata of another dtype": rewrite(f"{WORDS_FILE}/.zarray", other_metadata(dtype="<i4")),
    "chunks of 0": rewrite(f"{WORDS_FILE}/.zarray", other_metadata(chunks=[0])),
    "chunks without end": rewrite(f"{WORDS_FILE}/.zarray", other_metadata(chunks=[2**40])),
    "compressed chunks without end": rewrite(
        f"{NORM_FILE}/.zarray", other_metadata(chunks=[2**62])
    ),
    "chunks larger than the array": rewrite(f"{NORM_FILE}/.zarray", other_metadata(chunks=[49])),
    "a compressed chunk that is none": rewrite(f"{NORM_FILE}/0", lambda content: bytes(96)),
    "a compressed chunk too short": rewrite(
        f"{NORM_FILE}/0", lambda content: gzip.compress(gzip.decompress(content)[:-2])
    ),
    "a compressed chunk too long": rewrite(
        f"{NORM_FILE}/0", lambda content: gzip.compress(gzip.decompress(content) + b"\0")
    ),
    "another value": rewrite(
        f"{NORM_FILE}/0",
        lambda content: gzip.compress(b"\0" + gzip.decompress(content)[1:]),
    ),
}


# What is in the files is right all the same.
MAY_BE_REFUSED = {
    "a gzip stream without its end": rewrite(f"{NORM_FILE}/0", lambda content: content[:-9]),
    "bytes behind a gzip stream": rewrite(f"{NORM_FILE}/0", lambda content: content + b"mine"),
    "zeros behind a gzip stream": rewrite(f"{NORM_FILE}/0", lambda content: content + bytes(4)),
    "two gzip streams": rewrite(f"{NORM_FILE}/0", two_streams),
    "a gzip stream with a wrong CRC": rewrite(
        f"{NORM_FILE}/0", lambda content: content[:-8] + b"\1" + content[-7:]
    ),
    "another separator": rewrite(f"{NORM_FILE}/.zarray", other_metadata(dimension_separator="/")),
    "another order": rewrite(f"{NORM_FILE}/.zarray", other_metadata(order="F")),
    "a value to fill with": rewrite(f"{NORM_FILE}/.zarray", other_metadata(fill_value=0)),
    "an unknown key": rewrite(f"{NORM_FILE}/.zarray", other_metadata(more=1)),
}


def shorter(metadata):
    return metadata | {"shape": [metadata["shape"][0] - 1], "chunks": [metadata["chunks"][0] - 1]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every array in a folder of its own."""
    path = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_arrays, "PACKED_BYTES", 0)
        write(path, "tunstall")
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "out"
    write(path, "tunstall")
    return path


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(small, tmp_path, case):
    """Both readers refuse it."""
    path = shutil.copytree(small, tmp_path / "copy")
    DAMAGE[case](path)
    with pytest.raises(Refused):
        independent_reader.read_checkpoint(path)
    with pytest.raises((CheckpointError, CodecError)):
        qmoe_jax.load_switch(path)


@pytest.mark.parametrize("case", MAY_BE_REFUSED)
def test_what_may_be_refused(small, tmp_path, case):
    """Each reader refuses it, or reads the right values."""
    path = shutil.copytree(small, tmp_path / "copy")
    MAY_BE_REFUSED[case](path)
    expected = independent_reader.read_checkpoint(small)[NORM]
    for read_norm, refused in (
        (lambda: independent_reader.read_checkpoint(path)[NORM], Refused),
        (lambda: open_compressed_checkpoint(path).read_dense([NORM])[NORM], CheckpointError),
    ):
        try:
            found = read_norm()
        except refused:
            continue
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", PACK_DAMAGE)
def test_damage_of_packed_arrays(packed, tmp_path, case):
    """Both readers refuse it."""
    path = shutil.copytree(packed, tmp_path / "copy")
    PACK_DAMAGE[case](path)
    with pytest.raises(Refused):
        independent_reader.read_checkpoint(path)
    with pytest.raises((CheckpointError, CodecError)):
        qmoe_jax.load_switch(path)


def test_packed_or_not(small, packed, tmp_path):
    """The same parameters; some packed and some not; a pack in other chunks, and longer."""
    assert {file.name for file in packed.iterdir()} == {"manifest.json", "dense", "coded"}
    for part in ("dense", "coded"):
        assert [file.name for file in (packed / part).iterdir()] == ["packed"]
    expected = independent_reader.read_checkpoint(small)
    mixed = tmp_path / "mixed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_arrays, "PACKED_BYTES", 200)
        patch.setattr(packed_arrays, "PACK_CHUNK_BYTES", 64)
        write(mixed, "tunstall")
    assert len(list((mixed / "coded/packed").iterdir())) > 2
    assert (mixed / WORDS_FILE).exists()
    longer = shutil.copytree(packed, tmp_path / "longer")
    content = (longer / "coded/packed/0").read_bytes()
    size = len(content) + 5
    (longer / "coded/packed/0").write_bytes(gzip.compress(content + b"mine\0"))
    metadata = other_metadata(shape=[size], chunks=[size], compressor={"id": "gzip", "level": 9})
    rewrite("coded/packed/.zarray", metadata)(longer)
    for path in (packed, mixed, longer):
        assert_same_parameters(path)
        found = independent_reader.read_checkpoint(path)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], name)


def parts_of(path):
    """Checksums of two experts, behind one of none."""
    content = (path / f"{WORDS_FILE}/../row_lengths/0.0").resolve().read_bytes()
    middle = 2 * len(content) // 3
    parts = {0: b"", 2: content[:middle], 3: content[middle:]}
    return [[stop, hashlib.sha256(part).hexdigest()] for stop, part in parts.items()]


def test_what_readers_must_accept(small, tmp_path):
    """Other chunks, gzip for any array, files of others, any key order, anything in compression."""
    path = shutil.copytree(small, tmp_path / "copy")
    folder = path / WORDS_FILE
    words = np.frombuffer((folder / "0").read_bytes(), "<u4")
    size = words.size // 2 + 1
    second = np.append(words[size:], np.full(2 * size - words.size, 7, "<u4"))
    for name, part in (("0", words[:size]), ("1", second)):
        (folder / name).write_bytes(gzip.compress(part.astype("<u4").tobytes(), 9))
    metadata = other_metadata(chunks=[size], compressor={"id": "gzip", "level": 9})
    rewrite(f"{WORDS_FILE}/.zarray", metadata)(path)
    (path / "README").write_text("mine")
    edit("compression", to={"anything": [None, {"a": 1.5, "ä": "\u0000"}]})(path)
    edit("config", "eval_capacity_factor", to=None)(path)
    edit("config", "train_capacity_factor", to=2)(path)
    edit("coded", WI, "arrays", "row_lengths", "checksums", to=parts_of(path))(path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(dict(reversed(manifest.items()))))
    assert_same_parameters(path)
    expected = independent_reader.read_checkpoint(small)
    for name, array in independent_reader.read_checkpoint(path).items():
        np.testing.assert_array_equal(array, expected[name], name)
