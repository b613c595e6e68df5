"""Readers, encoders and batches: values by hand, bad rows by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from rayllm.algorithms.rewards import per_token_rewards
from rayllm.data.batching import BatchOrder
from rayllm.data.chat import TurnFrame, encode_conversation, prompt_token_ids, read_conversations
from rayllm.data.experience import concat
from rayllm.data.files import read_rows, write_parquet
from rayllm.data.padding import pad_right
from rayllm.data.preferences import read_rankings
from rayllm.data.prompts import read_prompts
from rayllm.data.rollout import Rollout, SampledTurn, collate
from rayllm.data.text import PackedRows, tokenize_documents
from rayllm.data.tokenizer import CHAT_TEMPLATE, TURN_END, end_of_text_id, stop_token_ids
from rayllm.errors import InputError


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


USER, ASSISTANT = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", r"d.jsonl:2: row: not valid JSON"),
        ("[1]", r"d.jsonl:2: row: expected an object with columns, got a list"),
        ({"txt": "a"}, r"d.jsonl:2: text: missing; the row holds txt"),
        ({"text": None}, r"d.jsonl:2: text: missing"),
        ({"text": 5}, r"d.jsonl:2: text: must be text, got int 5"),
        ({"text": "  "}, r"d.jsonl:2: text: is empty"),
    ],
)
@pytest.mark.scorecard("R39", "R40")
def test_a_bad_document_is_named_by_its_line(tmp_path, tiny_tokenizer, row, message):
    path = jsonl(tmp_path / "d.jsonl", [{"text": "fine"}, row])
    with pytest.raises(InputError, match=message):
        tokenize_documents(path, tiny_tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "messages: must end with the assistant's turn, got user"),
        ({"messages": []}, "messages: must be text or a list of messages, got list"),
        ({"messages": [{"role": "user"}]}, "messages.0.: a message needs 'role' and 'content'"),
        ({"messages": [{"role": "robot", "content": "x"}, ASSISTANT]}, "messages.0..role: unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": ""}, ASSISTANT]}, "messages.0..content: is empty"),
        ({"prompt": "hi"}, "completion: missing, and no 'response'; the row holds prompt"),
        ({"prompt": "hi", "response": 3}, "response: must be text, got int 3"),
    ],
)
@pytest.mark.scorecard("R39", "R40")
def test_a_bad_demonstration_is_named(tmp_path, tiny_tokenizer, row, message):
    path = jsonl(tmp_path / "d.jsonl", [row])
    with pytest.raises(InputError, match=rf"d.jsonl:1: .*{message}"):
        read_conversations(path, tiny_tokenizer, max_length=64)


@pytest.mark.scorecard("R38")
def test_broken_parquet_and_missing_column(tmp_path):
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        list(read_rows(path, ["text"]))
    write_parquet([{"body": "a"}], path)
    with pytest.raises(InputError, match="d.parquet: row 0: text: missing; the row holds body"):
        list(read_rows(path, ["text"]))


def test_the_loss_falls_on_every_assistant_turn_and_its_end_exactly_once(tiny_tokenizer):
    turns = [USER, ASSISTANT, {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    example = encode_conversation(tiny_tokenizer, turns)
    trained = tiny_tokenizer.decode(example.token_ids[example.loss_mask])
    assert trained == f"yes{TURN_END}no{TURN_END}"
    end = tiny_tokenizer.eos_token_id
    assert (example.token_ids[example.loss_mask] == end).sum() == 2
    assert example.token_ids[-1] == end and example.loss_mask[-1]  # nothing behind the last turn's end


def test_what_is_trained_in_sft_is_what_a_prompt_and_a_response_are_in_rl(tiny_tokenizer):
    prompt = prompt_token_ids(tiny_tokenizer, [USER])
    response = tiny_tokenizer.encode("yes", add_special_tokens=False) + [tiny_tokenizer.eos_token_id]
    example = encode_conversation(tiny_tokenizer, [USER, ASSISTANT])
    assert example.token_ids.tolist() == prompt + response
    assert example.loss_mask.tolist() == [False] * len(prompt) + [True] * len(response)


@pytest.mark.scorecard("R45")
def test_padding_is_not_the_end_of_a_turn(tiny_tokenizer):
    assert tiny_tokenizer.pad_token_id != tiny_tokenizer.eos_token_id
    assert stop_token_ids(tiny_tokenizer) == sorted({tiny_tokenizer.eos_token_id, end_of_text_id(tiny_tokenizer)})


@pytest.mark.scorecard("R41")
def test_long_conversations_are_dropped_and_counted(tmp_path, tiny_tokenizer):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "response": "yes"}, {"prompt": "hi", "response": "x" * 500}])
    data = read_conversations(path, tiny_tokenizer, max_length=64)
    assert len(data.examples) == 1 and data.dropped == {"longer than max_length": 1}
    assert data.origins.prompts == ["hi"]


def test_documents_are_one_stream_begun_by_end_of_text(tmp_path, tiny_tokenizer):
    stream = tokenize_documents(jsonl(tmp_path / "d.jsonl", [{"text": "France"}, {"text": "é"}]), tiny_tokenizer)
    begin = end_of_text_id(tiny_tokenizer)
    expected = [begin, *tiny_tokenizer.encode("France"), begin, *tiny_tokenizer.encode("é")]
    assert stream.tokens.tolist() == expected
    assert (stream.num_documents, stream.num_bytes) == (2, 6 + 2)


def test_packed_rows_are_cut_from_the_stream_and_every_epoch_elsewhere():
    tokens = np.arange(103, dtype=np.uint32)
    rows = PackedRows(tokens, 10, 2, seed=0)
    offsets = []
    for epoch in range(3):
        steps = range(epoch * rows.order.steps_per_epoch, (epoch + 1) * rows.order.steps_per_epoch)
        starts = [row[0] for step in steps for row in rows.batch(step)]
        assert len(set(starts)) == len(starts) and len({start % 10 for start in starts}) == 1
        offsets.append(starts[0] % 10)
        for step in steps:
            assert (np.diff(rows.batch(step)) == 1).all()
    assert len(set(offsets)) > 1


def test_batch_order_is_a_function_of_seed_and_step():
    first, again = BatchOrder(10, 4, seed=1), BatchOrder(10, 4, seed=1)
    steps = [first.rows(step).tolist() for step in range(6)]
    assert [again.rows(step).tolist() for step in (5, 0, 3)] == [steps[5], steps[0], steps[3]]
    for epoch in range(3):
        seen = sum(steps[2 * epoch : 2 * epoch + 2], [])
        assert len(set(seen)) == 8  # no row twice in an epoch
    assert BatchOrder(10, 4, seed=2).rows(0).tolist() != steps[0]
    with pytest.raises(ValueError, match="3 rows do not fill one batch of 4"):
        BatchOrder(3, 4, seed=0)


def test_length_grouping_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 200, size=400)

    def padding(order):
        return sum(lengths[order.rows(s)].max() * 8 - lengths[order.rows(s)].sum() for s in range(order.steps_per_epoch))

    grouped, plain = BatchOrder(400, 8, seed=0, lengths=lengths), BatchOrder(400, 8, seed=0)
    assert padding(grouped) < padding(plain) / 4
    assert sorted(np.concatenate([grouped.rows(s) for s in range(50)]).tolist()) == list(range(400))


@pytest.mark.scorecard("R41")
def test_prompts_keep_their_columns_and_count_what_is_dropped(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "hi", "kind": "chat"}, {"prompt": "x" * 300, "kind": "long"}, {"prompt": [USER], "kind": "b"}]
    data = read_prompts(jsonl(tmp_path / "p.jsonl", rows), tiny_tokenizer, max_prompt_tokens=40)
    assert [row["kind"] for row in data.rows] == ["chat", "b"] and data.dropped == {"longer than 40 tokens": 1}
    assert data.text(1) == "hi there"
    assert data.token_ids[1] == prompt_token_ids(tiny_tokenizer, [USER])
    with pytest.raises(InputError, match="no prompt of at most 3 tokens"):
        read_prompts(tmp_path / "p.jsonl", tiny_tokenizer, max_prompt_tokens=3)


def test_prompts_given_as_token_ids_are_taken_as_they_are(tmp_path, tiny_tokenizer):
    rows = [{"prompt": [3, 1, 4], "kind": "a"}, {"prompt": [1] * 9}, {"prompt": [len(tiny_tokenizer) - 1]}]
    as_jsonl = jsonl(tmp_path / "p.jsonl", rows)
    write_parquet(rows, as_parquet := tmp_path / "p.parquet")
    for path in (as_jsonl, as_parquet):
        data = read_prompts(path, tiny_tokenizer, max_prompt_tokens=8)
        assert data.token_ids == [[3, 1, 4], [len(tiny_tokenizer) - 1]]
        assert data.rows[0]["kind"] == "a" and data.dropped == {"longer than 8 tokens": 1}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 10**6], r"has token 1000000, outside the tokenizer's vocabulary of \d+$"),
        ([1, -1], "a prompt of token ids holds -1, expected whole numbers"),
        ([1, "a"], "a prompt of token ids holds 'a', expected whole numbers"),
        ([1, True], "a prompt of token ids holds True"),
        ([True], "a prompt of token ids holds True"),
        ([1, 2.5], "a prompt of token ids holds 2.5"),
        ([], "must be text or a list of messages, got list"),
    ],
)
@pytest.mark.scorecard("R42")
def test_a_bad_prompt_of_token_ids_is_named_by_its_line(tmp_path, tiny_tokenizer, prompt, message):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": [1]}, {"prompt": prompt}])
    with pytest.raises(InputError, match=rf"p.jsonl:2: prompt(\[\d\])?: {message}"):
        read_prompts(path, tiny_tokenizer, max_prompt_tokens=8)


def test_rankings_take_sampled_ids_as_they_are_and_count_pairs(tmp_path, tiny_tokenizer):
    rows = [
        {"prompt": [USER], "responses": ["a", "b", "c"], "response_ids": [[5, 6], [7], [8]], "ranks": [1, 0, 1]},
        {"prompt": "hi", "responses": ["a", "b"], "response_ids": None, "ranks": [0, 0]},
        {"prompt": "hi", "responses": ["yes", "no"], "response_ids": None, "ranks": [0, 1]},
    ]
    data = read_rankings(jsonl(tmp_path / "r.jsonl", rows), tiny_tokenizer, max_length=64)
    assert data.dropped == {"no pair with a better response": 1} and data.num_pairs == 2 + 1
    assert data.rankings[0].sequences[0].tolist() == prompt_token_ids(tiny_tokenizer, [USER]) + [5, 6]
    expected = encode_conversation(tiny_tokenizer, [{"role": "user", "content": "hi"}, ASSISTANT]).token_ids
    assert data.rankings[1].sequences[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ranks": [0]}, "2 responses but 1 ranks"), ({"ranks": [0, -1]}, "from 0"), ({"ranks": [0, "b"]}, "from 0")],
)
@pytest.mark.scorecard("R48")
def test_a_bad_ranking_is_named(tmp_path, tiny_tokenizer, change, message):
    row = {"prompt": "hi", "responses": ["a", "b"], "ranks": [0, 1], **change}
    with pytest.raises(InputError, match=rf"r.jsonl:1: .*{message}"):
        read_rankings(jsonl(tmp_path / "r.jsonl", [row]), tiny_tokenizer, max_length=64)


def test_pad_right():
    tokens, mask = pad_right([np.array([1, 2, 3]), np.array([4])], 9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[True] * 3, [True, False, False]]


def rollout(prompt_id, prompt, response, stopped=True):
    return Rollout(
        prompt_id=prompt_id,
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(response),
        logprobs=tuple(-0.5 for _ in response),
        finish_reason="stop" if stopped else "length",
        policy_versions=tuple(range(len(response))),
    )


def test_collate_aligns_every_field_to_the_sequence():
    batch = collate([rollout(7, [1, 2], [3, 4]), rollout(8, [1], [5], stopped=False)], pad_token_id=0)
    assert batch.sequences.tolist() == [[1, 2, 3, 4], [1, 5, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.action_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.rollout_logprobs.tolist() == [[0, 0, -0.5, -0.5], [0, -0.5, 0, 0]]
    assert batch.policy_versions.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch.prompt_ids.tolist() == [7, 8] and batch.stopped.tolist() == [True, False]


@pytest.mark.scorecard("R45")
def test_padding_with_the_end_of_turn_itself_trains_it_once_and_never_where_the_response_was_cut():
    end = 9  # also the padding, as in SmolLM2
    rows = [rollout(0, [1, 2], [3, end]), rollout(1, [1], [4, 5, 6, 7], stopped=False), rollout(2, [end, 1], [end])]
    batch = collate(rows, pad_token_id=end)
    trained = [ids[mask].tolist() for ids, mask in zip(batch.sequences, batch.action_mask, strict=True)]
    assert trained == [[3, end], [4, 5, 6, 7], [end]]
    assert [part.trimmed().sequences.shape[1] for part in (batch, batch[:1], batch[2:])] == [5, 4, 3]
    mask = batch.action_mask
    rewards = per_token_rewards(
        torch.tensor([1.0, 2.0, 3.0]), torch.zeros(mask.shape), torch.zeros(mask.shape), mask, kl_coef=0.0
    )
    assert rewards.nonzero().tolist() == [[0, 3], [1, 4], [2, 2]]  # the last sampled token of each


def test_experience_checks_shapes_by_field_name():
    batch = collate([rollout(0, [1, 2], [3])], pad_token_id=0)
    with pytest.raises(ValueError, match=r"Experience.values has shape \(1, 2\), expected \(1, 3\)"):
        batch.replace(values=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="the first token has no predecessor"):
        batch.replace(action_mask=torch.ones(1, 3, dtype=torch.bool))


def test_an_experience_is_pickled_as_arrays_and_comes_back_writable():
    batch = collate([rollout(0, [1, 2], [3])], pad_token_id=0).replace(values=torch.tensor([[0.5, 1.5, -2.0]]))
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    read_only = [memoryview(bytes(buffer)) for buffer in buffers]
    back = pickle.loads(header, buffers=read_only)
    assert len(buffers) == 8 and back.logprobs is None
    for field in dataclasses.fields(batch):
        tensor, expected = getattr(back, field.name), getattr(batch, field.name)
        assert tensor is expected is None or (torch.equal(tensor, expected) and tensor.dtype == expected.dtype)
    back.values.add_(1)  # an array out of Ray's store would end the process here
    assert back.values.tolist() == [[1.5, 2.5, -1.0]]


def test_an_experience_travels_small_and_as_it_was():
    """A ragged batch with turns of an environment, of which every 3rd row was dropped."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(9):
        lengths = [int(n) for n in torch.randint(1, 9, (4,), generator=generator)]
        parts = [(list(range(n)), place % 2 == 0) for place, n in enumerate(lengths[:3])]
        rows.append(conversation(list(range(lengths[3])), parts, [0.25 * row, -1.0]))
    batch = collate(rows, pad_token_id=7)
    mask = batch.action_mask & (torch.arange(9) % 3 != 0)[:, None]
    noise = torch.randn(batch.sequences.shape, generator=generator)
    rollout_stage = {name: getattr(batch, name) * mask for name in ("policy_versions", "turn_rewards")}
    batch = batch.replace(
        action_mask=mask, **rollout_stage, rollout_logprobs=noise * mask, advantages=noise * mask, returns=noise * mask,
        logprobs=noise, ref_logprobs=noise, values=noise, rewards=torch.arange(9.0),
    )
    back = pickle.loads(pickle.dumps(batch, protocol=5))
    for field in dataclasses.fields(batch):
        tensor, expected = getattr(back, field.name), getattr(batch, field.name)
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype, field.name
    long = collate([rollout(0, [1] * 32, [2] * 64)] * 64, pad_token_id=0)
    assert len(pickle.dumps(long, protocol=5)) < 11 * 64 * 96  # bytes a token; 18 as it lies


