"""The report of a comparison, or of a folder of runs, with every section."""

import json
import re
from html.parser import HTMLParser

import pytest
from made_comparison import (
    FOCAL,
    GHM,
    HOSTILE,
    NETWORK,
    SL1,
    SMALL,
    SMALL_PAIRS,
    text_of,
    write_run,
)

from ghm_d2.records import Comparison, Pair, Schedule, Trial
from ghm_d2.reports.figures.models import precision_recall
from ghm_d2.reports.figures.training import learning_curves
from ghm_d2.reports.page.write import write_report
from ghm_d2.reports.report import read_report

FIGURES = {
    "differences.png",
    "learning.png",
    "loss.png",
    "gradient_ratio.png",
    "density_ghm_c.png",
    "density_ghm_r.png",
    "gradient_norms_cls.png",
    "gradient_norms_reg.png",
    "sample_weight_cls.png",
    "sample_weight_reg.png",
    "gradient_share_cls.png",
    "gradient_share_reg.png",
    "precision_recall.png",
    "confusion.png",
    "noise.png",
    *(f"worst_{side}.jpg" for side in (1, 2, 3, 4)),
}
SECTIONS = [
    "Results",
    "Differences",
    "Cost",
    "Training",
    "The trained models",
    "Annotation noise",
    "The worst images",
    "How it was run",
]


