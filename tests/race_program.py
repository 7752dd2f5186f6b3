"""Products with stored codes on threads of their own; what `test_cpu_races.py` runs under Helgrind.

XLA's pool is played by pthreads that nothing of Python's touches: a lock of Python's would order
what they do. Atomic operations order nothing for Helgrind. Last comes a race, which has to be seen.
"""

import ctypes
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from fake_xla import FakeApi, FakeCall, Schedule

libc = ctypes.CDLL(None)


class Pool(FakeApi):
    """Begins a thread for every task."""

    def schedule(self, address):
        asked = Schedule.from_address(address)
        self.scheduled.append(begin(asked.task, asked.data))

    def join(self):
        for thread in self.scheduled:
            assert libc.pthread_join(thread, None) == 0


def begin(task, data):
    thread = ctypes.c_size_t()
    code = libc.pthread_create(
        ctypes.byref(thread), None, ctypes.c_void_p(task), ctypes.c_void_p(data)
    )
    assert code == 0
    return thread


def save_operands(folder):
    """Make what the products take, apart, so that JAX need not run under Helgrind."""
    import fake_xla
    from test_cpu_product import make_experts, make_tokens

    from qmoe_jax.ops.cpu import products

    for coding in products.CODINGS:
        experts, _ = make_experts(coding, 4, 400, 150, seed=3)
        x, index = make_tokens(40, 4, 150)
        names = products._array_names(experts.spec)
        operands = [np.array(x), np.array(index), *fake_xla.stored(experts, names)]
        np.savez(Path(folder) / f"{coding}.npz", *operands)


def multiply(path):
    from qmoe_jax.ops.cpu import targets

    with np.load(path) as file:
        operands = [file[name] for name in file.files]
    operands = [x.view(ml_dtypes.bfloat16) if x.dtype.kind == "V" else x for x in operands]
    handler, expected = targets.handler(path.stem), None
    for threads in (1, 4, 4, 4):
        y = np.full((40, 400), 7, np.float32)
        pool = Pool()
        assert FakeCall(pool, operands, y, [1, threads]).run(handler) is None
        pool.join()
        assert len(pool.scheduled) == threads - 1
        expected = y if expected is None else expected
        assert expected.any()
        np.testing.assert_array_equal(y, expected)
    print("multiplied", path.stem)


def race():
    """Count in threads without atomics."""
    from qmoe_jax.ops.cpu.machine_code import c_callback
    from qmoe_jax.ops.cpu.xla_call import load64, store64

    def count(address):
        for _ in range(1000):
            store64(address, load64(address) + 1)
        return 0

    task, word = c_callback(count), ctypes.c_int64(0)
    for thread in [begin(task.address, ctypes.addressof(word)) for _ in range(2)]:
        assert libc.pthread_join(thread, None) == 0
    print("raced", ctypes.addressof(word))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not list(folder.glob("*.npz")):
        save_operands(folder)
    for path in sorted(folder.glob("*.npz")):
        multiply(path)
    race()
