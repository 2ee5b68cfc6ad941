"""ghm bench as a user runs it, at sizes of a second."""

import json
import signal
import subprocess
import sys

import pytest

SMALL = ("--samples", 8_000, "--positives", 20, "--rounds", 2)


def test_losses_as_json_and_as_a_file(ghm, tmp_path):
    file = tmp_path / "new" / "bench.json"
    only = ("--only", "GHM-C", "--only", "torch BCE", "--only", "GHM-R")
    done = ghm("bench", *SMALL, *only, "--samples", 16_000, "--json", "--output", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(file.read_text())
    assert [(r["peer"], r["samples"]) for r in found["results"]] == [
        ("GHM-C", 8_000),
        ("torch BCE", 8_000),
        ("GHM-C", 16_000),
        ("torch BCE", 16_000),
        ("GHM-R", 80),
    ]
    assert all(r["seconds"] > 0 and r["memory"] > 0 for r in found["results"])
    shown, markdown = ghm("bench", "show", file), ghm("bench", "show", file, "--markdown")
    assert "200 anchors x 80 classes" in shown.stdout and "kernel" in shown.stdout
    assert markdown.stdout.startswith("| ratio | measured | aim | met |")
    assert "| GHM-C / torch BCE, time |" in markdown.stdout
    assert {r["name"] for r in found["ratios"]} == {
        "GHM-C / torch BCE, time",
        "GHM-C, extra memory / gradient",
    }
    assert found["machine"]["threads"] >= 1 and found["code_version"]


def test_losses_as_a_table(ghm):
    done = ghm("bench", *SMALL, "--samples", 10**11, "--samples", 16_000)
    assert done.returncode == 0, done.stderr
    assert "200 anchors x 80 classes" in done.stdout and "20 boxes" in done.stdout
    assert "ns a sample" in done.stdout and "GHM-C / torch BCE, time" in done.stdout
    assert "GHM-C at 100,000,000,000 samples: the inputs alone need about" in done.stdout
    for name in ("GHM-C", "exact GHM-C", "fvcore focal jit", "softmax GHM-C", "GHM-R"):
        assert any(line.split("  ")[0].strip() == name for line in done.stdout.splitlines())
    assert "\x1b" not in done.stdout and "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "float8"], "bfloat16"),
        (["--device", "tpu"], "cuda"),
        (["--only", "GHMC"], "'GHM-C'"),
        (["--samples", "0"], "equal to 1"),
        (["--output", "."], "name a file"),
        (["--json", "step"], "ghm bench step --help"),
        (["stepp"], "step"),
        (["step", "--config", "quick/faster_rcnn_sl1.yaml"], "--config"),
        (["step", "--config", "quick/retinanet_gmh.yaml"], "retinanet_ghm.yaml"),
        (["step", "MODEL.RETINANET.CLS_LOSS_TYPE", "ce"], "leave it out"),
        (["step", "--steps", "0"], "equal to 1"),
    ],
)
def test_mistakes_get_a_remedy(ghm, words, said):
    done = ghm("bench", *words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"what": "losses"}', '{"what": []}'])
def test_a_file_that_is_no_benchmark_is_refused(ghm, tmp_path, text):
    file = tmp_path / "bench.json"
    if text is not None:
        file.write_text(text)
    done = ghm("bench", "show", file)
    assert done.returncode == 3 and str(file) in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_it(ghm):
    command = [sys.executable, "-m", "ghm_d2.cli", "bench", "--samples", "8000", "--json"]
    words = ["--rounds", "10000000", "--seconds", "600", "--only", "torch BCE"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([*command, *words], **pipes)
    assert "timing" in started.stderr.readline()  # the first line of progress, after 10 s
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == 130 and stdout == ""
    assert "interrupted" in stderr and "Traceback" not in stderr


def test_steps(ghm, digits_folder, tiny):
    words = ("--dataset", digits_folder, "--steps", 2, "--device", "cpu")
    done = ghm("bench", "step", *words, "--json", *tiny)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = [side["name"] for side in found["sides"]]
    assert names == [
        "CE + SL1",
        "Detectron2 focal + SL1",
        "focal + SL1",
        "GHM-C + SL1",
        "GHM-C + GHM-R",
    ]
    assert found["references"] == names[:2] and found["images_per_batch"] == 2
    for side in found["sides"]:
        assert len(side["runs"]) == 2 and side["seconds"] > 0 and side["loss_ms"] > 0
        assert set(side["ratios"]) == set(names[:2]) and side["peak_memory_mb"] is None
    assert found["sides"][0]["ratios"]["CE + SL1"] == 1
    assert 0 < found["data"]["share"] < 1 and found["data"]["num_workers"] == 0
    assert found["dataset"] == "digits" and "cpu" in found["machine"]


def test_steps_as_a_table(ghm, digits_folder, tiny):
    done = ghm("bench", "step", "--dataset", digits_folder, "--steps", 1, *tiny)
    assert done.returncode == 0, done.stderr
    assert "Detectron2 focal + SL1" in done.stdout and "waiting for data" in done.stdout
