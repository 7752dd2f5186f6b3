"""The model of the lattice's kernel: bank conflicts, and what it counts of codes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_emulation.tensors import lattice_codes

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import kernel_sass
import wavefronts

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("words", "atomic", "expected"),
    [
        (LANES, False, 1),
        (LANES * 2, False, 2),
        (LANES * 32, False, 32),
        (LANES * 0 + 7, False, 1),  # all lanes are given one word
        (LANES * 0 + 7, True, 32),  # but add to it one after another
        (LANES // 2, True, 2),
    ],
)
def test_bank_conflicts(words, atomic, expected):
    everyone = np.ones((1, 32), bool)
    assert wavefronts.bank_conflicts(words[None], everyone, atomic=atomic) == [expected]
    nobody = np.zeros((1, 32), bool)
    assert wavefronts.bank_conflicts(words[None], nobody, atomic=atomic) == [0]


def test_work_is_that_of_the_codes():
    codes, levels = lattice_codes(np.random.default_rng(0), (1, 40, 700), 0.8)
    expert = wavefronts.Expert.of(codes, levels)
    work = wavefronts.read(expert)
    assert work.columns == 2 * expert.magnitudes.shape[1]  # two blocks of 32 rows
    own = np.pad(expert.magnitudes, ((0, 24), (0, 0))).reshape(2, 32, -1)
    groups = turns = 0
    for block in own:
        for task in expert.tasks():
            for first in range(task.start, task.stop, 32):
                columns = block[:, first : min(first + 32, task.stop)]
                groups += 1
                turns += int((columns != 0).sum(axis=0).max())
    assert work.columns_of_32 == groups
    assert work.turns + work.turns_of_third == turns
    # Every codeword is in a round.
    rounds = 32 * (4 * work.rounds_of_128 + work.rounds_of_32 + work.raw_words * 4)
    assert rounds >= sum(len(string) for block in (0, 1) for string in expert.strings(block))


def test_the_busier_pipe_decides():
    one = wavefronts.seconds(1e6, 0)
    assert wavefronts.seconds(1e6, 1e5) == one
    assert wavefronts.seconds(1e6, 1e6) > one


CODE = """
        /*0000*/                   MOV R0, R1 ;
.L_x_1:
        /*0010*/                   LDS R2, [R0] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   ATOMS.OR RZ, [R0], R2 ;
.L_x_3:
        /*0040*/                   IADD3 R0, R0, R0, R0 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_loops_of_machine_code():
    sass = kernel_sass.parse(CODE)
    assert sass.loops == [(1, 7), (4, 6)]
    assert sass.count((1, 7), "IADD3") == 0
    assert sass.count((1, 7), "IADD3", own=False) == 1
    assert sass.executed((1, 7)) == 3
    assert sass.executed((1, 7), kept="ATOMS") == 4
