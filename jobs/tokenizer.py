"""Train the tokenizer on the corpus; the folder it leaves carries the chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from rayllm.config.base import Loaded
from rayllm.config.tokenizer import TokenizerConfig
from rayllm.data.files import check_data_file, read_rows
from rayllm.data.tokenizer import train_tokenizer
from rayllm.report.run import Run
from rayllm.report.terminal import print_done, print_preamble


def run(loaded: Loaded[TokenizerConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `tokenizer` job."""
    config = loaded.config
    check_data_file(config.documents, key="documents")
    job = Run("tokenizer", loaded)
    if job.done:
        return job
    with job:
        counts = {"rows": 0, "bytes": 0}

        def texts() -> Iterator[str]:
            for row in read_rows(config.documents, ["text"]):
                counts["rows"] += 1
                counts["bytes"] += len(row["text"].encode())
                yield row["text"]

        print_preamble(console, job)
        tokenizer = train_tokenizer(texts(), vocab_size=config.vocab_size, max_length=config.max_length)
        job.add_data("documents", **counts, dropped={})
        tokenizer.save_pretrained(job.model_dir)
        metrics = {"vocab_size": len(tokenizer), "bytes_per_token": bytes_per_token(tokenizer, config)}
        job.finish(metrics)
        print_done(console, job, metrics)
    return job


def bytes_per_token(tokenizer: Any, config: TokenizerConfig) -> float:
    """On the first hundred documents."""
    texts = [row["text"] for row, _ in zip(read_rows(config.documents, ["text"]), range(100), strict=False)]
    tokens = sum(len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / tokens


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("tokenizer")
