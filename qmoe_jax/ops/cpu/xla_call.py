"""XLA's foreign function interface, spoken in machine code: no compiler and no Python is between.

A handler gets the address of an `XLA_FFI_CallFrame` and returns that of an `XLA_FFI_Error`, or 0.
Offsets below are those of jaxlib's `xla/ffi/api/c_api.h` on machines of 64 bits. The structs used
here are the same from API 0.1 (jaxlib 0.6) to 0.4 (jaxlib 0.11). Addresses are int64.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from qmoe_jax.ops.cpu.machine_code import instructions, jitted

NEWEST_MINOR = 4
"""API 0.4 was read; XLA keeps older handlers working."""
_FRAME_SIZE, _ARGS_SIZE, _RETS_SIZE, _ATTRS_SIZE = 168, 40, 40, 48
_API_SIZE = 152  # up to ThreadPool_NumThreads
_BUFFER_SIZE = 48
_METADATA_EXTENSION, _METADATA_SIZE = 1, 36
_BUFFER, _SCALAR = 1, 3
_EXECUTE = 3
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 3, 8, 12
S32, S64, U8, U16, U32, F32, BF16 = 4, 5, 6, 7, 8, 11, 16
"""Of XLA_FFI_DataType."""


def _loader(bits: int, kind: Any) -> Callable[[int], int]:
    @instructions
    def load(typingctx, address):
        def generate(context, builder, signature, args):
            integer = ir.IntType(bits)
            value = builder.load(builder.inttoptr(args[0], integer.as_pointer()))
            return value if bits == 64 else builder.sext(value, ir.IntType(64))

        return kind(types.int64), generate

    return load


load64 = _loader(64, types.int64)
"""load64(address): an int64, or the address that lies there."""
load32 = _loader(32, types.int64)
"""load32(address): an int32."""


@instructions
def store64(typingctx, address, value):
    """Store an int64."""

    def generate(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@instructions
def store32(typingctx, address, value):
    """Store the lower half of an int64."""

    def generate(context, builder, signature, args):
        half = builder.trunc(args[1], ir.IntType(32))
        builder.store(half, builder.inttoptr(args[0], ir.IntType(32).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@instructions
def atomic_add(typingctx, address, value):
    """Add to an int64 that threads share; return what it was."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


def stack_words(count: int) -> Callable[[], int]:
    """Return address(): of int64s that last until the calling function returns."""

    @instructions
    def address(typingctx):
        def generate(context, builder, signature, args):
            place = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), count))
            return builder.ptrtoint(place, ir.IntType(64))

        return types.int64(), generate

    return address


@instructions
def data_address(typingctx, array):
    """Address of an array's first element."""

    def generate(context, builder, signature, args):
        pointer = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.int64(array), generate


@instructions
def array_at(typingctx, address, shape, dtype):
    """Return the contiguous array of a shape and dtype that lies at an address."""
    kind = types.Array(dtype.dtype, len(shape), "C")

    def generate(context, builder, signature, args):
        array = context.make_array(kind)(context, builder)
        size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        itemsize = context.get_constant(types.intp, size)
        dims = cgutils.unpack_tuple(builder, args[1])
        strides = [itemsize]
        for dim in reversed(dims[1:]):
            strides.append(builder.mul(strides[-1], dim))
        populate_array(
            array,
            data=builder.inttoptr(args[0], array.data.type),
            shape=cgutils.pack_array(builder, dims),
            strides=cgutils.pack_array(builder, strides[::-1]),
            itemsize=itemsize,
            meminfo=None,
        )
        return array._getvalue()

    return kind(types.int64, types.UniTuple(types.int64, len(shape)), dtype), generate


@functools.cache
def c_function(name: str) -> Callable[..., int]:
    """Return call(words): a function of the C library, called with a tuple of int64s.

    They stand for sizes and addresses too; only the lower half of an `int` result is one.
    """

    @instructions
    def call(typingctx, words):
        def generate(context, builder, signature, args):
            values = cgutils.unpack_tuple(builder, args[0])
            kind = ir.FunctionType(ir.IntType(64), [value.type for value in values])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)

        return types.int64(words), generate

    return call


