"""Which logged metrics become which chart."""

from __future__ import annotations

from dataclasses import dataclass

from rayllm.report.glossary import Unit


@dataclass(frozen=True, slots=True)
class PanelSpec:
    """One pair of axes: ``lines`` are (metric, label) and those that were never logged are left out."""

    title: str
    lines: tuple[tuple[str, str], ...]
    meaning: str
    unit: Unit = "number"
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class FigureSpec:
    """Panels under one heading and above one x-axis."""

    stage: str
    title: str
    panels: tuple[PanelSpec, ...]


LOSS = PanelSpec(
    "loss", (("train/loss", "training"), ("eval/loss", "held out")), "Mean loss per token, in nats."
)
BITS = PanelSpec(
    "bits per byte", (("eval/bits_per_byte", "held out"),), "Bits needed to predict one byte of unseen text."
)
PHASES = ("rollout", "score", "update", "sync")

FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec("pretrain", "Pretraining", (LOSS, BITS)),
    FigureSpec("sft", "Supervised fine-tuning", (LOSS, BITS)),
    FigureSpec(
        "reward_model",
        "Reward model",
        (
            PanelSpec(
                "loss",
                (("train/loss", "training"), ("eval/loss", "held out")),
                "Mean negative log-likelihood of the labelled order, in nats.",
            ),
            PanelSpec(
                "pair accuracy",
                (("train/accuracy", "training"), ("eval/accuracy", "held out")),
                "Share of pairs where the preferred answer gets the higher score; 50 % is chance.",
                "rate",
            ),
        ),
    ),
    FigureSpec(
        "preference",
        "Preference optimisation",
        (
            PanelSpec(
                "loss",
                (("train/loss", "training"), ("eval/loss", "held out")),
                "Mean preference loss over prompts; its scale depends on the kind of loss.",
            ),
            PanelSpec(
                "accuracy",
                (("train/accuracy", "training"), ("eval/accuracy", "held out")),
                "Share of pairs where the preferred answer has the higher implicit reward; with KTO, share of answers "
                "on the right side of the reference point.",
                "rate",
            ),
            PanelSpec(
                "drift on the data's answers",
                (("train/kl", "training"), ("eval/kl", "held out")),
                "Mean log-probability under the reference minus that under the model, nats an answer: the KL from "
                "reference to model where the reference wrote the answers.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: is it better?",
        (
            PanelSpec(
                "reward",
                (("objective/rewards", "rollouts"), ("eval/reward", "held out")),
                "What PPO maximises; it should rise together with gold, or it is being exploited.",
            ),
            PanelSpec(
                "gold score",
                (("eval/gold", "held out"), ("objective/gold", "rollouts")),
                "Score by the judge that training never sees.",
            ),
            PanelSpec(
                "KL from the start",
                (("objective/kl", "nats per answer"),),
                "How far the policy moved from where it started; a healthy run stays below about 10.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: how does it answer?",
        (
            PanelSpec(
                "answer length",
                (("response/length_mean", "tokens"),),
                "Mean tokens of an answer in the rollouts.",
            ),
            PanelSpec(
                "stop rate",
                (("response/stop_rate", "rollouts"), ("eval/stop_rate", "held out")),
                "Share of answers that end by themselves.",
                "rate",
            ),
            PanelSpec(
                "entropy",
                (("objective/entropy", "nats per token"),),
                "Spread of the next-token distribution; a collapse means that the answers became all alike.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: where does a step's time go?",
        (
            PanelSpec(
                "seconds per step",
                tuple((f"time/{phase}", phase) for phase in PHASES),
                "Seconds of each phase, stacked; the rest of the step is not shown.",
                "seconds",
                True,
            ),
        ),
    ),
)


def _optimizer(**labels: str) -> tuple[PanelSpec, PanelSpec]:
    """Panels of the models whose metrics begin with these names, with their labels."""
    return (
        PanelSpec(
            "learning rate",
            tuple((f"{name}/lr", label) for name, label in labels.items()),
            "Step size of the optimizer.",
        ),
        PanelSpec(
            "gradient norm",
            tuple((f"{name}/grad_norm", label) for name, label in labels.items()),
            "Norm of the gradient before clipping.",
        ),
    )


_OPTIMIZER = (
    *_optimizer(train=""),
    PanelSpec(
        "tokens per second", (("perf/tokens_per_second", ""),), "Training tokens processed per second."
    ),
)

MORE_FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec("pretrain", "Pretraining", _OPTIMIZER),
    FigureSpec("sft", "Supervised fine-tuning", _OPTIMIZER),
    FigureSpec(
        "reward_model",
        "Reward model",
        (
            PanelSpec(
                "margin",
                (("eval/margin", "held out"), ("train/margin", "training")),
                "Mean score of the preferred answer minus the other.",
            ),
            *_OPTIMIZER,
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: policy update",
        (
            PanelSpec(
                "policy loss", (("loss/policy", ""),), "Clipped surrogate loss; it hovers around zero."
            ),
            PanelSpec(
                "clip fraction",
                (("policy/clipfrac", ""),),
                "Share of tokens whose probability ratio was clipped; above 30 % the step is too large.",
                "rate",
            ),
            PanelSpec(
                "KL of one update",
                (("policy/approx_kl", ""),),
                "How far the policy moved within one step, in nats per token.",
            ),
        ),
    ),
    FigureSpec(
        "preference",
        "Preference optimisation",
        (
            PanelSpec(
                "implicit rewards",
                (("eval/chosen_rewards", "chosen"), ("eval/rejected_rewards", "rejected")),
                "Beta times the log-ratio of model to reference on held-out answers; both may fall, as long as the "
                "chosen ones fall less.",
            ),
            PanelSpec(
                "margin",
                (("eval/margin", "held out"), ("train/margin", "training")),
                "Mean implicit reward of the preferred answer minus the other.",
            ),
            PanelSpec(
                "reference point",
                (("train/reference_point", "training"),),
                "KTO only: estimated KL to the reference, at least 0, that rewards are compared with.",
            ),
            *_OPTIMIZER,
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: critic",
        (
            PanelSpec("value loss", (("loss/value", ""),), "Squared error of the critic."),
            PanelSpec(
                "explained variance",
                (("value/explained_variance", ""),),
                "Share of the variance of the returns that the critic predicts; below 0 it is harmful.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: machinery",
        (
            PanelSpec(
                "rollout mismatch",
                (("rollout/logprob_mismatch", ""),),
                "Mean difference of log-probabilities between the sampler and the trainer under the same weights; "
                "should be near 0.",
            ),
            PanelSpec(
                "age of the responses",
                (("off_policy/lag", "mean"), ("off_policy/lag_max", "oldest")),
                "Policy updates between sampling a token and training on it; bounded by max_policy_lag.",
            ),
            *_optimizer(policy="policy", critic="critic"),
            PanelSpec("seconds per step", (("time/step", ""),), "Sampling, scoring, update and sync."),
        ),
    ),
)