def test_concat_pads_and_selecting_gives_the_parts_back():
    parts = [collate([rollout(0, [1, 2], [3, 4])], pad_token_id=0), collate([rollout(1, [1], [2])], pad_token_id=0)]
    joined = concat(parts)
    assert joined.sequences.shape == (2, 4)
    assert joined[1:2].trimmed().sequences.tolist() == parts[1].sequences.tolist()
    with pytest.raises(ValueError, match="rewards is set in some parts only"):
        concat([parts[0].replace(rewards=torch.zeros(1)), parts[1]])


def conversation(prompt, parts, rewards):
    """A rollout from (tokens, is it sampled) parts, and the same token by token."""
    tokens, turns, logprobs = [], [], []
    for ids, sampled in parts:
        if sampled:
            turns.append(SampledTurn(start=len(tokens), end=len(tokens) + len(ids), reward=rewards[len(turns)]))
            logprobs += [-0.1 * token for token in ids]
        tokens += ids
    return Rollout(
        prompt_id=4, prompt_token_ids=tuple(prompt), token_ids=tuple(tokens), logprobs=tuple(logprobs),
        finish_reason="max_turns", policy_versions=(0,) * len(logprobs), turns=tuple(turns),
    )  # fmt: skip


def test_collate_puts_observations_outside_and_rewards_on_the_last_token_of_their_turn():
    three = conversation([9, 9], [([1, 2], True), ([7, 7, 7], False), ([3], True), ([8], False), ([4, 5, 6], True)], [0.5, -1, 2])
    one = conversation([9], [([2, 2, 2], True)], [3])
    batch = collate([three, one], pad_token_id=0)
    assert batch.sequences.tolist() == [[9, 9, 1, 2, 7, 7, 7, 3, 8, 4, 5, 6], [9, 2, 2, 2] + [0] * 8]
    assert batch.action_mask.int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1], [0, 1, 1, 1] + [0] * 8]
    assert batch.attention_mask.int().tolist() == [[1] * 12, [1] * 4 + [0] * 8]
    assert batch.turn_rewards.tolist() == [[0, 0, 0, 0.5, 0, 0, 0, -1, 0, 0, 0, 2], [0, 0, 0, 3] + [0] * 8]
    assert batch.turn_rewards.dtype == torch.float32
    expected = -0.1 * batch.sequences * batch.action_mask
    torch.testing.assert_close(batch.rollout_logprobs, expected)
    assert batch.stopped.tolist() == [True, True]


