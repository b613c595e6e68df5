"""The serve and chat jobs: one real server (Ray Serve, vLLM) for the whole module, driven from outside."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
import psutil
import pytest
from pydantic import ValidationError
from ray.serve import Application
from rich.console import Console

from actors.reward_remote import Judge
from actors.serving import build_app, model_name, read_api_key
from jobs.chat import printable
from jobs.chat import run as run_chat
from jobs.serve import announcement
from jobs.serve import run as run_serve
from jobs.serve_session import Signals, Stop, check_port_free
from rayllm.config.base import Loaded
from rayllm.config.chat import ChatConfig
from rayllm.config.reward import JudgeSource
from rayllm.config.serve import ServeConfig
from rayllm.data.samples import Samples
from rayllm.errors import InputError
from rayllm.lineage import write_manifest
from tests.conftest import ROOT

KEY = "sk-test-4711"
TURN_END_ID = 2
PROMPTS = ["Hello", "What colour is snow?", "Paris", "Count: 1 2 3", "The capital of France is"]
SCRIPT = """
import json, sys
from rich.console import Console
from jobs.serve import run
from rayllm.config.base import Loaded
from rayllm.config.reward import JudgeSource
from rayllm.config.serve import ServeConfig
from rayllm.data.samples import Samples
run(Loaded(ServeConfig.model_validate(json.loads(sys.argv[1]))), Console(highlight=False))
"""


@pytest.fixture(scope="module")
def server(tiny_model_dir, tmp_path_factory):
    """The job in a process group of its own, as a terminal would start it."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "key").write_text(KEY + "\n")
    port = free_port()
    config = {
        "model": str(tiny_model_dir),
        "served_model_name": "tiny",
        "port": port,
        "max_concurrent_requests": 8,
        "max_queued_requests": 8,
        "api_key_file": str(folder / "key"),
    }
    with open(folder / "out", "w+") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(config)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            printed = (folder / "out").read_text
            _wait_for(lambda: "Ctrl-C stops" in printed() or process.poll() is not None, 240)
            assert process.poll() is None, printed()
            url = f"http://127.0.0.1:{port}/v1"
            yield SimpleNamespace(
                url=url,
                port=port,
                process=process,
                client=openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60),
                key_file=folder / "key",
                printed=printed,
            )
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(60)


@pytest.fixture(scope="module")
def greedy(tiny_model_dir):
    """Token ids of transformers' own greedy answer to a list of messages."""
    from rayllm.models.folders import load_tokenizer
    from rayllm.models.loading import load_causal_lm

    model, tokenizer = load_causal_lm(tiny_model_dir), load_tokenizer(tiny_model_dir)

    def answer(messages, max_tokens=24):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    return answer


def with_manifest(model: Path, folder: Path) -> tuple[Path, str]:
    """A copy as a job would have written it, and its id."""
    shutil.copytree(model, folder)
    return folder, write_manifest(folder, stage="test", parents=[], data=[], config={}, metrics={})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.2)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _ask(server, text="Hello", **options):
    return server.client.chat.completions.create(model="tiny", messages=_user(text), **options)


def _text(server, text="Hello", **options) -> str:
    return _ask(server, text, **options).choices[0].message.content


# What is served


def test_lists_the_model(server):
    models = server.client.models.list().data
    assert [m.id for m in models] == ["tiny"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answer_is_transformers_greedy_answer(server, greedy, prompt):
    expected = greedy(_user(prompt))
    options = {"temperature": 0, "max_tokens": 24, "extra_body": {"return_token_ids": True}}
    whole = _ask(server, prompt, **options).choices[0]
    assert whole.token_ids == expected

    pieces, ids = [], []
    for chunk in _ask(server, prompt, stream=True, **options):
        pieces.append(chunk.choices[0].delta.content or "")
        ids += getattr(chunk.choices[0], "token_ids", None) or []
    assert ids == expected
    assert "".join(pieces) == whole.message.content
    assert len(pieces) > 10, "the answer did not come in pieces"


def test_concurrent_greedy_answers_do_not_change(server, greedy):
    def ids(prompt):
        options = {"temperature": 0, "max_tokens": 24, "extra_body": {"return_token_ids": True}}
        return _ask(server, prompt, **options).choices[0].token_ids

    prompts = PROMPTS * 2
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ids, prompts))
    assert answers == [greedy(_user(p)) for p in prompts]


