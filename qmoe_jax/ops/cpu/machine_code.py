"""What the kernels of a CPU need and numba does not have: unaligned words, bit deposits, vectors.

Each is a few LLVM instructions for numba to compile where they are called. Vectors are LLVM's own,
of 16 floats: AVX-512 holds one in a register, any other machine in several. Addresses are not
checked here: callers have buffers with room for them.
"""

import contextlib
import hashlib
import importlib.resources
import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.extending import intrinsic, register_jitable

LANES = 16
"""Floats of a vector."""
_ENTRY_BYTES = 32
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_WORD = ir.IntType(64)
_HALF = ir.IntType(32)


def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call, without the GIL; the order of floating-point sums stays as written.

    Unwrapped, because a type-checking import hook may have put its own function around it.
    """
    return numba.njit(nogil=True, error_model="numpy", boundscheck=False)(inspect.unwrap(function))


def in_both(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let compiled code call a function that stays Python's own."""
    return register_jitable(inspect.unwrap(function))


def c_callback(function: Callable[..., int], *tables: np.ndarray) -> CFunc:
    """Compile a function of one address that returns one, for C to call.

    Its machine code is kept on disk: compiling takes many seconds, loading it a tenth of one. It
    lies in the folder that numba finds for its `cache=True`; without a writable one it is compiled
    in every process. numba asks only whether the function's own file has changed; here all of this
    folder count, and the tables that it holds.
    """
    callback: Any = CFunc(
        inspect.unwrap(function),
        ((types.int64,), types.int64),
        locals={},
        options={"nopython": True, "error_model": "numpy", "boundscheck": False},
    )
    cache: Any = None
    with contextlib.suppress(RuntimeError):  # no folder that can be written
        cache = FunctionCache(callback._pyfunc)
    if cache is not None:
        sources = importlib.resources.files("qmoe_jax.ops.cpu").iterdir()
        texts = sorted(source.read_bytes() for source in sources if source.name.endswith(".py"))
        parts = [*texts, *(table.tobytes() for table in tables)]
        stamp = hashlib.sha256(b"\0".join(parts)).hexdigest()
        base = cache._impl.filename_base
        cache._cache_file = IndexDataCacheFile(cache._cache_path, base, stamp)
        # Not by its bytecode and what it closes over, functions among that: the stamp has it all.
        cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple())
        callback._cache = cache
    callback.compile()
    return callback


def host_has(feature: str) -> bool:
    """Whether numba may use a feature of this CPU, by LLVM's name."""
    features = getattr(config, "CPU_FEATURES", None)  # of the variable NUMBA_CPU_FEATURES
    if features is not None:
        return f"+{feature}" in features.split(",")
    if getattr(config, "CPU_NAME", None) not in (None, "", "host"):
        return False
    return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))


def instructions(function: Callable[..., Any]) -> Any:
    """Make numba take a function's instructions; for type checkers, with other arguments."""
    return intrinsic(inspect.unwrap(function))


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Address of an array's first byte."""
    pointer = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(pointer, ir.IntType(8).as_pointer())


def _at(builder: Any, base: Any, offset: Any, kind: ir.Type) -> Any:
    return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())


@instructions
def get(typingctx, array, index):
    """Load an element of a contiguous array, without numba's test for negative indices."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.int64), generate


@instructions
def put(typingctx, array, index, value):
    """Store an element of a contiguous array."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.store(args[2], builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), generate


@instructions
def load_word(typingctx, array, offset):
    """Load 64 bits of a uint8 array from any byte on, the first byte lowest."""

    def generate(context, builder, signature, args):
        base = _data(context, builder, signature.args[0], args[0])
        load = builder.load(_at(builder, base, args[1], _WORD))
        load.align = 1
        return load

    return types.uint64(array, types.int64), generate


