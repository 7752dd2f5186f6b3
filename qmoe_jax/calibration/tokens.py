"""The token file: what calibration and evaluation read, without TensorFlow.

A token file is one `.npz` with four int32 arrays, one row per example, and a JSON header:

| array | shape | meaning |
| --- | --- | --- |
| `encoder_input_tokens` | [examples, inputs_length] | encoder ids, padded with 0 |
| `decoder_input_tokens` | [examples, targets_length] | targets shifted right, 0 where no target |
| `decoder_target_tokens` | [examples, targets_length] | ids to predict, padded with 0 |
| `decoder_loss_weights` | [examples, targets_length] | 1 where there is a target, else 0 |
| `header` | [num_bytes] uint8 | UTF-8 JSON: `TokenMetadata`, version, sha256 of the arrays |

The names are those of seqio's encoder-decoder features; the arrays equal what its packing converter
makes of examples that are alone in their row.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32

from qmoe_jax.atomic_file import open_atomically
from qmoe_jax.errors import TokensError

FORMAT = "qmoe_jax.tokens"
FORMAT_VERSION = 1
ARRAY_NAMES = (
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
)
PAD_ID = 0

_PREPARE = "qmoe-jax prepare-tokens"


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Examples in the shape that the model takes.

    Attributes:
      encoder_input_tokens: int32 [examples, inputs_length].
      decoder_input_tokens: int32 [examples, targets_length].
      decoder_target_tokens: int32 [examples, targets_length].
      decoder_loss_weights: int32 [examples, targets_length], 0 or 1.
      num_real: rows from here on are filler that makes the batch full: all ids and weights 0.
    """

    encoder_input_tokens: Int32[np.ndarray, "examples inputs_length"]
    decoder_input_tokens: Int32[np.ndarray, "examples targets_length"]
    decoder_target_tokens: Int32[np.ndarray, "examples targets_length"]
    decoder_loss_weights: Int32[np.ndarray, "examples targets_length"]
    num_real: int

    def __len__(self) -> int:
        return len(self.encoder_input_tokens)

    @property
    def num_target_tokens(self) -> int:
        """Targets that count in the loss."""
        return int(self.decoder_loss_weights.sum())

    def arrays(self) -> dict[str, Int32[np.ndarray, "_ _"]]:
        """Return the four arrays by name, in the order of `ARRAY_NAMES`."""
        return {name: getattr(self, name) for name in ARRAY_NAMES}


