"""The checks on each Python: `pip install nox`, then `nox`, or `nox -s tests-3.12 -- -k losses`.

Versions are those of constraints.txt. A Python that is not installed is skipped.
"""

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
ENV = {"PIP_CONSTRAINT": "constraints.txt", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.error_on_missing_interpreters = False


def install(session: nox.Session, *extras: str) -> None:
    """Install the project with extras, and Detectron2."""
    session.install("--upgrade", "pip", "setuptools", env=ENV)
    session.install("--editable", f".[{','.join(extras)}]", env=ENV)
    session.run("python", "tools/detectron2_wheel.py", env=ENV)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, without those that take minutes."""
    install(session, "test")
    words = session.posargs or ["-n", "2", "--dist", "worksteal"]
    session.run("pytest", "-m", "not slow", *words, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("ruff", env=ENV)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types."""
    install(session, "test")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with every link checked."""
    session.install("mkdocs-material", env=ENV)
    session.run("mkdocs", "build", "--strict", "--quiet", env={"NO_MKDOCS_2_WARNING": "1"})
