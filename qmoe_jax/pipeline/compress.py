"""`compress`: a native checkpoint to a compressed one, checked before work starts, resumable."""

import dataclasses
import hashlib
import os
import time
from typing import Any

import jax

import qmoe_jax
from qmoe_jax.calibration.tokens import TokenFile, read_tokens
from qmoe_jax.checkpoints.compressed import CompressedCheckpointWriter
from qmoe_jax.checkpoints.config import SwitchConfig
from qmoe_jax.checkpoints.t5x import T5XCheckpoint, open_t5x_checkpoint
from qmoe_jax.errors import TokensError
from qmoe_jax.pipeline.block_loop import BlockLoop
from qmoe_jax.pipeline.journal import Journal
from qmoe_jax.pipeline.report import CompressionReport
from qmoe_jax.pipeline.samples import Samples
from qmoe_jax.pipeline.settings import CompressionSettings

PathLike = str | os.PathLike[str]


def compress(
    checkpoint: PathLike,
    output: PathLike,
    tokens: PathLike | TokenFile | None = None,
    *,
    validation_tokens: PathLike | TokenFile | None = None,
    num_examples: int | None = None,
    overwrite: bool = False,
    buffer_dir: PathLike | None = None,
    progress: bool = True,
    settings: CompressionSettings | None = None,
    **changes: Any,
) -> CompressionReport:
    """Compresses the experts of a native T5X Switch checkpoint.

    A run that was stopped, by whatever, goes on where it was when it is called again with the same
    arguments, and ends with the same bytes as an undisturbed one. Until then its work is in
    `<output>.partial` (local outputs only; a run to gs:// starts anew).

    Args:
      checkpoint: the native checkpoint, local or gs://.
      output: where the compressed checkpoint goes; it appears there only when it is whole.
      tokens: calibration examples (a token file of `qmoe_jax.prepare_tokens`); needed for GPTQ.
        With method="rtn" they may be left out; then no layer error is reported.
      validation_tokens: examples that flow along and give a loss through the compressed experts;
        they never enter a Hessian and change nothing of the output.
      num_examples: use this many calibration examples; all where None.
      overwrite: replace an existing output, and throw away an unfinished run with other settings.
      buffer_dir: folder for memory-mapped hidden states; in memory where None.
      progress: show progress bars.
      settings: how to compress; the paper's ternary GPTQ where None.
      **changes: single fields of `pipeline.settings.CompressionSettings`, as `grid="2bit"`.

    Returns:
      A report per kernel and in total.

    Raises:
      CheckpointError: the input is no readable Switch checkpoint; the output exists, cannot be
        written, or is being written; or it holds an unfinished run with other settings.
      TokensError: the tokens are unreadable, absent where needed, or of another vocabulary.
      ValueError: a setting out of its range.
    """
    started = time.monotonic()
    chosen = dataclasses.replace(settings or CompressionSettings(), **changes)
    if tokens is None and chosen.method == "gptq":
        raise TokensError(
            'method="gptq" needs calibration tokens; pass tokens=, made by '
            '`python -m qmoe_jax.prepare_tokens`, or use method="rtn"'
        )
    if tokens is None and validation_tokens is not None:
        raise TokensError("validation_tokens without tokens; pass both, or evaluate the output")
    source = open_t5x_checkpoint(checkpoint)
    config = SwitchConfig.from_checkpoint(source)
    calibration = None
    samples = None
    if tokens is not None:
        calibration = _load_tokens(tokens, config)[slice(num_examples)]
        samples = Samples.build(
            calibration,
            None if validation_tokens is None else _load_tokens(validation_tokens, config),
            premask_sentinels=chosen.premask_sentinels,
        )
    described = _describe(calibration)
    writer = CompressedCheckpointWriter(output, overwrite=overwrite)
    journal = None
    try:
        if writer.work_folder is not None:
            run = _determining_facts(source, config, chosen, described)
            journal = Journal(writer.work_folder, run, discard=overwrite)
            if progress and len(journal):
                print(f"Resuming: {len(journal)} finished expert batches are there already.")
        loop = BlockLoop(source, config, chosen, samples, writer, journal, buffer_dir, progress)
        report = loop.all_layers(os.fspath(output))
        report.num_replayed = 0 if journal is None else journal.num_replayed
        writer.finish(config, {"settings": chosen.to_json(), "tokens": described})
    finally:
        if journal is not None:
            journal.close()
    report.seconds = time.monotonic() - started
    return report


def _load_tokens(tokens: PathLike | TokenFile, config: SwitchConfig) -> TokenFile:
    if isinstance(tokens, TokenFile):
        return tokens
    return read_tokens(tokens, num_embeddings=config.num_embeddings)


def _describe(calibration: TokenFile | None) -> dict[str, Any] | None:
    """What the manifest says of the calibration data."""
    if calibration is None:
        return None
    digest = hashlib.sha256()
    for array in calibration.tokens.arrays().values():
        digest.update(array.tobytes())
    return {
        "num_examples": len(calibration),
        "sha256": digest.hexdigest(),
        "metadata": dataclasses.asdict(calibration.metadata),
    }


def _determining_facts(
    source: T5XCheckpoint,
    config: SwitchConfig,
    settings: CompressionSettings,
    tokens: dict[str, Any] | None,
) -> dict[str, Any]:
    """What determines the output to the bit: a run that differs in any of it cannot be resumed."""
    return {
        "checkpoint": {
            "url": source.url,
            "step": source.step,
            "dtypes": {name: dtype.name for name, dtype in source.dtypes.items()},
        },
        "config": config.to_json(),
        "settings": settings.to_json(),
        "tokens": tokens,
        "versions": {"qmoe_jax": qmoe_jax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