def entry_point(function: Any) -> Callable[[], int]:
    """Return address(): where C calls a jitted function of one address that returns nothing."""

    @instructions
    def address(typingctx):
        def generate(context, builder, signature, args):
            compiled = function.get_compile_result(types.void(types.int64))
            context.active_code_library.add_linking_library(compiled.library)
            inner = context.declare_function(builder.module, compiled.fndesc)
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
            name = f"entry.{compiled.fndesc.unique_name}"
            outer = ir.Function(builder.module, kind, builder.module.get_unique_name(name))
            outer.linkage = "internal"
            body = ir.IRBuilder(outer.append_basic_block())
            context.call_conv.call_function(body, inner, types.none, [types.int64], [outer.args[0]])
            body.ret_void()
            return builder.ptrtoint(outer, ir.IntType(64))

        return types.int64(), generate

    return address


@instructions
def _call(typingctx, function, struct):
    """Call C with the address of a struct of int64s; return an int64, or an address."""

    def generate(context, builder, signature, args):
        place = cgutils.alloca_once_value(builder, args[1])
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word])
        target = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(target, [builder.ptrtoint(place, word)])

    return types.int64(types.int64, struct), generate


@functools.cache
def text(message: str) -> Callable[[], int]:
    """Return address(): of a constant string for C."""

    @instructions
    def address(typingctx):
        def generate(context, builder, signature, args):
            constant = context.insert_const_string(builder.module, message)
            return builder.ptrtoint(constant, ir.IntType(64))

        return types.int64(), generate

    return address


@jitted
def api_fits(frame):
    """Whether a frame and its API are those that were read."""
    api = load64(frame + 16)
    return (
        load64(frame) >= _FRAME_SIZE
        and load64(frame + 40) == _ARGS_SIZE
        and load64(frame + 80) == _RETS_SIZE
        and load64(frame + 120) == _ATTRS_SIZE
        and load64(api) >= _API_SIZE
        and load32(api + 32) == 0
    )


@jitted
def answers_metadata(frame):
    """Whether XLA asks, as it does when a handler is registered, for which API it was made."""
    extension = load64(frame + 8)
    if extension == 0 or load32(extension + 8) != _METADATA_EXTENSION:
        return False
    metadata = load64(extension + 24)
    api = load64(frame + 16)
    major, minor = 0, 1
    if api != 0:  # API 0.1 asks without one
        major, minor = load32(api + 32), min(load32(api + 36), NEWEST_MINOR)
    # Offered is what XLA has, as far as it was read; what does not fit gets a version that is none.
    has_room = load64(metadata) >= _METADATA_SIZE and load64(frame) >= _FRAME_SIZE
    store32(metadata + 24, major if has_room and major == 0 else -1)
    store32(metadata + 28, minor)
    store32(metadata + 32, 0)
    if minor >= 2:
        store64(metadata + 40, 0)  # no state
    return True


@jitted
def error(frame, code, message):
    """Return an error for XLA; `message` is an address."""
    api = load64(frame + 16)
    return _call(load64(api + 48), (28, 0, message, code))


@jitted
def _succeeds(api, problem):
    """Whether a call has returned no error; one that it has is let go."""
    if problem != 0:
        _call(load64(api + 64), (24, 0, problem))
    return problem == 0


@jitted
def num_pool_threads(frame, spare):
    """Threads of XLA's pool, or 0 where it has none; `spare` is an address of 8 bytes."""
    api = load64(frame + 16)
    store64(spare, 0)
    if not _succeeds(api, _call(load64(api + 144), (32, 0, load64(frame + 24), spare))):
        return 0
    return max(load64(spare), 0)


@jitted
def schedule(frame, task, data):
    """Have XLA's pool call task(data) some time; return whether it will."""
    api = load64(frame + 16)
    return _succeeds(api, _call(load64(api + 136), (40, 0, load64(frame + 24), task, data)))


def _field(*offsets: int, half: bool = False) -> Callable[..., int]:
    """Return field(address): what lies behind all offsets but the last, each of an address."""

    @instructions
    def field(typingctx, address):
        def generate(context, builder, signature, args):
            return _follow(builder, args[0], offsets, half)

        return types.int64(types.int64), generate

    return field


