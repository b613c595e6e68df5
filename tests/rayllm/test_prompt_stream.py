"""The order in which prompts are used."""

from __future__ import annotations

import pytest

from rayllm.data.prompts import PromptSpan, PromptStream


def test_every_epoch_holds_every_prompt_once_in_a_new_order():
    stream = PromptStream(12, seed=3)
    first, second = ([i for _ in range(3) for i in stream.ids(stream.take(4))] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


@pytest.mark.scorecard("R46")
def test_a_batch_never_spans_two_epochs():
    stream = PromptStream(10, seed=0)
    taken = [stream.ids(stream.take(count)) for count in (4, 4, 4)]
    assert len(set(taken[0] + taken[1])) == 8 and stream.position == (1, 4)


def test_it_continues_from_its_position():
    stream = PromptStream(10, seed=0)
    stream.take(7)
    resumed = PromptStream(10, seed=0, position=stream.position)
    assert [resumed.take(3), resumed.take(5)] == [stream.take(3), stream.take(5)]


def test_a_span_is_split_into_parts_that_hold_its_prompts_in_order():
    stream = PromptStream(12, seed=1)
    stream.take(2)
    span = stream.take(6)
    parts = span.split(3)
    assert parts == [PromptSpan(0, 2, 2), PromptSpan(0, 4, 2), PromptSpan(0, 6, 2)]
    assert [i for part in parts for i in stream.ids(part)] == stream.ids(span)
    assert span.split(4) == [PromptSpan(0, 2, 1), PromptSpan(0, 3, 2), PromptSpan(0, 5, 1), PromptSpan(0, 6, 2)]
    assert [part.count for part in span.split(8)] == [1] * 6


@pytest.mark.scorecard("R46")
def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="11 prompts wanted at once, there are 10"):
        PromptStream(10, seed=0).take(11)
