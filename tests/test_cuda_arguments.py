"""The structs that kernels take by value: declared alike in CUDA C++ and in Python."""

import ctypes
import re
import shutil

import numpy as np
import pytest
from cuda_emulation import emulator, launches

from qmoe_jax.codec.codings import coding_names, get_coding
from qmoe_jax.codec.cuda_interface import ArgumentStruct, is_pointer
from qmoe_jax.ops.cuda import fragment_products, kernels
from qmoe_jax.ops.cuda.launcher import KernelCall, StructArgument

WITH_KERNELS = [name for name in coding_names() if get_coding(name).cuda]
PRODUCT_AND_OTHERS = (
    kernels.PRODUCT,
    kernels.MATMUL,
    kernels.EXPANSION,
    kernels.ENCODING,
    fragment_products.FRAGMENTS,
    fragment_products.FRAGMENT_PRODUCT,
)


def declared() -> dict[str, ArgumentStruct]:
    """All structs of the Python side, by name."""
    codings = [get_coding(name).cuda for name in coding_names()]
    structs = [coding.arguments for coding in codings if coding] + [*PRODUCT_AND_OTHERS]
    return {struct.name: struct for struct in structs}


def stated() -> dict[str, list[tuple[str, str, str]]]:
    """(name, C type, comment) of the fields of every struct of arguments in the sources."""
    structs = {}
    for path in sorted(emulator.KERNEL_FOLDER.glob("*.cu*")):
        for match in re.finditer(
            r"^struct (\w+(?:Arrays|Arguments)) \{\n(.*?)^\};", path.read_text(), re.M | re.S
        ):
            fields: list[tuple[str, str, str]] = []
            for line in match[2].splitlines():
                code, _, comment = line.partition("//")
                if code.strip():
                    field = re.fullmatch(r"((?:const )?\w+\*?) (\w+);", code.strip())
                    assert field, f"{path.name}: {line}"
                    fields.append((field[2], field[1], comment.strip()))
                else:
                    name, kind, before = fields.pop()
                    fields.append((name, kind, f"{before} {comment.strip()}"))
            assert match[1] not in structs
            structs[match[1]] = fields
    return structs


def test_both_sides_have_the_same_structs():
    assert set(stated()) == set(declared())


@pytest.mark.parametrize("struct", declared().values(), ids=lambda struct: struct.name)
class TestStruct:
    def test_fields_are_those_of_the_sources(self, struct):
        fields = stated()[struct.name]
        assert struct.fields == tuple((name, kind) for name, kind, _ in fields)

    def test_every_field_is_explained(self, struct):
        """Pointers with the dtype and shape of their array."""
        for name, kind, comment in stated()[struct.name]:
            assert comment, name
            if is_pointer(kind):
                assert re.match(
                    r"(u?int\d+|b?float\d+)( or (u?int\d+|b?float\d+))? \[[^]]+\]", comment
                ), name

    def test_layout_is_that_of_c(self, struct):
        types = {"int": ctypes.c_int, "u32": ctypes.c_uint}
        fields = [
            (name, ctypes.c_void_p if is_pointer(kind) else types[kind])
            for name, kind in struct.fields
        ]
        in_c = type("InC", (ctypes.Structure,), {"_fields_": fields})
        assert struct.dtype.itemsize == ctypes.sizeof(in_c)
        for name, _ in struct.fields:
            assert struct.dtype.fields[name][1] == getattr(in_c, name).offset

    def test_bytes(self, struct):
        """Numbers as they are, pointers looked up; nothing but the bytes goes to the kernel."""
        numbers = {
            name: 100 + place
            for place, (name, kind) in enumerate(struct.fields)
            if not is_pointer(kind)
        }
        argument = StructArgument.of(struct, numbers, first=2)
        pointers = [2**40 + place for place in range(20)]
        packed = argument.pack(pointers)
        assert packed.shape == ()
        assert packed.size == 1  # CuPy passes such an array by value
        places = iter(pointers[2:])
        for name, kind in struct.fields:
            expected = next(places) if is_pointer(kind) else numbers[name]
            assert packed[name] == expected


def test_calls_pack_every_sort_of_argument():
    struct = ArgumentStruct("Some", (("n", "int"), ("p", "const int*")))
    arguments = (StructArgument.of(struct, {"n": 5}), 1, np.int32(7))
    packed = KernelCall("some.cu", "some", (1, 1), 32, 0, arguments).pack([800, 900])
    assert packed[0].tobytes() == np.array([5, 0, 800, 0], np.int32).tobytes()
    assert packed[1:] == [np.uintp(900), np.int32(7)]
    assert packed[1].nbytes == 8


@pytest.mark.parametrize("coding", WITH_KERNELS)
def test_a_tensor_has_what_its_struct_names(coding):
    """Every pointer is a stored array or derived, and every stored array is among them."""
    found = get_coding(coding)
    assert found.cuda
    names, stored = set(found.cuda.array_names), set(found.array_names)
    derived = set(found.cuda.derived_names)
    assert ("row_block_starts" in derived) == bool({"row_lengths", "block_lengths"} & stored)
    assert not derived & stored
    assert names == stored | derived | ({"table"} if found.cuda.table else set())
    others = {name for name, kind in found.cuda.arguments.fields if not is_pointer(kind)}
    assert set(found.cuda.sizes) == others
    assert {array for array, _ in found.cuda.sizes.values()} <= stored


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_structs_of_another_size_are_refused():
    module = emulator.EmulatedModule(emulator.build())
    signature = module.signatures["expand_packed2"]
    assert signature == ["s16", f"s{kernels.EXPANSION.dtype.itemsize}"]
    kernel = module.get_function("expand_packed2")
    wrong = launches.Struct(kernels.PRODUCT, (None,) * 5 + (1,) * 8)
    with pytest.raises(TypeError, match="argument 0 has 72 bytes.*must be one struct of 16 bytes"):
        kernel((1, 1), (32,), [wrong, wrong])
