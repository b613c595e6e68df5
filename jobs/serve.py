"""Serve a model over HTTP: OpenAI-compatible, on Ray Serve with vLLM behind it.

Before anything starts: config, model folder, key file and port are checked. Then Ray, Serve's proxy and the
replicas start; the job waits for ``/v1/models`` to answer, prints how to use the server, and watches it until
Ctrl-C or SIGTERM. Whatever ends the job, every process that it started is gone when it returns.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shlex
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import ray
from ray import serve
from rich.console import Console
from rich.text import Text

from actors.serving import BAD_ARGUMENT, LOAD_FAILED, application, model_name, read_api_key
from rayllm.config.serve import ServeConfig
from rayllm.errors import InputError
from rayllm.models.loading import check_model_dir, check_tokenizer_dir

APP = "rayllm"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_S = 1.0
KILL_AFTER_S = 15.0


class Stop(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run(config: ServeConfig, *, ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM (returns) or Ctrl-C (exits with 130).

    Args:
        config: what to serve and where.
        ready: called with the server's base address (``http://.../v1``) once it answers.

    Raises:
        InputError: the model, the key file, the port or an engine argument is wrong; too few CPUs.
        RuntimeError: the model did not load, or the cluster broke.
        SystemExit: 130 after Ctrl-C.
    """
    check_model_dir(config.model, key="model")
    check_tokenizer_dir(config.model, key="model")
    api_key = None if config.api_key_file is None else read_api_key(config.api_key_file)
    check_port_free(config.host, config.port)
    console = Console(highlight=False)
    stopped: Stop | None = None
    with _signals_raise_stop() as catch_signals:
        try:
            with _ray(catch_signals):
                _serve(config, api_key, console, ready)
        except Stop as stop:
            stopped = stop
    if stopped is not None and stopped.signum == signal.SIGINT:
        raise SystemExit(130)


def _serve(
    config: ServeConfig, api_key: str | None, console: Console, ready: Callable[[str], None] | None
) -> None:
    """Start everything, announce it and watch it; ends only by an exception."""
    url = base_url(config.host, config.port)
    start = time.monotonic()
    deadline = start + config.start_timeout_s
    try:
        with _progress(console, f"Loading {config.model} ..."):
            _check_resources(config)
            _deploy(config)
            _wait_until_loaded(config, deadline)
            _wait_until_up(url, api_key, deadline)
        text = announcement(config, url, seconds=time.monotonic() - start)
        console.print(text, markup=False, soft_wrap=True)
        if ready is not None:
            ready(url)
        _watch(console)
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


def check_port_free(host: str, port: int) -> None:
    """Raise InputError unless a server can listen on ``host`` and ``port``.

    Serve's proxies share ports (SO_REUSEPORT): without this check a second server would start and take turns
    with the first.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"host: cannot resolve {host!r}: {error.strerror}") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except PermissionError:
            raise InputError(f"port: {port} needs root rights; set port to a number above 1023") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(f"host: cannot listen on {host}: {error.strerror}") from None
            raise InputError(
                f"port: {port} is in use on {host}; stop the other server or set port to a free one, "
                f"such as port={_free_port(host)}"
            ) from None


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.getsockname()[1]


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
    serve.run_many([serve.RunTarget(application(config), name=APP)], wait_for_applications_running=False)


def _wait_until_loaded(config: ServeConfig, deadline: float) -> None:
    """Return when all replicas have loaded the model."""
    while True:
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


def _wait_until_up(url: str, api_key: str | None, deadline: float) -> None:
    request = urllib.request.Request(f"{url}/models")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
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
        f"Serving {config.model} as {name!r} (ready after {seconds:.0f} s)",
        "",
        f"  API    {url}",
        f"  chat   {chat}",
        f"  curl   {curl} -d {shlex.quote(body)}",
        "",
        "Ctrl-C stops the server.",
    ]
    return "\n".join(lines)


def _watch(console: Console) -> None:
    """Tell when the model goes down and comes back; Serve repairs it. Ends only by an exception."""
    was_up = True
    while True:
        time.sleep(POLL_S)
        app = serve.status().applications.get(APP)
        if app is None:
            raise RuntimeError("the application was deleted from the Ray cluster; start the job again")
        is_up = app.status == "RUNNING"
        if is_up != was_up:
            text = "The model answers again." if is_up else "The model's engine died; starting it again ..."
            console.print(text)
        was_up = is_up


@contextmanager
def _signals_raise_stop() -> Iterator[Callable[[], None]]:
    """The next SIGINT or SIGTERM raises Stop, later ones are ignored; gives a function to catch one more.

    Only the main thread can catch signals: in another one this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(signum: int, _frame: object) -> None:
        _ignore_signals()  # nothing interrupts the clean-up half way
        raise Stop(signum)

    def catch() -> None:
        for signum in SIGNALS:
            signal.signal(signum, handle)

    previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
    catch()
    try:
        yield catch
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def _ray(catch_signals: Callable[[], None]) -> Iterator[None]:
    """Ray and, at the end, no Serve; a cluster that was started here ends with all its processes.

    Requests under way may finish (20 s); a second Ctrl-C cuts them off.
    """
    if ray.is_initialized():
        if serve.status().proxies:  # its port cannot be changed, and it is not ours to stop
            raise InputError("port: this cluster already runs Ray Serve; stop it first (`serve shutdown`)")
        try:
            yield
        finally:
            _stop_app()
            serve.shutdown()
        return
    before = set(psutil.Process().children(recursive=True))
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
        catch_signals()  # Ray put its own SIGTERM handler in place
        yield
    finally:
        _ignore_signals()
        started = [p for p in psutil.Process().children(recursive=True) if p not in before]
        if ray.is_initialized() and _cluster_lives(before):
            with suppress(Stop):
                catch_signals()
                _stop_app()
            _ignore_signals()
        else:  # Ray's calls would wait a minute for an answer
            _end(started, after=0)
        ray.shutdown()
        _end(started, after=KILL_AFTER_S)


def _stop_app() -> None:
    """Returns when the replicas, and with them the engines, have ended."""
    if APP in serve.status().applications:
        serve.delete(APP)


def _cluster_lives(before: set[psutil.Process]) -> bool:
    """False if who stopped this job signalled Ray's processes too, as `kill -- -GROUP` and systemd do."""
    time.sleep(0.5)
    return all(_is_running(daemon) for daemon in psutil.Process().children() if daemon not in before)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


def _end(processes: list[psutil.Process], *, after: float) -> None:
    """Kill the processes that have not ended by themselves ``after`` seconds from now."""
    _, alive = psutil.wait_procs(processes, timeout=after)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=KILL_AFTER_S)
