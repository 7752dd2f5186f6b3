"""`compress`: a native checkpoint to a compressed one, checked before work starts, resumable."""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import qmoe_jax
from qmoe_jax.calibration.tokens import TokenFile, read_tokens
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.manifest import FORMAT_VERSION
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import T5XCheckpoint, open_t5x_checkpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.evaluation.divergence import DivergenceReport, measure_divergence
from qmoe_jax.evaluation.metrics import LossReport, evaluate_loss
from qmoe_jax.models.load import load_switch
from qmoe_jax.ops.products import check_choice
from qmoe_jax.outputs import check_is_no_input, check_writable
from qmoe_jax.paths import local_path
from qmoe_jax.pipeline.allocation import allocate, measure_probes
from qmoe_jax.pipeline.bit_budget import target_bits
from qmoe_jax.pipeline.block_loop import BlockLoop
from qmoe_jax.pipeline.devices import Devices
from qmoe_jax.pipeline.journal import Journal, check_journal_folder
from qmoe_jax.pipeline.kernel_reader import KernelReader, cache_bytes
from qmoe_jax.pipeline.processes import Processes
from qmoe_jax.pipeline.report import CompressionReport
from qmoe_jax.pipeline.run import Run
from qmoe_jax.pipeline.run_log import RunLog, peak_host_bytes
from qmoe_jax.pipeline.run_pages import check_pages, write_pages
from qmoe_jax.pipeline.samples import Samples
from qmoe_jax.pipeline.schedule import Finished, LayerSchedule, kernel_reads, make_schedule
from qmoe_jax.progress import Progress
from qmoe_jax.progress import progress as show_progress
from qmoe_jax.quantization.groups import num_groups
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.quantization.step_search import typical_bits

PathLike = str | os.PathLike[str]
# A model that takes more is not loaded for the report: `evaluate` compares it.
_MOST_BYTES_COMPARED = 2**30


