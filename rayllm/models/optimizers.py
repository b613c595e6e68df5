"""Optimizers in plain torch: AdamW, and Muon with AdamW for what Muon is not for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rayllm.config.common import OptimizerConfig
from rayllm.models.partial import decoder_layers

Groups = list[dict[str, Any]]


def parameter_groups(parameters: Sequence[torch.nn.Parameter], weight_decay: float) -> Groups:
    """Trained parameters in two groups: matrices with weight decay; biases, norms and heads of one row without."""
    trained = [p for p in parameters if p.requires_grad]
    decayed = [p.dim() >= 2 and min(p.shape) > 1 for p in trained]
    groups = [
        {"params": [p for p, yes in zip(trained, decayed, strict=True) if yes], "weight_decay": weight_decay},
        {"params": [p for p, yes in zip(trained, decayed, strict=True) if not yes], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw_arguments(config: OptimizerConfig) -> dict[str, Any]:
    """Keyword arguments of every AdamW."""
    return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}


def build_optimizer(module: torch.nn.Module, config: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of ``config.name`` over the trained parameters of ``module``.

    Args:
        module: with its start weights, not yet sharded.
        config: which optimizer, its rates.
        fused: one kernel for all of AdamW's parameters (CUDA).
    """

    def adamw(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = parameter_groups(parameters, config.weight_decay)
        return torch.optim.AdamW(groups, fused=fused, **adamw_arguments(config))

    if config.name == "muon":
        return MuonWithAdamW(module, config, adamw)
    return adamw(list(module.parameters()))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of the decoder blocks, AdamW for all else, with one list of parameter groups.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); step size as in Liu et al. 2025
    (arXiv:2502.16982), so that both take the same learning rate.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        config: OptimizerConfig,
        adamw: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        blocks = decoder_layers(module).parameters()
        hidden = [p for p in blocks if p.requires_grad and p.dim() == 2 and min(p.shape) > 1]
        chosen = {id(p) for p in hidden}
        others = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden,
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._parts.append(adamw(others))
        groups = [{**group, "part": i} for i, part in enumerate(self._parts) for group in part.param_groups]
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both parts, on this optimizer's groups and state: they are replaced when a checkpoint is loaded, and
        their parameters by float32 masters when the weights are bfloat16."""
        assert closure is None
        for i, part in enumerate(self._parts):
            part.param_groups = [group for group in self.param_groups if group["part"] == i]
            part.state = self.state
            part.step()