def test_turn_rewards_are_selected_trimmed_and_joined_like_every_per_token_field():
    long = collate([conversation([9], [([1], True), ([7], False), ([3], True)], [1, 2])], pad_token_id=0)
    short = collate([conversation([9], [([2], True)], [3])], pad_token_id=0)
    joined = concat([long, short])
    assert joined.turn_rewards.tolist() == [[0, 1, 0, 2], [0, 3, 0, 0]]
    assert joined[1:].trimmed().turn_rewards.tolist() == short.turn_rewards.tolist()
    with pytest.raises(ValueError, match="Experience.turn_rewards has shape"):
        long.replace(turn_rewards=torch.zeros(1))


def test_without_an_environment_there_are_no_turn_rewards():
    batch = collate([rollout(7, [1, 2], [3, 4])], pad_token_id=0)
    assert batch.turn_rewards is None
    with pytest.raises(ValueError, match="turn_rewards is set in some parts only"):
        concat([batch, batch.replace(turn_rewards=torch.zeros(1, 4))])
    with pytest.raises(AssertionError, match="one kind of rollout in a batch"):
        collate([rollout(7, [1], [3]), conversation([9], [([2], True)], [3])], pad_token_id=0)


def test_a_rollout_needs_a_logprob_for_each_sampled_token_and_no_other():
    good = conversation([9], [([1, 2], True), ([7, 7], False), ([3], True)], [0, 0])
    assert good.sampled == (True, True, False, False, True)
    with pytest.raises(AssertionError, match="one log-probability for each sampled token"):
        dataclasses.replace(good, logprobs=(0.0,) * 5)


