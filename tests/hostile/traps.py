"""A hostile case, and the traps around it that show whether the command fell for its files."""

import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sandbox

SECRET = "the-reader's-own-secret-7f3a"
CANARY, SECRET_FILE, WORK, OUTPUT = "canary", "secret.txt", "work", "out"
LONGEST_LINE = 1000  # characters
# a plain progress line, after ten seconds; and a note that is no error
PROGRESS = re.compile(r".*\d+/\d+  ETA .*|(training|resuming) on .*|note: .*")
# what no output may hold: escape sequences, and marks that turn the direction of writing
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Case:
    """One hostile file, and what `ghm` answers to it."""

    file: str
    tried: str
    write: Callable[[Path], None]  # fills the folder in which the command runs
    command: tuple[str, ...]
    says: str  # a regular expression that the error line must hold
    exit: int = 3
    stdout: bool = False  # whether the command answers on stdout, as one that lists faults does
    check: Callable[[Path, sandbox.Result], list[str]] | None = None  # of the output folder
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.tried}"


def each(cases: list[Case]):
    """A decorator that runs a test with each case."""
    marks = {True: [pytest.mark.slow], False: []}
    rows = [pytest.param(case, id=str(case), marks=marks[case.slow]) for case in cases]
    return pytest.mark.parametrize("case", rows)


class Web:
    """A web server on this machine that nothing must ask: `asked` lists what it was asked for."""

    def __init__(self):
        self.asked = asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{server.server_port}"


web = functools.cache(Web)


def filled(text: str, work: Path) -> str:
    """Fill in the places of the traps, {canary}, {secret} and {address}, and {work}."""
    places = {"canary": work.parent / CANARY, "secret": work.parent / SECRET_FILE, "work": work}
    for name, place in (places | {"address": web().address}).items():
        text = text.replace(f"{{{name}}}", str(place))
    return text


def faults(case: Case, folder: Path) -> list[str]:
    """Run a case in `folder`; what it did that it must not do."""
    parent, streams = folder / "parent", folder / "streams"
    work = parent / WORK
    for path in (work, parent / "home", streams):
        path.mkdir(parents=True)
    (parent / SECRET_FILE).write_text(f"{SECRET}\n", encoding="utf-8")
    web().asked.clear()
    case.write(work)
    before = snapshot(parent)
    result = sandbox.run(list(case.command), work, streams)
    changed = before.items() ^ snapshot(parent).items()
    caught = {
        f"written outside the output: {sorted({name for name, _ in changed})[:3]}": changed,
        "code in the file was executed": (parent / CANARY).exists(),
        f"the network was asked for {web().asked[:1]}": web().asked,
        "the secret beside the folder leaked": leaked(result.out + result.err, work / OUTPUT),
        f"took {result.resident / 2**30:.1f} GiB of memory": result.resident > sandbox.RESIDENT,
    }
    more = case.check(work / OUTPUT, result) if case.check else []
    found = [text for text, yes in caught.items() if yes]
    return [*found, *wrong_answer(case, result), *more]


def wrong_answer(case: Case, result: sandbox.Result) -> list[str]:
    """List the faults of the exit code and of the streams."""
    lines = error_lines(result.err)
    answer = result.out + result.err if case.stdout else result.err
    wrong = {
        f"exit code {result.code}, not {case.exit}": result.code != case.exit,
        f"{len(lines)} error lines": case.exit and len(lines) + case.stdout != 1,
        "an endless error line": any(len(line) > LONGEST_LINE for line in lines),
        "a traceback": "Traceback" in result.out + result.err,
        "control characters": UNPRINTABLE.search(result.out + result.err),
        f"does not say {case.says!r}": not re.search(case.says, answer),
    }
    found = [text for text, yes in wrong.items() if yes]
    return [*found, result.out[-2000:], result.err[-2000:]] if found else []


def error_lines(text: str) -> list[str]:
    """The lines of stderr that are no progress."""
    return [line for line in text.splitlines() if line.strip() and not PROGRESS.fullmatch(line)]


def snapshot(parent: Path) -> dict[str, str]:
    """Return path -> content of everything below `parent` but the output and the home folder."""
    found = {}
    for root, folders, files in os.walk(parent):
        left_out = {parent: "home", parent / WORK: OUTPUT}.get(Path(root))
        folders[:] = [name for name in folders if name != left_out]
        found |= {str(Path(root, name)): content(Path(root, name)) for name in (*folders, *files)}
    return found


def content(path: Path) -> str:
    """Return a text that changes when `path` is changed."""
    if path.is_symlink():
        return os.readlink(path)
    if not path.is_file():
        return str(path.stat().st_mode)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leaked(text: str, output: Path) -> bool:
    """Return whether the secret stands in `text` or in a file of the output."""
    files = [file for file in output.rglob("*") if file.is_file()]
    return SECRET in text or any(SECRET.encode() in file.read_bytes() for file in files)
