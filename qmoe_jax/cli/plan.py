"""Says what a run will need, before it starts: compression, or with --finetune fine-tuning.

    qmoe-jax plan --list
    qmoe-jax plan switch_base_128 --device a100
    qmoe-jax plan switch_c_2048 --device h100 --num_examples 160000 \\
      --buffer_dir /scratch --host_gb 256 --disk_gb 2000 --expert_batch 32
    qmoe-jax plan /data/checkpoint_550000 --tokens calibration.npz --json plan.json
    qmoe-jax plan compressed --finetune lora --batch_size 32 --device a100

Of a checkpoint metadata are read (names, shapes, dtypes, chunks), and a few experts, which are
rounded to tell how many weights will be zero: sizes follow from that. Of a public checkpoint, given
by its name, geometry comes from configs/public_checkpoints.json; its dtype is assumed, and its
zeros are the QMoE paper's. Memory is an upper estimate, time a rough one. "At the most" on disk
holds for any weights. Host memory and disk are those of this machine unless given.

With --finetune the checkpoint is a compressed one, whose arrays are counted, or a native or public
one, which is taken as compressed with the settings given ("experts" trains it as it is). What a
step needs besides is estimated.

Exit status: 0 the run fits, 1 it does not, 2 bad input.
"""

import argparse
import dataclasses
import inspect
import json
import os
import shutil
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmoe_jax.atomic_file import write_json
from qmoe_jax.calibration.tokens import read_tokens
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint
from qmoe_jax.checkpoints.storage import kvstore_spec
from qmoe_jax.cli.flags import CommandParser
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.outputs import check_writable, is_json_object, output_file
from qmoe_jax.paths import local_path
from qmoe_jax.planning.finetuning import FinetunePlan, TunedModel, plan_finetuning
from qmoe_jax.planning.inputs import ModelFacts, TokenFacts
from qmoe_jax.planning.measured_zeros import measured_zero_shares
from qmoe_jax.planning.memory import Resources
from qmoe_jax.planning.plan import Plan, make_plan
from qmoe_jax.planning.public_checkpoints import devices, is_public_name, public_checkpoint
from qmoe_jax.planning.sizes import ZeroShare
from qmoe_jax.planning.text import format_finetune_plan, format_list, format_plan
from qmoe_jax.quantization.settings import GRIDS, CompressionSettings
from qmoe_jax.training.settings import KINDS, FinetuneSettings

# As the paper: 10,000 examples for 128 experts, 160,000 for 2048.
_EXAMPLES_PER_128_EXPERTS = 10_000


# --- From arguments to a plan ---


def plan_from_arguments(arguments: argparse.Namespace) -> Plan:
    """Return the plan that a command line asks for.

    Raises:
      CheckpointError: no such checkpoint, or no public one of that name.
      TokensError: unreadable or unfitting tokens.
      ValueError: a bad setting.
    """
    chosen = {f.name: getattr(arguments, f.name) for f in _setting_fields()}
    settings = CompressionSettings(**{k: v for k, v in chosen.items() if v is not None})
    _check_positive(arguments)
    model = _model(arguments)
    zeros = None
    if arguments.zero_share is not None:
        zeros = dict.fromkeys(GRIDS, ZeroShare(arguments.zero_share, "given"))
    elif model.source is not None:
        settings.check_layers(model.config.sparse_layers)
        zeros = measured_zero_shares(model.source, model.config, settings)
    tokens = _tokens(arguments, model, settings)
    return make_plan(model, tokens, settings, _resources(arguments), zeros=zeros)


