"""What must not be possible: code out of files, answers to strangers, secrets in records, known holes in packages."""

from __future__ import annotations

import ast
import asyncio
import copy
import json
import re
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from actors.reward_remote import HttpRewards
from actors.serving import replica_environment
from actors.web_guard import MAX_BODY_BYTES, Guard, key_digest
from actors.weights import read_safetensors
from rayllm.config.reward import HttpSource
from rayllm.config.serve import ServeConfig
from rayllm.data.chat import prompt_token_ids
from rayllm.data.rows import RowError
from rayllm.data.samples import Failed, Samples
from rayllm.errors import InputError
from rayllm.models.folders import check_model_dir, load_tokenizer
from rayllm.models.loading import load_causal_lm

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-secret-4711"


def sources() -> list[Path]:
    return [path for top in ("rayllm", "actors", "jobs", "bench") for path in sorted((ROOT / top).rglob("*.py"))]


# Code out of files: S01, S02, S04, S15, S22


class Canary:
    """Unpickled it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.scorecard("S01")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "model.pth", "model.ckpt"])
def test_pickled_weights_are_not_opened(tmp_path, tiny_model_dir, name):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"x": Canary(canary)}, folder / name)
    with pytest.raises(InputError, match=r"has no \*.safetensors weights"):
        check_model_dir(folder, key="model")
    with pytest.raises(Exception, match="(?i)safetensors|no file named"):
        load_causal_lm(folder)
    assert not canary.exists()


ALLOWED = {
    ("pickle.loads", "actors/vllm_async.py"): "what this module sends to its own worker processes",
    ("pickle.loads", "actors/publishing.py"): "what a learner of this run wrote, by Ray or this node's memory",
    ("pickle.loads", "actors/carried.py"): "what an actor of this run sends to another one through a third",
    ("pickle.loads", "actors/weight_group.py"): "what the learner of this run sends to its own group",
    ("np.load", "*"): "without allow_pickle",
}
"""Call and file -> why it is there."""

FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "dill.loads", "joblib.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec", "compile", "__import__",
    "torch.load", "runpy.run_path", "np.load", "numpy.load",
}  # fmt: skip


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, name, call) of every call in the code."""
    return [
        (str(path.relative_to(ROOT)), called(node), node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.scorecard("S02", "S15")
def test_nothing_opens_pickles_evaluates_or_shells_out_but_what_is_listed(seen):
    bad, used = [], set()
    for file, name, node in calls():
        words = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        if words.get("shell") == "True" or words.get("trust_remote_code") == "True" or words.get("allow_pickle") == "True":
            bad.append((file, node.lineno, words))
        if name == "torch.load" and words.get("weights_only") == "True":
            continue
        if name in FORBIDDEN:
            listed = next((key for key in ((name, file), (name, "*")) if key in ALLOWED), None)
            used.add(listed)
            if listed is None:
                bad.append((file, node.lineno, name))
    assert not bad
    assert used - {None} == set(ALLOWED)  # and the list has nothing that is gone
    seen(f"{len(calls())} calls looked at; {len(ALLOWED)} uses listed with their reason")


def test_the_lint_itself_finds_what_it_is_for():
    for text in ("pickle.loads(x)", "eval(x)", "os.system(x)", "yaml.load(x)"):
        (node,) = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        assert called(node) in FORBIDDEN


@pytest.mark.scorecard("S04")
def test_a_model_that_brings_code_is_refused_or_loaded_without_it(tmp_path, tiny_model_dir):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    internal = {"_attn_implementation_internal": "evil/kernels"}
    for change in ({"auto_map": auto_map}, internal):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        check_model_dir(folder, key="model")  # a kind that transformers knows: its own code serves
        try:
            load_causal_lm(folder)
        except (ValueError, ImportError, OSError) as error:
            assert change is internal, error
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(InputError, match="model: .* is a model of its own code .*, which is not run"):
        check_model_dir(folder, key="model")
    with pytest.raises(ValueError, match="trust_remote_code|evil"):
        load_causal_lm(folder)
    assert not canary.exists()


@pytest.mark.scorecard("S04", "R66")
def test_workers_do_not_reach_for_the_hub():
    from actors.environment import worker_env

    assert worker_env(0)["HF_HUB_OFFLINE"] == worker_env(1)["HF_HUB_OFFLINE"] == "1"
    assert replica_environment(ServeConfig(model=Path("m")))["HF_HUB_OFFLINE"] == "1"


@pytest.mark.scorecard("S22")
@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__base__.__subclasses__()[0] }}",
        "{{ raise_exception('no') }}",
        "{% set x = messages.append({'role': 'user', 'content': 'more'}) %}x",
    ],
)
def test_a_template_that_attacks_is_a_bad_row(tiny_tokenizer, template):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(RowError, match="the chat template refuses it"):
        prompt_token_ids(tokenizer, [{"role": "user", "content": "hi"}])


