"""A weight file of any content gives weights, or an error of one plain line."""

import io
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from ghm_d2.data.coco_json import is_plain
from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.weight_files import read_weights, state_dict_of
from ghm_d2.modeling.yolov3.darknet import DarkNet
from ghm_d2.modeling.yolov3.darknet_weights import read_darknet_weights, write_darknet_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
SUFFIXES = (".pkl", ".pth", ".safetensors", ".weights")
thorough = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def darknet():
    """A detector whose DarkNet has 465 parameters and statistics."""
    model = nn.Module()
    model.backbone = DarkNet(stem_channels=1, depths=(0, 0, 0))
    return model


@pytest.fixture(scope="module")
def sound(darknet, tmp_path_factory):
    """Return the contents of a file that is in order, by suffix."""
    file = tmp_path_factory.mktemp("sound") / "a.weights"
    write_darknet_weights(str(file), darknet)
    zipped = io.BytesIO()
    torch.save({"model": STATE, "iteration": 3}, zipped)
    arrays = pickle.dumps({"model": {name: value.numpy() for name, value in STATE.items()}})
    contents = (arrays, zipped.getvalue(), save(STATE), file.read_bytes())
    return dict(zip(SUFFIXES, contents, strict=True))


@pytest.fixture(scope="module")
def read(darknet, tmp_path_factory):
    """Reads contents as a file with a suffix: a state dict, or None where it was refused."""
    folder = tmp_path_factory.mktemp("any")

    def read(suffix: str, contents: bytes) -> dict | None:
        path = folder / f"file{suffix}"
        path.write_bytes(contents)
        try:
            if suffix == ".weights":
                return read_darknet_weights(str(path), darknet)
            return state_dict_of(read_weights(str(path)), str(path))
        except WeightsError as error:
            assert str(error) and is_plain(str(error))
            return None

    return read


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sound_files_are_read(read, sound, suffix):
    assert read(suffix, sound[suffix])


@pytest.mark.parametrize("suffix", SUFFIXES)
@thorough
@given(contents=st.binary(max_size=60))
@example(contents=b"\x80\x02c\x1bx\ny\n.")  # names that would reach the terminal
def test_any_contents(read, suffix, contents):
    read(suffix, contents)


@pytest.mark.parametrize("suffix", SUFFIXES)
@thorough
@given(data=st.data())
def test_a_file_with_other_bytes(read, sound, suffix, data):
    contents = bytearray(sound[suffix])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(contents)))
        length = data.draw(st.sampled_from((0, 1, 2, 8, 10**6)))
        contents[start : start + length] = data.draw(st.binary(max_size=8))
    read(suffix, bytes(contents))
