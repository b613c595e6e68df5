"""Rewards over HTTP, from real servers on this machine: one of rewards, and one with a language model behind it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from actors.reward_remote import filled, judged
from actors.reward_source import SourceActor
from rayllm.config.reward import DEFAULT_JUDGE_PROMPT, HttpSource, JudgeSource
from rayllm.data.rollout import Rollout, collate
from rayllm.data.samples import Failed, Samples
from rayllm.errors import InputError, RewardError

NUM = 5
KEY = "sk-4711"


class Server(ThreadingHTTPServer):
    """Answers by ``respond(path, body) -> (status, text)``; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, respond):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond, self.asked, self.keys = respond, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        status, text = self.server.respond(self.path, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def started(respond) -> Server:
        servers.append(Server(respond))
        return servers[-1]

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def shard(tiny_tokenizer):
    texts = ["Paris", " is", " white", " snow", " France"]
    rollouts = [
        Rollout(
            prompt_id=index % 2, prompt_token_ids=tuple(tiny_tokenizer.encode("What?")),
            token_ids=tuple(tiny_tokenizer.encode(text)), logprobs=(0.0,) * len(tiny_tokenizer.encode(text)),
            finish_reason="stop", policy_versions=(0,) * len(tiny_tokenizer.encode(text)),
        )
        for index, text in enumerate(texts)
    ]  # fmt: skip
    return collate(rollouts, pad_token_id=tiny_tokenizer.pad_token_id)


ROWS = [{"prompt": "What?", "n": 1}, {"prompt": [{"role": "user", "content": "What?"}], "n": 2}]


def scores(tiny_model_dir, source, shard):
    async def run():
        actor = SourceActor(name="far", source=source, tokenizer=str(tiny_model_dir), rows=ROWS)
        await actor.setup()
        return await actor.scores(shard)

    return asyncio.run(run())


def lengths(path, body):
    """The right answer, in another order than it was asked for."""
    return 200, json.dumps({"rewards": {s["id"]: len(s["response"]) + s["row"]["n"] for s in reversed(body["samples"])}})


def test_rewards_come_in_batches_and_are_joined_by_id(tiny_model_dir, shard, serve, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", KEY)
    server = serve(lengths)
    found = scores(tiny_model_dir, HttpSource(url=server.url, batch_size=2, api_key_env="REWARD_KEY"), shard)
    assert found.values.tolist() == [5 + 1, 2 + 2, 5 + 1, 4 + 2, 6 + 1]
    assert sorted(len(body["samples"]) for body in server.asked) == [1, 2, 2]
    assert set(server.asked[0]["samples"][0]) == {"id", "prompt", "response", "row"}
    assert server.keys == [f"Bearer {KEY}"] * 3


@pytest.mark.scorecard("R21")
def test_a_server_that_is_busy_is_asked_again(tiny_model_dir, shard, serve):
    calls = []

    def busy_at_first(path, body):
        calls.append(body)
        return (503, "busy") if len(calls) < 3 else lengths(path, body)

    found = scores(tiny_model_dir, HttpSource(url=serve(busy_at_first).url), shard)
    assert found.num_failures == 0 and len(calls) == 3


@pytest.mark.scorecard("R21")
def test_a_batch_that_fails_takes_no_other_with_it(tiny_model_dir, shard, serve):
    def one_bad(path, body):
        return (500, "oh") if any(s["id"] == "1/1" for s in body["samples"]) else lengths(path, body)

    source = HttpSource(url=serve(one_bad).url, batch_size=1, retries=1, on_failure="drop")
    found = scores(tiny_model_dir, source, shard)
    assert found.values.isnan().tolist() == [False, False, False, True, False] and found.num_failures == 1
    assert "answered HTTP 500: 'oh' (response 1/1; 1 of 5 failed)" in found.problem


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "<html>"), "answered no JSON: '<html>'"),
        ((200, "[1, 2]"), r"answered '\[1, 2\]', expected {\"rewards\": {id: number}}"),
        ((200, '{"rewards": {"0/0": 1}}'), r"returned no value for 1/0 \(4 missing, 0 unknown of 5 responses\)"),
        ((401, "no key"), "answered HTTP 401: 'no key' .*after 1 retries; on_failure=stop"),
        ((302, ""), "answered HTTP 302"),
    ],
)
@pytest.mark.scorecard("R21")
def test_what_is_no_answer_stops_with_a_message(tiny_model_dir, shard, serve, answer, message):
    url = serve(lambda path, body: answer).url
    with pytest.raises(RewardError, match=rf"reward source far \(url={url}\) {message}"):
        scores(tiny_model_dir, HttpSource(url=url, retries=1), shard)