def compress(
    checkpoint: PathLike,
    output: PathLike,
    tokens: PathLike | TokenFile | None = None,
    *,
    validation_tokens: PathLike | TokenFile | None = None,
    num_examples: int | None = None,
    overwrite: bool = False,
    buffer_dir: PathLike | None = None,
    work_dir: PathLike | None = None,
    log: PathLike | None = None,
    num_devices: int | None = 1,
    separate_evaluation: bool = False,
    compare: bool = False,
    implementation: str = "auto",
    report: bool | str = False,
    report_examples: int = 32,
    progress: bool = True,
    settings: CompressionSettings | None = None,
    **changes: Any,
) -> CompressionReport:
    """Compress the experts of a native T5X Switch checkpoint.

    Interrupted runs resume and give identical bytes: call this again with the same arguments.
    Until the output is whole its work is in `<output>.partial`.

    In several processes (after `jax.distributed.initialize`) all call this with the same arguments.
    Each reads and quantizes its own experts and sends its own share of the examples through the
    model; tokens travel between them. The output is on storage that all of them see.

    Args:
      checkpoint: the native checkpoint, local or gs://.
      output: where the compressed checkpoint goes; it appears there only when it is whole.
      tokens: calibration examples (a token file of `qmoe-jax prepare-tokens`); needed for GPTQ.
        With method="rtn" they may be left out; then no layer error is reported.
      validation_tokens: examples that flow along and give a loss through the compressed experts;
        they never enter a Hessian and change nothing of the output.
      num_examples: use this many calibration examples; all where None.
      overwrite: replace an existing output, and throw away an unfinished run with other settings.
      buffer_dir: folder for memory-mapped hidden states; in memory where None.
      work_dir: folder for finished batches of experts, kept until the output is whole; by default
        inside `<output>.partial`, and for gs:// outputs a temporary one, which no later run finds.
      log: file that gets a line of JSON for each finished layer.
      num_devices: devices of each process to spread experts and samples over; all where None.
        `expert_batch` experts go to each.
      separate_evaluation: load the output again and evaluate it on the validation tokens.
      compare: the same beside the uncompressed model, for KL, agreement and the paired loss gap
        (`evaluation.divergence`); both must fit in memory then.
      implementation: of these evaluations' products with codes, as in `load_switch`.
      report: write a page and a model card beside the output, `<output>.report.html` and
        `<output>.model_card.md`; a text is the command that made it, which they show.
      report_examples: so many validation examples, or else calibration examples, tell how far the
        output's predictions are from the uncompressed model's (KL), where that takes at most 1 GiB;
        0 does not measure it. Only with `report`.
      progress: show progress bars.
      settings: how to compress; GPTQ to the lattice at its default step where None.
      **changes: single fields of `CompressionSettings`, as `grid="ternary"`.

    Returns:
      What the run did, per kernel and in total.

    Raises:
      CheckpointError: the input is no readable Switch checkpoint; the output exists, cannot be
        written, or is being written; or it holds an unfinished run with other settings.
      TokensError: the tokens are unreadable, absent where needed, or of another vocabulary.
      ValueError: a setting out of its range, overrides of layers that do not exist, or a
        target_size that cannot be.
    """
    started = time.monotonic()
    chosen = dataclasses.replace(settings or CompressionSettings(), **changes)
    if tokens is None and chosen.needs_tokens:
        raise TokensError(
            'method="gptq" needs calibration tokens, and so does allocation="measured"; pass '
            'tokens=, made by `qmoe-jax prepare-tokens`, or use method="rtn"'
        )
    if tokens is None and validation_tokens is not None:
        raise TokensError("validation_tokens without tokens; pass both, or evaluate the output")
    if separate_evaluation and validation_tokens is None:
        raise TokensError("separate_evaluation needs validation_tokens; pass them too")
    if compare and validation_tokens is None:
        raise TokensError("compare needs validation_tokens; pass them too")
    check_choice(implementation)
    if report_examples < 0:
        raise ValueError(f"report_examples is {report_examples}; give 0 or more")
    if report:
        check_pages(output)
    allocation = chosen.allocation
    run_log = RunLog(log)
    inputs = _paths(checkpoint, tokens, validation_tokens)
    buffers, work_folder = _folder(buffer_dir, "buffer_dir"), _folder(work_dir, "work_dir")
    if work_folder is not None:
        check_is_no_input(work_folder, "work_dir", inputs)
        check_journal_folder(work_folder)
    devices, processes = Devices.local(num_devices), Processes()
    if chosen.allocation == "measured" and processes.count > 1:
        raise ValueError(
            f'allocation is "measured" in {processes.count} processes, and it is measured in one; '
            "take the kernel_steps of the manifest of a run in one process"
        )
    source, config = _open(checkpoint, chosen, devices)
    target = target_bits(source.shapes, source.dtype_names, config, chosen)
    calibration, validation, samples = None, None, None
    if tokens is not None:
        calibration = _load_tokens(tokens, config).first(num_examples)
        if validation_tokens is not None:
            validation = _load_tokens(validation_tokens, config)
        samples = Samples.build(
            _share(calibration, processes),
            None if validation is None else _share(validation, processes),
            premask_sentinels=chosen.premasks_sentinels,
        )
    described = _describe(calibration)
    facts = _determining_facts(source, config, chosen, described, devices, processes)
    show = functools.partial(show_progress, shown=progress and processes.is_primary)
    with contextlib.ExitStack() as stack:
        writer = CompressedCheckpointWriter(
            output,
            overwrite=overwrite,
            inputs=inputs,
            is_primary=processes.is_primary,
        )
        work = writer.work_folder if work_folder is None else os.fspath(work_folder)
        if work is None:
            work = stack.enter_context(tempfile.TemporaryDirectory())
        if processes.count > 1:
            work = os.path.join(work, f"process_{processes.index}")
        journal = stack.enter_context(contextlib.closing(Journal(work, facts, discard=overwrite)))
        processes.barrier("output claimed")
        if chosen.allocation == "measured" and calibration is not None:
            steps = _kernel_steps(checkpoint, calibration, chosen, target, journal, show)
            chosen = dataclasses.replace(chosen, allocation="uniform", kernel_steps=steps)
        run = Run(source, config, chosen, writer, journal, devices, processes, show)
        schedule = _schedule(run, tell=progress)
        reads = kernel_reads(schedule, processes.index)
        reader = stack.enter_context(KernelReader(source, run.kernel_names, reads))
        if processes.is_primary:
            run_log.write("start", output=os.fspath(output), run=facts)
        loop = BlockLoop(run, reader, schedule, samples, run_log, buffers)
        done = loop.all_layers(os.fspath(output))
        processes.barrier("all written")
        if processes.is_primary:
            told = chosen.to_json() | {"allocation": allocation}
            writer.finish(config, {"settings": told, "tokens": described})
        processes.barrier("finished")
        if work_dir is not None:
            journal.clear()
    if validation is not None and processes.is_primary:
        if compare:
            done.divergence_text = "validation"
            done.divergence = _measure_divergence(
                *(checkpoint, output, validation, chosen, implementation, progress)
            )
            done.separate_validation = done.divergence.losses
        elif separate_evaluation:
            done.separate_validation = _evaluate_output(
                output, validation, chosen, implementation, show
            )
    done.settings["allocation"] = allocation
    done.seconds = time.monotonic() - started
    done.peak_host_bytes = peak_host_bytes()
    if report and processes.is_primary:
        examples = calibration if validation is None else validation
        wanted = report_examples > 0 and done.divergence is None
        if wanted and examples is not None and processes.count == 1 and _is_small(source):
            done.divergence_text = "calibration" if validation is None else "validation"
            few = examples.first(min(report_examples, len(examples)))
            done.divergence = _measure_divergence(
                *(checkpoint, output, few, chosen, implementation, progress)
            )
        command = report if isinstance(report, str) else None
        write_pages(done, checkpoint=os.fspath(checkpoint), command=command)
        done.has_pages = True
    if processes.is_primary:
        run_log.write("finish", **{k: v for k, v in done.to_json().items() if k != "kernels"})
    return done


