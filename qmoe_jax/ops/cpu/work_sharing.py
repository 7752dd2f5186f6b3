"""A layer's tokens by expert, and where the blocks of the experts reached are cut into pieces."""

import numpy as np

from qmoe_jax.ops.cpu.machine_code import get, jitted


@jitted
def stored_length(lengths, size, number):
    """Return one of the lengths of `size` bytes each, 1, 2 or 4, that lie in a uint8 array."""
    length = np.int64(get(lengths, number * size))
    if size >= 2:
        length |= np.int64(get(lengths, number * size + 1)) << 8
    if size == 4:
        length |= np.int64(get(lengths, number * size + 2)) << 16
        length |= np.int64(get(lengths, number * size + 3)) << 24
    return length


@jitted
def cut_work(
    expert_index, expert_offsets, lengths, length_bytes, blocks, most_tokens, piece, most_pieces,
    order, starts, busy, cuts, places,
):  # fmt: skip
    """Sort tokens by expert, and cut the blocks of experts that have some into like pieces.

    Args:
      expert_index: int32 [tokens]; outside [0, experts): no expert.
      expert_offsets: int32 [experts + 1], of stored words.
      lengths: uint8, stored bytes of each block [experts, blocks] as `stored_length` takes them.
      length_bytes: of a length; 0: all blocks of an expert are alike.
      blocks: of an expert.
      most_tokens: of an expert that share a decode.
      piece: least cost of a piece: a byte costs 7 for each decode and 1 for each token.
      most_pieces: at most so many; never more than blocks.
      order: int64 [tokens], gets the tokens at each sorted place; those without an expert last.
      starts: int64 [experts + 1], gets the first place of each expert.
      busy: int64 [experts], gets the experts with tokens.
      cuts: int64 [most_pieces + 1], gets where pieces begin and the last one ends: number of the
        expert among the busy ones, times blocks, plus block.
      places: int64 [experts + 1], scratch.

    Returns:
      Busy experts, pieces, and tokens of the busiest expert.
    """
    experts = starts.size - 1
    starts[:] = 0
    for token in range(expert_index.size):
        expert = np.int64(expert_index[token])
        if 0 <= expert < experts:
            starts[expert + 1] += 1
    num_busy = 0
    busiest = 0
    for expert in range(experts):
        if starts[expert + 1] > 0:
            busy[num_busy] = expert
            num_busy += 1
            busiest = max(busiest, starts[expert + 1])
        starts[expert + 1] += starts[expert]
    for expert in range(experts + 1):
        places[expert] = starts[expert]
    for token in range(expert_index.size):
        expert = np.int64(expert_index[token])
        if not 0 <= expert < experts:
            expert = experts
        order[places[expert]] = token
        places[expert] += 1

    total = 0.0
    found = pieces = 1
    for turn in range(2):
        # First the sum of all costs, then the places where it passes a piece.
        cost = 0.0
        found = 1
        pieces = max(1, min(np.int64(min(total / piece, 1e9)), most_pieces, num_busy * blocks))
        for number in range(num_busy):
            expert = busy[number]
            tokens = starts[expert + 1] - starts[expert]
            a_byte = 7.0 * ((tokens + most_tokens - 1) // most_tokens) + tokens
            size = 4.0 * (np.int64(expert_offsets[expert + 1]) - np.int64(expert_offsets[expert]))
            for block in range(blocks):
                if turn == 1:
                    while found < pieces and cost * pieces >= total * found:
                        cuts[found] = number * blocks + block
                        found += 1
                if length_bytes > 0:
                    cost += a_byte * stored_length(lengths, length_bytes, expert * blocks + block)
                else:
                    cost += a_byte * max(size, 0.0) / blocks
        total = cost
    while found < pieces:
        cuts[found] = num_busy * blocks
        found += 1
    cuts[0] = 0
    cuts[pieces] = num_busy * blocks
    return num_busy, pieces, busiest
