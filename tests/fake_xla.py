"""What XLA hands to a handler, made of ctypes from jaxlib's header; for tests without XLA."""

import ctypes
import threading
from typing import ClassVar

import numpy as np

POINTER = ctypes.c_void_p
SIZE = ctypes.c_size_t
HANDLER = ctypes.CFUNCTYPE(POINTER, POINTER)
TASK = ctypes.CFUNCTYPE(None, POINTER)
DTYPES = {
    "float32": 11, "float64": 12, "int32": 4, "int64": 5, "uint8": 6, "uint16": 7, "uint32": 8,
    "bfloat16": 16,
}  # fmt: skip


class Extension(ctypes.Structure):
    NAME = "XLA_FFI_Extension_Base"
    _fields_: ClassVar = [("struct_size", SIZE), ("type", ctypes.c_int), ("next", POINTER)]


class Version(ctypes.Structure):
    NAME = "XLA_FFI_Api_Version"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("major_version", ctypes.c_int),
        ("minor_version", ctypes.c_int),
    ]


class Metadata(ctypes.Structure):
    NAME = "XLA_FFI_Metadata"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("api_version", Version),
        ("traits", ctypes.c_uint32),
        ("state_type_id", ctypes.c_int64),
    ]


class MetadataExtension(ctypes.Structure):
    NAME = "XLA_FFI_Metadata_Extension"
    _fields_: ClassVar = [("extension_base", Extension), ("metadata", POINTER)]


class Buffer(ctypes.Structure):
    NAME = "XLA_FFI_Buffer"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("dtype", ctypes.c_int),
        ("data", POINTER),
        ("rank", ctypes.c_int64),
        ("dims", POINTER),
    ]


class Scalar(ctypes.Structure):
    NAME = "XLA_FFI_Scalar"
    _fields_: ClassVar = [("dtype", ctypes.c_int), ("value", POINTER)]


class Args(ctypes.Structure):
    NAME = "XLA_FFI_Args"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("size", ctypes.c_int64),
        ("types", POINTER),
        ("args", POINTER),
    ]


class Rets(ctypes.Structure):
    NAME = "XLA_FFI_Rets"
    _fields_: ClassVar = [*Args._fields_[:4], ("rets", POINTER)]


class Attrs(ctypes.Structure):
    NAME = "XLA_FFI_Attrs"
    _fields_: ClassVar = [*Args._fields_[:4], ("names", POINTER), ("attrs", POINTER)]


class CallFrame(ctypes.Structure):
    NAME = "XLA_FFI_CallFrame"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("api", POINTER),
        ("ctx", POINTER),
        ("stage", ctypes.c_int),
        ("args", Args),
        ("rets", Rets),
        ("attrs", Attrs),
        ("future", POINTER),
    ]


class Api(ctypes.Structure):
    NAME = "XLA_FFI_Api"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("api_version", Version),
        ("internal_api", POINTER),
        *((f"function_{n}", POINTER) for n in range(13)),
    ]


class ErrorCreate(ctypes.Structure):
    NAME = "XLA_FFI_Error_Create_Args"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("message", ctypes.c_char_p),
        ("errc", ctypes.c_int),
    ]


class ErrorDestroy(ctypes.Structure):
    NAME = "XLA_FFI_Error_Destroy_Args"
    _fields_: ClassVar = [("struct_size", SIZE), ("extension_start", POINTER), ("error", POINTER)]


class Schedule(ctypes.Structure):
    NAME = "XLA_FFI_ThreadPool_Schedule_Args"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("ctx", POINTER),
        ("task", POINTER),
        ("data", POINTER),
    ]


class NumThreads(ctypes.Structure):
    NAME = "XLA_FFI_ThreadPool_NumThreads_Args"
    _fields_: ClassVar = [
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("ctx", POINTER),
        ("num_threads", POINTER),
    ]


STRUCTS = (
    *(Extension, Version, Metadata, MetadataExtension, Buffer, Scalar, Args, Rets, Attrs),
    *(CallFrame, Api, ErrorCreate, ErrorDestroy, Schedule, NumThreads),
)
ERROR_CREATE, ERROR_DESTROY, SCHEDULE, NUM_THREADS = 0, 2, 11, 12
"""Places among the API's functions."""


