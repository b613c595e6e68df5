"""The exceptions that have a name of their own."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong config, data file or model folder. The command prints its text as one line and exits with 2.

    The text says where (file and line, row, or key), what was found, what was expected and how to mend it.
    """


class RewardError(RuntimeError):
    """A source of rewards failed, and its policy is to stop. The text names the source and what it did."""


class EngineStopped(RuntimeError):
    """A rollout engine failed, and its process ends. The work that it had can be done by another one."""


class FleetExhausted(RuntimeError):
    """Fewer actors of a role are left than the run needs, and no more will come. The command exits with 3; the last
    checkpoint is as it was, and the same command continues there."""
