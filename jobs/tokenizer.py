"""Train the tokenizer on the corpus; the folder it leaves carries the chat template."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from rich.console import Console

from rayllm.config.base import Loaded
from rayllm.config.tokenizer import TokenizerConfig
from rayllm.data.files import check_data_file, read_texts
from rayllm.data.rows import BadRows
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
        bad = BadRows(config.max_bad_rows)

        def texts() -> Iterator[str]:
            for text in read_texts(config.documents, bad):
                counts["rows"] += 1
                counts["bytes"] += len(text.encode())
                yield text

        print_preamble(console, job)
        tokenizer = train_tokenizer(texts(), vocab_size=config.vocab_size, max_length=config.max_length)
        job.add_data("documents", **bad.facts(), **counts, dropped={})
        tokenizer.save_pretrained(job.model_dir)
        metrics = {"vocab_size": len(tokenizer), "bytes_per_token": bytes_per_token(tokenizer, config)}
        job.finish(metrics)
        print_done(console, job, metrics)
    return job


def bytes_per_token(tokenizer: Any, config: TokenizerConfig) -> float:
    """On the first hundred documents."""
    texts = list(islice(read_texts(config.documents, BadRows(config.max_bad_rows)), 100))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / tokens


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("tokenizer")