@dataclasses.dataclass(frozen=True)
class TokenMetadata:
    """Where tokens come from and how to read their ids.

    Attributes:
      task: name of the seqio task, or of whatever made the tokens.
      split: split of that task.
      vocabulary_size: number of ids that the vocabulary has; every id is below it.
      sentinel_first: lowest sentinel id (`<extra_id_99>` in T5's vocabularies).
      sentinel_count: ids in [sentinel_first, sentinel_first + sentinel_count) are sentinels.
      eos_id: end-of-sequence id.
      seed: seed of order and corruption.
      source: free text: files, versions, lengths, protocol.
    """

    task: str
    split: str
    vocabulary_size: int
    sentinel_first: int
    sentinel_count: int
    eos_id: int
    seed: int
    source: str

    def is_sentinel(self, ids: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Return true where an id is a sentinel: those positions stay out of Hessians."""
        return (ids >= self.sentinel_first) & (ids < self.sentinel_first + self.sentinel_count)


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """The contents of a token file: all its examples and their metadata."""

    tokens: TokenBatch
    metadata: TokenMetadata

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice) -> "TokenFile":
        """Return the examples of a slice, as views."""
        arrays = {name: array[index] for name, array in self.tokens.arrays().items()}
        num_examples = len(arrays["encoder_input_tokens"])
        return TokenFile(TokenBatch(**arrays, num_real=num_examples), self.metadata)

    def sha256(self) -> str:
        """Return the digest of the examples that runs record: of the arrays' bytes alone.

        The header of a token file has another, which covers their names and shapes too.
        """
        digest = hashlib.sha256()
        for array in self.tokens.arrays().values():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[TokenBatch]:
        """Yield batches of exactly `batch_size` rows, so that one compilation serves all.

        The last one is filled up with rows of padding and says by `num_real` how many are real.
        """
        if batch_size < 1:
            raise TokensError(f"batch_size is {batch_size}; a batch needs at least one example.")
        for start in range(0, len(self), batch_size):
            part = self[start : start + batch_size].tokens
            filler = ((0, batch_size - len(part)), (0, 0))
            arrays = {name: np.pad(array, filler) for name, array in part.arrays().items()}
            yield TokenBatch(**arrays, num_real=len(part))


def from_sequences(
    inputs: Sequence[Int[np.ndarray, "_"]],
    targets: Sequence[Int[np.ndarray, "_"]],
    *,
    inputs_length: int,
    targets_length: int,
) -> TokenBatch:
    """Pad token sequences (eos included, no padding) and derives the decoder's inputs.

    The decoder's inputs are the targets shifted right by one behind a 0; where the targets are
    padding they are 0 too, as in seqio's packed features.

    Raises:
      TokensError: no sequence, or one that is longer than its length: nothing is cut off.
    """
    if not inputs or len(inputs) != len(targets):
        raise TokensError(
            f"{len(inputs)} inputs and {len(targets)} targets; equal counts of at least 1 needed."
        )
    encoder = _pad("inputs", inputs, inputs_length)
    target = _pad("targets", targets, targets_length)
    weights = (target != PAD_ID).astype(np.int32)
    shifted = np.pad(target[:, :-1], ((0, 0), (1, 0))) * weights
    return TokenBatch(encoder, shifted, target, weights, num_real=len(encoder))


def write_tokens(path: str | os.PathLike[str], tokens: TokenBatch, metadata: TokenMetadata) -> None:
    """Write a token file, whole or not at all; equal contents give equal bytes.

    Raises:
      TokensError: no examples, filler rows, arrays that disagree, or ids outside the vocabulary.
      OSError: the file cannot be written.
    """
    path = Path(path)
    arrays = tokens.arrays()
    _check_arrays(arrays, path)
    _check_ids(arrays, metadata, path)
    if tokens.num_real != len(tokens):
        raise TokensError(
            f"{len(tokens) - tokens.num_real} of {len(tokens)} examples for {path} are filler; "
            "a token file holds real examples only: drop them."
        )
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "sha256": _digest(arrays),
        "metadata": dataclasses.asdict(metadata),
    }
    text = json.dumps(header, sort_keys=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        # pyright takes the arrays for savez's own flags.
        np.savez_compressed(file, header=np.frombuffer(text, np.uint8), **arrays)  # pyright: ignore[reportArgumentType]


def read_tokens(path: str | os.PathLike[str], *, num_embeddings: int | None = None) -> TokenFile:
    """Read and check a token file.

    Args:
      path: the file.
      num_embeddings: rows of the model's embedding; ids must be below it.

    Raises:
      TokensError: the file is missing, truncated, of another version, altered, empty, or made with
        another vocabulary than the model's.
    """
    path = Path(path)
    entries = _load(path)
    if "header" not in entries:
        raise TokensError(
            f"{path} has no header, only {sorted(entries)}; a token file is written by "
            f"`{_PREPARE}`. Plain arrays are read by `read_plain_tokens`."
        )
    try:
        header = json.loads(entries.pop("header").tobytes())
        found = (header["format"], header["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise TokensError(f"The header of {path} is damaged; write it anew by `{_PREPARE}`.") from (
            error
        )
    if found != (FORMAT, FORMAT_VERSION):
        raise TokensError(
            f"{path} is {found[0]!r} version {found[1]!r}; this program reads {FORMAT!r} version "
            f"{FORMAT_VERSION}. Write it anew by `{_PREPARE}`."
        )
    _check_arrays(entries, path)
    digest = _digest(entries)
    if digest != header.get("sha256"):
        raise TokensError(
            f"The arrays of {path} have sha256 {digest}, the header says {header.get('sha256')}; "
            f"the file was altered. Write it anew by `{_PREPARE}`."
        )
    try:
        metadata = TokenMetadata(**header["metadata"])
    except (KeyError, TypeError) as error:
        raise TokensError(
            f"The metadata of {path} are {header.get('metadata')!r}; needed are "
            f"{[field.name for field in dataclasses.fields(TokenMetadata)]}."
        ) from error
    return _checked_file(entries, metadata, path, num_embeddings)


def read_plain_tokens(
    path: str | os.PathLike[str],
    metadata: TokenMetadata,
    *,
    num_embeddings: int | None = None,
) -> TokenFile:
    """Read an `.npz` that has the four arrays and no header, of shape [..., length].

    Leading axes, such as [batches, batch], are flattened to one axis of examples. What the file
    does not say, the caller does in `metadata`.

    Raises:
      TokensError: as `read_tokens`.
    """
    path = Path(path)
    entries = _load(path)
    plain = {}
    for name in ARRAY_NAMES:
        if name in entries and entries[name].ndim >= 1 and entries[name].dtype.kind in "iu":
            array = entries[name]
            # Clipped, so that an id too wide for int32 is rejected as one and does not wrap.
            array = np.clip(array.reshape(-1, array.shape[-1]), -1, np.iinfo(np.int32).max)
            plain[name] = np.ascontiguousarray(array, np.int32)
    _check_arrays(plain, path)
    return _checked_file(plain, metadata, path, num_embeddings)


def _pad(name: str, sequences: Sequence[np.ndarray], length: int) -> np.ndarray:
    padded = np.full((len(sequences), length), PAD_ID, np.int32)
    for row, sequence in zip(padded, sequences, strict=True):
        if len(sequence) > length:
            raise TokensError(
                f"{name} of {len(sequence)} tokens do not fit {name}_length {length}; "
                f"raise {name}_length to at least {max(map(len, sequences))}."
            )
        row[: len(sequence)] = sequence
    return padded


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise TokensError(f"There is no token file {path}; write one by `{_PREPARE} --output`.")
    try:
        # Opened here, because np.load leaves a file that it cannot read open.
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise TokensError(
            f"{path} ({path.stat().st_size} bytes) is no complete .npz: {error}. It was truncated "
            f"or is something else; write it anew by `{_PREPARE}`."
        ) from error


def _check_arrays(arrays: dict[str, np.ndarray], path: Path) -> None:
    missing = [name for name in ARRAY_NAMES if name not in arrays]
    if missing:
        raise TokensError(
            f"{path} lacks integer arrays {missing}; it needs {list(ARRAY_NAMES)}. "
            f"Write it anew by `{_PREPARE}`."
        )
    shapes = {name: arrays[name].shape for name in ARRAY_NAMES}
    encoder, decoder = shapes[ARRAY_NAMES[0]], shapes[ARRAY_NAMES[1]]
    fits = (
        len(encoder) == len(decoder) == 2
        and encoder[0] == decoder[0]
        and all(shapes[name] == decoder for name in ARRAY_NAMES[1:])
        and all(arrays[name].dtype == np.int32 for name in ARRAY_NAMES)
    )
    if not fits:
        dtypes = {name: str(arrays[name].dtype) for name in ARRAY_NAMES}
        raise TokensError(
            f"{path} has shapes {shapes} and dtypes {dtypes}; needed is int32 with "
            "[examples, inputs_length] for the encoder and one [examples, targets_length] "
            "for the decoder."
        )
    if encoder[0] == 0:
        raise TokensError(
            f"{path} has no examples; at least one is needed. Write it anew by `{_PREPARE}`."
        )


def _check_ids(
    arrays: dict[str, np.ndarray],
    metadata: TokenMetadata,
    path: Path,
    num_embeddings: int | None = None,
) -> None:
    for name in ARRAY_NAMES[:3]:
        low, high = int(arrays[name].min()), int(arrays[name].max())
        if low < 0 or high >= metadata.vocabulary_size:
            raise TokensError(
                f"{name} of {path} has ids {low} to {high}; the vocabulary has 0 to "
                f"{metadata.vocabulary_size - 1}. Tokenise with the vocabulary that is named."
            )
        if num_embeddings is not None and high >= num_embeddings:
            raise TokensError(
                f"{name} of {path} has id {high}; the model has {num_embeddings} embeddings. The "
                "text was tokenised with another vocabulary: tokenise it with the model's."
            )
    weights = arrays["decoder_loss_weights"]
    if not np.isin(weights, (0, 1)).all():
        raise TokensError(f"decoder_loss_weights of {path} are not all 0 or 1; mark targets by 1.")


def _checked_file(
    arrays: dict[str, np.ndarray],
    metadata: TokenMetadata,
    path: Path,
    num_embeddings: int | None,
) -> TokenFile:
    _check_ids(arrays, metadata, path, num_embeddings)
    picked = {name: arrays[name] for name in ARRAY_NAMES}
    return TokenFile(TokenBatch(**picked, num_real=len(picked[ARRAY_NAMES[0]])), metadata)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """Return the sha256 of a token file's header: of names, shapes and little-endian contents."""
    digest = hashlib.sha256()
    for name in ARRAY_NAMES:
        array = arrays[name]
        digest.update(f"{name} {array.shape} int32\n".encode())
        digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()
