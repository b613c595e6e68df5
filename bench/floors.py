"""What the parts of a step cost by themselves, on one thread each: no Ray, no DeepSpeed, nobody waits for anybody.

    python -m bench.floors --model DIR --json OUT

- ``async_llm``: vLLM's AsyncLLM, engine in a process of its own, sampling the workload's responses.
- ``llm_engine``: vLLM's LLMEngine in this process; ``llm_engine_seeded``: with a seed for each request, as in training.
- ``logprobs``: a language model's forward pass over all prompts and responses; ``values``: a scalar head's.
- ``update_policy``, ``update_critic``: forward, backward, clipped AdamW step, in micro-batches.
- ``copy_weights``: the weights into one buffer and back.

Wall and CPU seconds, each floor in a fresh process, with the settings of ``bench/workload.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.figures import circumstances, console, spread, written
from bench.workload import (
    LEARNING_RATE,
    MICRO_BATCH,
    NEW_TOKENS,
    NUM_RESPONSES,
    PROMPT_TOKENS,
    TEMPERATURE,
    make_prompts,
)
from rayllm.lineage import write_json

COLD, REPEATS = 2, 3
Samples = list[dict[str, float]]

STEP: dict[str, dict[str, int]] = {
    "ppo": {"llm_engine": 1, "logprobs": 2, "values": 2, "update_policy": 1, "update_critic": 1, "copy_weights": 1},
    "grpo": {"llm_engine": 1, "logprobs": 1, "update_policy": 1, "copy_weights": 1},
}
"""Algorithm -> how often a step does the work of each floor."""


def cpu_seconds() -> float:
    """Used so far by this process and those it started."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def timed(work: Callable[[int], Any]) -> Samples:
    """Call ``work`` with the number of the repetition; the first calls are thrown away."""
    samples = []
    for repeat in range(COLD + REPEATS):
        wall, cpu = time.perf_counter(), cpu_seconds()
        work(repeat)
        samples.append({"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu})
    return samples[COLD:]


def prompts_of(repeat: int, vocab_size: int) -> list[list[int]]:
    return make_prompts(NUM_RESPONSES, vocab_size, seed=repeat)


def engine_args(model: str) -> dict[str, Any]:
    from actors.vllm_engine import default_engine_args, this_device
    from actors.vllm_stepped import SteppedEngine

    return {"model": model, **default_engine_args(this_device()), **SteppedEngine.fixed_args}


def sampling_params(seed: int | None = None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=TEMPERATURE,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        seed=seed,
    )


def async_llm(model: str) -> dict[str, Samples]:
    """All responses by vLLM's AsyncLLM."""
    from actors.vllm_engine import set_environment

    set_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    with asyncio.Runner() as runner:

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**{**engine_args(model), "async_scheduling": None}))

        engine = runner.run(start())
        vocab_size = engine.model_config.get_vocab_size()

        async def sample(ids: list[int], name: str) -> None:
            async for output in engine.generate({"prompt_token_ids": ids}, sampling_params(), name):
                assert len(output.outputs[0].token_ids) == NEW_TOKENS

        async def step(repeat: int) -> None:
            calls: list[Awaitable[None]] = [
                sample(ids, f"{repeat}-{row}") for row, ids in enumerate(prompts_of(repeat, vocab_size))
            ]
            await asyncio.gather(*calls)

        samples = timed(lambda repeat: runner.run(step(repeat)))
        engine.shutdown()
    return {"async_llm": samples}


