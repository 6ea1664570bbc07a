"""Packages that only preparing data needs: requirements-data.txt."""

from importlib.util import find_spec

from common.errors import UserError


def check_packages(*names: str) -> None:
    """UserError with what to type where one of these is not installed. None is imported."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: pip install -r requirements-data.txt")