def _is_small(source: T5XCheckpoint) -> bool:
    """Whether the uncompressed model may be loaded for the report alone."""
    sizes = (
        source.dtypes[name].itemsize * math.prod(shape) for name, shape in source.shapes.items()
    )
    return sum(sizes) <= _MOST_BYTES_COMPARED


def _measure_divergence(
    checkpoint: PathLike,
    output: PathLike,
    examples: TokenFile,
    settings: CompressionSettings,
    implementation: str,
    progress: bool,
) -> DivergenceReport:
    return measure_divergence(
        *load_switch(output, settings.activation_dtype, implementation=implementation),
        *load_switch(checkpoint, settings.activation_dtype),
        [batch.arrays() for batch in examples.batches(min(settings.batch_size, len(examples)))],
        progress="compare" if progress else None,
    )


def _open(
    checkpoint: PathLike, settings: CompressionSettings, devices: Devices
) -> tuple[T5XCheckpoint, SwitchConfig]:
    """Open the source, and refuse settings that do not fit it."""
    source = open_t5x_checkpoint(checkpoint, cache_bytes=0)
    config = read_config(source)
    if needed := cache_bytes(source, config, settings.expert_batch * len(devices)):
        source = open_t5x_checkpoint(checkpoint, cache_bytes=needed)
    settings.check_layers(config.sparse_layers)
    for layer in config.sparse_layers:
        for num_in in (config.embed_dim, config.expert_mlp_dim):
            num_groups(num_in, settings.for_layer(*layer).group_size)
    return source, config


