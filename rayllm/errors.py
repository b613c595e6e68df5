"""The one exception that means: the user's input is wrong, nothing heavy has started."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong config, data file or model folder. The command prints its text as one line and exits with 2.

    The text says where (file and line, row, or key), what was found, what was expected and how to mend it.
    """