class FakeApi:
    """XLA's functions.

    Args:
      when: a task is run "now" by who schedules it, by a thread ("threads"), when the test says so
        ("later"), or there is no pool ("never").
      num_threads: that the pool tells.
    """

    def __init__(self, when="now", num_threads=3, version=(0, 3)):
        self.when, self.num_threads = when, num_threads
        self.errors, self.destroyed, self.scheduled, self.threads = {}, [], [], []
        functions = {
            ERROR_CREATE: self.create_error,
            ERROR_DESTROY: self.destroy_error,
            SCHEDULE: self.schedule,
            NUM_THREADS: self.tell_threads,
        }
        self.kept = {number: HANDLER(function) for number, function in functions.items()}
        self.struct = Api(ctypes.sizeof(Api), None, Version(ctypes.sizeof(Version), None, *version))
        for number, function in self.kept.items():
            address = ctypes.cast(function, POINTER).value
            setattr(self.struct, f"function_{number}", address)

    def make_error(self, code, message):
        self.errors[number := len(self.errors) + 1] = (code, message)
        return number

    def create_error(self, address):
        asked = ErrorCreate.from_address(address)
        assert asked.struct_size == ErrorCreate.errc.offset + 4
        return self.make_error(asked.errc, asked.message.decode())

    def destroy_error(self, address):
        asked = ErrorDestroy.from_address(address)
        assert asked.struct_size == ctypes.sizeof(ErrorDestroy)
        self.destroyed.append(asked.error)

    def schedule(self, address):
        asked = Schedule.from_address(address)
        assert asked.struct_size == ctypes.sizeof(Schedule)
        if self.when == "never":
            return self.make_error(12, "no pool")
        task, data = TASK(asked.task), asked.data
        self.scheduled.append(lambda: task(data))
        if self.when == "now":
            task(data)
        if self.when == "threads":
            self.threads.append(threading.Thread(target=task, args=(data,)))
            self.threads[-1].start()
        return None

    def tell_threads(self, address):
        asked = NumThreads.from_address(address)
        assert asked.struct_size == ctypes.sizeof(NumThreads)
        if self.when == "never":
            return self.make_error(12, "no pool")
        ctypes.c_int64.from_address(asked.num_threads).value = self.num_threads
        return None


class FakeCall:
    """A frame of operands and a result, NumPy's arrays, and int64 attributes in their order."""

    def __init__(self, api, operands, result, attributes):
        self.kept = [api, operands, result]
        self.frame = CallFrame(ctypes.sizeof(CallFrame), None, ctypes.addressof(api.struct))
        self.frame.stage = 3
        buffers = [self.buffer(array) for array in operands]
        self.frame.args = Args(
            ctypes.sizeof(Args), None, len(buffers), self.ints([1] * len(buffers)),
            self.addresses(buffers),
        )  # fmt: skip
        self.frame.rets = Rets(
            ctypes.sizeof(Rets), None, 1, self.ints([1]), self.addresses([self.buffer(result)])
        )
        scalars = []
        for value in attributes:
            self.kept.append(value := ctypes.c_int64(value))
            scalars.append(Scalar(DTYPES["int64"], ctypes.addressof(value)))
        self.frame.attrs = Attrs(
            ctypes.sizeof(Attrs), None, len(scalars), self.ints([3] * len(scalars)), None,
            self.addresses(scalars),
        )  # fmt: skip

    def ints(self, values):
        self.kept.append(array := (ctypes.c_int * max(len(values), 1))(*values))
        return ctypes.addressof(array)

    def addresses(self, structs):
        self.kept.append(structs)
        array = (POINTER * max(len(structs), 1))(*map(ctypes.addressof, structs))
        self.kept.append(array)
        return ctypes.addressof(array)

    def buffer(self, array):
        dims = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
        self.kept.append(dims)
        return Buffer(
            ctypes.sizeof(Buffer), None, DTYPES[str(array.dtype)], array.ctypes.data, array.ndim,
            ctypes.addressof(dims),
        )  # fmt: skip

    def run(self, handler):
        """Return the error's number, or None."""
        return HANDLER(handler.address)(ctypes.addressof(self.frame))


def ask_metadata(handler, api, size=36):
    """Return the version that a handler answers with when it is registered."""
    metadata = Metadata(size, Version(ctypes.sizeof(Version)), 99, 99)
    extension = MetadataExtension(
        Extension(ctypes.sizeof(MetadataExtension), 1), ctypes.addressof(metadata)
    )
    frame = CallFrame(ctypes.sizeof(CallFrame), ctypes.addressof(extension))
    frame.api = None if api is None else ctypes.addressof(api.struct)
    assert HANDLER(handler.address)(ctypes.addressof(frame)) is None
    assert metadata.traits == 0
    version = metadata.api_version
    return (version.major_version, version.minor_version), metadata.state_type_id


def stored(experts, names):
    """An expert's arrays for a frame."""
    return [np.array(experts.arrays[name]) for name in names]