@instructions
def store_word(typingctx, array, offset, word):
    """Store 64 bits of a uint8 array from any byte on."""

    def generate(context, builder, signature, args):
        base = _data(context, builder, signature.args[0], args[0])
        builder.store(args[2], _at(builder, base, args[1], _WORD)).align = 1
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), generate


@instructions
def count_ones(typingctx, word):
    """Set bits of a word."""

    def generate(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@instructions
def reverse_bits(typingctx, word):
    """Return a word with its last bit first."""

    def generate(context, builder, signature, args):
        return builder.bitreverse(args[0])

    return types.uint64(types.uint64), generate


@instructions
def bfloat16_value(typingctx, bits):
    """Return the float32 that uint16 bits of a bfloat16 stand for."""

    def generate(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], _HALF), ir.Constant(_HALF, 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@instructions
def _deposit_in_hardware(typingctx, bits, mask):
    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_WORD, [_WORD, _WORD])
        pdep = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.bmi.pdep.64")
        return builder.call(pdep, args)

    return types.uint64(types.uint64, types.uint64), generate


def _deposit_by_loop(bits, mask):
    """Deal the lowest bits to the ones of the mask, the lowest first."""
    dealt = np.uint64(0)
    while mask:
        lowest = mask & (~mask + np.uint64(1))
        dealt |= lowest & (~(bits & np.uint64(1)) + np.uint64(1))
        bits >>= np.uint64(1)
        mask ^= lowest
    return dealt


deposit = _deposit_in_hardware if host_has("bmi2") else jitted(_deposit_by_loop)
"""deposit(bits, mask): deal the lowest bits to the ones of the mask, the lowest first."""


def _splat(builder: Any, value: Any) -> Any:
    vector = builder.insert_element(
        ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_HALF, 0)
    )
    zeros = ir.Constant(ir.VectorType(_HALF, LANES), [0] * LANES)
    return builder.shuffle_vector(vector, ir.Constant(_FLOATS, ir.Undefined), zeros)


def _splat_half(builder: Any, word: Any, number: int) -> Any:
    """Put the lower (0) or the upper half of a word into every lane."""
    if number:
        word = builder.lshr(word, _word(32))
    half = builder.trunc(word, _HALF)
    vector = builder.insert_element(
        ir.Constant(_INTEGERS, ir.Undefined), half, ir.Constant(_HALF, 0)
    )
    zeros = ir.Constant(_INTEGERS, [0] * LANES)
    return builder.shuffle_vector(vector, ir.Constant(_INTEGERS, ir.Undefined), zeros)


def _each(values: Any) -> Any:
    return ir.Constant(_INTEGERS, list(values))


def _lanes(builder: Any, halves: Any, half: int) -> Any:
    """Bits 16 half to 16 half + 15 of `_splat_half`, as a mask of lanes."""
    bits = _each(1 << 16 * half + lane for lane in range(LANES))
    return builder.icmp_unsigned("!=", builder.and_(halves, bits), _each([0] * LANES))


def _signs(builder: Any, halves: Any, half: int) -> Any:
    """Return the same bits as signs of lanes."""
    moved = builder.shl(halves, _each(31 - 16 * half - lane for lane in range(LANES)))
    return builder.and_(moved, _each([1 << 31] * LANES))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    name = f"llvm.fmuladd.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), (a, b, c))


def _zeros() -> Any:
    return ir.Constant(_FLOATS, [0.0] * LANES)


def _load(builder: Any, pointer: Any) -> Any:
    load = builder.load(pointer)
    load.align = 4
    return load


def _loop(builder: Any, count: Any, sums: list[Any], turn: Callable[[Any, list[Any]], list[Any]]):
    """Emit `sums = turn(i, sums)` for i below count; the sums stay in registers."""
    before = builder.block
    test, body, after = (builder.append_basic_block(name) for name in ("test", "body", "after"))
    builder.branch(test)
    builder.position_at_end(test)
    index = builder.phi(_WORD)
    index.add_incoming(ir.Constant(_WORD, 0), before)
    phis = []
    for value in sums:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    builder.cbranch(builder.icmp_signed("<", index, count), body, after)
    builder.position_at_end(body)
    results = turn(index, phis)
    following = builder.add(index, ir.Constant(_WORD, 1))
    last = builder.block
    builder.branch(test)
    index.add_incoming(following, last)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, last)
    builder.position_at_end(after)
    return phis


