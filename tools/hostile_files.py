#!/usr/bin/env python3
"""Hands hostile files to the real `ghm`, and shows what it says: tried, refused.

    python tools/hostile_files.py                 # all of tools/hostile_cases.py; minutes
    python tools/hostile_files.py weights yaml    # those whose names hold one of these words
    python tools/hostile_files.py --json

Every case runs in a folder of its own, with traps around it: a file that code in a hostile file
would create, a secret beside the folder that must not turn up anywhere, a snapshot of all that
lies outside the output folder, a server that must not be asked for anything, and limits of memory
and time. Prints a Markdown table; exit code 1 if anything was not refused or not made harmless.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hostile_cases import CASES, UNPRINTABLE

SECRET = "the-reader's-own-secret-7f3a"
COMMAND = [sys.executable, "-m", "ghm_d2.cli"]
CANARY, SECRET_FILE, WORK, OUTPUT = "canary", "secret.txt", "work", "out"
SECONDS, ADDRESS_SPACE, RESIDENT = 90, 8 * 2**30, 3 * 2**30
LONGEST_LINE = 1000  # characters
# a plain progress line, after ten seconds; and a note that is no error
PROGRESS = re.compile(r".*\d+/\d+  ETA .*|(training|resuming) on .*|note: .*")


@dataclass(frozen=True)
class Result:
    """What a command did: its exit code, streams, peak memory, and traps it fell into."""

    code: int | None  # None: killed at the time limit
    out: str
    err: str
    resident: int  # bytes
    faults: list[str]

    @property
    def said(self) -> str:
        """The error line, or the last of the output."""
        lines = error_lines(self.err) or self.out.strip().splitlines()
        return lines[-1] if lines else ""


def run_case(case, parent: Path) -> Result:
    """Write the files of `case` below `parent`, run its command there and watch the traps."""
    parent = Path(tempfile.mkdtemp(prefix="hostile-", dir=parent))
    work = parent / WORK
    work.mkdir()
    (parent / SECRET_FILE).write_text(f"{SECRET}\n", encoding="utf-8")
    with trap_server() as (address, asked):
        case.write(work, address)
        before = snapshot(parent)
        words = [word.format(work=work, address=address) for word in case.command]
        result = run([*COMMAND, *words], work)
    faults = list(result.faults)
    changed = before.items() ^ snapshot(parent).items()
    if changed:
        faults.append(f"written outside the output: {sorted({name for name, _ in changed})[:3]}")
    if (parent / CANARY).exists():
        faults.append("code in the file was executed")
    if asked:
        faults.append(f"the network was asked for {asked[0]}")
    if leaked(result.out + result.err, work / OUTPUT):
        faults.append("the secret beside the folder leaked")
    faults += wrong_answer(case, result) + case.check(work / OUTPUT, result)
    return Result(result.code, result.out, result.err, result.resident, faults)


def run(command: list[str], work: Path) -> Result:
    """Run `command` in `work` within the limits; Ctrl-C here ends it too."""
    home = work.parent / "home"
    home.mkdir(exist_ok=True)
    env = os.environ | {
        "HOME": str(home),
        "MPLCONFIGDIR": str(Path(tempfile.gettempdir()) / "hostile-matplotlib"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            preexec_fn=limit_memory,
        )  # fmt: skip
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            timer.cancel()
        texts = [text_of(stream) for stream in (out, err)]
    process.returncode = code = os.waitstatus_to_exitcode(status)
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    killed = code == -signal.SIGKILL
    faults = [f"killed after {SECONDS} s, or for its memory"] if killed else []
    if resident > RESIDENT:
        faults.append(f"took {resident / 2**30:.1f} GiB of memory")
    return Result(None if killed else code, *texts, resident, faults)


def text_of(stream) -> str:
    """The first 16 MiB that a command wrote."""
    stream.seek(0)
    return stream.read(2**24).decode("utf-8", "replace")


def limit_memory() -> None:
    """Bound the address space of the process to be, where the system knows such a bound."""
    with suppress(OSError, ValueError):  # macOS has none
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def wrong_answer(case, result: Result) -> list[str]:
    """What is wrong with the exit code and the streams."""
    faults = []
    lines = error_lines(result.err)
    if result.code != case.exit:
        faults.append(f"exit code {result.code}, not {case.exit}")
    for name, text in (("stdout", result.out), ("stderr", result.err)):
        if "Traceback" in text:
            faults.append(f"a traceback on {name}")
        if UNPRINTABLE.search(text):
            faults.append(f"control characters on {name}")
    if case.exit and len(lines) + bool(case.stdout) != 1:
        faults.append(f"{len(lines)} error lines")
    if any(len(line) > LONGEST_LINE for line in lines):
        faults.append("an endless error line")
    if not re.search(case.says, result.out + result.err if case.stdout else result.err):
        faults.append(f"does not say {case.says!r}")
    return faults


def error_lines(text: str) -> list[str]:
    """The lines of stderr that are no progress."""
    return [line for line in text.splitlines() if line.strip() and not PROGRESS.fullmatch(line)]


def snapshot(parent: Path) -> dict[str, str]:
    """Path -> content, of everything below `parent` but the output folder."""
    found = {}
    for root, folders, files in os.walk(parent):
        if Path(root) == parent / WORK and OUTPUT in folders:
            folders.remove(OUTPUT)
        for name in (*folders, *files):
            path = Path(root) / name
            found[str(path.relative_to(parent))] = content(path)
    return {name: content for name, content in found.items() if name != "home"}


def content(path: Path) -> str:
    """What tells whether `path` was changed."""
    if path.is_symlink():
        return os.readlink(path)
    if not path.is_file():
        return str(path.stat().st_mode)
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def leaked(text: str, output: Path) -> bool:
    """Whether the secret stands in `text` or in a file of the output."""
    files = [f for f in output.rglob("*") if f.is_file()] if output.is_dir() else []
    return SECRET in text or any(SECRET.encode() in file.read_bytes() for file in files)


@contextmanager
def trap_server():
    """A web server on this machine; gives (its address, the list of what it was asked for)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def table(rows: list[tuple]) -> str:
    """A Markdown table of (case, result)."""
    lines = ["| file | tried | exit | said |", "| --- | --- | ---: | --- |"]
    for case, result in rows:
        said = re.sub(r"\S*/hostile-\w+/", "", result.said.removeprefix("error: "))
        said = said.replace("|", "\\|").replace("<", "&lt;")
        if result.faults:
            said = f"**not refused**: {'; '.join(result.faults)}; {said}"
        lines.append(f"| {case.file} | {case.tried} | {result.code} | {said[:220]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the cases that the arguments name and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", default=[""], help="of the cases' names; all if none")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if any(word in case.name for word in arguments.words)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(chosen, 1):
            print(f"{number}/{len(chosen)} {case.name}", end="", file=sys.stderr, flush=True)
            result = run_case(case, Path(folder))
            print(f": {'; '.join(result.faults) or 'as it should be'}", file=sys.stderr)
            rows.append((case, result))
    if arguments.json:
        keys = ("code", "said", "faults", "resident")
        values = [
            {"file": case.file, "tried": case.tried} | {key: getattr(result, key) for key in keys}
            for case, result in rows
        ]
        print(json.dumps(values, indent=2))
    else:
        print(table(rows), end="")
    return int(any(result.faults for _, result in rows))


if __name__ == "__main__":
    sys.exit(main())