def finetune_plan_from_arguments(arguments: argparse.Namespace) -> FinetunePlan:
    """Return the plan of fine-tuning that a command line asks for.

    Raises:
      CheckpointError: no such checkpoint, or no public one of that name.
      TokensError: unreadable tokens.
      ValueError: a bad setting, or a kind that the model has not.
    """
    _check_positive(arguments)
    chosen = {name: getattr(arguments, name) for name in _FINETUNE_OPTIONS}
    settings = FinetuneSettings(
        trainable=tuple(arguments.finetune.split(",")),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    encoder, decoder = arguments.inputs_length, arguments.targets_length
    if arguments.tokens is not None:
        encoder, decoder = read_tokens(arguments.tokens).tokens.lengths
    return plan_finetuning(
        _tuned_model(arguments, settings),
        settings,
        {"encoder": encoder, "decoder": decoder},
        _resources(arguments),
        activation_dtype=arguments.activation_dtype or "float32",
    )


def _tuned_model(arguments: argparse.Namespace, settings: FinetuneSettings) -> TunedModel:
    given = arguments.checkpoint
    if _is_path(given) and is_compressed_checkpoint(given):
        return TunedModel.from_compressed(given)
    model = _model(arguments)
    if "experts" in settings.kinds:
        return TunedModel.from_native(model)
    chosen = {f.name: getattr(arguments, f.name) for f in _setting_fields()}
    compression = CompressionSettings(**{k: v for k, v in chosen.items() if v is not None})
    compression.check_layers(model.config.sparse_layers)
    zeros = None
    if arguments.zero_share is not None:
        zeros = dict.fromkeys(GRIDS, ZeroShare(arguments.zero_share, "given"))
    return TunedModel.as_compressed(model, compression, zeros)


def _is_path(given: str) -> bool:
    return os.path.exists(given) or ("/" in given and not is_public_name(given))


def _model(arguments: argparse.Namespace) -> ModelFacts:
    given = arguments.checkpoint
    if _is_path(given):
        return ModelFacts.from_checkpoint(given)
    return ModelFacts.from_registry(public_checkpoint(given), arguments.source_dtype)


def _tokens(
    arguments: argparse.Namespace, model: ModelFacts, settings: CompressionSettings
) -> TokenFacts:
    embeddings = model.config.num_embeddings
    if arguments.tokens is not None:
        calibration = read_tokens(arguments.tokens, num_embeddings=embeddings)
        validation = None
        if arguments.validation_tokens is not None:
            validation = read_tokens(arguments.validation_tokens, num_embeddings=embeddings)
        return TokenFacts.from_files(
            calibration.first(arguments.num_examples),
            validation,
            premask_sentinels=settings.premasks_sentinels,
        )
    if arguments.validation_tokens is not None:
        raise TokensError("--validation_tokens without --tokens; give both or neither")
    num_examples = arguments.num_examples
    if num_examples is None:
        num_examples = _EXAMPLES_PER_128_EXPERTS * max(1, model.config.num_experts // 128)
    return TokenFacts.from_means(
        num_examples,
        arguments.num_validation,
        {
            "encoder": float(arguments.mean_inputs_length or arguments.inputs_length),
            "decoder": float(arguments.mean_targets_length or arguments.targets_length),
        },
        {"encoder": arguments.inputs_length, "decoder": arguments.targets_length},
    )


def _resources(arguments: argparse.Namespace) -> Resources:
    device = devices()[arguments.device]
    memory = device.memory_bytes
    if arguments.device_gb is not None:
        memory = round(1e9 * arguments.device_gb)
    local = not arguments.output.startswith("gs://")
    buffer_dir = arguments.buffer_dir
    for name in ("output", "buffer_dir"):
        if getattr(arguments, name) is not None:
            _check_folder(getattr(arguments, name), f"--{name}", storage=name == "output")
    output_free, buffer_free, same_disk = None, None, True
    if arguments.disk_gb is not None:
        output_free = round(1e9 * arguments.disk_gb)
    elif local:
        output_free = shutil.disk_usage(_existing(arguments.output)).free
    if buffer_dir is not None and arguments.disk_gb is None:
        same_disk = local and _file_system(buffer_dir) == _file_system(arguments.output)
        buffer_free = shutil.disk_usage(_existing(buffer_dir)).free
    host = free_host_memory()
    if arguments.host_gb is not None:
        host = round(1e9 * arguments.host_gb)
    return Resources(
        device=device,
        device_bytes=None if memory is None else round(arguments.memory_fraction * memory),
        host_bytes=host,
        output_disk_bytes=output_free,
        buffer_disk_bytes=buffer_free,
        same_disk=same_disk,
        buffers_on_disk=buffer_dir is not None,
        journal=local,
        read_bytes_per_second=1e9 * arguments.read_gbps,
        write_bytes_per_second=1e9 * arguments.write_gbps,
    )


def _check_folder(path: str, name: str, *, storage: bool) -> None:
    """Refuse where the run could not write: it would be planned for nothing.

    Raises:
      CheckpointError: no folder, or none that can be made.
    """
    if storage and path.startswith("gs://"):
        kvstore_spec(path)
        return
    folder = local_path(path, name)
    check_writable(folder, name)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{name} is {folder}, a file; give a folder")


def _existing(path: str) -> Path:
    """Return the folder itself, or the nearest that exists above it."""
    folder = local_path(path, "the folder").absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _file_system(path: str) -> int:
    return _existing(path).stat().st_dev


def free_host_memory() -> int | None:
    """Bytes that a process may still take: the system's, or its container's if that is less."""
    free = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    except OSError:
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        limit -= int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return limit if free is None else min(free, max(limit, 0))


def _check_positive(arguments: argparse.Namespace) -> None:
    names = ("read_gbps", "write_gbps", "host_gb", "device_gb", "disk_gb", "memory_fraction")
    for name in (*names, "inputs_length", "targets_length"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if arguments.memory_fraction > 1:
        raise ValueError(f"memory_fraction is {arguments.memory_fraction}; it is at most 1")


# --- Command line ---


def _setting_fields() -> list[dataclasses.Field]:
    """All settings: each is an option of its own name."""
    return list(dataclasses.fields(CompressionSettings))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = CommandParser("plan", description=__doc__)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="folder of a native checkpoint, local or gs://, or the name of a public one",
    )
    parser.add_argument("--list", action="store_true", help="print the public checkpoints")
    parser.add_argument("--json", metavar="FILE", help="also write the plan to this file")
    parser.add_argument(
        "--source_dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="dtype of a public checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--zero_share",
        type=float,
        help="expected share of zero weights (default: measured on experts of the checkpoint; of a "
        "public one the paper's)",
    )
    _add_tokens(parser.add_argument_group("tokens"))
    _add_resources(parser.add_argument_group("resources"))
    _add_finetuning(parser.add_argument_group("fine-tuning, as FinetuneSettings has it"))
    group = parser.add_argument_group("settings of the run, as CompressionSettings has them")
    hints = typing.get_type_hints(CompressionSettings)
    meanings = _meanings(CompressionSettings)
    for field in _setting_fields():
        kind = _without_none(hints[field.name])
        if kind is bool:
            option: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif kind in (str, int, float):
            option = {"type": kind}
        else:
            of_numbers = typing.get_args(kind)[1:] == (float,)
            option = {"type": _numbers if of_numbers else _overrides, "metavar": "JSON"}
        default = "none" if field.default is dataclasses.MISSING else repr(field.default)
        meaning = meanings.get(field.name, "").replace("%", "%%")
        group.add_argument(f"--{field.name}", help=f"{meaning} (default: {default})", **option)
    return parser


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`, `str` of `str | int | None`; any other type as it is."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if set(kinds) == {str, int}:
        return str
    return kinds[0] if isinstance(hint, types.UnionType) and len(kinds) == 1 else hint


def _meanings(documented: type) -> dict[str, str]:
    """Return what the docstring of a class says of each attribute, without its last full stop."""
    lines = inspect.cleandoc(documented.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    meanings: dict[str, str] = {}
    name = ""
    for line in lines:
        if line.startswith("    "):
            meanings[name] += " " + line.strip()
        elif line.startswith("  "):
            name, _, meaning = line.strip().partition(": ")
            meanings[name] = meaning
    return {name: meaning.removesuffix(".") for name, meaning in meanings.items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def _numbers(text: str) -> dict[str, float]:
    """Return a JSON object of numbers."""
    value = _json(text)
    parts = value.values() if isinstance(value, dict) else [None]
    if not all(isinstance(p, int | float) and not isinstance(p, bool) for p in parts):
        raise argparse.ArgumentTypeError(f'{text!r} is no object of numbers, as {{"*/wo": 5.0}}')
    return {name: float(number) for name, number in value.items()}


def _overrides(text: str) -> dict[str, Any]:
    """Return a JSON object of objects with plain values; what they may say the settings check."""
    value = _json(text)
    parts = value.values() if isinstance(value, dict) else [None]
    plain = (str, int, float)  # bool is an int
    if not all(
        isinstance(p, dict) and all(isinstance(v, plain) for v in p.values()) for p in parts
    ):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no object of objects, as {{"decoder/*": {{"grid": "2bit"}}}}'
        )
    return value


def _add_tokens(group: Any) -> None:
    group.add_argument("--tokens", metavar="FILE", help="calibration tokens: their exact lengths")
    group.add_argument("--validation_tokens", metavar="FILE", help="validation tokens")
    group.add_argument(
        "--num_examples", type=int, help="calibration examples (default: 10,000 per 128 experts)"
    )
    group.add_argument("--num_validation", type=int, default=0, help="validation examples")
    for name, default in (("inputs", 512), ("targets", 114)):
        group.add_argument(
            f"--{name}_length", type=int, default=default, help="of arrays (default: %(default)s)"
        )
        group.add_argument(
            f"--mean_{name}_length", type=float, help="without padding (default: all of it)"
        )


def _add_resources(group: Any) -> None:
    # No choices: --help must also work where configs/ is missing.
    group.add_argument(
        "--device", default="cpu", help="one of configs/devices.json (default: %(default)s)"
    )
    group.add_argument("--device_gb", type=float, help="device memory (default: the device's)")
    group.add_argument(
        "--memory_fraction",
        type=float,
        default=0.75,
        help="share of device memory that JAX takes, as XLA_PYTHON_CLIENT_MEM_FRACTION "
        "(default: %(default)s, JAX's own)",
    )
    group.add_argument("--host_gb", type=float, help="free host memory (default: this machine's)")
    group.add_argument("--disk_gb", type=float, help="free disk space (default: --output's)")
    group.add_argument("--output", default=".", help="where the output would go (default: here)")
    group.add_argument("--buffer_dir", help="folder for memory-mapped hidden states")
    group.add_argument(
        "--read_gbps", type=float, default=1.0, help="GB/s from the checkpoint (default: 1)"
    )
    group.add_argument(
        "--write_gbps", type=float, default=1.0, help="GB/s to the output (default: 1)"
    )


# Settings of fine-tuning that decide what it needs; batch_size is an option of both kinds of run.
_FINETUNE_OPTIONS = (
    *("batch_size", "microbatches", "optimizer"),
    *("lora_rank", "lora_shared", "lora_kernels"),
)


def _add_finetuning(group: Any) -> None:
    group.add_argument(
        "--finetune",
        metavar="KINDS",
        help=f"what is trained, of {', '.join(KINDS)}, or several with commas between; then "
        f"--batch_size (default: {FinetuneSettings.batch_size}) and --activation_dtype are this "
        "run's",
    )
    group.add_argument("--microbatches", type=int, help="parts of a batch (default: 1)")
    group.add_argument("--optimizer", help="adafactor or adam (default: adafactor)")
    group.add_argument("--lora_rank", type=int, help="of corrections (default: 8)")
    group.add_argument(
        "--lora_shared",
        action=argparse.BooleanOptionalAction,
        help="experts share corrections (default: no)",
    )
    group.add_argument(
        "--lora_kernels",
        type=lambda text: tuple(text.split(",")),
        metavar="PATTERNS",
        help="what is corrected, with commas between (default: attention and dense MLPs)",
    )


def _is_plan(file: Path) -> bool:
    compression, finetuning = ("model", "zero_shares", "sizes"), ("model", "held_memory", "disk")
    return is_json_object(file, compression) or is_json_object(file, finetuning)


IF_INTERRUPTED = "nothing was written, run it again"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status: 1 where the run does not fit."""
    arguments = make_parser().parse_args(argv)
    if arguments.list or arguments.checkpoint is None:
        print(format_list())
        return 0
    if arguments.device not in devices():
        raise ValueError(f"device is {arguments.device!r}; choose one of {', '.join(devices())}")
    file = None
    if arguments.json is not None:
        file = output_file(arguments.json, "the plan", _is_plan)
    if arguments.finetune is None:
        for name in _FINETUNE_OPTIONS:
            if name != "batch_size" and getattr(arguments, name) is not None:
                raise ValueError(f"--{name} without --finetune; give both, or leave it out")
        plan = plan_from_arguments(arguments)
        text = format_plan(plan)
    else:
        plan = finetune_plan_from_arguments(arguments)
        text = format_finetune_plan(plan)
    if file is not None:
        write_json(file, plan.to_json())
    print(text)
    if plan.problems and None in (arguments.host_gb, arguments.disk_gb):
        print(
            "\nMemory and disk are what this machine has free now, where not given; to plan for "
            "another: --host_gb, --disk_gb."
        )
    return 1 if plan.problems else 0
