"""What a compression run will need, said before it starts, from metadata alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qmoe_jax.formatting import format_bytes
from qmoe_jax.pipeline.bit_budget import target_bits
from qmoe_jax.planning.inference import MemoryAtWork, memory_at_work, seconds_a_token
from qmoe_jax.planning.inputs import ModelFacts, TokenFacts, check_tokens
from qmoe_jax.planning.memory import (
    Resources,
    device_memory,
    disk,
    host_memory,
    largest_expert_batch,
    most_journal_bytes,
    peak,
)
from qmoe_jax.planning.sizes import (
    CompressedSize,
    ZeroShare,
    compressed_size,
    layer_settings,
    most_output_bytes,
    published_size,
    zero_share,
)
from qmoe_jax.planning.time import Work, device_work, seconds_by_kind, total_seconds
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.quantization.step_search import typical_bits


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will need. Sizes are bytes, times seconds.

    Attributes:
      model: the checkpoint.
      tokens: what flows through it.
      settings: how it is compressed.
      resources: what there is.
      zero_shares: expected share of zero weights, by grid that the run uses.
      bytes_to_read: decoded from the checkpoint.
      host: parts of the host's peak, without what a CPU device holds.
      device: parts of each phase on the device.
      output_disk: parts of what is expected to be in the output's folder at its peak.
      most_output_disk: a bound on that, whatever the weights.
      buffer_disk: parts of what is written to the folder of the buffers.
      sizes: of the compressed model, the chosen coding first; ternary ones also in the paper's
        coding and in the published layout.
      work: on the device, by kind.
      seconds: by kind.
      memory_at_work: of the output, on the device.
      seconds_a_token: of the output at work, by kind; None where the device's speed is not known.
      largest_expert_batch: that fits device and host; 0 where none does.
      problems: why the run cannot fit, a sentence each; empty where it can.
    """

    model: ModelFacts
    tokens: TokenFacts
    settings: CompressionSettings
    resources: Resources
    zero_shares: Mapping[str, ZeroShare]
    bytes_to_read: int
    host: dict[str, int]
    device: dict[str, dict[str, int]]
    output_disk: dict[str, int]
    most_output_disk: int
    buffer_disk: dict[str, int]
    sizes: tuple[CompressedSize, ...]
    work: dict[str, Work]
    seconds: dict[str, float]
    memory_at_work: MemoryAtWork
    seconds_a_token: dict[str, float] | None
    largest_expert_batch: int
    problems: tuple[str, ...]

    @property
    def host_peak(self) -> int:
        """Bytes of host memory, with the device's where they are one."""
        on_device = self.device_peak if self.resources.device.is_host else 0
        return sum(self.host.values()) + on_device

    @property
    def device_peak(self) -> int:
        """Bytes of device memory."""
        return peak(self.device)[1]

    @property
    def total_seconds(self) -> float:
        """Estimated seconds of the run."""
        return total_seconds(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        phase, num_bytes = peak(self.device)
        return {
            "model": self.model.name,
            "config": self.model.config.to_json(),
            "parameters": self.model.num_parameters(),
            "source_num_bytes": self.model.num_bytes(),
            "bytes_to_read": self.bytes_to_read,
            "settings": self.settings.to_json(),
            "tokens": dataclasses.asdict(self.tokens),
            "resources": dataclasses.asdict(self.resources),
            "zero_shares": {g: dataclasses.asdict(z) for g, z in self.zero_shares.items()},
            "host_memory": self.host | {"peak": self.host_peak},
            "device_memory": self.device,
            "device_memory_peak": {"phase": phase, "num_bytes": num_bytes},
            "output_disk": self.output_disk,
            "most_output_disk": self.most_output_disk,
            "buffer_disk": self.buffer_disk,
            "sizes": [
                dataclasses.asdict(size)
                | {
                    "total": size.total,
                    "bits_per_weight": size.bits_per_weight,
                    "expert_compression": size.expert_compression,
                    "model_compression": size.model_compression,
                }
                for size in self.sizes
            ],
            "flops": {kind: part.flops for kind, part in self.work.items()},
            "seconds": self.seconds | {"total": self.total_seconds},
            "memory_at_work": dataclasses.asdict(self.memory_at_work),
            "seconds_a_token": self.seconds_a_token,
            "largest_expert_batch": self.largest_expert_batch,
            "fits": not self.problems,
            "problems": list(self.problems),
        }


def make_plan(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    resources: Resources,
    *,
    zeros: Mapping[str, ZeroShare] | None = None,
) -> Plan:
    """Plan a run.

    Args:
      model: the checkpoint.
      tokens: what flows through it.
      settings: how it is compressed.
      resources: what there is to run on.
      zeros: expected share of zero weights, by grid; `sizes.zero_share` where there is none.

    Raises:
      TokensError: settings that need other tokens.
      ValueError: a zero share that is not between 0 and 1, or a target_size that cannot be.
    """
    config = model.config
    settings.check_layers(config.sparse_layers)
    check_tokens(tokens, settings)
    layers = layer_settings(config, settings).values()
    target = target_bits(model.shapes, model.dtypes, config, settings)
    shares = {
        own.grid: (zeros or {}).get(own.grid)
        or zero_share(config, own.grid, target or typical_bits(own.step))
        for own in layers
        if own.method != "none"
    }
    for share in shares.values():
        if not 0 < share.value < 1:
            raise ValueError(f"zero_share is {share.value}; it must be above 0 and below 1")
    sizes = _sizes(model, settings, shares)
    output_disk, buffer_disk = disk(
        model,
        tokens,
        settings,
        sizes[0].total,
        zeros=shares,
        buffers_on_disk=resources.buffers_on_disk,
        journal=resources.journal,
    )
    bytes_to_read = model.bytes_to_read(settings.expert_batch)
    if settings.allocation == "measured":
        bytes_to_read += sum(model.num_bytes().values())
    on_cpu = resources.device.is_host
    plan = Plan(
        model=model,
        tokens=tokens,
        settings=settings,
        resources=resources,
        zero_shares=shares,
        bytes_to_read=bytes_to_read,
        host=host_memory(model, tokens, settings, buffers_on_disk=resources.buffers_on_disk),
        device=device_memory(model, tokens, settings, on_cpu=on_cpu),
        output_disk=output_disk,
        most_output_disk=most_output_bytes(config, model.shapes, model.dtypes, settings)
        + (most_journal_bytes(model, settings) if resources.journal else 0),
        buffer_disk=buffer_disk,
        sizes=sizes,
        work=device_work(model, tokens, settings),
        seconds=seconds_by_kind(
            model,
            tokens,
            settings,
            resources.device,
            bytes_to_read=bytes_to_read,
            bytes_to_write=sum(output_disk.values()) + sum(buffer_disk.values()),
            read_bytes_per_second=resources.read_bytes_per_second,
            write_bytes_per_second=resources.write_bytes_per_second,
        ),
        memory_at_work=memory_at_work(
            model, settings, resources.device, sizes[0], resources.device_bytes
        ),
        seconds_a_token=seconds_a_token(model, settings, resources.device),
        largest_expert_batch=largest_expert_batch(model, tokens, settings, resources),
        problems=(),
    )
    return dataclasses.replace(plan, problems=tuple(_problems(plan)))


def _sizes(
    model: ModelFacts, settings: CompressionSettings, zeros: Mapping[str, ZeroShare]
) -> tuple[CompressedSize, ...]:
    config = model.config
    sizes = [compressed_size(config, model.shapes, model.dtypes, settings, zeros)]
    own_settings = layer_settings(config, settings).values()
    kinds = {(own.method == "none", own.grid) for own in own_settings}
    whole_rows = all(own.group_size is None for own in own_settings)
    if kinds == {(False, "ternary")}:
        if sizes[0].layout != "qmoe":
            plain = dataclasses.replace(settings, layer_overrides={}, skip="", grid="ternary")
            plain = dataclasses.replace(plain, expert_coding="qmoe")
            sizes.append(compressed_size(config, model.shapes, model.dtypes, plain, zeros))
        # Hugging Face's models have no gated experts, the published layout no groups.
        if len(config.wi_names) == 1 and whole_rows:
            sizes.append(published_size(config, model.shapes, zeros["ternary"].value))
    return tuple(sizes)


def _problems(plan: Plan) -> list[str]:
    resources, largest = plan.resources, plan.largest_expert_batch
    smaller = (
        f"The largest expert_batch that fits is {largest}." if largest else "No expert_batch fits."
    )
    problems = []
    limit = resources.device_bytes
    if not resources.device.is_host and limit is not None and plan.device_peak > limit:
        phase, needed = peak(plan.device)
        remedy = (
            smaller
            if phase in ("Hessians", "quantize", "run experts")
            else f"Lower batch_size, which is {plan.settings.batch_size}."
        )
        problems.append(
            f"device memory: {phase} needs {format_bytes(needed)}, and JAX may use "
            f"{format_bytes(limit)} of the {resources.device.label}. {remedy}"
        )
    if resources.host_bytes is not None and plan.host_peak > resources.host_bytes:
        hidden = plan.host.get("hidden states", 0)
        if hidden > plan.host_peak - resources.host_bytes:
            remedy = (
                f"Hidden states take {format_bytes(hidden)} of it: give a buffer_dir on a disk, or "
                "fewer examples."
            )
        else:
            remedy = smaller
        problems.append(
            f"host memory: the run needs {format_bytes(plan.host_peak)}, and "
            f"{format_bytes(resources.host_bytes)} are free. {remedy}"
        )
    return problems + _disk_problems(plan)


def _disk_problems(plan: Plan) -> list[str]:
    resources = plan.resources
    output, buffers = sum(plan.output_disk.values()), sum(plan.buffer_disk.values())
    needs = [("the output needs", output, resources.output_disk_bytes)]
    if buffers and resources.same_disk:
        together = output + buffers
        needs = [("output and buffers together need", together, resources.output_disk_bytes)]
    elif buffers:
        needs.append(("the buffers need", buffers, resources.buffer_disk_bytes))
    return [
        f"disk: {what} {format_bytes(needed)}, and {format_bytes(free)} are free. Choose "
        "another disk or make room."
        for what, needed, free in needs
        if free is not None and needed > free
    ]
