"""A product under way: a block of memory from which XLA's threads take pieces of the work.

The thread that XLA calls takes pieces too, until none is left, and then waits only for threads that
are at one: it needs none of the pool's, so nothing can deadlock. A task that the pool begins later
finds no piece. The last to leave frees the block.
"""

import os

import numpy as np

from qmoe_jax.ops.cpu.machine_code import count_ones, jitted
from qmoe_jax.ops.cpu.work_sharing import cut_work
from qmoe_jax.ops.cpu.xla_call import (
    RESOURCE_EXHAUSTED,
    argument,
    array_at,
    atomic_add,
    buffer_data,
    buffer_dim,
    c_function,
    error,
    int64_attribute,
    load64,
    num_arguments,
    num_pool_threads,
    result,
    schedule,
    stack_words,
    store64,
    text,
)

# What lies where in a job, in words of 8 bytes; then come the arrays of `cut_work`.
NEXT, DONE, REFERENCES, FAILED, PIECES, MOST, THREADS = range(7)
TOKENS, EXPERTS, ROWS, WIDTH, X, Y, WORD_BYTES, LENGTH_BYTES = range(7, 15)
TABLES, ARRAYS, HEADER = 15, 20, 32
MOST_TOKENS = 128
"""Tokens of an expert that share a decode; their x, by column, should stay in a core's cache."""
PIECES_A_THREAD = 16
_MOST_THREADS = 4096
_SPINS = 2000

_spare = stack_words(16)
_malloc, _free = c_function("malloc"), c_function("free")
_memory_ran_out = text("there is no memory left for a product with stored codes")

if hasattr(os, "sched_yield"):
    _sched_yield = c_function("sched_yield")

    @jitted
    def _give_way():
        _sched_yield(())

else:

    @jitted
    def _give_way():
        pass


if hasattr(os, "sched_getaffinity"):
    _sched_getaffinity = c_function("sched_getaffinity")

    @jitted
    def _num_cores(spare):
        """Cores that this thread may run on, or 0; as `host_threads.num_threads`."""
        if _sched_getaffinity((0, 128, spare)) << 32 != 0:
            return 0
        cores = 0
        for place in range(0, 128, 8):
            cores += count_ones(load64(spare + place))
        return cores

else:

    @jitted
    def _num_cores(spare):
        return 0


@jitted
def allocate(size):
    """Address of memory, or 0; `release_memory` frees it."""
    return _malloc((size,))


@jitted
def release_memory(address):
    """Free what `allocate` returned."""
    _free((address,))


@jitted
def work_arrays(job):
    """Return order, starts, busy and cuts; see `cut_work`."""
    header = array_at(job, (HEADER,), np.int64)
    tokens, experts = header[TOKENS], header[EXPERTS]
    at = job + 8 * HEADER
    order = array_at(at, (tokens,), np.int64)
    at += 8 * tokens
    starts = array_at(at, (experts + 1,), np.int64)
    at += 8 * (experts + 1)
    busy = array_at(at, (experts,), np.int64)
    at += 8 * experts
    cuts = array_at(at, (header[PIECES] + 1,), np.int64)
    return order, starts, busy, cuts


@jitted
def begin_job(frame, experts, blocks, lengths_operand, length_bytes):
    """Make a job of a frame that fits: operands are x, experts of tokens, then the stored arrays.

    Words and offsets of experts are the first two of those.

    Args:
      frame: its attributes are the least work of a piece and, unless 0, the threads.
      experts: of the stored arrays.
      blocks: of an expert, in which work is cut.
      lengths_operand: which has the blocks' stored lengths, if `length_bytes` is not 0.
      length_bytes: of a length; 0: all blocks of an expert are alike.

    Returns:
      Its address, or 0 where memory ran out.
    """
    x, y = argument(frame, 0), result(frame)
    tokens = buffer_dim(x, 0)
    threads = int64_attribute(frame, 1)
    if threads <= 0:
        spare = _spare()
        threads = max(1, num_pool_threads(frame, spare))
        cores = _num_cores(spare)
        if cores > 0:
            threads = min(threads, cores)
    threads = min(threads, _MOST_THREADS)
    most_pieces = PIECES_A_THREAD * threads
    num_words = HEADER + tokens + 3 * experts + 2 + most_pieces + 1
    job = allocate(8 * num_words)
    if job == 0:
        return 0
    header = array_at(job, (HEADER,), np.int64)
    header[:] = 0
    header[PIECES] = most_pieces
    header[THREADS] = threads
    header[TOKENS] = tokens
    header[EXPERTS] = experts
    header[ROWS] = buffer_dim(y, 1)
    header[WIDTH] = buffer_dim(x, 1)
    header[X] = buffer_data(x)
    header[Y] = buffer_data(y)
    header[WORD_BYTES] = 4 * buffer_dim(argument(frame, 2), 0)
    for number in range(num_arguments(frame) - 2):
        header[ARRAYS + number] = buffer_data(argument(frame, 2 + number))
    order, starts, busy, cuts = work_arrays(job)
    places = array_at(job + 8 * (num_words - experts - 1), (experts + 1,), np.int64)
    size = experts * blocks * length_bytes
    num_busy, pieces, busiest = cut_work(
        array_at(buffer_data(argument(frame, 1)), (tokens,), np.int32),
        array_at(buffer_data(argument(frame, 3)), (experts + 1,), np.int32),
        array_at(buffer_data(argument(frame, lengths_operand)), (size,), np.uint8),
        length_bytes, blocks, MOST_TOKENS, max(int64_attribute(frame, 0), 1), most_pieces, order,
        starts, busy, cuts, places,
    )  # fmt: skip
    header[PIECES] = pieces if num_busy > 0 else 0
    header[MOST] = min(MOST_TOKENS, busiest)
    y_rows = array_at(header[Y], (tokens, header[ROWS]), np.float32)
    for place in range(starts[experts], tokens):
        y_rows[order[place]] = 0
    return job


@jitted
def take_piece(job):
    """Take a piece that no other thread has; return its number, or -1."""
    piece = atomic_add(job + 8 * NEXT, 1)
    return piece if piece < load64(job + 8 * PIECES) else -1


@jitted
def end_piece(job):
    """Tell that a piece is done."""
    atomic_add(job + 8 * DONE, 1)


@jitted
def fail(job):
    """Tell that memory ran out."""
    atomic_add(job + 8 * FAILED, 1)


@jitted
def leave(job):
    """Leave a job; the last one frees it."""
    if atomic_add(job + 8 * REFERENCES, -1) == 1:
        release_memory(job)


@jitted
def call_helpers(frame, job, task):
    """Have XLA's threads call task(job), and count them and the calling thread as in the job."""
    helpers = max(min(load64(job + 8 * THREADS), load64(job + 8 * PIECES)) - 1, 0)
    # The caller's own work, and its waiting for the end.
    store64(job + 8 * REFERENCES, helpers + 2)
    for _ in range(helpers):
        if not schedule(frame, task, job):
            leave(job)


@jitted
def end_job(frame, job):
    """Wait until all pieces are done and leave; return an error or 0."""
    pieces = load64(job + 8 * PIECES)
    turns = 0
    while atomic_add(job + 8 * DONE, 0) < pieces:
        turns += 1
        if turns > _SPINS:
            _give_way()
    failed = load64(job + 8 * FAILED) > 0
    leave(job)
    return error(frame, RESOURCE_EXHAUSTED, _memory_ran_out()) if failed else 0
