"""Serve a model over HTTP: OpenAI-compatible, on Ray Serve with vLLM behind it.

Before anything starts: config, model folder, key file and port are checked. Then Ray, Serve's proxy and the
replicas start; the job waits for ``/v1/models`` to answer, prints how to use the server, and watches it until
Ctrl-C or SIGTERM. Whatever ends the job, every process that it started is gone when it returns.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from rich.console import Console
from rich.text import Text

from actors.serving import BAD_ARGUMENT, LOAD_FAILED, application, model_name, read_api_key
from jobs.serve_session import APP, Signals, Stop, check_port_free, serve_session
from rayllm.config.base import Loaded
from rayllm.config.serve import ServeConfig, is_loopback
from rayllm.errors import InputError
from rayllm.lineage import check_files
from rayllm.models.folders import check_model_dir, check_tokenizer_dir

POLL_S = 1.0


def run(loaded: Loaded[ServeConfig], console: Console, *, verbose: bool = False) -> None:
    """The `serve` job: serve until SIGTERM (returns) or Ctrl-C (exits with 130).

    Raises:
        InputError: the model, the key file, the port or an engine argument is wrong; too few CPUs.
        RuntimeError: the model did not load, or the cluster broke.
        SystemExit: 130 after Ctrl-C.
    """
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_tokenizer_dir(config.model, key="model")
    check_files(config.model, key="model")
    api_key = None if config.api_key_file is None else read_api_key(config.api_key_file)
    check_port_free(config.host, config.port)
    stopped: Stop | None = None
    with Signals() as signals:
        try:
            with serve_session(config.host, config.port, signals):
                _serve(config, api_key, console, signals)
        except Stop as stop:
            stopped = stop
    if stopped is not None and stopped.signum == signal.SIGINT:
        raise SystemExit(130)


def _serve(
    config: ServeConfig,
    api_key: str | None,
    console: Console,
    signals: Signals,
) -> None:
    """Start everything, announce it and watch it; ends only by an exception."""
    url = base_url(config.host, config.port)
    start = time.monotonic()
    deadline = start + config.start_timeout_s
    try:
        with _progress(console, f"Loading {config.model} ..."):
            _check_resources(config)
            _deploy(config)
            _wait_until_loaded(config, deadline, signals)
            _wait_until_up(url, api_key, deadline, signals)
        text = announcement(config, url, seconds=time.monotonic() - start)
        console.print(text, markup=False, soft_wrap=True)
        _watch(console, signals)
    except Stop:
        console.print("\nStopping ...")
        raise


@contextmanager
def _progress(console: Console, text: str) -> Iterator[None]:
    """A spinner in a terminal, a line in a log."""
    if not console.is_terminal:
        console.print(text, markup=False, soft_wrap=True)
        yield
        return
    with console.status(Text(text)):
        yield


def base_url(host: str, port: int) -> str:
    """Where clients on this machine reach the server."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}/v1" if ":" in name else f"http://{name}:{port}/v1"


def _check_resources(config: ServeConfig) -> None:
    """Raise InputError if the replicas can never be placed."""
    have = ray.cluster_resources()
    for resource, each in (("CPU", config.cpus_per_replica), ("GPU", config.gpus_per_replica)):
        need, found = each * config.num_replicas, have.get(resource, 0)
        if need > found:
            key = f"{resource.lower()}s_per_replica"
            raise InputError(
                f"num_replicas={config.num_replicas} x {key}={each} needs {need} {resource}s "
                f"but Ray has {found:g}; lower num_replicas or {key}"
            )


def _deploy(config: ServeConfig) -> None:
    """Start the proxy and ask Serve for the replicas."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": config.port},
        logging_config={"log_level": "WARNING"},
    )
    app = application(config, local=is_loopback(config.host))
    serve.run_many([serve.RunTarget(app, name=APP)], wait_for_applications_running=False)


def _wait_until_loaded(config: ServeConfig, deadline: float, signals: Signals) -> None:
    """Return when all replicas have loaded the model."""
    while True:
        signals.check()
        app = serve.status().applications[APP]
        if app.status == "RUNNING":
            return
        if app.status == "DEPLOY_FAILED":
            details = [app.message, *(d.message for d in app.deployments.values())]
            raise explain_failure(config, "\n".join(details))
        if time.monotonic() > deadline:
            limit = f"start_timeout_s={config.start_timeout_s:g}"
            raise RuntimeError(f"{config.model} did not load within {limit}")
        time.sleep(0.2)


def explain_failure(config: ServeConfig, details: str) -> Exception:
    """The error to raise for Serve's account of a failed start, which holds the replica's traceback."""
    refused = re.search(re.escape(BAD_ARGUMENT) + "(.*)", details)
    if refused is not None:
        return InputError(refused.group(1))
    failed = re.search(re.escape(LOAD_FAILED) + "(.*)", details)
    return RuntimeError(f"{config.model} did not load: {failed.group(1) if failed else details}")


def _wait_until_up(url: str, api_key: str | None, deadline: float, signals: Signals) -> None:
    request = urllib.request.Request(f"{url}/models")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        signals.check()
        try:
            with opener.open(request, timeout=10):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server started but {url}/models does not answer: {error}") from None
        time.sleep(0.1)


def announcement(config: ServeConfig, url: str, *, seconds: float) -> str:
    """How to use the running server: addresses and two commands to copy."""
    name = model_name(config)
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    key = "" if config.api_key_file is None else shlex.quote(str(config.api_key_file))
    curl = f"curl {url}/chat/completions -H 'Content-Type: application/json'"
    chat = "rayllm chat"
    if config.port != 8000 or not url.startswith("http://127.0.0.1:"):
        chat += f" url={url}"
    if key:
        curl += f' -H "Authorization: Bearer $(cat {key})"'
        chat += f" api_key_file={key}"
    lines = [
        f"Serving {config.model} as {name!r} (loaded in {seconds:.0f} s)",
        "",
        f"  API    {url}",
        f"  chat   {chat}",
        f"  curl   {curl} -d {shlex.quote(body)}",
        "",
        "Ctrl-C stops the server.",
    ]
    return "\n".join(lines)


def _watch(console: Console, signals: Signals) -> None:
    """Tell when the model goes down and comes back; Serve repairs it. Ends only by an exception."""
    was_up = True
    while True:
        signals.check()
        time.sleep(POLL_S)
        app = serve.status().applications.get(APP)
        if app is None:
            raise RuntimeError("the application was deleted from the Ray cluster; start the job again")
        is_up = app.status == "RUNNING"
        if is_up != was_up:
            text = "The model answers again." if is_up else "The model's engine died; starting it again ..."
            console.print(text)
        was_up = is_up




if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("serve")