def llm_engine(model: str) -> dict[str, Samples]:
    """All responses by vLLM's LLMEngine, stepped here."""
    from actors.vllm_engine import set_environment

    set_environment()
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine: Any = LLMEngine.from_engine_args(EngineArgs(**engine_args(model)))
    vocab_size = engine.model_config.get_vocab_size()

    def step(repeat: int, *, seeded: bool) -> None:
        offset = (COLD + REPEATS) * seeded  # other prompts: none is in the prefix cache
        for row, ids in enumerate(prompts_of(repeat + offset, vocab_size)):
            params = sampling_params(seed=row if seeded else None)
            engine.add_request(f"{seeded}-{repeat}-{row}", {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert len(output.outputs[0].token_ids) == NEW_TOKENS

    return {
        "llm_engine": timed(lambda repeat: step(repeat, seeded=False)),
        "llm_engine_seeded": timed(lambda repeat: step(repeat, seeded=True)),
    }


def torch_alone(model: str) -> dict[str, Samples]:
    """Scoring, updates and the copy of the weights in plain PyTorch."""
    torch.set_num_threads(1)
    from rayllm.models.heads import ScalarModel
    from rayllm.models.loading import load_causal_lm

    policy, critic = load_causal_lm(model), ScalarModel.from_folder(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_RESPONSES, PROMPT_TOKENS + NEW_TOKENS)
    sequences = torch.randint(policy.config.vocab_size, shape, generator=generator)
    parts = list(sequences.split(MICRO_BATCH))
    return {
        "logprobs": timed(lambda _: _logprobs(policy, parts)),
        "values": timed(lambda _: _values(critic, parts)),
        "update_policy": timed(_updates(policy, parts, _policy_loss)),
        "update_critic": timed(_updates(critic, parts, _value_loss)),
        "copy_weights": timed(_copies(policy)),
    }


@torch.no_grad()
def _logprobs(policy: Any, parts: list[torch.Tensor]) -> None:
    from rayllm.algorithms.logprobs import token_logprobs

    for part in parts:
        token_logprobs(policy(input_ids=part).logits, part, temperature=TEMPERATURE)


@torch.no_grad()
def _values(critic: Any, parts: list[torch.Tensor]) -> None:
    for part in parts:
        critic(part, None)


def _policy_loss(policy: Any, part: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from rayllm.algorithms.logprobs import token_logprobs
    from rayllm.algorithms.losses import policy_loss

    new = token_logprobs(policy(input_ids=part).logits, part, temperature=TEMPERATURE)
    return policy_loss(new, new.detach(), torch.ones_like(new), mask, normalizer=NUM_RESPONSES * NEW_TOKENS)


def _value_loss(critic: Any, part: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from rayllm.algorithms.losses import value_loss
    from rayllm.models.heads import token_values

    new = token_values(critic(part, None))
    old, returns = new.detach(), torch.ones_like(new)
    return value_loss(new, old, returns, mask, clip_range=0.2, normalizer=NUM_RESPONSES * NEW_TOKENS)


def _updates(
    model: torch.nn.Module, parts: list[torch.Tensor], loss: Callable[..., torch.Tensor]
) -> Callable[[int], None]:
    """One optimizer step over all micro-batches, each time it is called."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    mask = torch.zeros(parts[0].shape, dtype=torch.bool)
    mask[:, PROMPT_TOKENS:] = True

    def update(_: int) -> None:
        for part in parts:
            loss(model, part, mask).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def _copies(model: torch.nn.Module) -> Callable[[int], None]:
    """All weights into one buffer and back, each time it is called."""
    weights = [parameter.detach().view(-1) for parameter in model.parameters()]
    buffer = torch.empty(sum(len(weight) for weight in weights))
    places = buffer.split([len(weight) for weight in weights])

    def copy(_: int) -> None:
        for weight, place in zip(weights, places, strict=True):
            place.copy_(weight)
        for weight, place in zip(weights, places, strict=True):
            weight.copy_(place)

    return copy


FLOORS: tuple[Callable[[str], dict[str, Samples]], ...] = (async_llm, llm_engine, torch_alone)


def measure(model: Path) -> dict[str, dict[str, Any]]:
    """Floor -> wall and CPU seconds of one step's work, and tokens per second where it samples."""
    found: dict[str, dict[str, Any]] = {}
    for floor in FLOORS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            for name, samples in pool.submit(floor, str(model)).result().items():
                seconds = {kind: spread([sample[kind] for sample in samples]) for kind in ("wall", "cpu")}
                found[name] = {**seconds, "samples": samples}
                if "llm" in name:
                    rates = [NUM_RESPONSES * NEW_TOKENS / sample["wall"] for sample in samples]
                    found[name]["tokens_per_s"] = spread(rates)
    return found


def show(result: dict[str, Any], to: Console) -> None:
    """Print the figures as a table."""
    table = Table(title=f"floors, {result['parameters']:,} parameters, {REPEATS} repeats", title_justify="left")
    for column in ("floor", "wall s, median (quartiles)", "CPU s", "tokens/s"):
        table.add_column(column, justify="left" if column == "floor" else "right")
    for name, floor in result["floors"].items():
        rate = written(floor["tokens_per_s"], 0) if "tokens_per_s" in floor else ""
        table.add_row(name, written(floor["wall"], 4), written(floor["cpu"], 2), rate)
    to.print(table)


def main() -> None:
    from rayllm.models.folders import count_stored_parameters

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    result = {
        "bench": "floors",
        "model": str(given.model),
        "parameters": count_stored_parameters(given.model),
        **circumstances(),
        "floors": measure(given.model),
    }
    write_json(given.json, result)
    show(result, console())


if __name__ == "__main__":
    main()
