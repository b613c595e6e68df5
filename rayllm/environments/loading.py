"""Environments by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from rayllm.data.files import Row
from rayllm.environments.base import Environment, MakesPrompts
from rayllm.errors import InputError
from rayllm.named import import_named

KNOWN = {
    "calculator": "rayllm.environments.calculator:Calculator",
    "guess_number": "rayllm.environments.guess_number:GuessNumber",
}


def load_environment(name: str, **options: Any) -> Callable[[], Environment]:
    """A function that makes a fresh environment, one a conversation.

    Args:
        name: one of ``KNOWN``, or ``module:Class`` of a module that Python finds.
        options: keyword arguments of the class.

    Raises:
        InputError: unknown name, a module that does not import, a class that is no environment or refuses the options.
    """
    make = partial(_find_class(name), **options)
    try:
        environment = make()
    except (TypeError, ValueError) as error:
        signature = inspect.signature(make.func)
        raise InputError(f"environment {name}: {error}; its options are {signature}") from error
    if not isinstance(environment, Environment):
        raise InputError(f"environment {name}: {type(environment).__name__} needs the methods reset and step")
    return make


def make_prompts(make: Callable[[], Environment], num: int, *, seed: int) -> list[Row]:
    """The environment's own prompts.

    Raises:
        InputError: it has none.
    """
    environment = make()
    if not isinstance(environment, MakesPrompts):
        raise InputError(f"environment {type(environment).__name__} makes no prompts: it needs a prompt file")
    return environment.prompts(num, seed=seed)


def _find_class(name: str) -> type:
    path = KNOWN.get(name, name)
    if ":" not in path.strip(":"):
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KNOWN)}; your own: module:Class"
        raise InputError(f"environment {name!r} is unknown; {hint}")
    found = import_named(path, what=f"environment {name}")
    if not isinstance(found, type):
        raise InputError(f"environment {name}: expected a class, got {found!r:.60}")
    return found
