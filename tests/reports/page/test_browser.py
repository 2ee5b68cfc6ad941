"""The report in a real browser, headless: nothing missing, nothing fetched, a clean console."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
# looks at the page in a frame of its own, which keeps the page's Content-Security-Policy
LOOK = """
<iframe id="page" style="width: {width}px; height: 700px; border: 0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const style = e => frame.contentWindow.getComputedStyle(e);
  const root = page.documentElement;
  document.getElementById("found").textContent = JSON.stringify({{
    title: page.title,
    headings: [...page.querySelectorAll("h2")].map(h => h.textContent),
    images: [...page.images].map(i => [i.naturalWidth, i.clientWidth]),
    scripts: page.scripts.length,
    fetched: frame.contentWindow.performance.getEntriesByType("resource")
      .map(e => e.name).filter(name => !name.startsWith("data:")),
    overflow: root.scrollWidth - root.clientWidth,
    paper: style(page.body).backgroundColor,
    ink: style(page.body).color,
  }});
}});
</script>
"""


def chromium(page, *options) -> tuple[str, str]:
    """The page's DOM after its scripts, and the console's lines."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000"]
    command += [
        f"--user-data-dir={page.parent / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    run = subprocess.run(
        [*command, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return run.stdout, "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


def look(report, folder, width: int, *options) -> dict:
    page = folder / "look.html"
    text = html.escape(report.files[0].read_text(encoding="utf-8"))
    page.write_text(LOOK.format(width=width, page=text), encoding="utf-8")
    dom, console = chromium(page, *options)
    assert console == ""
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))


def test_the_page_itself_opens_with_a_clean_console(full_report, tmp_path):
    page = tmp_path / "report.html"
    shutil.copy(full_report.files[0], page)
    dom, console = chromium(page)
    assert console == ""
    assert dom.count("<img") == len(full_report.files) - 3
    assert "<script" not in dom


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_missing_fetched_or_cut_off(full_report, tmp_path, width):
    found = look(full_report, tmp_path, width)
    assert found["title"].startswith("two-stage <script>")  # shown, not run
    assert found["headings"][0] == "Results" and len(found["headings"]) == 8
    assert len(found["images"]) == len(full_report.files) - 3
    assert all(natural > 0 and shown > 0 for natural, shown in found["images"])
    assert (found["scripts"], found["fetched"]) == (0, [])
    assert found["overflow"] <= 0


def test_light_and_dark(full_report, tmp_path):
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    light = look(full_report, tmp_path, 800)
    dark = look(full_report, tmp_path, 800, "--force-dark-mode")
    assert brightness(light["paper"]) > 200 > 100 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 60 < 180 < brightness(dark["ink"])
