"""Another model under the same name, while the first one is being asked."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from actors.serving import FINGERPRINT_DIGITS
from tests.conftest import ROOT
from tests.jobs.test_serve import free_port, with_manifest

SCRIPT = """
import json, sys, threading, time
import httpx2
from ray import serve
from actors.serving import build_app
from jobs.session import ray_session

port, *models = sys.argv[1:]
body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 24}
answers, done = [], threading.Event()

def deploy(model):
    app = build_app({"model": model, "served_model_name": "tiny"})
    serve.run_many([serve.RunTarget(app, name="rayllm")], wait_for_applications_running=True)

def ask():
    with httpx2.Client(timeout=120) as client:
        while not done.is_set():
            response = client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
            told = response.json()
            answers.append((response.status_code, told.get("system_fingerprint"), told["choices"][0]["message"]["content"]))

def asked(count):
    while len(answers) < count:
        time.sleep(0.05)

with ray_session(None):
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, logging_config={"log_level": "WARNING"})
    deploy(models[0])
    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    asked(6)
    deploy(models[1])
    asked(len(answers) + 6)
    done.set()
    for thread in threads:
        thread.join()
    serve.shutdown()
print(json.dumps(answers))
"""


@pytest.mark.long
@pytest.mark.scorecard("R70", tier="full")
def test_every_answer_is_of_one_model_and_says_of_which(tiny_model_dir, other_tiny_model_dir, tmp_path, seen):
    first, first_id = with_manifest(tiny_model_dir, tmp_path / "first")
    other, other_id = with_manifest(other_tiny_model_dir, tmp_path / "other")
    job = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(free_port()), str(first), str(other)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    answers = json.loads(job.stdout.splitlines()[-1])
    assert {status for status, _, _ in answers} == {200}
    ids = [one[:FINGERPRINT_DIGITS] for one in (first_id, other_id)]
    fingerprints = [fingerprint for _, fingerprint, _ in answers]
    assert list(dict.fromkeys(fingerprints)) == ids
    texts = {fingerprint: {text for _, name, text in answers if name == fingerprint} for fingerprint in ids}
    assert all(len(found) == 1 for found in texts.values())  # greedy: a mixture would say something else
    assert texts[ids[0]] != texts[ids[1]]
    seen(f"{len(answers)} answers, each of one of two models that it names; none failed")
