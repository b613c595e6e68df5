"""The reward model's report: figures by hand, and what the page says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rayllm.data.preferences import Ranking
from rayllm.report.html import write_report
from rayllm.report.reward import REPORT, Scored, pair_accuracy, rate, reward_report
from rayllm.report.reward_view import reward_view


class Words:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(96 + int(i)) for i in ids)


def ranking(prompt: int, lengths: list[int], ranks: list[int], **more) -> Ranking:
    """Responses to the prompt of one token; the response of length n is n times the token n."""
    return Ranking([np.array([prompt, *[n] * n]) for n in lengths], ranks, 1, **more)


def report(rankings: list[Ranking], scores: list[float] | list[list[float]]) -> dict:
    found = np.array(scores, dtype=float)
    return reward_report(Scored(rankings, found.reshape(len(found), -1)), Words())


def accuracies(rows: list[dict]) -> dict[str, tuple[float, int]]:
    return {row["group"]: (row["accuracy"], row["pairs"]) for row in rows}


def test_pairs_ties_and_groups_by_hand():
    # Prompt 1: ranks 0, 1, 1 with scores 2, 3, 1: pairs right and wrong. Prompt 2: 0, 2 with equal scores: half.
    rankings = [
        ranking(1, [1, 2, 3], [0, 1, 1], category="a", labeler="x"),
        ranking(2, [4, 5], [0, 2], category="b", labeler="y"),
    ]
    found = report(rankings, [2, 3, 1, 5, 5])
    assert pair_accuracy(Scored(rankings, np.array([[2.0], [3], [1], [5], [5]]))) == (0.5, pytest.approx(0.0))
    assert found["num_prompts"] == 2 and found["num_pairs"] == 3 and found["num_responses"] == 5
    assert found["accuracy"]["accuracy"] == 0.5
    assert accuracies(found["by_margin"]) == {"1 place apart": (0.5, 2), "2 places apart": (0.5, 1)}
    assert accuracies(found["by_category"]) == {"a": (0.5, 2), "b": (0.5, 1)}
    assert accuracies(found["by_labeler"]) == {"x": (0.5, 2), "y": (0.5, 1)}
    assert found["by_agreement"] == [] and found["ensemble"] is None
    (worst,) = found["disagreements"]
    assert (worst["prompt"], worst["better"], worst["worse"]) == ("a", "a", "bb")
    assert worst["chance"] == pytest.approx(1 / (1 + math.e))


def test_margins_are_quarters_of_the_scores_that_labelers_gave():
    rankings = [ranking(i, [1, 2], [0, 1], scores=[float(i), 0.0]) for i in range(1, 5)]
    found = report(rankings, [1, 0, 1, 0, 0, 1, 0, 1])
    assert [(row["accuracy"], row["pairs"]) for row in found["by_margin"]] == [(1, 1), (1, 1), (0, 1), (0, 1)]


def test_agreement_is_among_people_and_the_majority_is_right():
    # Three people on one pair, two against one; then two people alike; one person twice is nobody's agreement.
    pair = {"lengths": [1, 2]}
    rankings = [ranking(1, ranks=[0, 1], labeler=name, **pair) for name in "xy"] + [
        ranking(1, ranks=[1, 0], labeler="z", **pair)
    ]
    rankings += [ranking(2, ranks=[0, 1], labeler=name, **pair) for name in "xy"]
    rankings += [ranking(3, ranks=[0, 1], labeler="x", **pair)] * 2
    found = report(rankings, [0, 1] * 3 + [1, 0] * 2 + [1, 0] * 2)
    assert accuracies(found["by_agreement"]) == {"a majority agrees": (0, 1), "all agree": (1, 1)}
    assert found["num_prompts"] == 3


def test_calibration_by_hand():
    # Seven of eight pairs right, each with a difference of log 7: as sure as right. The other way round: 3/4 too sure.
    rankings = [ranking(i + 1, [1, 2], [0, 1]) for i in range(8)]
    sure = [math.log(7), 0] * 7 + [0, math.log(7)]
    found = report(rankings, sure)["calibration"]
    assert found["error"] == pytest.approx(0, abs=1e-9) and found["confidence"] == pytest.approx(7 / 8)
    assert found["loss"] == pytest.approx(-(7 / 8 * math.log(7 / 8) + 1 / 8 * math.log(1 / 8)))
    assert [(entry["pairs"], entry["accuracy"]) for entry in found["bins"]] == [(8, 7 / 8)]
    assert report(rankings, sure[::-1])["calibration"]["error"] == pytest.approx(3 / 4)


def test_length_bias_by_hand():
    # The model scores by length alone; labels prefer the longer one in 2 of 3 pairs; one pair is of one length.
    rankings = [ranking(1, [9, 2], [0, 1]), ranking(2, [8, 1], [0, 1]), ranking(3, [3, 7], [0, 1])]
    rankings.append(Ranking([np.array([4, 1, 2]), np.array([4, 2, 1])], [0, 1], 1))
    found = report(rankings, [9, 2, 8, 1, 3, 7, 2, 1.5])["length"]
    assert found["labels_prefer_longer"] == pytest.approx(2 / 3) and found["model_prefers_longer"] == 1
    assert found["correlation_within_prompts"] > 0.99
    assert accuracies(found["accuracy"]) == {
        "same length": (1, 1), "the better is longer": (1, 2), "the better is shorter": (0, 1)
    }  # fmt: skip


def test_heads_are_weighed_in_their_own_deviations():
    # The second head is a hundred times as loud and as often wrong; alone it would decide both pairs.
    rankings = [ranking(1, [1, 2], [0, 1]), ranking(2, [1, 2], [0, 1])]
    found = report(rankings, [[1.0, 0], [-1.0, 100], [1.0, 100], [-1.0, 0]])
    assert found["accuracy"]["accuracy"] == 0.75  # one right, one a draw
    assert found["ensemble"]["heads"] == [1.0, 0.5]
    assert found["scores"]["std"] == [1.0, 50.0]


def test_the_interval_covers_and_knows_that_pairs_of_a_prompt_are_no_independent_draws():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        prompts = np.repeat(np.arange(60), 6)
        right = (np.repeat(rng.random(60) < 0.7, 6)).astype(float)  # all pairs of a prompt alike
        found = rate(right, prompts)
        covered += found["low"] <= 0.7 <= found["high"]
    assert 0.92 <= covered / 400 <= 0.98
    apart = rate(right, np.arange(360))
    assert found["high"] - found["low"] > 2 * (apart["high"] - apart["low"])
    all_right = rate(np.ones(20), np.repeat(np.arange(10), 2))
    assert all_right["high"] == 1 and all_right["low"] == pytest.approx(10 / (10 + 1.96**2))


@pytest.mark.parametrize(
    ("share", "tone", "said"),
    [(0.52, "bad", "Near chance"), (0.3, "bad", "Worse than chance"), (0.6, "mixed", "little better than a coin"),
     (0.8, "good", "Better than chance: 80.0 % of 400")],
)  # fmt: skip
def test_the_verdict_is_honest(share, tone, said):
    rankings = [ranking(i + 1, [1, 2], [0, 1]) for i in range(400)]
    scores = [[1, 0] if i < share * 400 else [0, 1] for i in range(400)]
    verdict = report(rankings, [score for pair in scores for score in pair])["verdict"]
    assert verdict["tone"] == tone and said in verdict["text"]


def test_the_page_of_a_run_shows_the_report_and_escapes_it(tmp_path):
    rankings = [ranking(i + 1, [1, 2], [0, 1], labeler="<script>x", category="kind") for i in range(3)]
    found = report(rankings, [[1, 0.5], [0, 0], [1, 0], [0, 1], [0, 2], [3, 0]])
    (tmp_path / REPORT).write_text(json.dumps(found))
    (tmp_path / "run.json").write_text(json.dumps({"stage": "reward_model", "status": "done"}))
    page, record = write_report(tmp_path)
    html = page.read_text()
    for text in ("Reward model: ", "by margin of the label", "by category", "Worst disagreements", "Ensemble: its heads",
                 "Length: correlation", "Calibration: expected error", "<svg"):  # fmt: skip
        assert text in html
    assert "<script>x" not in html
    assert json.loads(record.read_text())["reward_model"]["accuracy"] == found["accuracy"]
    assert reward_view({}) is None
