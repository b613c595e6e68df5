"""The Ray Serve deployment: vLLM's own OpenAI-compatible app around one engine per replica.

A replica is one Ray actor with vLLM's ``AsyncLLM``, which keeps the model in a child process (EngineCore).
Requests come from Serve's proxy, go through the app that ``vllm serve`` has (``/v1/chat/completions``,
``/v1/completions``, ``/v1/models``, ``/metrics``, ...) and stream back. When the engine dies the health check
fails and Serve puts a new replica in its place.

A client that gives no sampling options gets temperature 1, top-p 1, no top-k, no penalties and as many tokens
as fit: plain sampling from the model, as in RLHF training. The sampling defaults in a model's own
``generation_config.json`` are not used (``engine.generation_config=auto`` brings them back). Answers stop at
the tokenizer's end-of-sequence token, here end-of-turn, and at every ``eos_token_id`` in that file.

Every answer's ``system_fingerprint`` is the start of the model's id in its lineage: it tells which model gave it,
whatever was served before and after under the same name.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from actors.engine_guard import REPLICA_PID
from actors.web_guard import Guard, key_digest
from rayllm import faults
from rayllm.config.serve import ServeConfig
from rayllm.errors import InputError
from rayllm.lineage import check_files, read_manifest

DEPLOYMENT = "ModelServer"
CPU_KV_CACHE_BYTES = 512 * 1024**2
MAX_ANSWERS = 64
"""To one request (`n`)."""

FINGERPRINT_DIGITS = 16
"""Of a model's id."""

BAD_ARGUMENT = "engine argument refused: "
LOAD_FAILED = "engine did not start: "
"""How the messages of errors in a replica begin: those of the user's config, and others."""


@serve.deployment(
    name=DEPLOYMENT,
    health_check_period_s=1,  # three failures in a row replace the replica
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=20,  # requests under way may finish
    graceful_shutdown_wait_loop_s=0.2,
    max_constructor_retry_count=1,  # a model that does not load will not load the second time
)
@serve.ingress()
class ModelServer:
    """One replica: an engine and the web app in front of it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, arguments: dict[str, Any], api_key_sha256: str | None, local: bool
    ) -> None:
        """Load the model; returns when the engine can answer.

        Args:
            arguments: vLLM's engine and server arguments by name.
            api_key_sha256: hex digest of the key that clients must send; None lets everyone in.
            local: as in `Guard`.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        os.environ[REPLICA_PID] = str(os.getpid())  # the engine's processes end when this one is killed
        faults.reach("serve.load")
        self._api_key_sha256, self._local = api_key_sha256, local
        self._args = server_namespace(arguments)
        try:
            engine_args = AsyncEngineArgs.from_cli_args(self._args)
            config = engine_args.create_engine_config()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{BAD_ARGUMENT}engine: {_one_line(error)}") from error
        try:
            self._engine = AsyncLLM.from_vllm_config(
                config,
                enable_log_requests=engine_args.enable_log_requests,
                disable_log_stats=engine_args.disable_log_stats,
            )
        except RuntimeError as error:
            raise RuntimeError(LOAD_FAILED + (_engine_error() or _one_line(error))) from error

    async def __serve_build_asgi_app__(self) -> Any:
        """Serve calls this once, after the constructor, to get the app that answers requests."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        app = build_app(self._args, supported_tasks=tasks, model_config=self._engine.model_config)
        await init_app_state(self._engine, app.state, self._args, tasks)
        app.state.server = types.SimpleNamespace()  # vLLM flags a dead engine here, for its own launcher
        return Guard(app, sha256=self._api_key_sha256, local=self._local)

    async def check_health(self) -> None:
        """Raises when the engine is dead."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return " ".join(str(error).split())


def _engine_error() -> str | None:
    """The last exception in this process's log; the engine's process writes there too, and vLLM says only
    "see root cause above"."""
    try:
        log = Path(os.readlink("/proc/self/fd/2")).read_text(errors="replace")
    except OSError:
        return None
    found = re.findall(r"^(?:\(.*?\) )?\w*(?:Error|Exception): .+", log[-100_000:], flags=re.MULTILINE)
    return found[-1] if found else None


def model_name(config: ServeConfig) -> str:
    """The name that clients use: as configured, else the stage in the lineage, else the folder's name."""
    if config.served_model_name is not None:
        return config.served_model_name
    with suppress(OSError, ValueError, AttributeError):
        stage = (read_manifest(config.model) or {}).get("stage")
        if isinstance(stage, str) and stage:
            return stage
    return config.model.resolve().name


def read_api_key(path: Path) -> str:
    """The key in ``path``, white space around it left out.

    Raises:
        InputError: no such file, nothing in it, or a character that no HTTP header can carry.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"api_key_file: cannot read {path}: {reason}") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"api_key_file: {path} must hold one key: printable ASCII without spaces")
    return key


def application(config: ServeConfig, *, local: bool) -> Application:
    """What ``serve.run`` takes; ``local`` as in `Guard`.

    Raises:
        InputError: the key file cannot be used.
    """
    key = None if config.api_key_file is None else key_digest(read_api_key(config.api_key_file).encode())
    deployment: Any = ModelServer
    return deployment.options(
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_concurrent_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "runtime_env": {"env_vars": replica_environment(config)},
        },
    ).bind(vllm_arguments(config), key, local)


def build_app(args: dict[str, Any]) -> Application:
    """For a Serve config file: ``import_path: actors.serving:build_app``, ServeConfig's keys under ``args``.

    The file's own ``http_options`` say where to listen; ``host`` and ``port`` have no effect there.

    Raises:
        InputError: a file of the model is not the one that its lineage lists; the key file cannot be used.
    """
    config = ServeConfig.model_validate(args)
    check_files(config.model, key="model")
    return application(config, local=False)


def vllm_arguments(config: ServeConfig) -> dict[str, Any]:
    """vLLM arguments of a replica: defaults for the device, then ``config.engine`` on top."""
    arguments: dict[str, Any] = {
        "model": str(config.model.resolve()),
        "served_model_name": [model_name(config)],
        "generation_config": "vllm",
        "worker_extension_cls": "actors.engine_guard.EngineGuard",
        "uvicorn_log_level": "warning",
    }
    manifest = read_manifest(config.model)
    if manifest is not None:
        arguments |= {"fingerprint_mode": "custom", "fingerprint_value": manifest["id"][:FINGERPRINT_DIGITS]}
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
        "VLLM_SERVER_DEV_MODE": "0",  # its routes change the weights, for whoever asks
        "VLLM_MAX_N_SEQUENCES": str(MAX_ANSWERS),
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