def _follow(builder: Any, address: Any, offsets: tuple[int, ...], half: bool) -> Any:
    word = ir.IntType(64)
    for number, offset in enumerate(offsets):
        integer = ir.IntType(32) if half and number == len(offsets) - 1 else word
        place = builder.add(address, ir.Constant(word, offset))
        address = builder.load(builder.inttoptr(place, integer.as_pointer()))
    return builder.sext(address, word) if half else address


num_arguments = _field(56)
"""num_arguments(frame): operands."""
result = _field(112, 0)
"""result(frame): address of the first result's `XLA_FFI_Buffer`."""
buffer_data = _field(24)
"""buffer_data(buffer): address of its elements."""
buffer_dtype = _field(16, half=True)
"""buffer_dtype(buffer): one of the data types above."""


@instructions
def argument(typingctx, frame, number):
    """Address of an operand's `XLA_FFI_Buffer`."""

    def generate(context, builder, signature, args):
        operands = _follow(builder, args[0], (72,), False)
        place = builder.add(operands, builder.shl(args[1], ir.Constant(ir.IntType(64), 3)))
        return _follow(builder, place, (0,), False)

    return types.int64(types.int64, types.int64), generate


@instructions
def buffer_dim(typingctx, buffer, axis):
    """Length of an axis that the buffer has."""

    def generate(context, builder, signature, args):
        dims = _follow(builder, args[0], (40,), False)
        place = builder.add(dims, builder.shl(args[1], ir.Constant(ir.IntType(64), 3)))
        return _follow(builder, place, (0,), False)

    return types.int64(types.int64, types.int64), generate


def wanted_buffers(*buffers: tuple[int, int, tuple[int, ...]]) -> np.ndarray:
    """Return what `fits` wants of operands and, last, the result: int64 [operands + 1, 6].

    Args:
      buffers: two data types of which it has one, and numbers in `sizes` of its axes' lengths.
    """
    rows = [[one, other, len(axes), *axes, 0, 0, 0][:6] for one, other, axes in buffers]
    return np.array(rows, np.int64)


@jitted
def fits(frame, wanted, sizes):
    """Whether operands and result of a frame to be executed are such as a handler wants.

    Args:
      frame: of an API that fits.
      wanted: of `wanted_buffers`.
      sizes: int64; those that are -1 become the lengths that are found first.

    Returns:
      Whether it is so, and all attributes are int64.
    """
    count = wanted.shape[0] - 1
    if load32(frame + 32) != _EXECUTE or num_arguments(frame) != count or load64(frame + 96) != 1:
        return False
    for number in range(count + 1):
        is_result = number == count
        kinds = load64(frame + 104) if is_result else load64(frame + 64) + 4 * number
        if load32(kinds) != _BUFFER:
            return False
        buffer = result(frame) if is_result else argument(frame, number)
        dtype = buffer_dtype(buffer)
        if load64(buffer) < _BUFFER_SIZE:
            return False
        if dtype != wanted[number, 0] and dtype != wanted[number, 1]:
            return False
        if load64(buffer + 32) != wanted[number, 2]:
            return False
        for axis in range(wanted[number, 2]):
            size = wanted[number, 3 + axis]
            if sizes[size] < 0:
                sizes[size] = buffer_dim(buffer, axis)
            if sizes[size] != buffer_dim(buffer, axis):
                return False
    for number in range(load64(frame + 136)):
        if load32(load64(frame + 144) + 4 * number) != _SCALAR:
            return False
        if load32(load64(load64(frame + 160) + 8 * number)) != S64:
            return False
    return True


int64_attributes = _field(136)
"""int64_attributes(frame): attributes."""


@instructions
def int64_attribute(typingctx, frame, number):
    """Value of an attribute; they are sorted by name."""

    def generate(context, builder, signature, args):
        attributes = _follow(builder, args[0], (160,), False)
        place = builder.add(attributes, builder.shl(args[1], ir.Constant(ir.IntType(64), 3)))
        return _follow(builder, place, (0, 8, 0), False)

    return types.int64(types.int64, types.int64), generate