def _kernel_steps(
    checkpoint: PathLike,
    calibration: TokenFile,
    settings: CompressionSettings,
    target: float | None,
    journal: Journal,
    show: Callable[..., Progress],
) -> dict[str, float]:
    """Return the step of each kernel, measured once in a run."""
    steps = journal.load_allocation()
    if steps is None:
        module, variables = load_switch(checkpoint, settings.activation_dtype)
        probes = measure_probes(
            *(module, variables, calibration, settings),
            batch_size=settings.batch_size,
            progress=functools.partial(show, title="allocation", unit="kernels"),
        )
        wanted = typical_bits(settings.step) if target is None else target
        steps = allocate(probes, wanted)
        journal.save_allocation(steps)
    return steps


def _schedule(run: Run, *, tell: bool) -> tuple[LayerSchedule, ...]:
    """Schedule the run after what all processes have finished; each says what it goes on from."""
    finished = run.journal.finished()
    if tell and (finished.layers or finished.batches):
        print(
            f"Resuming: {len(finished.layers)} finished layers and {len(finished.batches)} "
            "finished expert batches are there already."
        )
    return make_schedule(
        run.config.sparse_layers,
        run.settings,
        num_experts=run.config.num_experts,
        batch_size=run.batch_size,
        finished=[Finished.from_json(own) for own in run.processes.gather_json(finished.to_json())],
    )


def _paths(*given: PathLike | TokenFile | None) -> list[PathLike]:
    return [path for path in given if isinstance(path, str | os.PathLike)]


def _folder(path: PathLike | None, what: str) -> Path | None:
    """Return a folder that the run may write to, before it does; None is none."""
    if path is None:
        return None
    folder = local_path(path, what)
    check_writable(folder, what)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{what} is {folder}, a file; give a folder")
    return folder


def _share(tokens: TokenFile, processes: Processes) -> TokenFile:
    """Return the examples that this process sends through the model."""
    share = processes.share(len(tokens))
    return tokens[share.start : share.stop]


def _evaluate_output(
    output: PathLike,
    tokens: TokenFile,
    settings: CompressionSettings,
    implementation: str,
    show: Callable[..., Progress],
) -> LossReport:
    module, variables = load_switch(
        output, settings.activation_dtype, implementation=implementation
    )
    batches = [batch.arrays() for batch in tokens.batches(settings.batch_size)]
    shown = show(batches, title="separate evaluation", unit="batches")
    return evaluate_loss(module, variables, shown)


def _load_tokens(tokens: PathLike | TokenFile, config: SwitchConfig) -> TokenFile:
    if isinstance(tokens, TokenFile):
        return tokens
    return read_tokens(tokens, num_embeddings=config.num_embeddings)


def _describe(calibration: TokenFile | None) -> dict[str, Any] | None:
    """Return what the manifest says of the calibration data."""
    if calibration is None:
        return None
    return {
        "num_examples": len(calibration),
        "sha256": calibration.sha256(),
        "metadata": dataclasses.asdict(calibration.metadata),
    }


def _determining_facts(
    source: T5XCheckpoint,
    config: SwitchConfig,
    settings: CompressionSettings,
    tokens: dict[str, Any] | None,
    devices: Devices,
    processes: Processes,
) -> dict[str, Any]:
    """Return what determines the output to the bit: a run that differs in it cannot be resumed."""
    return {
        "checkpoint": {
            "url": source.url,
            "step": source.step,
            "fingerprint": source.fingerprint(),
            "dtypes": source.dtype_names,
        },
        "config": config.to_json(),
        "settings": settings.to_json(),
        "tokens": tokens,
        "versions": {
            "qmoe_jax": qmoe_jax.__version__,
            "jax": jax.__version__,
            "format": FORMAT_VERSION,
        },
        "device": jax.devices()[0].device_kind,
        "num_devices": len(devices),
        "num_processes": processes.count,
    }
