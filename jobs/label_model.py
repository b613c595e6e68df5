"""The labels of a reward model: what it ranks, what it leaves to people, and how often it agrees with them.

```
RUN/rankings.parquet     prompts whose best two answers it tells apart: ranks, scores
RUN/for_people.parquet   the others, without ranks
RUN/best.parquet         the best answer to each prompt as a demonstration (best of n, rejection sampling)
RUN/pairs.parquet        the best answer and the worst one: prompt, chosen, rejected
```
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console

from actors.labeling import Chunk, read_part
from rayllm.config.label import LabelConfig
from rayllm.data.agreement import Agreement, compare_labelers
from rayllm.data.chat import prompt_messages
from rayllm.data.files import Row
from rayllm.data.labeling import RowWriter, ScoredAnswers, best_row, pair_row, ranking_rows
from rayllm.data.preferences import Ranking
from rayllm.data.prompts import PromptData
from rayllm.lineage import content_id


def given_answers(rankings: Sequence[Ranking]) -> list[Row]:
    """People's answers as rows to score."""
    return [
        {
            "prompt_id": index,
            "token_ids": ranking.sequences[0][: ranking.num_prompt_tokens].tolist(),
            "response_ids": [sequence[ranking.num_prompt_tokens :].tolist() for sequence in ranking.sequences],
        }
        for index, ranking in enumerate(rankings)
    ]


def write_labels(
    config: LabelConfig, prompts: PromptData, rankings: Sequence[Ranking], chunks: dict[str, list[Chunk]], parts: Path
) -> dict[str, float]:
    """Write the files from the parts, one part after the other; returns figures."""
    assert config.reward_model is not None
    labeler = f"reward-model {content_id(config.reward_model)[:12]}"
    bound = least_best_score(config, prompts, chunks["prompts"], parts)
    left_out: Counter[str] = Counter()
    rewards: list[float] = []
    with ExitStack() as stack:
        files = {
            kind: stack.enter_context(RowWriter(config.run_dir, kind))
            for kind in ("rankings", "for_people", "best", "pairs")
        }
        num_responses = 0
        for answers in scored_answers(prompts, chunks["prompts"], parts):
            if labelled := ranking_rows(answers, labeler=labeler, set_aside_below=config.set_aside_below):
                kind, row = labelled
                files[kind].add(row)
                num_responses += len(row["responses"]) if kind == "rankings" else 0
            else:
                left_out["all_answers_equal"] += 1
            best = best_row(answers, labeler=labeler)
            if best is None:
                left_out["unfinished"] += 1
            elif best["reward"] < bound:
                left_out["rejected"] += 1
            else:
                files["best"].add(best)
                rewards.append(best["reward"])
            if pair := pair_row(answers, labeler=labeler, set_aside_below=config.set_aside_below):
                files["pairs"].add(pair)
        counts = {f"{kind}/prompts": float(file.count) for kind, file in files.items()}
    figures = counts | {
        "rankings/responses": num_responses,
        "rankings/all_answers_equal": left_out["all_answers_equal"],
        "best/unfinished": left_out["unfinished"],
        "best/rejected": left_out["rejected"],
        **({"best/reward_mean": float(np.mean(rewards))} if rewards else {}),
    }
    if rankings:
        scores = [row["scores"] for chunk in chunks["heldout_rankings"] for row in read_part(chunk, parts)]
        figures |= agreement_figures(*compare_labelers(rankings, scores))
    return figures


def scored_answers(prompts: PromptData, chunks: Sequence[Chunk], parts: Path) -> Iterator[ScoredAnswers]:
    """In the order of the prompts."""
    for chunk in chunks:
        for row in read_part(chunk, parts):
            yield ScoredAnswers(
                prompt=prompt_messages(prompts.rows[row["prompt_id"]]["prompt"]),
                responses=row["responses"],
                response_ids=row["response_ids"],
                stopped=row["stopped"],
                scores=row["scores"],
                logits=row["logits"],
            )


def least_best_score(config: LabelConfig, prompts: PromptData, chunks: Sequence[Chunk], parts: Path) -> float:
    """The score that a prompt's best answer must reach to be kept."""
    bound = -np.inf if config.best.min_score is None else config.best.min_score
    if config.best.top_fraction < 1:
        found = (
            answers.scores[answers.best]
            for answers in scored_answers(prompts, chunks, parts)
            if answers.best is not None
        )
        scores = np.fromiter(found, dtype=np.float64)
        if len(scores):
            kept = max(1, round(config.best.top_fraction * len(scores)))
            bound = max(bound, float(np.sort(scores)[-kept]))
    return float(bound)


def agreement_figures(with_people: Agreement | None, people: Agreement | None) -> dict[str, float]:
    """As metrics; without `people` where nobody ranked what another ranked."""
    figures: dict[str, float] = {}
    for name, found in (("reward_model", with_people), ("people", people)):
        if found is not None:
            figures |= {
                f"agreement/{name}": found.rate,
                f"agreement/{name}_low": found.low,
                f"agreement/{name}_high": found.high,
                f"agreement/{name}_pairs": found.num_pairs,
            }
    return figures


def print_agreement(console: Console, metrics: dict[str, float]) -> None:
    """The sentence by which one decides whether the reward model may label alone."""

    def shown(name: str) -> str:
        rate, low, high = (100 * metrics[f"agreement/{name}{end}"] for end in ("", "_low", "_high"))
        return f"{rate:.1f} % ({low:.1f} to {high:.1f})"

    text = f"  The reward model agrees with people on {shown('reward_model')} of pairs"
    if "agreement/people" not in metrics:
        text += "; how often people agree with each other is unknown: no answers were ranked twice"
    elif metrics["agreement/reward_model"] >= metrics["agreement/people"]:
        text += f", people with each other on {shown('people')}: it may label alone"
    else:
        text += f", people with each other on {shown('people')}: it should not label alone yet"
    console.print(text, highlight=False, soft_wrap=True)
