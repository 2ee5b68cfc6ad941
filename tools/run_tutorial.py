#!/usr/bin/env python3
"""Runs docs/tutorial.ipynb and keeps its outputs: `python tools/run_tutorial.py ../tutorial`.

The notebook runs in the folder that is named, which must not exist yet; its path shows in the
outputs. It takes about ten minutes, and needs the extra notebook.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def main(folder: Path) -> None:
    """Run the notebook in a new folder, and write it back."""
    folder.mkdir(parents=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook, folder)
    notebook.metadata.language_info = {"name": "python"}  # without this machine's version
    nbformat.write(notebook, NOTEBOOK)


def run(notebook, folder: Path) -> None:
    """Run a notebook's cells in `folder`; their outputs and numbers are replaced."""
    commands = Path(sys.executable).parent  # of the environment, for the lines with !ghm
    os.environ["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"
    NotebookClient(
        notebook,
        timeout=1800,
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,
    ).execute()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
