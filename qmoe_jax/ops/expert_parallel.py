"""The expert MLP with the experts of a layer split over devices, along one mesh axis.

Each device holds and runs its own experts on the tokens that are routed to them; a sum over devices
puts the outputs together, since a token has an output on one device only. All else is replicated,
but for batches where somebody splits their rows over the same axis (`split_rows`): then XLA runs
the other layers on a device's own rows, and gathers rows where experts take them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qmoe_jax.codec import codings
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.ops.experts import AdaptedExperts, CodedExperts, Experts
from qmoe_jax.ops.grouped_mlp import Activation
from qmoe_jax.ops.local_devices import local_devices
from qmoe_jax.ops.products import expert_mlp
from qmoe_jax.varying import varying_as

AXIS = "experts"


def expert_mesh(num_devices: int) -> Mesh:
    """Return a mesh over the first so many devices of this process.

    Raises:
      ValueError: there are not so many.
    """
    return Mesh(np.array(local_devices(num_devices)), (AXIS,))


def check_split(num_experts: int, mesh: Mesh) -> None:
    """Raise ValueError unless every device gets as many experts as the others."""
    if num_experts % mesh.size:
        raise ValueError(
            f"{num_experts} experts cannot be split evenly over {mesh.size} devices; choose a "
            "num_devices that divides them"
        )


def split_dense(kernel: np.ndarray, mesh: Mesh) -> Array:
    """[experts, in, out] on the devices, each with its own experts."""
    check_split(kernel.shape[0], mesh)
    return jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(AXIS)))


def split_coded(coded: CodedTensor, mesh: Mesh) -> dict[str, Array]:
    """Return the arrays of a coded tensor, [devices, ...]: a device has those of its own experts.

    Codes of a device are padded with zeros to the longest; nothing reads there.
    """
    count = coded.spec.num_experts // mesh.size
    check_split(coded.spec.num_experts, mesh)
    parts = [
        codings.slice_experts(coded, at * count, (at + 1) * count).arrays for at in range(mesh.size)
    ]
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    arrays = {}
    for name in parts[0]:
        longest = max(part[name].shape[0] for part in parts)
        shape = (mesh.size, longest, *parts[0][name].shape[1:])

        # Device by device: the host never holds a second copy of the whole.
        shards = []
        for part, device in zip(parts, mesh.devices.flat, strict=True):
            missing = [(0, longest - part[name].shape[0])] + [(0, 0)] * (len(shape) - 2)
            shards.append(jax.device_put(np.pad(part[name], missing)[None], device))
        arrays[name] = jax.make_array_from_single_device_arrays(shape, sharding, shards)
    return arrays


def split_spec(spec: TensorSpec, mesh: Mesh) -> TensorSpec:
    """Return the spec of a device's part."""
    return dataclasses.replace(spec, num_experts=spec.num_experts // mesh.size)


def replicate(array: np.ndarray | Array, mesh: Mesh) -> Array:
    """Return an array on every device, whole."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def split_rows(array: np.ndarray | Array, mesh: Mesh, axis: int = 0) -> Array:
    """Return an array on the devices, each with its own part along an axis, which they divide."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS)))


def split_expert_mlp(
    x: Float[Array, "tokens embed"],
    expert_index: Int[Array, "tokens"],
    *,
    mesh: Mesh,
    num_experts: int,
    wi: Sequence[Experts],
    wo: Experts,
    activation: Activation,
    hidden_scale: Float[Array, "experts mlp"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "tokens embed"]:
    """`expert_mlp` with experts as `split_dense` and `split_coded` place them; same arguments.

    Low-rank corrections of kernels are replicated.
    """
    count = num_experts // mesh.size
    kernels = [*wi, wo]
    whole, mine = PartitionSpec(), PartitionSpec(AXIS)

    def local(
        x: Array,
        expert_index: Array,
        arrays: list[dict[str, Array]],
        hidden_scale: Array | None,
    ) -> Array:
        first = lax.axis_index(AXIS) * count
        is_mine = (expert_index >= first) & (expert_index < first + count)
        own = [
            _own_experts(kernel, held, mesh) for kernel, held in zip(kernels, arrays, strict=True)
        ]
        outputs = expert_mlp(
            # A device's gradient of x is that of its own experts; this adds them up.
            varying_as(x, is_mine),
            jnp.where(is_mine, expert_index - first, -1),
            num_experts=count,
            wi=own[:-1],
            wo=own[-1],
            activation=activation,
            hidden_scale=hidden_scale,
            implementation=implementation,
        )
        return lax.psum(outputs, AXIS)

    def split_as(name: str, array: Array) -> PartitionSpec:
        """All arrays have a part for each expert or device, but for a correction that is shared."""
        return whole if name.startswith("adapter_") and array.shape[0] == 1 else mine

    held = [kernel.by_name for kernel in kernels]
    specs = [{name: split_as(name, a) for name, a in arrays.items()} for arrays in held]
    split = jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, specs, mine), out_specs=whole)
    return split(x, expert_index, held, hidden_scale)


def _own_experts(kernel: Experts, held: Mapping[str, Array], mesh: Mesh) -> Experts:
    """Return a device's part: a dense kernel's own experts, or codes under a leading axis of 1."""
    if isinstance(kernel, AdaptedExperts):
        base = _own_experts(kernel.base, held, mesh)
        assert not isinstance(base, AdaptedExperts)
        # As with x above, for corrections that experts share.
        index = lax.axis_index(AXIS)
        a, b = (varying_as(held[name], index) for name in ("adapter_a", "adapter_b"))
        return AdaptedExperts(base, a, b)
    if not isinstance(kernel, CodedExperts):
        return kernel.layout()(held)
    own = kernel.layout()({name: held[name][0] for name in kernel.by_name})
    return dataclasses.replace(own, spec=split_spec(kernel.spec, mesh))