def _deposit(context: Any, builder: Any, bits: Any, mask: Any) -> Any:
    if host_has("bmi2"):
        kind = ir.FunctionType(_WORD, [_WORD, _WORD])
        pdep = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.bmi.pdep.64")
        return builder.call(pdep, (bits, mask))
    signature = types.uint64(types.uint64, types.uint64)
    return context.compile_internal(builder, _deposit_by_loop, signature, (bits, mask))


def _word(value: int) -> Any:
    return ir.Constant(_WORD, value)


def _bits_at(builder: Any, base: Any, rank: Any) -> Any:
    """64 bits of a string from bit `rank` on."""
    byte = builder.lshr(rank, _word(3))
    shift = builder.and_(rank, _word(7))
    low, high = (
        builder.load(_at(builder, base, builder.add(byte, _word(more)), _WORD)) for more in (0, 1)
    )
    low.align = high.align = 1
    # Not as a funnel shift, which is slow on AMD's cores: bits that both have are the same.
    return builder.or_(builder.lshr(low, shift), builder.shl(high, builder.sub(_word(8), shift)))


def _with_sign(builder: Any, vector: Any, signs: Any) -> Any:
    """Floats, negated where a sign is set."""
    flipped = builder.xor(builder.bitcast(vector, _INTEGERS), signs)
    return builder.bitcast(flipped, _FLOATS)


