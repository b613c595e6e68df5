"""Rankings: one prompt, several responses, who is better.

A ranking row of a Parquet file has `prompt` (messages), `responses` (texts, all different), `response_ids` (the
tokens as sampled, end-of-turn token included where the model produced it), `ranks` (0 is best, ties share a rank),
`labeler`; and if there are any, `scores` (how good the labeler found each response, in whatever unit) and `kind` or
`category` of the prompt. `response_ids` may be null for rankings made elsewhere: the text is then encoded with the
template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayllm.data.chat import encode_conversation, messages_problem, prompt_messages, prompt_token_ids
from rayllm.data.files import Row, read_rows


@dataclass(frozen=True, slots=True)
class Ranking:
    """Encoded responses of one prompt and their ranks."""

    sequences: list[np.ndarray]  # prompt and response, (T_i,) int64 each
    ranks: list[int]
    """Aligned to ``sequences``; 0 is best, ties share a rank."""

    num_prompt_tokens: int
    """Every sequence begins with the prompt; what follows is the response."""

    labeler: str | None = None
    """Who ranked."""

    scores: list[float] | None = None
    """Aligned to ``sequences``: how good the labeler found each response, higher is better."""

    category: str | None = None
    """What kind of prompt it is."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) responses of every pair that has a better one."""
        numbered = list(enumerate(self.ranks))
        return [(i, j) for i, a in numbered for j, b in numbered if a < b]

    @property
    def num_pairs(self) -> int:
        """Pairs with a better and a worse response."""
        return len(self.pairs)

    def select(self, rows: Sequence[int]) -> Ranking:
        """The ranking of these responses alone."""
        scores = None if self.scores is None else [self.scores[row] for row in rows]
        sequences, ranks = [self.sequences[row] for row in rows], [self.ranks[row] for row in rows]
        return replace(self, sequences=sequences, ranks=ranks, scores=scores)


@dataclass(frozen=True, slots=True)
class RankingData:
    rankings: list[Ranking]
    dropped: dict[str, int]

    @property
    def num_pairs(self) -> int:
        return sum(r.num_pairs for r in self.rankings)

    @property
    def num_tokens(self) -> int:
        return sum(len(s) for r in self.rankings for s in r.sequences)


def read_rankings(path: Path, tokenizer: Any, *, max_length: int) -> RankingData:
    """Read and encode rankings; responses over ``max_length`` tokens and prompts left without a pair are dropped.

    Raises:
        InputError: a malformed row, by its number.
    """
    rankings = []
    dropped = {"response longer than max_length": 0, "no pair with a better response": 0}
    for row in read_rows(path, ["prompt", "responses", "ranks"], check=_problem):
        prompt = prompt_token_ids(tokenizer, prompt_messages(row["prompt"]))
        category = row.get("category") or row.get("kind")
        sequences, ranks = _encode(row, tokenizer, prompt), [int(rank) for rank in row["ranks"]]
        ranking = Ranking(sequences, ranks, len(prompt), row.get("labeler"), row.get("scores"), category)
        fits = [index for index, sequence in enumerate(sequences) if len(sequence) <= max_length]
        dropped["response longer than max_length"] += len(sequences) - len(fits)
        ranking = ranking.select(fits)
        if ranking.num_pairs:
            rankings.append(ranking)
        else:
            dropped["no pair with a better response"] += 1
    return RankingData(rankings, {reason: count for reason, count in dropped.items() if count})


def _encode(row: Row, tokenizer: Any, prompt: list[int]) -> list[np.ndarray]:
    if row.get("response_ids") is None:
        messages = prompt_messages(row["prompt"])
        turns = [[*messages, {"role": "assistant", "content": text}] for text in row["responses"]]
        return [encode_conversation(tokenizer, turn).token_ids for turn in turns]
    return [np.asarray([*prompt, *ids], dtype=np.int64) for ids in row["response_ids"]]


def _problem(row: Row) -> str | None:
    responses, ranks, ids = row["responses"], row["ranks"], row.get("response_ids")
    if not isinstance(responses, list) or not isinstance(ranks, list):
        return "'responses' and 'ranks' must be lists"
    if len(responses) != len(ranks) or (ids is not None and len(ids) != len(ranks)):
        return f"{len(responses)} responses but {len(ranks)} ranks"
    if not all(isinstance(rank, int) and rank >= 0 for rank in ranks):
        return f"'ranks' must be whole numbers from 0 (best), got {ranks}"
    scores = row.get("scores")
    if scores is not None and not (
        isinstance(scores, list) and len(scores) == len(ranks) and all(isinstance(s, int | float) for s in scores)
    ):
        return f"'scores' must be {len(ranks)} numbers, one a response, got {scores!r:.60}"
    return messages_problem(row["prompt"])