@pytest.mark.scorecard("R21")
def test_nobody_there_is_said(tiny_model_dir, shard, serve):
    server = serve(lengths)
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match="cannot be reached at http://127.0.0.1"):
        scores(tiny_model_dir, HttpSource(url=server.url, retries=0), shard)


@pytest.mark.scorecard("R21")
def test_a_server_that_hangs_is_cut_off_and_what_was_done_counts(tiny_model_dir, shard, serve):
    def slow_for_one(path, body):
        if body["samples"][0]["id"] == "0/1":
            time.sleep(30)
        return lengths(path, body)

    source = HttpSource(url=serve(slow_for_one).url, batch_size=1, retries=0, timeout_s=2, on_failure="zero")
    found = scores(tiny_model_dir, source, shard)
    assert found.values.tolist() == [6.0, 4.0, 0.0, 6.0, 7.0] and "did not answer within timeout_s=2" in found.problem


@pytest.mark.scorecard("S19")
def test_a_key_that_is_not_there_is_missed_before_anything_is_sent(tiny_model_dir, shard, monkeypatch):
    monkeypatch.delenv("REWARD_KEY", raising=False)
    with pytest.raises(InputError, match="environment variable REWARD_KEY is not set"):
        scores(tiny_model_dir, HttpSource(url="http://127.0.0.1:9", api_key_env="REWARD_KEY"), shard)


def test_a_model_judges_behind_the_chat_api(tiny_model_dir, tiny_tokenizer, shard, serve):
    """The tiny model says how probable a response is to it: not a number that anybody could make up."""
    from rayllm.models.loading import load_causal_lm

    model = load_causal_lm(tiny_model_dir).eval()

    def surprise(text: str) -> float:
        ids = torch.tensor([[tiny_tokenizer.eos_token_id, *tiny_tokenizer.encode(text)]])
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    def chat(path, body):
        assert path == "/v1/chat/completions" and body["model"] == "judge" and body["temperature"] == 0
        (message,) = body["messages"]
        response = message["content"].split("RESPONSE ")[1]
        content = f"1 moment. Score: {surprise(response):.4f}"
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})

    source = JudgeSource(url=serve(chat).url + "/v1", model="judge", template="{prompt} {n} {other} RESPONSE {response}")
    found = scores(tiny_model_dir, source, shard)
    expected = [surprise(text) for text in ("Paris", "is", "white", "snow", "France")]
    assert found.values.tolist() == pytest.approx(expected, abs=1e-3) and len(set(expected)) == NUM


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 7.0), ("**Score:** 8.5.", 8.5), ("-2", -2.0), ("7/10", 7.0), ("**6**", 6.0), ("Score: -3", -3.0),
        ("Score: 7/10", 7.0), ("Score: 8 out of 10", 8.0), ("Score: 4. Reason: only 2 of the 12 facts", 4.0),
        ("My score is: 9", None), ("From 1 to 10 I say 8.5", None), ("Score: 7-8", None), ("Score: 10", 10.0),
        ("Score: 3\n\nOn reflection, score = 5", 5.0), ("good", None), ("", None),
    ],
)  # fmt: skip
def test_the_score_stands_behind_its_name_or_first(text, score):
    found = judged(text, JudgeSource(url="http://h", model="m").pattern)
    assert isinstance(found, Failed) if score is None else found == score


@pytest.mark.parametrize(("text", "pattern"), [("Well.", r"(\d+)"), ("", r"(\d+)"), ("good", "(good)")])
def test_an_answer_without_a_number_is_a_failure(text, pattern):
    failed = judged(text, pattern)
    assert isinstance(failed, Failed) and f"answered {text!r}, where pattern=" in failed.reason


def test_the_template_takes_columns_and_keeps_other_braces():
    sample = Samples(("0/0",), ("<user>Hi",), ("a {prompt}",), ([1],), ({"prompt": "Hi", "rule": "be {kind}"},), (True,))
    assert filled("{prompt}|{response}|{rule}|{unknown}|{}", sample) == "Hi|a {prompt}|be {kind}|{unknown}|{}"
    assert "Hi" in filled(DEFAULT_JUDGE_PROMPT, sample)
