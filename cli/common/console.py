"""Output: results go to stdout (tables, or JSON with --json), everything else to stderr."""

import json
import os
import sys
from contextlib import contextmanager

import typer
from rich.console import Console

from ghm_d2.errors import EXIT_INTERRUPTED, GHMError, printable

from .group import leave_error, rank

TABLE_WIDTH = 150  # characters; narrower tables break names apart

# a terminal, or COLUMNS, has its own width; a pipe or a file would get 80 characters
_has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
out = Console(soft_wrap=True, width=None if _has_width else TABLE_WIDTH)
err = Console(stderr=True, soft_wrap=True)


def emit(value, *, as_json: bool, human) -> None:
    """Print `value` as JSON, or call `human()` to print it for a person."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    else:
        human()


def tell(text: str) -> None:
    """Print a line of a command's result for a person; names in it are not read as markup."""
    out.print(printable(text), markup=False, highlight=False)


def show_error(text: str) -> None:
    """Print one line of an error on stderr."""
    err.print(f"[bold red]error:[/] {_escape(text)}", highlight=False)


@contextmanager
def user_errors():
    """Turn our errors into one line on stderr and their exit code; other exceptions are bugs."""
    try:
        yield
    except GHMError as error:
        if not leave_error(error):
            show_error(str(error))
        raise typer.Exit(error.exit_code) from None
    except ModuleNotFoundError as error:
        if (error.name or "ghm_d2").startswith("ghm_d2"):
            raise
        show_error(f"{error.name} is not installed; `ghm doctor` shows how to install it")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if rank() == 0:
            err.print("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
