"""Reading a pickle as data: arrays of numbers and plain containers, nothing else.

A pickle is a program that names functions and calls them; `pickle.load` runs whatever it names.
The reader here answers the few names that an array consists of with stand-ins of its own and
refuses every other name before it is called. NumPy's own unpickling code is not used either: it
takes a dtype's flags from the file, and a dtype that lies about holding objects makes an array
of raw pointers.
"""

import pickle
import re
import struct
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np

from ghm_d2.errors import WeightsError

_NUMBER = re.compile(r"[biufc]\d{1,2}")  # bool is "b1"
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, np.ndarray, np.generic)


def load_plain_pickle(file: BinaryIO, name: str) -> Any:
    """Load the pickle in `file`: dicts, lists, tuples, sets, scalars and arrays.

    Args:
        file: opened for reading bytes. Pickles written by Python 2 are understood.
        name: of the file, for messages.

    Raises:
        WeightsError: the pickle names anything else (nothing is called), or is damaged.
    """
    try:
        return _finish(_PlainUnpickler(file, name).load(), {})
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise WeightsError(
            f"{name} is truncated or not a pickle of arrays ({type(error).__name__}: "
            f"{ascii(str(error))[1:-1][:200]})"
        ) from None


# The one in C, pickle.Unpickler, takes memory by the largest number that the file gives an object:
# 64 GB at a word of five bytes
class _PlainUnpickler(pickle._Unpickler):
    dispatch = pickle._Unpickler.dispatch.copy()

    def __init__(self, file: BinaryIO, name: str):
        super().__init__(file, encoding="latin1")  # as Python 2 wrote its byte strings
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        # Bound methods: a pickle can set attributes on what it is given, and on these it cannot
        answers = {
            ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
            ("numpy", "dtype"): self._dtype,
            ("numpy._core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy._core.multiarray", "scalar"): self._scalar,
            ("numpy._core.numeric", "_frombuffer"): self._frombuffer,
            ("_codecs", "encode"): self._encode,
            ("builtins", "bytes"): self._no_bytes,
            ("builtins", "set"): set,
            ("builtins", "frozenset"): frozenset,
            ("collections", "OrderedDict"): OrderedDict,
        }
        # Python 2's and NumPy 1's names of the same
        today = module.replace("__builtin__", "builtins").replace("numpy.core.", "numpy._core.")
        if (today, name) in answers:
            return answers[today, name]
        # The file chooses this text too: no escape sequences to the terminal
        raise self.refusal(f"it tries to load {ascii(f'{module}.{name}')[1:-1][:100]}")

    def load_bytearray8(self):
        """Read before taking memory: Python's method takes whatever the file asks for first."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def refusal(self, reason: str) -> WeightsError:
        return WeightsError(
            f"{self.name} was refused: {reason}, and weights are plain arrays of numbers; nothing "
            "in it was executed"
        )

    def _dtype(self, code, align=False, copy=True) -> "_DType":
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not _NUMBER.fullmatch(code):
            raise self.refusal(f"it holds an array of type {code!r}")
        return _DType(code)

    def _reconstruct(self, ndarray, shape, code) -> "_Array":
        return _Array()

    def _scalar(self, dtype: "_DType", raw) -> np.generic:
        return _array(raw, dtype, (), "C")[()]

    def _frombuffer(self, raw, dtype: "_DType", shape, order, axes=None) -> np.ndarray:
        if axes is None:
            return _array(raw, dtype, shape, order)
        return _array(raw, dtype, shape, "C").transpose(axes)

    def _encode(self, text: str, encoding: str) -> bytes:
        # How Python 3 writes bytes in protocol 2. Any other codec would be a call into its module
        if encoding not in ("latin1", "latin-1"):
            raise self.refusal(f"it asks for the codec {encoding!r}")
        return text.encode("latin1")

    def _no_bytes(self) -> bytes:
        return b""


class _DType:
    """Stands in for a dtype of plain numbers; byte order is all that its state may change."""

    def __init__(self, code: str):
        self.numpy = np.dtype(code)

    def __setstate__(self, state):
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        self.numpy = self.numpy.newbyteorder(order)


class _Array:
    """Stands in for an array between its creation in the pickle and its contents."""

    def __setstate__(self, state):
        shape, dtype, fortran, raw = state[-4:]  # the first of five is a version
        self.numpy = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw, dtype: _DType, shape, order: str) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, bytes | bytearray):
        raise ValueError(f"an array's contents are a {type(raw).__name__}")
    array = np.ndarray(shape, dtype.numpy, buffer=raw, order=order)
    if array.nbytes != len(raw):
        raise ValueError(f"{len(raw)} bytes for an array of {array.nbytes}")
    return array.astype(dtype.numpy.newbyteorder("="))  # a copy: writable, and native to torch


def _finish(value: Any, done: dict[int, Any]) -> Any:
    """Put arrays in the place of their stand-ins, and let nothing unknown through."""
    if isinstance(value, _LEAVES):
        return value
    if id(value) in done:  # a container may occur twice, or within itself
        return done[id(value)]
    done[id(value)] = value
    if isinstance(value, _Array):
        done[id(value)] = value.numpy
    elif isinstance(value, dict):
        for key in value:
            value[key] = _finish(value[key], done)
    elif isinstance(value, list):
        value[:] = [_finish(v, done) for v in value]
    elif isinstance(value, tuple):
        done[id(value)] = tuple(_finish(v, done) for v in value)
    elif not isinstance(value, set | frozenset):
        raise TypeError(f"it holds a {type(value).__name__}")
    return done[id(value)]
