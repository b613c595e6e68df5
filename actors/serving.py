"""The Ray Serve deployment: vLLM's own OpenAI-compatible app around one engine per replica.

A replica is one Ray actor with vLLM's ``AsyncLLM``, which keeps the model in a child process (EngineCore).
Requests come from Serve's proxy, go through the app that ``vllm serve`` has (``/v1/chat/completions``,
``/v1/completions``, ``/v1/models``, ``/metrics``, ...) and stream back. When the engine dies the health check
fails and Serve puts a new replica in its place.

A client that gives no sampling options gets temperature 1, top-p 1, no top-k, no penalties and as many tokens
as fit: plain sampling from the model, as in RLHF training. The sampling defaults in a model's own
``generation_config.json`` are not used (``engine.generation_config=auto`` brings them back). Answers stop at
the tokenizer's end-of-sequence token, here end-of-turn, and at every ``eos_token_id`` in that file.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import json
import os
import types
from argparse import Namespace
from typing import Any

from ray import serve
from ray.serve import Application

from actors.engine_guard import REPLICA_PID
from rayllm.config.serve import ServeConfig

DEPLOYMENT = "ModelServer"
CPU_KV_CACHE_BYTES = 512 * 1024**2
OPEN_PATHS = ("/health",)
BAD_ARGUMENT = "engine argument refused: "
"""Begins the message of errors in the replica that come from the user's config."""


@serve.deployment(
    name=DEPLOYMENT,
    health_check_period_s=2,  # three failures in a row replace the replica
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=20,  # requests under way may finish
    graceful_shutdown_wait_loop_s=0.2,
    max_constructor_retry_count=1,  # a model that does not load will not load the second time
)
@serve.ingress()
class ModelServer:
    """One replica: an engine and the web app in front of it."""

    async def __init__(self, arguments: dict[str, Any], api_key_sha256: str | None) -> None:
        """Load the model; returns when the engine can answer.

        Args:
            arguments: vLLM's engine and server arguments by name.
            api_key_sha256: hex digest of the key that clients must send; None lets everyone in.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        os.environ[REPLICA_PID] = str(os.getpid())  # the engine's processes end when this one is killed
        self._api_key_sha256 = api_key_sha256
        self._args = server_namespace(arguments)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(self._args), usage_context=UsageContext.OPENAI_API_SERVER
        )

    async def __serve_build_asgi_app__(self) -> Any:
        """Serve calls this once, after the constructor, to get the app that answers requests."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        app = build_app(self._args, supported_tasks=tasks, model_config=self._engine.model_config)
        await init_app_state(self._engine, app.state, self._args, tasks)
        app.state.server = types.SimpleNamespace()  # vLLM flags a dead engine here, for its own launcher
        if self._api_key_sha256 is not None:
            app.add_middleware(ApiKeyMiddleware, sha256=self._api_key_sha256)
        return app

    async def check_health(self) -> None:
        """Raises when the engine is dead."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()


class ApiKeyMiddleware:
    """Answers 401 to requests without the key, whatever their path; only health checks are open.

    vLLM's own ``--api-key`` guards ``/v1`` but leaves paths with the same abilities open, such as
    ``/invocations``. Only the key's digest is known here, so it shows in no log, dashboard or checkpoint.
    """

    def __init__(self, app: Any, *, sha256: str) -> None:
        self._app = app
        self._sha256 = sha256

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        guarded = scope["type"] in ("http", "websocket") and scope["path"] not in OPEN_PATHS
        if not guarded or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _send_unauthorized(send)

    def _has_key(self, scope: Any) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key_digest(token.strip()), self._sha256)


async def _send_unauthorized(send: Any) -> None:
    error = {"message": "Missing or wrong API key", "type": "invalid_request_error", "code": 401}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def key_digest(key: bytes) -> str:
    """Hex SHA-256 of an API key."""
    return hashlib.sha256(key).hexdigest()


def application(config: ServeConfig, *, model_name: str, api_key: str | None) -> Application:
    """The Serve application for ``config``, with absolute paths, ready for ``serve.run``."""
    return ModelServer.options(
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_concurrent_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "runtime_env": {"env_vars": replica_environment(config)},
        },
    ).bind(
        vllm_arguments(config, model_name=model_name),
        None if api_key is None else key_digest(api_key.encode()),
    )


def vllm_arguments(config: ServeConfig, *, model_name: str) -> dict[str, Any]:
    """vLLM arguments of a replica: defaults for the device, then ``config.engine`` on top."""
    arguments = {
        "model": str(config.model.resolve()),
        "served_model_name": [model_name],
        "generation_config": "vllm",
        "worker_extension_cls": "actors.engine_guard.EngineGuard",
        "uvicorn_log_level": "warning",
    }
    arguments |= _cuda_arguments(config) if config.gpus_per_replica else _cpu_arguments(config)
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    return arguments | config.engine


def _cpu_arguments(config: ServeConfig) -> dict[str, Any]:
    """Eager float32 and a small, fixed KV cache: ready soonest, and exact."""
    arguments: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if "kv_cache_memory_bytes" not in config.engine:
        arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    if config.engine.get("tensor_parallel_size", 1) == 1:
        arguments["distributed_executor_backend"] = "uni"  # no process beside EngineCore
    return arguments


def _cuda_arguments(config: ServeConfig) -> dict[str, Any]:
    """The model's own dtype, CUDA graphs, nearly all of the GPU's memory. Not run yet."""
    return {
        "dtype": "auto",
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": config.gpus_per_replica,
    }


def replica_environment(config: ServeConfig) -> dict[str, str]:
    """Environment of a replica's processes; libraries read it when they are imported."""
    environment = {
        "HF_HUB_OFFLINE": "1",  # the model is a local folder
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": "",  # the key comes from api_key_file alone
    }
    if config.gpus_per_replica:
        return environment
    return environment | {
        "OMP_NUM_THREADS": str(config.cpus_per_replica),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every replica is pinned to the same core
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets the "uni" executor be used on CPU
        "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled with enforce_eager; saves the import's work
    }


def server_namespace(arguments: dict[str, Any]) -> Namespace:
    """vLLM's parsed command line with ``arguments`` in place of its defaults.

    Raises:
        ValueError: vLLM has no argument of that name; the message has the nearest one.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    known = vars(args)
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean engine.{near[0]}?" if near else ""
            raise ValueError(f"{BAD_ARGUMENT}engine.{name}: vLLM has no such argument{hint}")
        setattr(args, name, value)
    return args