def test_raw_http_stream(server):
    body = {"model": "tiny", "messages": _user("Hello"), "stream": True, "max_tokens": 5}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.stream("POST", f"{server.url}/chat/completions", json=body, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_default_sampling_is_temperature_one_and_the_seed_fixes_it(server):
    plain = _text(server, seed=7, max_tokens=24)
    assert plain == _text(server, seed=7, max_tokens=24, temperature=1, top_p=1)
    assert plain != _text(server, seed=8, max_tokens=24)


def test_max_tokens_ends_with_length(server):
    answer = _ask(server, max_tokens=7, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_stops_at_the_end_of_turn_token(server, tiny_tokenizer):
    assert tiny_tokenizer.eos_token_id == TURN_END_ID
    answer = _ask(server, logit_bias={str(TURN_END_ID): 100})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens == 1


def test_a_served_model_is_asked_as_a_judge(server, greedy, tiny_model_dir, monkeypatch):
    """It says nothing of use: the failure quotes its own greedy answer."""
    from rayllm.models.folders import load_tokenizer

    monkeypatch.setenv("JUDGE_KEY", KEY)
    source = JudgeSource(
        url=server.url, model="tiny", api_key_env="JUDGE_KEY", template="Rate: {response}", pattern="(no such text)",
        max_tokens=8,
    )  # fmt: skip
    sample = Samples(("0/0",), ("Hello",), ("Snow is white",), ([1],), ({"prompt": "Hello"},), (True,))

    async def ask():
        return await Judge(source).score(sample, timeout_s=60)

    (failed,) = asyncio.run(ask())
    ids = greedy(_user("Rate: Snow is white"), max_tokens=8)
    text = load_tokenizer(tiny_model_dir).decode(ids, skip_special_tokens=True)
    assert failed.reason.startswith(f"answered {text[:120]!r}, where pattern=")


@pytest.mark.scorecard("R72", tier="full", partly=True)
def test_unknown_model_is_404(server):
    with pytest.raises(openai.NotFoundError, match="nope"):
        server.client.chat.completions.create(model="nope", messages=_user("Hello"))


@pytest.mark.scorecard("S09", tier="full")
def test_everything_but_health_wants_the_key(server):
    root = server.url.removesuffix("/v1")
    assert httpx2.get(f"{root}/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/invocations", "/openapi.json"):
        assert httpx2.get(root + path).status_code == 401, path
    wrong = openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    processes = [server.process.pid, *_children(server)]
    argv = [" ".join(psutil.Process(pid).cmdline()) for pid in processes if psutil.pid_exists(pid)]
    assert not any(KEY in line for line in argv)


@pytest.mark.scorecard("R69", "S21", tier="full")
def test_too_many_requests_get_503(server):
    url = f"{server.url}/chat/completions"
    body = {"model": "tiny", "messages": _user("Hello"), "max_tokens": 100, "ignore_eos": True}

    async def work(client, begun):
        async with client.stream("POST", url, json=body | {"max_tokens": 400, "stream": True}) as response:
            async for _ in response.aiter_lines():
                begun.set()
            return response

    async def burst():
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx2.Limits(max_connections=50)
        async with httpx2.AsyncClient(headers=headers, timeout=60, limits=limits) as client:
            begun = [asyncio.Event() for _ in range(8)]
            at_work = [asyncio.create_task(work(client, event)) for event in begun]
            await asyncio.gather(*[event.wait() for event in begun])  # what comes at once finds the queue full at 8
            posts = [client.post(url, json=body) for _ in range(32)]
            return [*await asyncio.gather(*posts), *await asyncio.gather(*at_work)]

    responses = asyncio.run(burst())
    codes = [r.status_code for r in responses]
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 16  # 8 at work, 8 in the queue
    assert all(r.headers["retry-after"] == "1" for r in responses if r.status_code == 503)


@pytest.mark.scorecard("R71", tier="full")
def test_a_client_that_leaves_frees_the_engine(server):
    def generated():
        headers = {"Authorization": f"Bearer {KEY}"}
        lines = httpx2.get(server.url.removesuffix("/v1") + "/metrics", headers=headers).text.splitlines()
        return next(float(x.split()[-1]) for x in lines if x.startswith("vllm:generation_tokens_total"))

    before = generated()
    stream = _ask(server, stream=True, max_tokens=480, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    time.sleep(1)
    after = generated()
    assert after - before < 400
    time.sleep(0.5)
    assert generated() == after


# Chat


def chat(config: ChatConfig) -> None:
    run_chat(Loaded(config), Console())


def serve(config: ServeConfig) -> None:
    run_serve(Loaded(config), Console())


def _chat_config(server, **options) -> ChatConfig:
    return ChatConfig(url=server.url, api_key_file=server.key_file, **options)


def test_chat_one_shot_prints_the_answer_alone(server, capsys):
    chat(_chat_config(server, prompt="Hello", max_tokens=12))
    assert capsys.readouterr().out == printable(_text(server, temperature=0, max_tokens=12)) + "\n"


def test_chat_reads_lines_and_remembers(server, capsys, monkeypatch):
    lines = "Hello\n\nand then?\n/system Be kind\nHello\n/temperature x\n/clear\n/quit\nnever sent\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat(_chat_config(server, max_tokens=12))
    out, notes = capsys.readouterr()

    def reply(messages):
        options = {"temperature": 0, "max_tokens": 12}
        return server.client.chat.completions.create(model="tiny", messages=messages, **options)

    first = reply(_user("Hello")).choices[0].message.content
    talk = [*_user("Hello"), {"role": "assistant", "content": first}, *_user("and then?")]
    second = reply(talk).choices[0].message.content
    third = reply([{"role": "system", "content": "Be kind"}, *_user("Hello")]).choices[0].message.content
    assert out == "".join(printable(x) + "\n" for x in (first, second, third))
    assert "System message set." in notes and "expected a number" in notes and "Forgotten." in notes


def test_chat_errors_are_one_clear_line(server, tmp_path):
    with pytest.raises(InputError, match="api_key_file: .* wants another key"):
        chat(ChatConfig(url=server.url, prompt="x"))
    with pytest.raises(InputError, match="model: .* has no model 'nope'; it has: tiny"):
        chat(_chat_config(server, model="nope", prompt="x"))
    with pytest.raises(InputError, match="max_tokens.*HTTP 400"):
        chat(_chat_config(server, prompt="x", max_tokens=100_000))
    with pytest.raises(InputError, match="rayllm serve model=FOLDER"):
        chat(ChatConfig(url=f"http://127.0.0.1:{free_port()}/v1", prompt="x"))


@pytest.mark.scorecard("S14", "R44")
def test_model_text_cannot_control_the_terminal():
    assert printable("a\x1b[31mb\x07\x9b1m\r\n\tc[bold]") == "a[31mb1m\n\tc[bold]"


# Before the start


@pytest.mark.scorecard("R61")
def test_a_used_port_and_a_wrong_folder_fail_before_ray_starts(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port: {port} is in use on 127.0.0.1; .* port="):
            serve(ServeConfig(model=tiny_model_dir, port=port))
    with pytest.raises(InputError, match="model: no model folder"):
        serve(ServeConfig(model=tmp_path / "none"))
    with pytest.raises(InputError, match="api_key_file: cannot read"):
        serve(ServeConfig(model=tiny_model_dir, api_key_file=tmp_path / "none"))


@pytest.mark.scorecard("S06")
def test_config_rules(tmp_path):
    with pytest.raises(ValidationError, match="api_key_file"):
        ServeConfig(model=tmp_path, host="0.0.0.0")
    with pytest.raises(ValidationError, match="engine.max_model_len: set max_model_len instead"):
        ServeConfig(model=tmp_path, engine={"max_model_len": 5})
    ServeConfig(model=tmp_path, host="0.0.0.0", api_key_file=tmp_path / "key")


def test_model_name_is_the_stage_or_the_folder(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    assert model_name(ServeConfig(model=folder)) == "final"
    (folder / "lineage.json").write_text('{"stage": "ppo"}')
    assert model_name(ServeConfig(model=folder)) == "ppo"
    assert model_name(ServeConfig(model=folder, served_model_name="mine")) == "mine"


def test_a_serve_config_file_can_build_the_app(tiny_model_dir):
    assert isinstance(build_app({"model": str(tiny_model_dir), "num_replicas": 2}), Application)
    with pytest.raises(ValidationError, match="num_replica"):
        build_app({"model": str(tiny_model_dir), "num_replica": 2})


def test_a_serve_config_refuses_a_model_that_was_changed(tiny_model_dir, tmp_path):
    folder, _ = with_manifest(tiny_model_dir, tmp_path / "model")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=r"config\.json is not the file that was written"):
        build_app({"model": str(folder)})


@pytest.mark.scorecard("S09")
def test_api_key_file_is_checked(tmp_path):
    path = tmp_path / "key"
    for text in ("", "two words", "schlüssel"):
        path.write_text(text)
        with pytest.raises(InputError, match="api_key_file"):
            read_api_key(path)
    path.write_text(" secret\n")
    assert read_api_key(path) == "secret"


@pytest.mark.scorecard("S09", "S19", tier="full")
def test_announcement_never_shows_the_key(tmp_path):
    config = ServeConfig(model=Path("m"), port=9000, api_key_file=tmp_path / "my key")
    text = announcement(config, "http://127.0.0.1:9000/v1", seconds=3)
    assert "url=http://127.0.0.1:9000/v1" in text and f"api_key_file='{tmp_path}/my key'" in text


def test_a_refused_start_in_a_shared_cluster_leaves_no_serve(local_ray, tiny_model_dir):
    port = free_port()
    with pytest.raises(InputError, match="num_replicas=99 .* needs 99 CPUs but Ray has 8"):
        serve(ServeConfig(model=tiny_model_dir, port=port, num_replicas=99))
    typo = {"kv_cache_memory_byte": 1}
    with pytest.raises(InputError, match="^engine.kv_cache_memory_byte: .*engine.kv_cache_memory_bytes"):
        serve(ServeConfig(model=tiny_model_dir, port=port, engine=typo))
    check_port_free("127.0.0.1", port)


def test_a_swallowed_signal_is_not_lost():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stop), Signals() as signals:
        with contextlib.suppress(Stop):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        os.kill(os.getpid(), signal.SIGINT)  # a second one is ignored
        signals.check()
    assert signal.getsignal(signal.SIGINT) == before


# The end; these two run last


def _children(server) -> list[int]:
    return [p.pid for p in psutil.Process(server.process.pid).children(recursive=True)]


def _engine(server) -> psutil.Process | None:
    for pid in _children(server):
        try:
            process = psutil.Process(pid)
            if "EngineCore" in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            pass
    return None


@pytest.mark.scorecard("R69", tier="full")
@pytest.mark.scorecard("R15", tier="full", partly=True)
def test_a_dead_engine_is_replaced(server, greedy):
    _engine(server).kill()
    _wait_for(lambda: "starting it again" in server.printed(), 60)
    _wait_for(lambda: "answers again" in server.printed(), 120)
    options = {"temperature": 0, "max_tokens": 24, "extra_body": {"return_token_ids": True}}
    assert _ask(server, **options).choices[0].token_ids == greedy(_user("Hello"))


@pytest.mark.scorecard("R68", tier="full")
def test_ctrl_c_stops_everything(server):
    started = [psutil.Process(pid) for pid in _children(server)]
    assert _engine(server) in started
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(60) == 130
    left = [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
    check_port_free("127.0.0.1", server.port)
    assert "Traceback" not in server.printed()
