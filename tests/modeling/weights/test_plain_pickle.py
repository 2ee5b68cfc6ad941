"""Pickles read as data: nothing but arrays of numbers and plain containers gets through."""

import io
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch

from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.plain_pickle import load_plain_pickle


def call(module, name, *arguments):
    """A pickle that calls a function by its name."""
    pickled = b"".join(pickle.dumps(a, protocol=2)[2:-1] for a in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + pickled + b"tR."


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("builtins", "eval", ("1",)),
        ("__builtin__", "getattr", ("a", "upper")),
        ("builtins", "bytearray", (10**12,)),
        ("functools", "partial", (1,)),
        ("_codecs", "encode", ("text", "rot13")),
        ("_codecs", "decode", (b"text", "zlib")),
        ("numpy", "load", ("file",)),
        ("numpy.core.multiarray", "fromfile", ("file",)),
        ("numpy._core.multiarray", "_reconstruct.__globals__", ()),
        ("torch", "load", ("file",)),
        ("torch.storage", "_load_from_bytes", (b"",)),
        ("collections", "namedtuple", ("a", "b")),
        ("numpy", "dtype", ("O8",)),
        ("numpy", "dtype", ("V8",)),
        ("numpy", "dtype", ("f4,O8",)),
    ],
)
def test_every_name_but_those_of_arrays_is_refused(module, name, arguments):
    with pytest.raises(WeightsError, match="refused"):
        load_plain_pickle(io.BytesIO(call(module, name, *arguments)), "file")


def test_terminal_escapes_of_a_file_do_not_reach_the_terminal():
    with pytest.raises(WeightsError) as caught:
        load_plain_pickle(io.BytesIO(call("\x1b[2Jevil", "name")), "file")
    assert "\x1b" not in str(caught.value)


def test_a_pickle_cannot_change_the_reader():
    # BUILD with a pair sets attributes on what a name stands for
    build = b"\x80\x02cnumpy\ndtype\n(N}q\x00U\x07__doc__U\x01xstb."
    for _ in range(2):
        with pytest.raises(WeightsError):
            load_plain_pickle(io.BytesIO(build), "file")
    array = np.arange(3)
    assert np.array_equal(load_plain_pickle(io.BytesIO(pickle.dumps(array)), "f"), array)


def test_a_dtype_cannot_pass_numbers_off_as_objects():
    pickled = pickle.dumps(np.arange(2.0), protocol=2)
    plain = struct.pack("<bi", ord("J"), -1)  # the dtype's flags follow two of these
    assert pickled.count(plain * 2 + b"K\x00") == 1
    lying = pickled.replace(plain * 2 + b"K\x00", plain * 2 + b"K\x3f")
    loaded = load_plain_pickle(io.BytesIO(lying), "file")
    assert loaded.dtype == np.float64
    assert not loaded.dtype.hasobject
    assert loaded.tolist() == [0, 1]


ARRAYS = {
    "float32": np.arange(6, dtype="f4").reshape(2, 3),
    "float64": np.linspace(0, 1, 7),
    "half": np.ones((1, 2, 3), dtype="f2"),
    "int64": np.arange(-3, 3),
    "uint8": np.arange(256, dtype="u1"),
    "bool": np.array([True, False]),
    "big endian": np.arange(4, dtype=">f4"),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "strided": np.arange(10)[::2],
    "one number": np.array(3.5),
    "empty": np.zeros((0, 3)),
    "scalar": np.float32(2.5),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", sorted(ARRAYS))
def test_arrays_of_numbers_load_as_pickle_loads_them(kind, protocol):
    value = ARRAYS[kind]
    loaded = load_plain_pickle(io.BytesIO(pickle.dumps(value, protocol=protocol)), "file")
    assert np.array_equal(loaded, value)
    assert loaded.dtype == value.dtype.newbyteorder("=")
    assert loaded.shape == value.shape
    torch.as_tensor(loaded)


def test_plain_containers_load(tmp_path):
    shared = [np.zeros(2), "text"]
    value = {"a": OrderedDict(x=(1, 2.5, None, True)), "b": {1, 2}, "c": [shared, shared]}
    value["d"] = frozenset({b"bytes", b""})
    value["itself"] = value
    for protocol in range(6):
        loaded = load_plain_pickle(io.BytesIO(pickle.dumps(value, protocol=protocol)), "file")
        assert {k: loaded[k] for k in "abd"} == {k: value[k] for k in "abd"}
        assert loaded["itself"] is loaded
        assert isinstance(loaded["c"][0][0], np.ndarray)
        assert loaded["c"][0] is loaded["c"][1]


@pytest.mark.parametrize("value", [{np.dtype("f4"): 1}, {(1, np.dtype("f4"))}], ids=str)
def test_keys_and_members_of_sets_are_plain_too(value):
    with pytest.raises(WeightsError, match="a key or member of a set is of type"):
        load_plain_pickle(io.BytesIO(pickle.dumps(value)), "file")


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did: text and bytes alike as byte strings."""

    def save_string(self, text):
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def pickled_by_python2(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


@pytest.mark.parametrize("kind", sorted(ARRAYS))
def test_python_2_pickles_load(kind):
    content = {"model": {"conv1_w": ARRAYS[kind]}, "__author__": "Detectron2 Model Zoo \xe9"}
    pickled = pickled_by_python2(content)
    assert b"cnumpy.core.multiarray" in pickled
    loaded = load_plain_pickle(io.BytesIO(pickled), "file")
    assert loaded["__author__"] == content["__author__"]
    assert np.array_equal(loaded["model"]["conv1_w"], ARRAYS[kind])
