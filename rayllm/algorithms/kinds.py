"""What a config chooses from by name, and what a loop must bring for it. No torch: a config is checked at once."""

from __future__ import annotations

from dataclasses import dataclass

POLICY_KINDS = ("ppo", "gspo", "cispo")
"""Of ``losses.policy_loss``."""


@dataclass(frozen=True, slots=True)
class AdvantageKind:
    """What an estimator reads, and what it leaves to its caller."""

    needs_critic: bool = False
    """Reads ``values``."""

    needs_groups: bool = False
    """Reads ``prompt_ids``, and wants several responses to each prompt."""

    needs_greedy_baseline: bool = False
    """Reads ``baseline``: one more response to each prompt, decoded greedily, scored and not trained on."""

    whitens: bool = False
    """The caller whitens the advantages over the action tokens of the global batch, with ``whiten``."""


ADVANTAGE_KINDS = {
    "gae": AdvantageKind(needs_critic=True, whitens=True),
    "grpo": AdvantageKind(needs_groups=True),
    "dr_grpo": AdvantageKind(needs_groups=True),
    "rloo": AdvantageKind(needs_groups=True),
    "reinforce_pp": AdvantageKind(whitens=True),
    "reinforce_baseline": AdvantageKind(needs_groups=True, whitens=True),
    "remax": AdvantageKind(needs_greedy_baseline=True),
}
"""Every estimator by its name in a config. The functions: ``advantages.ADVANTAGES``."""
