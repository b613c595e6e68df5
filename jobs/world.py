"""Write the toy world's data: documents, demonstrations and prompts. Generated, nothing is downloaded."""

from __future__ import annotations

import random
from typing import Any

from rich.console import Console

from rayllm.config.base import Loaded
from rayllm.config.world import WorldConfig
from rayllm.data.files import write_parquet
from rayllm.report.run import Run
from rayllm.report.terminal import print_done, print_preamble
from rayllm.world.demonstrations import demonstrate
from rayllm.world.documents import documents, pages
from rayllm.world.prompts import sample_prompts


def run(loaded: Loaded[WorldConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `world` job: six Parquet files in run_dir."""
    config = loaded.config
    job = Run("world", loaded)
    if job.done:
        return job
    with job:
        print_preamble(console, job)
        rows: dict[str, list[dict[str, Any]]] = {
            "documents": document_rows(config.num_paragraphs, seed=2 * config.seed),
            "heldout_documents": document_rows(config.num_heldout_paragraphs, seed=2 * config.seed + 1),
            "demonstrations": demonstration_rows(config),
            "prompts_train": prompt_rows(config.num_prompts, split="train", seed=config.seed),
            "prompts_new": prompt_rows(config.num_eval_prompts, split="new", seed=config.seed),
            "prompts_held": prompt_rows(config.num_eval_prompts, split="held", seed=config.seed),
            "prompts_label": prompt_rows(config.num_eval_prompts, split="new", seed=config.seed + 1),
        }
        for name, table in rows.items():
            write_parquet(table, config.run_dir / f"{name}.parquet")
        metrics = {f"{name}_rows": len(table) for name, table in rows.items()}
        job.finish(metrics)
        print_done(console, job, metrics)
    return job


def document_rows(num_paragraphs: int, *, seed: int) -> list[dict[str, str]]:
    """Pages of 8 to 20 paragraphs: a model of them has no habit of stopping."""
    paragraphs = [paragraph.text for paragraph in documents(num_paragraphs, seed=seed)]
    return [{"text": page} for page in pages(paragraphs, seed=seed)]


def demonstration_rows(config: WorldConfig) -> list[dict[str, object]]:
    """Prompts of the training split with an answer by the careless crowd, as messages."""
    rng = random.Random(f"demonstrations-{config.seed}")
    rows: list[dict[str, object]] = []
    for prompt in sample_prompts(config.num_demonstrations, split="train", seed=config.seed + 1):
        demonstration = demonstrate(prompt, rng)
        messages = [*prompt.to_row()["prompt"], {"role": "assistant", "content": demonstration.text}]
        rows.append({"messages": messages, "style": demonstration.style})
    return rows


def prompt_rows(num_prompts: int, *, split: str, seed: int) -> list[dict[str, object]]:
    """Distinct prompts with what the judge needs to know about them."""
    return [prompt.to_row() for prompt in sample_prompts(num_prompts, split=split, seed=seed)]


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("world")
