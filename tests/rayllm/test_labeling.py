"""What is made of a reward model's scores, against values worked by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayllm.data.agreement import agreement, compare_labelers, tally
from rayllm.data.chat import read_conversations
from rayllm.data.labeling import RowWriter, ScoredAnswers, best_row, order_probability, pair_row, ranking_rows
from rayllm.data.preferences import Ranking, read_rankings

LN3 = math.log(3)

ANSWERS = ScoredAnswers(
    prompt=[{"role": "user", "content": "What colour is snow?"}],
    responses=["Snow is", "Snow is white.", "No."],
    response_ids=[[5, 6], [5, 6, 7, 0], [8, 0]],
    stopped=[False, True, True],
    scores=[0.5, 2.0, -1.0],
    logits=[[2 - LN3], [2.0], [-1.0]],
)


def rows(*, below: float, answers: ScoredAnswers = ANSWERS):
    return ranking_rows(answers, labeler="rm", set_aside_below=below)


def test_the_probability_of_an_order():
    assert order_probability([LN3], [0.0]) == pytest.approx(0.75)
    assert order_probability([0.0], [LN3]) == pytest.approx(0.25)
    assert order_probability([LN3, 1.0], [0.0, 1.0 + LN3]) == pytest.approx(0.5)  # two heads that contradict each other
    assert order_probability([1000.0], [0.0]) == 1 and order_probability([0.0], [1000.0]) == 0


def test_a_ranking_is_by_score_and_goes_to_people_below_the_bound():
    kind, row = rows(below=0.74)
    assert kind == "rankings" and row["ranks"] == [1, 0, 2] and row["scores"] == [0.5, 2.0, -1.0]
    kind, row = rows(below=0.76)
    assert kind == "for_people" and "ranks" not in row and row["probability"] == pytest.approx(0.75)


def test_heads_that_disagree_send_a_prompt_to_people():
    split = replace(ANSWERS, logits=[[0.0, 6.0], [6.0, 0.0], [-1.0, -1.0]])  # the same mean gap needs no doubt
    assert rows(below=0.6, answers=split)[0] == "for_people"
    agreed = replace(ANSWERS, logits=[[0.0, 0.0], [6.0, 6.0], [-1.0, -1.0]])
    assert rows(below=0.6, answers=agreed)[0] == "rankings"


def test_equal_scores_share_a_rank_and_one_answer_makes_no_ranking():
    tied = replace(ANSWERS, scores=[1.0, 1.0, 0.0], logits=[[1.0], [1.0], [0.0]])
    assert rows(below=0.5, answers=tied)[1]["ranks"] == [0, 0, 1]
    one = replace(ANSWERS, responses=["a"], response_ids=[[1]], stopped=[True], scores=[0.0], logits=[[0.0]])
    assert rows(below=0.5, answers=one) is None
    assert best_row(one, labeler="rm")["messages"][-1] == {"role": "assistant", "content": "a"}
    assert pair_row(one, labeler="rm", set_aside_below=0.5) is None


def test_an_unfinished_answer_is_never_the_best_but_may_be_the_worst():
    cut = replace(ANSWERS, scores=[3.0, 2.0, -1.0])
    assert best_row(cut, labeler="rm")["reward"] == 2.0
    assert best_row(replace(cut, stopped=[False] * 3), labeler="rm") is None
    worst = replace(ANSWERS, scores=[-3.0, 2.0, -1.0], logits=[[-9.0], [2.0], [-1.0]])
    pair = pair_row(worst, labeler="rm", set_aside_below=0.75)
    assert pair["rejected"] == [{"role": "assistant", "content": "Snow is"}] and pair["rejected_reward"] == -3.0


def test_a_pair_that_is_unsure_is_left_out():
    assert pair_row(ANSWERS, labeler="rm", set_aside_below=0.9)["probability"] == pytest.approx(1 / (1 + math.exp(-3)))
    assert pair_row(ANSWERS, labeler="rm", set_aside_below=0.96) is None


def test_files_are_read_back_by_what_learns_from_them(tmp_path, tiny_tokenizer):
    with RowWriter(tmp_path, "rankings") as rankings, RowWriter(tmp_path, "best") as best:
        for _ in range(5000):  # more than are kept in memory
            rankings.add(rows(below=0.5)[1])
            best.add(best_row(ANSWERS, labeler="rm"))
        assert not (tmp_path / "best.parquet").exists()
    assert rankings.count == 5000
    data = read_rankings(tmp_path / "rankings.parquet", tiny_tokenizer, max_length=100)
    assert len(data.rankings) == 5000 and data.rankings[-1].ranks == [1, 0, 2]
    found = read_conversations(tmp_path / "best.parquet", tiny_tokenizer, max_length=100)
    assert len(found.examples) == 5000


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), RowWriter(tmp_path, "pairs") as pairs:
        pairs.add(pair_row(ANSWERS, labeler="rm", set_aside_below=0.5))
        raise ZeroDivisionError
    assert not (tmp_path / "pairs.parquet").exists()
    with RowWriter(tmp_path, "pairs"):
        pass
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == 0


def test_agreement_counts_pairs_that_both_put_in_an_order():
    assert tally([0, 1, 2], [0, 2, 1]) == (2, 3)
    assert tally([0, 0, 1], [2, 0, 3]) == (2, 2)  # the tied pair does not count
    assert tally([0, 1], [-2.0, 3.0]) == tally([1, 0], [3.0, -2.0]) == (1, 1)


def test_the_interval_is_over_prompts():
    rng = random.Random(0)
    alone = [(int(rng.random() < 0.8), 1) for _ in range(2400)]
    found = agreement(alone)
    assert found.num_pairs == 2400 and found.low < found.rate < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 2400), rel=0.15)
    in_sixes = agreement([(6 * same, 6) for same, _ in alone[:400]])  # as many pairs, in prompts that stand or fall
    assert in_sixes.high - in_sixes.low == pytest.approx(math.sqrt(6) * (found.high - found.low), rel=0.2)
    assert agreement([(3, 3)] * 5) == replace(agreement([(3, 3)] * 5), rate=1.0, low=1.0, high=1.0)
    assert agreement([(0, 0)]) is None


def ranking(labeler: str, answers: list[int], ranks: list[int]) -> Ranking:
    return Ranking([np.array([1, answer]) for answer in answers], ranks, 1, labeler)


def test_people_are_compared_on_the_answers_that_the_scores_are_compared_on():
    ana = ranking("ana", [10, 11, 12], [0, 1, 2])
    ben = ranking("ben", [12, 11, 10], [1, 2, 0])  # 10, 12, 11: one pair of three is the other way round
    alone = ranking("ana", [20, 21], [0, 1])
    score_of = {10: 3.0, 11: 2.0, 12: 1.0, 20: 0.0, 21: 1.0}
    scores = [[score_of[int(s[1])] for s in r.sequences] for r in (ana, ben, alone)]
    with_people, people = compare_labelers([ana, ben, alone], scores)
    assert (people.rate, people.num_pairs) == (pytest.approx(2 / 3), 3)
    assert (with_people.rate, with_people.num_pairs) == (pytest.approx(5 / 6), 6)  # not with `alone`
    with_people, people = compare_labelers([ana, alone], [scores[0], scores[2]])
    assert people is None and (with_people.rate, with_people.num_pairs) == (0.75, 4)
    again, people = compare_labelers([ana, ana], [scores[0], scores[0]])
    assert people is None and again.num_pairs == 3  # nobody agrees with himself
