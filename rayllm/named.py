"""What a config names as ``module:name``: code of the user's own."""

from __future__ import annotations

import importlib
from typing import Any

from rayllm.errors import InputError


def import_named(path: str, *, what: str) -> Any:
    """The object that ``module:name`` names.

    Args:
        path: a module that Python finds, and a name in it.
        what: the config key or thing that named it, for the message.

    Raises:
        InputError: not of that form, a module that does not import, or no such name in it.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise InputError(f"{what}: got {path!r}, expected module:name")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what}: cannot import {module}: {error}") from error
    if not hasattr(imported, name):
        raise InputError(f"{what}: module {module} has no {name}")
    return getattr(imported, name)