class _Sums:
    """Sums of a tile of tokens in registers: 32 rows each, in one way or two."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        # Two sums for each row, so that an addition need not wait for the one before.
        self.ways = 2 if tokens <= 4 else 1
        self.values = [_zeros()] * (2 * self.ways * tokens)

    def add(
        self, builder: Any, held: list[Any], ones: Any, minus: Any, row: Any, stride: Any
    ) -> None:
        """held += +-x for two columns: x of the first at the address `row`."""
        for column in range(2):
            ones_here = _splat_half(builder, ones, column)
            minus_here = _splat_half(builder, minus, column)
            masks = [_lanes(builder, ones_here, half) for half in range(2)]
            signs = [_signs(builder, minus_here, half) for half in range(2)]
            values = []
            if self.tokens > 1:
                one = ir.Constant(_FLOATS, [1.0] * LANES)
                values = [
                    builder.select(mask, _with_sign(builder, one, sign), _zeros())
                    for mask, sign in zip(masks, signs, strict=True)
                ]
            for token in range(self.tokens):
                value = builder.load(_at(builder, row, _word(4 * token), ir.FloatType()))
                vector = _splat(builder, value)
                for half in range(2):
                    number = (token * self.ways + column % self.ways) * 2 + half
                    if values:
                        held[number] = _multiply_add(builder, values[half], vector, held[number])
                        continue
                    signed = _with_sign(builder, vector, signs[half])
                    total = builder.fadd(held[number], signed)
                    held[number] = builder.select(masks[half], total, held[number])
            row = builder.gep(row, [stride])

    def store(self, builder: Any, held: list[Any], sums: Any, first: Any) -> None:
        """sums[first + token] += what is held."""
        for token in range(self.tokens):
            for half in range(2):
                total = held[token * self.ways * 2 + half]
                if self.ways == 2:
                    total = builder.fadd(total, held[(token * self.ways + 1) * 2 + half])
                place = builder.mul(builder.add(first, _word(token)), _word(128))
                pointer = _at(builder, sums, builder.add(place, _word(64 * half)), _FLOATS)
                total = builder.fadd(total, _load(builder, pointer))
                builder.store(total, pointer).align = 4


def add_columns(tokens: int) -> Callable[..., None]:
    """Return add_columns(entries, count, x, columns, first, sums).

    sums[first + t, r] += sum over columns c of +-x[c, t] where column c has a weight in row r, for
    `tokens` t. Entry i is of the columns 2 p and 2 p + 1: uint64 `entries`[i] has a word of 32 rows
    of each that have a weight, one of those where it is negative, and p. `x` is float32, tiles of
    [columns, tokens of the tile] one after another; `sums` is float32 [all tokens, 32].
    """

    @instructions
    def kernel(typingctx, entries, count, x, columns, first, sums):
        def generate(context, builder, signature, args):
            kinds = signature.args
            entries_at, x_at, sums_at = (
                _data(context, builder, kinds[n], args[n]) for n in (0, 2, 5)
            )
            _, count, _, columns, first, _ = args
            x_at = builder.gep(x_at, [builder.mul(builder.mul(first, columns), _word(4))])
            stride, step = _word(4 * tokens), _word(8 * tokens)
            state = _Sums(tokens)

            def turn(index: Any, held: list[Any]) -> list[Any]:
                held = list(held)
                entry = builder.gep(entries_at, [builder.mul(index, _word(_ENTRY_BYTES))])
                ones, minus, pair = (
                    builder.load(_at(builder, entry, _word(8 * n), _WORD)) for n in range(3)
                )
                row = builder.gep(x_at, [builder.mul(pair, step)])
                state.add(builder, held, ones, minus, row, stride)
                return held

            held = _loop(builder, count, state.values, turn)
            state.store(builder, held, sums_at, first)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(entries, integer, x, integer, integer, sums), generate

    return kernel


def deal_columns(tokens: int, *, keep: bool) -> Callable[..., int]:
    """Return deal_columns(scratch, masks, signs, second, every, some, count, x, sums).

    As `add_columns` of the first tokens and `count` pairs of columns, for which signs are dealt to
    masks on the way: integers and vectors keep different parts of a core busy. With `keep`, it
    leaves the entries of all pairs in `every`. Those of pairs of which `second` deals a bit to some
    weight, with these bits instead of the masks, are left in `some`; it returns how many.
    Both have room for count + 1.
    """

    @instructions
    def kernel(typingctx, scratch, masks, signs, second, every, some, count, x, sums):
        def generate(context, builder, signature, args):
            kinds = signature.args
            scratch_at, all_at, some_at, x_at, sums_at = (
                _data(context, builder, kinds[n], args[n]) for n in (0, 4, 5, 7, 8)
            )
            _, masks, signs, second, _, _, count, _, _ = args
            masks_at, signs_at, second_at = (
                builder.gep(scratch_at, [base]) for base in (masks, signs, second)
            )
            stride, step = _word(4 * tokens), _word(8 * tokens)
            state = _Sums(tokens)

            def put_entry(base: Any, number: Any, values: tuple[Any, ...]) -> None:
                entry = builder.gep(base, [builder.mul(number, _word(_ENTRY_BYTES))])
                for place, value in enumerate(values):
                    builder.store(value, _at(builder, entry, _word(8 * place), _WORD))

            def turn(index: Any, carried: list[Any]) -> list[Any]:
                rank, found, *held = carried
                ones = builder.load(_at(builder, masks_at, builder.mul(index, _word(8)), _WORD))
                ones.align = 1
                minus = _deposit(context, builder, _bits_at(builder, signs_at, rank), ones)
                large = _deposit(context, builder, _bits_at(builder, second_at, rank), ones)
                if keep:
                    put_entry(all_at, index, (ones, minus, index))
                put_entry(some_at, found, (large, minus, index))
                row = builder.gep(x_at, [builder.mul(index, step)])
                state.add(builder, held, ones, minus, row, stride)
                is_some = builder.zext(builder.icmp_unsigned("!=", large, _word(0)), _WORD)
                return [builder.add(rank, builder.ctpop(ones)), builder.add(found, is_some), *held]

            _, found, *held = _loop(builder, count, [_word(0), _word(0), *state.values], turn)
            state.store(builder, held, sums_at, _word(0))
            return found

        integer = types.int64
        return (
            integer(scratch, integer, integer, integer, every, some, integer, x, sums),
            generate,
        )

    return kernel


def multiply_row(tokens: int) -> Callable[..., None]:
    """Return multiply_row(bits, signs, words, low, high, x, width, first, sums).

    sums[first + t] = sum over weights i of w[i] x[first + t, i] for `tokens` t, where w[i] is 0, or
    where bit i of `bits` is set `low`, or `high` if its sign is: `signs` has one for each set bit.
    Both are uint8, `bits` of `words` words of 64 bits; `x` is float32 [all tokens, width], at least
    64 `words` wide; `sums` float32 [all tokens].
    """
    ways = {1: 4, 2: 2, 4: 2}.get(tokens, 1)  # sums apart, so that an addition need not wait

    @instructions
    def kernel(typingctx, bits, signs, words, low, high, x, width, first, sums):
        def generate(context, builder, signature, args):
            kinds = signature.args
            bits_at, signs_at, x_at, sums_at = (
                _data(context, builder, kinds[n], args[n]) for n in (0, 1, 5, 8)
            )
            _, _, words, low, high, _, width, first, _ = args
            stride = builder.mul(width, _word(4))
            x_at = builder.gep(x_at, [builder.mul(first, stride)])
            rows = [x_at]
            for _ in range(tokens - 1):
                rows.append(builder.gep(rows[-1], [stride]))
            lower, upper = _splat(builder, low), _splat(builder, high)

            def quarter(word: Any, number: int) -> Any:
                if number:
                    word = builder.lshr(word, _word(LANES * number))
                short = builder.trunc(word, ir.IntType(LANES))
                return builder.bitcast(short, ir.VectorType(ir.IntType(1), LANES))

            def turn(index: Any, carried: list[Any]) -> list[Any]:
                rank, *held = carried
                ones = builder.load(_at(builder, bits_at, builder.mul(index, _word(8)), _WORD))
                ones.align = 1
                minus = _deposit(context, builder, _bits_at(builder, signs_at, rank), ones)
                place = builder.mul(index, _word(4 * 64))
                for number in range(4):
                    value = builder.select(quarter(minus, number), upper, lower)
                    value = builder.select(quarter(ones, number), value, _zeros())
                    at = builder.add(place, _word(4 * LANES * number))
                    for token, row in enumerate(rows):
                        vector = _load(builder, _at(builder, row, at, _FLOATS))
                        target = token * ways + number % ways
                        held[target] = _multiply_add(builder, value, vector, held[target])
                return [builder.add(rank, builder.ctpop(ones)), *held]

            start = [_word(0)] + [_zeros()] * (tokens * ways)
            _, *held = _loop(builder, words, start, turn)
            for token in range(tokens):
                own = held[token * ways : (token + 1) * ways]
                while len(own) > 1:
                    own = [builder.fadd(a, b) for a, b in zip(own[::2], own[1::2], strict=True)]
                total = _sum_of_lanes(builder, own[0])
                place = builder.mul(builder.add(first, _word(token)), _word(4))
                builder.store(total, _at(builder, sums_at, place, ir.FloatType()))
            return context.get_dummy_value()

        integer, real = types.int64, types.float32
        return (
            types.void(bits, signs, integer, real, real, x, integer, integer, sums),
            generate,
        )

    return kernel


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    """Add halves until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        parts = [
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(
                    ir.VectorType(_HALF, lanes), list(range(lanes * part, lanes * (part + 1)))
                ),
            )
            for part in range(2)
        ]
        vector = builder.fadd(*parts)
    return builder.extract_element(vector, ir.Constant(_HALF, 0))
