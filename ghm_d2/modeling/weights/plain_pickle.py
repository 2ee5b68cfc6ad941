"""Reading a pickle as data: arrays of numbers and plain containers, nothing else.

A pickle is a program that names functions and calls them; `pickle.load` runs whatever it names.
The reader here replaces the few names that an array needs by its own stand-ins, and refuses every
other name before it is called. NumPy's own unpickling code is not used either: it takes a dtype's
flags from the file, and a dtype that falsely claims to hold objects makes an array of raw pointers.
"""

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from ghm_d2.errors import WeightsError

_NUMBER = re.compile(r"[biufc]\d{1,2}")  # bool is "b1"
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, np.ndarray, np.generic)


def load_plain_pickle(file: BinaryIO, name: str) -> Any:
    """Load the pickle in `file`: dicts, lists, tuples, sets, scalars and arrays.

    Args:
        file: a file opened in binary mode. Pickles of Python 2 are supported.
        name: the file's name, for error messages.

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


# The C class pickle.Unpickler sizes its memo by the largest index in the file, so that an opcode of
# five bytes can make it allocate 64 GB
class _PlainUnpickler(pickle._Unpickler):
    dispatch = pickle._Unpickler.dispatch.copy()

    def __init__(self, file: BinaryIO, name: str):
        super().__init__(file, encoding="latin1")  # for byte strings of Python 2
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        # Bound methods, because a pickle cannot set attributes on them
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
        # Map the names of Python 2 and NumPy 1 to today's
        today = module.replace("__builtin__", "builtins").replace("numpy.core.", "numpy._core.")
        if (today, name) in answers:
            return answers[today, name]
        # The file chooses this text: keep its escape sequences off the terminal
        raise self.refusal(f"it tries to load {ascii(f'{module}.{name}')[1:-1][:100]}")

    def load_bytearray8(self):
        """Read before allocating; Python's method first allocates the size that the file states."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def refusal(self, reason: str) -> WeightsError:
        return WeightsError(
            f"{self.name} was refused: {reason}, but weights must be plain arrays of numbers; "
            "nothing in it was executed"
        )

    def _dtype(self, code, align=False, copy=True) -> "_DType":
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not _NUMBER.fullmatch(code):
            raise self.refusal(f"it contains an array of type {code!r}")
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
        # Python 3 writes bytes so in protocol 2. Any other codec would call code of its module
        if encoding not in ("latin1", "latin-1"):
            raise self.refusal(f"it asks for the codec {encoding!r}")
        return text.encode("latin1")

    def _no_bytes(self) -> bytes:
        return b""


class _DType:
    """A stand-in for a dtype of plain numbers; a pickled state can change only its byte order."""

    def __init__(self, code: str):
        self.numpy = np.dtype(code)

    def __setstate__(self, state):
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        self.numpy = self.numpy.newbyteorder(order)


class _Array:
    """A stand-in for an array that the pickle has created but not yet filled."""

    def __setstate__(self, state):
        shape, dtype, fortran, raw = state[-4:]  # the first of five is a version
        self.numpy = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw, dtype: _DType, shape, order: str) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, bytes | bytearray):
        raise ValueError(f"the contents of an array are of type {type(raw).__name__}")
    array = np.ndarray(shape, dtype.numpy, buffer=raw, order=order)
    if array.nbytes != len(raw):
        raise ValueError(f"an array of {array.nbytes} bytes has {len(raw)} bytes of contents")
    return array.astype(dtype.numpy.newbyteorder("="))  # a writable copy in native byte order


def _finish(value: Any, done: dict[int, Any]) -> Any:
    """Replace stand-ins by their arrays, and refuse objects of any other type."""
    if isinstance(value, _LEAVES):
        return value
    if id(value) in done:  # a container may occur twice, or within itself
        return done[id(value)]
    done[id(value)] = value
    if isinstance(value, _Array):
        done[id(value)] = value.numpy
    elif isinstance(value, dict):
        _check_hashed(value)
        for key in value:
            value[key] = _finish(value[key], done)
    elif isinstance(value, list):
        value[:] = [_finish(v, done) for v in value]
    elif isinstance(value, tuple):
        done[id(value)] = tuple(_finish(v, done) for v in value)
    elif isinstance(value, set | frozenset):
        _check_hashed(value)
    else:
        raise TypeError(f"it contains an object of type {type(value).__name__}")
    return done[id(value)]


def _check_hashed(values: Iterable) -> None:
    """Refuse keys of a dictionary, and members of a set, of another type than `_LEAVES`."""
    for value in values:
        if isinstance(value, tuple | frozenset):
            _check_hashed(value)
        elif not isinstance(value, _LEAVES):
            raise TypeError(f"a key or member of a set is of type {type(value).__name__}")
