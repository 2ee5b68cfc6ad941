"""The entry point of `ghm`: if a package is missing, one line says how to install it."""

import sys


def main() -> None:
    """Run the command line; exit with 2 if a package of the extra `detectors` is missing."""
    try:
        from .app import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ghm_d2"):
            raise
        print(
            f"error: ghm needs the package {error.name}, which is not installed; run: pip install "
            "'ghm_d2[detectors]' (only the losses work without it)",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
