"""ghm configs."""

from ._console import emit, out, user_errors
from ._options import Json


def configs(as_json: Json = False) -> None:
    """List the shipped configurations."""
    with user_errors():
        from ghm_d2.config import list_configs

        names = [f"configs/{name}" for name in list_configs()]
        emit(names, as_json=as_json, human=lambda: out.print("\n".join(names), highlight=False))
