"""The examples of docs/rewards.md are valid, and what needs no server gives the scores that it should."""

from __future__ import annotations

import asyncio
import re

import yaml

from actors.reward_source import SourceActor
from rayllm.config.reward import KINDS, RewardConfig
from rayllm.data.rollout import Rollout, collate
from tests.conftest import ROOT

PAGE = (ROOT / "docs/rewards.md").read_text()
ROWS = [{"prompt": "a", "answer": "#### 42", "label": "B", "tests": ["assert add(1, 2) == 3"]}]
RESPONSES = {
    "exact": ("#### 42", 1.0), "number": ("It is 42.0 in all.", 1.0), "letter": ("The answer is (B).", 1.0),
    "text": ("#### 42", 1.0), "tagged": ("<answer> 42</answer>", 1.0), "shape": ("<think>a</think><answer>b</answer>", 1.0),
    "length": ("word " * 30, 1.0), "program": ("```python\ndef add(a, b):\n    return a + b\n```", 1.0),
    "brief": ("no", None),
}  # fmt: skip
"""Source of the page -> a response and its score."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def test_every_kind_has_an_example_and_the_examples_give_what_they_should(
    tmp_path, monkeypatch, tiny_tokenizer, tiny_model_dir
):
    (code,) = blocks("python")
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds, scored = set(), set()
    for block in blocks("yaml"):
        for name, source in RewardConfig.model_validate(yaml.safe_load(block)["reward"]).by_name.items():
            kinds.add(source.kind)
            if name not in RESPONSES:
                continue
            actor = SourceActor(name=name, source=source, tokenizer=str(tiny_model_dir), rows=ROWS)
            response, expected = RESPONSES[name]
            ids = tuple(tiny_tokenizer.encode(response))
            rollout = Rollout(
                prompt_id=0, prompt_token_ids=(5,), token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop",
                policy_versions=(0,) * len(ids),
            )  # fmt: skip
            found = asyncio.run(actor.scores(collate([rollout], pad_token_id=0)))
            actor.scorer.stop()
            expected = -0.01 * len(ids) if expected is None else expected
            assert (found.problem, round(found.values.item(), 6)) == ("", round(expected, 6)), name
            scored.add(name)
    assert kinds == KINDS.keys() - {"gold", "environment"} and scored == RESPONSES.keys()