def test_a_turn_frame_is_what_the_template_puts_between_two_turns(tiny_tokenizer):
    frame = TurnFrame(tiny_tokenizer, "model")
    said = [USER, ASSISTANT]
    observation = [{"role": "tool", "content": "95"}, {"role": "user", "content": "And now?"}]
    before = tiny_tokenizer.apply_chat_template(said, tokenize=False).removesuffix("\n")
    whole = prompt_token_ids(tiny_tokenizer, [*said, *observation])
    assert tiny_tokenizer.encode(before, add_special_tokens=False) + frame.encode(observation) == whole
    assert frame.end_of_turn == tiny_tokenizer.eos_token_id


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        TURNS.replace("in messages", "in messages[-2:]") + OPENING,  # forgets
        "{{ messages | length }}" + TURNS + OPENING,  # rewrites the start
        TURNS.replace("<|im_end|>", "</s>") + OPENING,  # ends the turn with another token than the policy
        TURNS,  # does not open the assistant's turn
        None,
    ],
)
@pytest.mark.scorecard("R45")
def test_a_template_that_a_conversation_cannot_go_on_in_is_refused(tiny_tokenizer, template):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    message = "m: the tokenizer has no chat template" if template is None else "m: the chat template does not keep"
    with pytest.raises(InputError, match=message):
        TurnFrame(tokenizer, "m")


def test_a_tokenizer_whose_end_of_turn_swallows_what_follows_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|end|>", rstrip=True, special=True)})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|end|>")
    with pytest.raises(InputError, match="encodes what follows '<|end|>' not by itself"):
        TurnFrame(tokenizer, "m")