class Page(HTMLParser):
    """Tags and the text of headings and cells of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        self._open.remove(tag)

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def page(full_report) -> Page:
    return Page(full_report.files[0].read_text(encoding="utf-8"))


def test_everything_is_there_in_its_order(full_report, page):
    names = [file.name for file in full_report.files]
    assert names[:3] == ["report.html", "report.md", "runs.csv"]
    assert set(names[3:]) == FIGURES
    assert all(file.stat().st_size for file in full_report.files)
    assert page.texts["h2"] == SECTIONS
    headers = ["Method", "Network", "AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "Seeds"]
    assert page.texts["th"][:9] == headers
    text = text_of(full_report, "report.md")
    assert "1 small (AP_S), 2,100 medium (AP_M)" in text
    assert re.findall(r"^## (.*)$", text, re.M) == ["Answer", *SECTIONS]
    assert set(re.findall(r"^!\[.*\]\((\S+)\)$", text, re.M)) == FIGURES


def test_html_fetches_nothing_and_runs_nothing(page):
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "link", "title", "style", "body", "main", "section", "h1", "h2"),
        *("p", "pre", "div", "table", "thead", "tbody", "tr", "th", "td", "strong", "figure"),
        *("img", "figcaption", "details", "summary"),
    }
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == len(FIGURES)


def test_hostile_names_are_shown_and_nothing_else(full_report, page):
    shown = " ".join(HOSTILE.split())
    assert shown in page.texts["title"][0] and shown in page.texts["h1"][0]
    assert any(cell == f"{SL1} {shown}" for cell in page.texts["th"])
    assert any(shown in text for text in page.texts["figcaption"])  # a worst image's name
    text = text_of(full_report, "report.md")
    code = "    ghm compare " + HOSTILE
    assert code in text
    assert "<" not in text.replace(code, "")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_the_best_mean_of_a_column_is_bold(comparison):
    report = read_report(comparison(analysis=False))
    rows = {line.split(" | ")[0][2:]: line for line in report.markdown.splitlines()}
    assert "**52.5 ± 1.5**" in rows["Faster R-CNN CE + GHM-R"]
    assert "**" not in rows[SL1]


def test_the_same_records_give_the_same_bytes(comparison, tmp_path):
    folder = comparison(SMALL, SMALL_PAIRS, noise=True)
    first = write_report(folder, tmp_path / "a").files
    again = write_report(folder, tmp_path / "b").files
    assert len(first) > 10
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_whose_settings_a_side_shares_is_told(comparison):
    folder = comparison(SMALL, SMALL_PAIRS, analysis=False)
    found = Comparison.read(folder)
    found.search = [Trial(FOCAL, ["SOLVER.BASE_LR", "1"], 5.0, True)]
    found.sides[1].settings_of = FOCAL
    found.write(folder)
    write_report(folder)
    assert f"{GHM} uses the settings found for {FOCAL}." in (folder / "report.md").read_text()


def test_how_steady_the_sides_trained_is_told(comparison):
    report = write_report(comparison(SMALL, SMALL_PAIRS, analysis=False))
    focal, ghm = report.to_json()["training"]
    assert focal["grad_ratio_cls_box"]["mean"] == 2 and "GHM-C" not in focal
    assert ghm["GHM-C"]["mean"] == pytest.approx(0.5) and ghm["GHM-C"]["n"] == 3
    rows = [x for x in text_of(report, "report.md").splitlines() if x.startswith(f"| {GHM} | 3 ")]
    assert len(rows) == 1 and "0.5 ± 0.25" in rows[0]


def test_runs_of_several_versions_are_told(comparison):
    folder = comparison(SMALL, SMALL_PAIRS, analysis=False)
    told = "several versions of ghm_d2"
    write_report(folder)
    assert told not in (folder / "report.md").read_text()
    write_run(folder / "../runs/1_2", 1, GHM, 2, 39.0, code_version="9.9")
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert told in text and f"9.9: {GHM}." in text


def test_the_note_says_how_many_false_claims_a_primary_pair_and_others_allow(comparison):
    told = "up to 10 % of comparisons may have some false claim"
    for primary in (False, True):
        pairs = [Pair(GHM, FOCAL, "", primary=primary), Pair(FOCAL, GHM, "")]
        folder = comparison(SMALL, pairs, analysis=False)
        write_report(folder)
        assert (told in (folder / "report.md").read_text()) == primary


def test_noise_is_told_in_numbers_and_in_a_picture(comparison):
    report = read_report(comparison(SMALL, SMALL_PAIRS, noise=True))
    rows = report.to_json()["noise"]
    assert [(row["side"], row["measure"]) for row in rows] == [
        *((FOCAL, "weight"), (FOCAL, "box_weight"), (GHM, "weight"), (GHM, "box_weight"))
    ]
    ghm = rows[2]
    # weights 2.05, 2.10, 2.15 over the clean 2.0, by the made-up analysis
    assert ghm["ratio"]["class"]["mean"] == pytest.approx(1.05)
    assert ghm["ratio"]["class"]["n"] == 3
    assert ghm["ratio"]["class"]["high"] == pytest.approx(1.05 + 0.0621, abs=1e-3)
    assert ghm["boxes"] == {"none": 200, "class": 30, "shift": 40}


def test_json_has_the_numbers(comparison):
    found = read_report(comparison(analysis=False)).to_json()
    row = found["rows"][0]
    assert (row["side"], row["network"], row["AP"]["n"]) == (SL1, NETWORK, 3)
    assert row["AP"]["low"] < row["AP"]["mean"] == 50.5 < row["AP"]["high"]
    pair = found["pairs"][0]
    assert pair["verdict"] == "higher" and pair["seeds"] == [1, 2, 3]
    assert 0 < pair["AP"]["low"] < pair["AP"]["difference"] < pair["AP"]["high"]
    cost = found["cost"][0]
    assert cost["loss_share"]["mean"] == pytest.approx(25 / 1000 / 0.5)
    json.dumps(found, allow_nan=False)


def test_published_rows_stand_beside_coco_only(comparison):
    folder = comparison(SMALL, SMALL_PAIRS, analysis=False)
    assert "published" not in read_report(folder).markdown
    for seed in (1, 2, 3):
        changes = {
            "network": "ResNet-101-FPN",
            "dataset": "coco_2017",
            "iterations": 87_960,
            "schedule": Schedule(87_960, 16, [58_640, 80_630], [800]),
            "per_class": {str(i): 1.0 for i in range(80)},
        }
        write_run(folder / f"../runs/1_{seed}", 1, GHM, seed, 39.0, **changes)
    lines = read_report(folder).markdown.splitlines()
    beside = next(i for i, line in enumerate(lines) if line.startswith(f"| {GHM} "))
    published = "| published: mmdetection 1.x, val2017 | ResNet-101-FPN | 39.0 |"
    assert lines[beside + 1].startswith(published)


def test_how_it_was_run_is_told(full_report, page):
    text = text_of(full_report, "report.md")
    for words in ("quick/side0.yaml", "SOLVER.MAX_ITER 300", "SOLVER.BASE_LR 0.01", "hash0"):
        assert words in text
    assert "cpu (x86\\_64" not in text and "cpu (x86_64, 2 threads)" in text
    assert page.texts["pre"] == [f"ghm compare {HOSTILE}"]


def test_more_sides_than_colours(comparison):
    """Then each has a panel; nothing fails, and no two sides look alike in one."""
    ap = {f"GHM M {m}": (40.0 + m,) for m in range(7)}
    sides = read_report(comparison(ap, [("GHM M 1", "GHM M 0", "")])).study.sides
    assert learning_curves(sides).file == "learning.png"
    assert precision_recall(sides).file == "precision_recall.png"


def test_plain_runs_are_grouped_by_what_was_trained(tmp_path):
    runs = [("a1", 0, FOCAL, 1, 47.0), ("a2", 0, FOCAL, 2, 48.0), ("b1", 1, GHM, 1, 49.0)]
    runs += [("b2", 1, GHM, 2, 50.02), ("c1", 2, GHM, 1, 30.0), ("b3", 1, GHM, 1, 0.0)]
    for name, side, method, seed, ap in runs:
        write_run(tmp_path / name, side, method, seed, ap)
    report = write_report(tmp_path)
    assert report.files[0] == tmp_path / "report" / "report.html"
    found = report.to_json()
    sides = {row["side"]: row["AP"]["n"] for row in found["rows"]}
    assert sides == {FOCAL: 2, f"{GHM} (hash1)": 2, f"{GHM} (hash2)": 1}
    assert [pair["reference"] for pair in found["pairs"]] == [FOCAL, FOCAL]
    assert found["pairs"][0]["verdict"] == "higher"
    assert found["notes"] == ["b3: same configuration and seed as b1, left out"]
    assert str(tmp_path) not in text_of(report, "report.html") + text_of(report, "report.md")


def test_plain_runs_on_other_data_are_no_pair(tmp_path):
    for name, dataset in (("a", "bccd"), ("b", "digits")):
        write_run(tmp_path / name, 0, FOCAL, 1, 47.0, dataset=dataset)
    report = read_report(tmp_path)
    assert [row.side.name for row in report.rows] == [
        f"{FOCAL} (bccd)",
        f"{FOCAL} (digits)",
    ]
    assert report.to_json()["pairs"] == []
    assert "nothing to compare" in report.answer[0]