@pytest.mark.scorecard("S11")
@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "..\\b.safetensors", "b\0.safetensors", "x/y", "./b"],
)
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        list(read_safetensors(tmp_path))


# Packages: S05, S24

FLOORS = {
    "torch": "2.10",  # CVE-2026-24747: weights_only=True and memory
    "transformers": "5.3",  # CVE-2026-4372: code by _attn_implementation_internal
    "ray": "2.54",  # CVE-2026-27482, CVE-2025-62593: the dashboard
    "vllm": "0.14",  # CVE-2026-22807: trust_remote_code ignored
}
"""Package -> first version without the holes that we know of."""


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    return [Requirement(text) for text in listed]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


@pytest.mark.scorecard("S05")
def test_packages_with_known_holes_are_excluded():
    bounds = {r.name: [Version(s.version) for s in r.specifier if s.operator == ">="] for r in requirements()}
    for name, floor in FLOORS.items():
        assert bounds[name] and max(bounds[name]) >= Version(floor), name
        pinned = pins().get(name) or pins().get(f"{name}-cpu")
        assert pinned and Version(pinned) >= Version(floor), name
    for name in ("torch", "transformers", "ray"):
        assert Version(metadata.version(name)) >= Version(FLOORS[name])


@pytest.mark.scorecard("S24")
def test_every_dependency_is_bounded_and_pinned_and_nothing_is_installed_at_run_time():
    for requirement in requirements():
        name = requirement.name.lower()
        if name == "vllm":  # of the extra for GPUs, which the pins are not for
            continue
        assert name in pins(), f"{name} has no pin in constraints-cpu.txt"
        assert requirement.specifier.contains(pins()[name], prereleases=True), requirement
    for path in sources():
        assert not re.search(r"[\[{][^\]}]*\"(pip|uv)\"[^\]}]*[\]}]", path.read_text()), path  # commands, environments


# The served model's door: S06, S08, S09, S10, S12, S21, R72


