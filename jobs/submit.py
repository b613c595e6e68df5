"""Run a command as a Ray job on a cluster: submit, stream the log, return the job's exit status."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

from rayllm.config.pipeline import PipelineConfig
from rayllm.errors import InputError

ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
FAILED, STOPPED = 1, 143
FINAL = (0, 2, STOPPED)
"""Exit statuses that another attempt would not change: done, wrong input, stopped."""

READY_TIMEOUT_S = 60
EXCLUDED = [".git", ".venv", "runs", "**/__pycache__"]


def submit(
    module: str, arguments: Sequence[str], config: Any, address: str, console: Console
) -> int:
    """Ship the current folder, run ``python -m jobs.<module>`` there, print its log as it comes.

    The run folder is handed over as an absolute path: it must lie on storage that all nodes share. Other paths
    are absolute too, or below the folder that is shipped.

    Args:
        module: name of the job's module.
        arguments: config file and overrides, as given to the command.
        config: the validated config.
        address: dashboard of the cluster, ``http://HEAD:8265``.
        console: for the log.

    Returns:
        The job's exit status. Ctrl-C stops the job.

    Raises:
        InputError: no cluster answers there, or it refuses the token.
    """
    if "run_dir" not in type(config).model_fields:
        raise InputError(f"--address: {module} runs where you are; docs/cluster.md says how to serve on a cluster")
    if not (Path.cwd() / "jobs" / "cli.py").is_file():
        raise InputError("--address: run it from the root of the rayllm checkout, which is shipped to the cluster")
    try:
        client = JobSubmissionClient(address)
        job_id = _submit_when_ready(
            client,
            entrypoint=shlex.join(["python", "-m", f"jobs.{module}", *arguments, f"run_dir={config.run_dir}"]),
            runtime_env={"working_dir": ".", "excludes": EXCLUDED},
            metadata={"rayllm": module},
        )
    except AuthenticationError as error:
        raise InputError(f"--address: {address} {_explain_refusal(error)}") from None
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "No available agent" in reason:  # Ray goes on without it when its fixed port is taken
            reason += "; is port 52365 taken there? `ray start --head --dashboard-agent-listen-port=PORT` uses another"
        raise InputError(f"--address: {address} did not take the job: {reason}") from None
    console.print(f"[dim]job {job_id} on {address}; Ctrl-C stops it, and so does[/dim]", highlight=False)
    console.print(f"[dim]  ray job stop --address {address} {job_id}[/dim]", highlight=False, soft_wrap=True)
    try:
        asyncio.run(_follow(client, job_id, console))
    except KeyboardInterrupt:
        client.stop_job(job_id)
        raise
    return _exit_status(client, job_id)


def submit_stages(arguments: Sequence[str], config: PipelineConfig, address: str, console: Console) -> int:
    """A pipeline as one Ray job a stage, one after the other. Stages that are done say so and end at once.

    A stage that fails is submitted again, ``config.retries`` times. Wrong input and a stop end the pipeline.

    Returns:
        0, or the exit status of the stage that ended it.
    """
    for stage in config.stages:
        for attempt in range(1, config.retries + 2):
            status = submit("pipeline", [*arguments, f"stages=[{stage}]"], config, address, console)
            if status in FINAL:
                break
            attempts = f"attempt {attempt} of {config.retries + 1}"
            console.print(f"{stage}: {attempts} failed with status {status}", highlight=False)
        if status:
            return status
    return 0


def _submit_when_ready(client: JobSubmissionClient, **job: Any) -> str:
    """A cluster that has just started refuses jobs until its agent is up."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _explain_refusal(error: AuthenticationError) -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":  # Ray sends no token then, even where one lies in its place
        return "takes jobs only with its token: RAY_AUTH_MODE is not set here; export RAY_AUTH_MODE=token"
    if "Invalid" in str(error):
        return "does not know this token; put the cluster's own into ~/.ray/auth_token or RAY_AUTH_TOKEN"
    return "takes jobs only with its token: put it into ~/.ray/auth_token or RAY_AUTH_TOKEN"


async def _follow(client: JobSubmissionClient, job_id: str, console: Console) -> None:
    async for lines in client.tail_job_logs(job_id):
        console.print(lines, end="", markup=False, highlight=False, soft_wrap=True)


def _exit_status(client: JobSubmissionClient, job_id: str) -> int:
    while client.get_job_status(job_id) not in ENDED:  # the log may end a moment before the status does
        time.sleep(0.5)
    info = client.get_job_info(job_id)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED
    return int(info.driver_exit_code or FAILED)
