"""XLA's call of a product with "lattice" codes; its reference is `multiply_piece` on plain arrays.

Operands: x, float32 [tokens, width]; experts of tokens, int32 [tokens]; the stored arrays in the
order of `products`. The result is y, float32 [tokens, rows].
"""

import numpy as np

from qmoe_jax.codec.lattice_dictionaries import NUM_CODEWORDS, NUM_DICTIONARIES
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
from qmoe_jax.ops.cpu.lattice_kernel import NUM_REGIONS, ROWS, multiply_piece, region_bytes
from qmoe_jax.ops.cpu.machine_code import jitted
from qmoe_jax.ops.cpu.xla_call import (
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

_TOKENS, _WIDTH, _ROWS, _EXPERTS, _OFFSETS, _BLOCKS, _LEANS, _ANY, _3, _15, _4, _8 = range(12)
_WANTED = wanted_buffers(
    (F32, F32, (_TOKENS, _WIDTH)),
    (S32, S32, (_TOKENS,)),
    (U32, U32, (_ANY,)),  # words
    (S32, S32, (_OFFSETS,)),  # expert_offsets
    (U16, U32, (_EXPERTS, _BLOCKS)),  # block_lengths
    (S32, S32, (_EXPERTS,)),  # grouped_columns
    (U16, U16, (_EXPERTS, _3, _15)),  # schedules
    (U8, U8, (_EXPERTS, _4)),  # dictionaries
    (U8, U8, (_EXPERTS, _LEANS)),  # leans
    (U8, U8, (_EXPERTS, _WIDTH)),  # columns
    (U8, U8, (_EXPERTS, _8)),  # bases
    (F32, F32, (_EXPERTS,)),  # origins
    (F32, F32, (_TOKENS, _ROWS)),
)
_LENGTHS = 4
_sizes = stack_words(12)
_wrong_operands = text(
    "operands of qmoe_jax's product with lattice codes are not those that "
    "qmoe_jax.ops.cpu.products.stored_product gives; call that"
)
_no_memory = text("there is no memory left for a product with lattice codes")


@jitted
def work(job):
    """Multiply pieces of a job until none is left, and leave it."""
    facts = array_at(job, (jobs.HEADER,), np.int64)
    rows, width, tokens = facts[jobs.ROWS], facts[jobs.WIDTH], facts[jobs.TOKENS]
    experts, most = facts[jobs.EXPERTS], facts[jobs.MOST]
    blocks = (rows + ROWS - 1) // ROWS
    length_bytes = facts[jobs.LENGTH_BYTES]
    pairs = (width + 1) // 2
    region = region_bytes(width)
    order, starts, busy, cuts = work_arrays(job)
    memory = 0
    while True:
        piece = take_piece(job)
        if piece < 0:
            break
        if memory == 0:
            words = 8 * (pairs + 1) + 7 * NUM_DICTIONARIES + 257
            numbers = 2 * width + 2 * pairs * most + ROWS * most
            memory = allocate(8 * words + 4 * numbers + NUM_REGIONS * region)
        if memory == 0:
            fail(job)
            end_piece(job)
            continue
        at = memory
        pair_entries = array_at(at, (2, pairs + 1, 4), np.uint64)
        at += 64 * (pairs + 1)
        ends = array_at(at, (7, NUM_DICTIONARIES), np.int64)
        at += 56 * NUM_DICTIONARIES
        counts = array_at(at, (257,), np.int64)
        at += 8 * 257
        places = array_at(at, (width,), np.int32)
        at += 4 * width
        column_steps = array_at(at, (width,), np.float32)
        at += 4 * width
        placed = array_at(at, (2 * pairs * most,), np.float32)
        at += 8 * pairs * most
        sums = array_at(at, (most, ROWS), np.float32)
        at += 4 * ROWS * most
        scratch = array_at(at, (NUM_REGIONS, region), np.uint8)
        columns = min(rows, width)
        multiply_piece(
            array_at(facts[jobs.ARRAYS], (facts[jobs.WORD_BYTES],), np.uint8),
            array_at(facts[jobs.ARRAYS + 1], (experts + 1,), np.int32),
            array_at(facts[jobs.ARRAYS + 2], (experts * blocks * length_bytes,), np.uint8),
            length_bytes,
            array_at(facts[jobs.ARRAYS + 3], (experts,), np.int32),
            array_at(facts[jobs.ARRAYS + 4], (experts, 3, 15), np.uint16),
            array_at(facts[jobs.ARRAYS + 5], (experts, 4), np.uint8),
            array_at(facts[jobs.ARRAYS + 6], (experts, (columns + 7) // 8), np.uint8),
            array_at(facts[jobs.ARRAYS + 7], (experts, width), np.uint8),
            array_at(facts[jobs.ARRAYS + 8], (experts, 8), np.uint8),
            array_at(facts[jobs.ARRAYS + 9], (experts,), np.float32),
            array_at(facts[jobs.TABLES + 2], (256,), np.float32),
            array_at(facts[jobs.TABLES], (NUM_DICTIONARIES * NUM_CODEWORDS,), np.uint64),
            array_at(facts[jobs.TABLES + 1], (NUM_DICTIONARIES,), np.int64),
            array_at(facts[jobs.X], (tokens, width), np.float32),
            order, starts, busy, cuts[piece], cuts[piece + 1], most,
            array_at(facts[jobs.Y], (tokens, rows), np.float32),
            scratch, pair_entries, ends, counts, places, column_steps, placed, sums,
        )  # fmt: skip
        end_piece(job)
    if memory != 0:
        release_memory(memory)
    leave(job)


_work = entry_point(work)


@jitted
def handle(frame, entries, longest, steps):
    """Answer a call; return an error or 0."""
    if answers_metadata(frame):
        return 0
    sizes = array_at(_sizes(), (12,), np.int64)
    for number in range(_3):
        sizes[number] = -1
    sizes[_3], sizes[_15], sizes[_4], sizes[_8] = 3, 15, 4, 8
    is_right = api_fits(frame) and fits(frame, _WANTED, sizes) and int64_attributes(frame) == 2
    if is_right:
        is_right = (
            sizes[_OFFSETS] == sizes[_EXPERTS] + 1
            and sizes[_BLOCKS] == (sizes[_ROWS] + ROWS - 1) // ROWS
            and sizes[_LEANS] == (min(sizes[_ROWS], sizes[_WIDTH]) + 7) // 8
        )
    if not is_right:
        return error(frame, INVALID_ARGUMENT, _wrong_operands())
    length_bytes = 2 if buffer_dtype(argument(frame, _LENGTHS)) == U16 else 4
    job = begin_job(frame, sizes[_EXPERTS], sizes[_BLOCKS], _LENGTHS, length_bytes)
    if job == 0:
        return error(frame, RESOURCE_EXHAUSTED, _no_memory())
    store64(job + 8 * jobs.LENGTH_BYTES, length_bytes)
    store64(job + 8 * jobs.TABLES, data_address(entries))
    store64(job + 8 * (jobs.TABLES + 1), data_address(longest))
    store64(job + 8 * (jobs.TABLES + 2), data_address(steps))
    call_helpers(frame, job, _work())
    work(job)
    return end_job(frame, job)
