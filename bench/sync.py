"""Time the way of the weights from the learner to an engine, with its proof.

    python -m bench.sync --model DIR --json OUT [key=value ...]

*serve*: from the call until the engine serves the new weights. *prove*: from then until it has shown that it does; it
samples meanwhile. *copies*: the same bytes copied out and in, by themselves. The engine has nothing else to do here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Column, Table

from actors.fleet import engine_dtype
from actors.placement import reserve
from actors.policy import PolicyActor
from bench.figures import circumstances, console, spread, written
from bench.workload import make_prompts, settings
from jobs.ppo_roles import Roles
from jobs.session import ray_session
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.data.prompts import PromptData
from rayllm.lineage import write_json
from rayllm.models.folders import count_stored_parameters

COLD, REPEATS = 2, 20


def measure(model: Path, overrides: list[str]) -> dict[str, Any]:
    """Seconds of `REPEATS` syncs after some that are not counted; one policy rank, one rollout actor, both at rest."""
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as folder:
        work = Path(folder)
        paths = {"run_dir": work / "run", "model": model.absolute(), "prompts": work / "none"}
        tree = settings("grpo", num_steps=1, **paths)
        tree["policy"] |= {"num_actors": 1}
        tree["rollout"] |= {"num_actors": 1}
        path = work / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        config = load_config(PPOConfig, path, overrides).config
        ids = make_prompts(64, 2)
        with ray_session(None):
            placement = reserve(Roles.needs(config), config.placement, print)
            roles = Roles.start(config, PromptData([{}] * len(ids), ids, {}), placement, ptx_tokens=work / "none")
            roles.wait()
            serve, prove = [], []
            for version in range(1, COLD + REPEATS + 1):
                began = time.perf_counter()
                roles.sync_weights(version=version)
                serving = time.perf_counter()
                roles.rollout.prove()
                serve.append(serving - began)
                prove.append(time.perf_counter() - serving)
            (published,) = roles.policy.call(PolicyActor.publish_weights, 0, dtype=engine_dtype(config.rollout))
    return {
        "bytes": published.nbytes,
        "serve_s": spread(serve[COLD:]),
        "prove_s": spread(prove[COLD:]),
        "copies_s": spread([_copy_twice(published.nbytes) for _ in range(REPEATS)]),
    }


def _copy_twice(nbytes: int) -> float:
    """Seconds."""
    first, second, third = (np.ones(nbytes, dtype=np.uint8) for _ in range(3))
    began = time.perf_counter()
    second[:] = first
    third[:] = second
    return time.perf_counter() - began


def show(result: dict[str, Any], to: Console) -> None:
    """Print the figures as a table."""
    to.print(f"sync of {result['parameters']:,} parameters, {result['bytes']:,} bytes")
    table = Table("", Column("ms, median (quartiles)", justify="right"))
    for name in ("serve_s", "prove_s", "copies_s"):
        figure = {kind: 1e3 * seconds for kind, seconds in result[name].items()}
        table.add_row(name.removesuffix("_s"), written(figure, 1))
    to.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    result = {
        "bench": "sync",
        "model": str(given.model),
        "parameters": count_stored_parameters(given.model),
        "overrides": given.overrides,
        **circumstances(),
        **measure(given.model, given.overrides),
    }
    write_json(given.json, result)
    show(result, console())


if __name__ == "__main__":
    main()