class App:
    """An app that says what came through."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})


def ask(path="/v1/chat/completions", *, key=None, local=True, headers=None, chunks=(b"{}",), length=None) -> tuple[int, App]:
    """Status of one request to a guarded app, and the app."""
    app, sent = App(), []
    pieces = [
        {"type": "http.request", "body": chunk, "more_body": n + 1 < len(chunks)} for n, chunk in enumerate(chunks)
    ]
    given = {"host": "127.0.0.1:8000", **(headers or {})}
    if length is not None:
        given["content-length"] = str(length)
    scope = {"type": "http", "path": path, "headers": [(k.encode(), v.encode()) for k, v in given.items()]}

    async def receive():
        return pieces.pop(0)

    async def send(message):
        sent.append(message)

    guard = Guard(app, sha256=None if key is None else key_digest(key.encode()), local=local)
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], app


ROUTES = [
    "/collective_rpc", "/update_weights", "/invocations", "/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache",
    "/server_info", "/docs", "/openapi.json", "/inference/v1/generate", "/v2/rerank", "/", "/v1", "//v1/models",
    "/v1/../pause", "/%76%31/models",
]  # fmt: skip


@pytest.mark.scorecard("S08")
def test_what_is_not_listed_is_not_there(seen):
    for path in ROUTES:
        if path != "/v1/../pause":  # below /v1/ for us, and no route of vLLM's, which compares paths as they are
            assert ask(path)[0] == 404, path
        assert ask(path, key=KEY)[0] == 401, path
    for path in ("/v1/models", "/v1/chat/completions", "/health", "/metrics"):
        assert ask(path)[0] == 200, path
    assert replica_environment(ServeConfig(model=Path("m")))["VLLM_SERVER_DEV_MODE"] == "0"
    seen(f"{len(ROUTES)} routes of vLLM's answer 404 without a key and 401 with one set; its development mode is off")


@pytest.mark.scorecard("S09")
def test_the_key_is_asked_everywhere_but_for_health():
    good = {"authorization": f"Bearer {KEY}"}
    assert ask("/v1/models", key=KEY, headers=good)[0] == 200
    assert ask("/health", key=KEY)[0] == 200
    for wrong in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", KEY, f"bearer  {KEY[:-1]}"):
        for path in ("/v1/models", "/metrics", "/ping", "/nowhere"):
            assert ask(path, key=KEY, headers={"authorization": wrong})[0] == 401, (wrong, path)


@pytest.mark.scorecard("S10")
def test_other_pages_and_rebound_names_are_refused_without_a_key():
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "127.9.9.9:1"):
        assert ask(headers={"host": host})[0] == 200, host
    for host in ("evil.example:8000", "127.0.0.1.evil.example", "", "10.0.0.7:8000", "localhost.evil.example"):
        assert ask(headers={"host": host})[0] == 403, host
    assert ask(headers={"host": "model.cluster.local"}, local=False)[0] == 200  # behind a proxy of the operator's
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9000", "http://localhost:8000"):
        assert ask(headers={"origin": origin})[0] == 403, origin
    assert ask(headers={"origin": "http://127.0.0.1:8000"})[0] == 200
    with_key = {"authorization": f"Bearer {KEY}", "origin": "https://my.app", "host": "my.host"}
    assert ask(key=KEY, headers=with_key)[0] == 200


@pytest.mark.scorecard("S12")
@pytest.mark.scorecard("S21", "R72", partly=True)
def test_a_body_has_a_bound_whether_it_says_its_length_or_not():
    assert ask(length=MAX_BODY_BYTES)[0] == 200
    for length in (MAX_BODY_BYTES + 1, 100 << 20, 10**30, -1, "many"):
        status, app = ask(length=length)
        assert status == 413 and not app.bodies, length
    chunk = bytes(1 << 20)
    assert ask(chunks=[chunk] * 8)[0] == 200
    status, app = ask(chunks=[chunk] * 100)
    assert status == 413 and not app.bodies
    assert replica_environment(ServeConfig(model=Path("m")))["VLLM_MAX_N_SEQUENCES"] == "64"


# Reward servers and records: S18, S19


@pytest.mark.scorecard("S18")
def test_a_reward_server_that_sends_us_elsewhere_is_not_followed():
    asked = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            return None

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = HttpSource(url=f"http://127.0.0.1:{server.server_port}/score", retries=0)
        samples = Samples(("0/0",), ("p",), ("r",), ([1],), ({},), (True,))
        (found,) = asyncio.run(HttpRewards(source).score(samples, timeout_s=20))
    finally:
        server.shutdown()
        server.server_close()
    assert isinstance(found, Failed) and "answered HTTP 307" in found.reason
    assert asked == ["/score"]


@pytest.mark.scorecard("S19")
def test_a_key_is_in_no_record_of_a_run(tmp_path, monkeypatch):
    from rayllm.config.base import load_config
    from rayllm.config.ppo import PPOConfig
    from rayllm.report.run import Run

    monkeypatch.setenv("MY_KEY", KEY)
    for name in ("model", "prompts.jsonl"):
        (tmp_path / name).write_text("{}")
    keys = [
        f"run_dir={tmp_path / 'run'}", f"model={tmp_path / 'model'}", f"prompts={tmp_path / 'prompts.jsonl'}",
        "reward.sources.j.kind=http", "reward.sources.j.url=http://127.0.0.1:1", "reward.sources.j.api_key_env=MY_KEY",
    ]  # fmt: skip
    with Run("ppo", load_config(PPOConfig, None, keys)) as run:
        run.note("going")
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(), path
    assert "MY_KEY" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.scorecard("R66")
def test_no_deadline_hangs_on_the_wall_clock():
    uses = [(file, node.lineno) for file, name, node in calls() if name in ("time.time", "datetime.now", "datetime.utcnow")]
    by_file = {file for file, _ in uses if not file.startswith("bench/")}
    assert by_file == {"jobs/ppo.py", "rayllm/lineage.py", "rayllm/report/run.py"}  # ages and dates, for people
