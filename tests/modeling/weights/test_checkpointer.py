"""Weights are data: what is refused, and what loads as Detectron2 loads it."""

import functools
import http.server
import os
import pickle
import re
import shutil
import threading
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from states import assert_same, state_of
from torch import nn

from ghm_d2.errors import WeightsError
from ghm_d2.losses import GHMC, GHMR
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.modeling.weights.weight_files import read_weights


class RunsACommand:
    """Pickles as a call of os.system; a stand-in for whatever a stranger would have run."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        stem = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, width, 3)))
        self.backbone = nn.Sequential(OrderedDict(stem=stem))
        self.head = nn.Linear(width, 2)


def numpy_state(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def payloads(command):
    evil = RunsACommand(command)
    holder = np.empty(1, dtype=object)
    holder[0] = evil
    return {
        "alone": evil,
        "in the model": {"model": {"head.weight": evil}, "__author__": "someone"},
        "beside the model": {"model": {"a": np.zeros(2)}, "__author__": "x", "trainer": [evil]},
        "in an object array": {"model": {"a": holder}, "__author__": "someone"},
        "as a key": {"model": {(1, evil): np.zeros(2)}},
    }


@pytest.mark.parametrize("ending", ["m.pkl", "m.pth", "m.pt", "m.pyth", "m.bin", "model"])
@pytest.mark.parametrize("saved_by", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("payload", sorted(payloads("")))
def test_a_file_that_would_run_code_is_refused(ending, saved_by, payload, tmp_path):
    file, marker = tmp_path / ending, tmp_path / "marker"
    content = payloads(f"touch {marker}")[payload]
    if saved_by == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads(file.read_bytes())
        assert marker.exists(), "the file would have been harmless anyway"
        marker.unlink()
    else:
        torch.save(content, file, _use_new_zipfile_serialization=saved_by == "torch")
    with pytest.raises(WeightsError) as caught:
        GHMCheckpointer(Model()).load(str(file))
    assert not marker.exists()
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert ending in message
    assert "\n" not in message


def test_the_refusal_says_what_the_file_tried(tmp_path):
    for name in ("m.pkl", "m.pth"):
        file = tmp_path / name
        evil = RunsACommand("true")
        if name.endswith("pkl"):
            file.write_bytes(pickle.dumps({"model": evil}))
        else:
            torch.save({"model": evil}, file)
        with pytest.raises(WeightsError, match=r"refused.*(posix|nt)\.system.*nothing.*executed"):
            read_weights(str(file))


def zoo_file(tmp_path, content):
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(content, protocol=2))
    return str(file)


def test_a_model_zoo_file_loads(tmp_path):
    saved = {k: v.numpy() for k, v in state_of(Model()).items()}
    content = {"model": saved, "__author__": "Detectron2 Model Zoo"}
    model = Model()
    checkpointer = GHMCheckpointer(model)
    checkpointer.load(zoo_file(tmp_path, content))
    assert_same(model, saved)
    assert checkpointer.report.loaded == 4
    assert checkpointer.report.warnings() == []


def test_a_model_zoo_backbone_is_matched_by_the_ends_of_its_names(tmp_path):
    saved = {k: v.numpy() for k, v in Model().backbone.state_dict().items()}
    content = {"model": saved, "__author__": "torchvision", "matching_heuristics": True}
    model = Model()
    checkpointer = GHMCheckpointer(model)
    checkpointer.load(zoo_file(tmp_path, content))
    assert_same(model.backbone, saved)
    assert checkpointer.report.missing == ("head.bias", "head.weight")


@pytest.mark.parametrize("blobs", [True, False])
def test_a_caffe2_file_loads(blobs, tmp_path):
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("f4")
    content = {"conv1_w": weight, "conv1_w_momentum": weight, "conv1_b": np.ones(4, "f4")}
    model = Model()
    checkpointer = GHMCheckpointer(model)
    content = {"blobs": content, "cfg": "text"} if blobs else content
    checkpointer.load(zoo_file(tmp_path, content))
    assert torch.equal(model.backbone.stem.conv1.weight, torch.from_numpy(weight))
    assert checkpointer.report.unexpected == ()


@pytest.mark.parametrize("ending", [".pth", ".pt", "", ".bin", ".safetensors", ".pyth"])
def test_other_endings_load(ending, tmp_path):
    source, model = Model(), Model()
    file = tmp_path / f"model{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(source.state_dict(), file)
    else:
        key = "model_state" if ending == ".pyth" else "model"
        torch.save({key: source.state_dict(), "epoch": 3}, file)
    GHMCheckpointer(model).load(str(file))
    assert_same(model, source.state_dict())


def test_matching_heuristics_can_be_asked_for(tmp_path):
    source, model = Model(), Model()
    file = tmp_path / "backbone.pth"
    torch.save(source.backbone.state_dict(), file)
    with pytest.raises(WeightsError, match="another model"):
        GHMCheckpointer(model).load(str(file))
    GHMCheckpointer(model).load(f"{file}?matching_heuristics=True")
    assert_same(model.backbone, source.backbone.state_dict())
    with pytest.raises(WeightsError, match="no weight file"):
        GHMCheckpointer(model).load(f"{file}?other=True")


def write(content):
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors", ".pyth"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: None, "no weight file"),
        (lambda file: file.mkdir(), "no weight file"),
        (write(b""), "is empty"),
        (write(b"\n<!DOCTYPE html><html><body>404</body></html>"), "web page|not a safetensors"),
        (write(b"version https://git-lfs.github.com/spec/v1\n"), "LFS|not a safetensors"),
        (write(b"PK\x03\x04 and then something else"), "not a"),
        (write(b"\x80\x02 and then something else"), "not a"),
        (write(pickle.dumps([1, 2, 3])), "has no weights|not a"),
        (write(pickle.dumps({"model": 3, "__author__": "x"})), "has no weights|not a"),
        (write(pickle.dumps({"model": {"a": "text"}, "__author__": "x"})), "no weights|not a"),
        (write(pickle.dumps({1: np.zeros(2)})), "has no weights|refused|not a"),
    ],
)
def test_what_is_no_weight_file_is_named(ending, spoil, message, tmp_path):
    file = tmp_path / f"model{ending}"
    spoil(file)
    with pytest.raises(WeightsError, match=message) as caught:
        GHMCheckpointer(Model()).load(str(file))
    assert file.name in str(caught.value)


@pytest.mark.parametrize("ending", [".pth", ".old.pth", ".pkl", ".safetensors"])
def test_a_truncated_file_is_named_wherever_it_was_cut(ending, tmp_path):
    file = tmp_path / f"model{ending}"
    state = state_of(Model(width=64))
    if ending == ".pkl":
        content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "zoo"}
        file.write_bytes(pickle.dumps(content))
    elif ending == ".safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save({"model": state}, file, _use_new_zipfile_serialization=ending == ".pth")
    whole = file.read_bytes()
    assert read_weights(str(file))
    for kept in (*range(1, 40, 3), *np.linspace(40, len(whole) - 1, 25).astype(int)):
        file.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match=file.name):
            GHMCheckpointer(Model(width=64)).load(str(file))


def test_weights_of_another_model_are_refused_and_leave_the_model_alone(tmp_path):
    file, model = tmp_path / "other.pth", Model()
    torch.save({"model": {"layer.weight": torch.ones(3)}}, file)
    before = state_of(model)
    with pytest.raises(WeightsError, match=r"other\.pth belongs to another model.*layer\.weight"):
        GHMCheckpointer(model).load(str(file))
    assert_same(model, before)


def test_the_report_tells_what_fitted(tmp_path):
    state = state_of(Model())
    state["head.weight"], state["extra"] = torch.ones(7, 4), torch.ones(1)
    del state["head.bias"]
    torch.save({"model": state}, tmp_path / "some.pth")
    checkpointer = GHMCheckpointer(Model())
    assert checkpointer.report is None
    checkpointer.load(str(tmp_path / "some.pth"))
    report = checkpointer.report
    assert (report.loaded, report.missing, report.unexpected) == (2, ("head.bias",), ("extra",))
    assert report.mismatched == (("head.weight", (7, 4), (2, 4)),)
    unused, anew, left = report.warnings()
    assert "some.pth: 1 tensors of the file are not in the model and were not used: extra" in unused
    assert "keep their initial values: head.weight (7, 4) -> (2, 4)" in anew
    assert "1 tensors of the model are missing in the file" in left
    assert left.endswith("initial values: head.bias")


def test_a_checkpoint_from_before_the_robust_form_misses_only_what_is_used(tmp_path):
    losses = nn.ModuleDict({"ghm_c": GHMC(), "ghm_r": GHMR()})
    names = [f"{n}.density.{b}" for n in losses for b in ("ema", "num_updates")]
    torch.save({"model": {n: losses.state_dict()[n] + 1 for n in names}}, tmp_path / "old.pth")
    checkpointer = GHMCheckpointer(losses)
    checkpointer.load(str(tmp_path / "old.pth"))
    assert checkpointer.report.loaded == 4 and checkpointer.report.warnings() == []
    assert losses["ghm_r"].density.ema.eq(1).all()
    robust = GHMCheckpointer(nn.ModuleDict({"ghm_c": GHMC.robust(), "ghm_r": GHMR.robust()}))
    robust.load(str(tmp_path / "old.pth"))
    assert robust.report.missing == ("ghm_c.density.ema_foreground", "ghm_r.sizes.histogram")


def test_a_tensor_of_another_width_is_no_predictor_of_other_classes(tmp_path):
    state = state_of(Model()) | {"head.weight": torch.ones(2, 8)}
    torch.save({"model": state}, tmp_path / "wide.pth")
    with pytest.raises(
        WeightsError, match=r"wide\.pth belongs to another architecture: head\.weight"
    ):
        GHMCheckpointer(Model()).load(str(tmp_path / "wide.pth"))


def test_no_weights_are_no_error():
    assert GHMCheckpointer(Model()).load("") == {}


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server on this machine in the place of Detectron2's, and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    prefix = "detectron2.utils.file_io.Detectron2Handler.S3_DETECTRON2_PREFIX"
    monkeypatch.setattr(prefix, address)
    monkeypatch.setattr("detectron2.model_zoo.model_zoo._ModelZooUrls.S3_PREFIX", address)
    yield served, address
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_fetched_as_detectron2_does(web):
    served, address = web
    source = Model()
    content = {"model": {k: v.numpy() for k, v in source.state_dict().items()}, "__author__": "zoo"}
    zoo_file(served, content)
    for path in (f"{address}model.pkl", "detectron2://model.pkl"):
        model = Model()
        checkpointer = GHMCheckpointer(model)
        checkpointer.load(path)
        assert_same(model, source.state_dict())
        assert checkpointer.report.path == path


def test_without_a_network_a_line_says_what_to_fetch_and_where_to_put_it(web, tmp_path):
    _, address = web
    given = zoo_file(tmp_path, {"model": numpy_state(Model()), "__author__": "zoo"})
    zoo = "COCO-Detection/retinanet_R_50_FPN_1x"
    for path, url in (
        (f"{address}a/b.pkl", f"{address}a/b.pkl"),
        ("detectron2://c/d.pkl", f"{address}c/d.pkl"),
        (f"{zoo}.yaml", f"{address}{zoo}/190397773/model_final_bfca0b.pkl"),
    ):
        with pytest.raises(WeightsError) as caught:
            GHMCheckpointer(Model()).load(path)
        found = re.search(r"fetch (\S+) by other means and copy it to (\S+), or", str(caught.value))
        assert found and found[1] == url
        shutil.copy(given, found[2])
        GHMCheckpointer(Model()).load(path)


def test_addresses_of_nothing_are_named(web):
    with pytest.raises(WeightsError, match=r"cannot be fetched.*MODEL\.WEIGHTS"):
        GHMCheckpointer(Model()).load("catalog://no/such.pkl")
    with pytest.raises(WeightsError, match="model zoo has no weights"):
        GHMCheckpointer(Model()).load("quick/retinanet_ghm.yaml")
