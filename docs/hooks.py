"""Gives the site the reports and pictures of results/, which lie beside docs/, not in it.

A page links to them as `../results/...`, which is right where the repository is browsed; on the
site they stand at `results/...`.
"""

from pathlib import Path

from mkdocs.structure.files import File

SHOWN = {".md", ".png", ".jpg"}


def on_files(files, config):
    """Add the reports and pictures."""
    root = Path(config.docs_dir).parent
    for path in sorted((root / "results").rglob("*")):
        if path.suffix in SHOWN:
            name = path.relative_to(root).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """Links from docs/ to results/, as the site has them."""
    return markdown.replace("](../results/", "](results/")
