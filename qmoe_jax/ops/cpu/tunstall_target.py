"""XLA's call of a product with "tunstall" codes; its reference is `multiply_piece` on plain arrays.

Operands: x, float32 [tokens, width]; experts of tokens, int32 [tokens]; the stored arrays in the
order of `products`. The result is y, float32 [tokens, rows].
"""

import numpy as np

from qmoe_jax.codec.tunstall import NUM_CODEWORDS, NUM_DICTIONARIES
from qmoe_jax.ops.cpu import job as jobs
from qmoe_jax.ops.cpu.job import (
    allocate,
    begin_job,
    call_helpers,
    end_job,
    end_piece,
    fail,
    leave,
    release_memory,
    take_piece,
    work_arrays,
)
from qmoe_jax.ops.cpu.machine_code import jitted
from qmoe_jax.ops.cpu.tunstall_kernel import ROWS, multiply_piece, padded_width, scratch_bytes
from qmoe_jax.ops.cpu.xla_call import (
    BF16,
    F32,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    S32,
    U8,
    U16,
    U32,
    answers_metadata,
    api_fits,
    argument,
    array_at,
    buffer_dtype,
    data_address,
    entry_point,
    error,
    fits,
    int64_attributes,
    stack_words,
    store64,
    text,
    wanted_buffers,
)

_TOKENS, _WIDTH, _ROWS, _EXPERTS, _OFFSETS, _ANY, _2 = range(7)
_WANTED = wanted_buffers(
    (F32, F32, (_TOKENS, _WIDTH)),
    (S32, S32, (_TOKENS,)),
    (U32, U32, (_ANY,)),  # words
    (S32, S32, (_OFFSETS,)),  # expert_offsets
    (U8, U8, (_EXPERTS,)),  # dictionaries
    (S32, S32, (_EXPERTS,)),  # shortest_rows
    (U8, U16, (_EXPERTS, _ROWS)),  # row_lengths
    (BF16, BF16, (_EXPERTS, _ROWS, _2)),  # levels
    (F32, F32, (_TOKENS, _ROWS)),
)
_LENGTHS = 6
_sizes = stack_words(7)
_wrong_operands = text(
    "operands of qmoe_jax's product with tunstall codes are not those that "
    "qmoe_jax.ops.cpu.products.stored_product gives; call that"
)
_no_memory = text("there is no memory left for a product with tunstall codes")


@jitted
def work(job):
    """Multiply pieces of a job until none is left, and leave it."""
    facts = array_at(job, (jobs.HEADER,), np.int64)
    rows, width, tokens = facts[jobs.ROWS], facts[jobs.WIDTH], facts[jobs.TOKENS]
    experts, most = facts[jobs.EXPERTS], facts[jobs.MOST]
    length_bytes = facts[jobs.LENGTH_BYTES]
    order, starts, busy, cuts = work_arrays(job)
    columns = padded_width(width)
    string = scratch_bytes(width)
    memory = 0
    while True:
        piece = take_piece(job)
        if piece < 0:
            break
        if memory == 0:
            memory = allocate(4 * most * (columns + 1) + 2 * string)
        if memory == 0:
            fail(job)
            end_piece(job)
            continue
        placed = array_at(memory, (most, columns), np.float32)
        at = memory + 4 * most * columns
        sums = array_at(at, (most,), np.float32)
        at += 4 * most
        bits = array_at(at, (string,), np.uint8)
        signs = array_at(at + string, (string,), np.uint8)
        multiply_piece(
            array_at(facts[jobs.ARRAYS], (facts[jobs.WORD_BYTES],), np.uint8),
            array_at(facts[jobs.ARRAYS + 1], (experts + 1,), np.int32),
            array_at(facts[jobs.ARRAYS + 2], (experts,), np.uint8),
            array_at(facts[jobs.ARRAYS + 3], (experts,), np.int32),
            array_at(facts[jobs.ARRAYS + 4], (experts * rows * length_bytes,), np.uint8),
            length_bytes,
            array_at(facts[jobs.ARRAYS + 5], (experts, rows, 2), np.uint16),
            array_at(facts[jobs.TABLES], (NUM_DICTIONARIES * NUM_CODEWORDS,), np.uint64),
            array_at(facts[jobs.TABLES + 1], (NUM_DICTIONARIES,), np.int64),
            array_at(facts[jobs.X], (tokens, width), np.float32),
            order, starts, busy, cuts[piece], cuts[piece + 1], most,
            array_at(facts[jobs.Y], (tokens, rows), np.float32),
            bits, signs, placed, sums,
        )  # fmt: skip
        end_piece(job)
    if memory != 0:
        release_memory(memory)
    leave(job)


_work = entry_point(work)


@jitted
def handle(frame, entries, longest):
    """Answer a call; return an error or 0."""
    if answers_metadata(frame):
        return 0
    sizes = array_at(_sizes(), (7,), np.int64)
    for number in range(_2):
        sizes[number] = -1
    sizes[_2] = 2
    is_right = api_fits(frame) and fits(frame, _WANTED, sizes) and int64_attributes(frame) == 2
    if not (is_right and sizes[_OFFSETS] == sizes[_EXPERTS] + 1):
        return error(frame, INVALID_ARGUMENT, _wrong_operands())
    blocks = (sizes[_ROWS] + ROWS - 1) // ROWS
    job = begin_job(frame, sizes[_EXPERTS], blocks, _LENGTHS, 0)
    if job == 0:
        return error(frame, RESOURCE_EXHAUSTED, _no_memory())
    length_bytes = 1 if buffer_dtype(argument(frame, _LENGTHS)) == U8 else 2
    store64(job + 8 * jobs.LENGTH_BYTES, length_bytes)
    store64(job + 8 * jobs.TABLES, data_address(entries))
    store64(job + 8 * (jobs.TABLES + 1), data_address(longest))
    call_helpers(frame, job, _work())
    work(job)
    return end_job(frame, job)
