"""A model card for the Hugging Face hub, made from what the lineage says and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from rayllm.report.lineage import Source, short_place, tree

CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
chat = [{{"role": "user", "content": "Hello"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))"""

SCORE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}")
chat = [{{"role": "user", "content": "Hello"}}, {{"role": "assistant", "content": "Hi!"}}]
tokens = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
print(model(**tokens).logits)  # higher is better"""


def model_card(name: str, manifest: Mapping[str, Any], source: Source, command: str | None) -> str:
    """README.md of the exported folder.

    Args:
        name: what the model is called in the example.
        manifest: its lineage.json, paths shortened.
        source: the tree of its ancestors.
        command: how it was made, if a run beside it says so.
    """
    is_reward = manifest["stage"] == "reward_model"
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
        "tags": ["rayllm", manifest["stage"].replace("_", "-")],
    }
    bases = list(dict.fromkeys(node.hub_name for node in _nodes(source) if node.hub_name))
    if bases:
        head["base_model"] = bases
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"Made by the `{manifest['stage']}` job of rayllm on {manifest['created'][:10]}. Everything here is from the "
        f"run's own record, `lineage.json`; the model's id is `{manifest['id']}`.",
        f"```python\n{(SCORE if is_reward else CHAT).format(name=name)}\n```",
        f"## Where it came from\n\n```text\n{_text(source)}```",
        f"## Data\n\n{_table(('for', 'file', 'rows', 'sha256'), _data(manifest))}",
        f"## Metrics at the end of the run\n\n{_table(('metric', 'value'), _metrics(manifest))}",
        f"## How it was made\n\n```yaml\n{yaml.safe_dump(manifest['config'], sort_keys=False)}```",
    ]
    if command is not None:
        short = re.sub(r"(?<![^\s=])/\S+", lambda path: short_place(Path(path[0])), command)
        parts.insert(-1, f"## Command\n\n```sh\n{short}\n```")
    versions = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    commit = manifest["code"].get("commit")
    parts.append(f"Versions: {versions}{f'; code {commit[:12]}' if commit else ''}.")
    return "\n\n".join(parts) + "\n"


def shorten_paths(tree: Any) -> Any:
    """The same with every absolute path cut to its last two parts: a stranger's folders are nobody's business."""
    if isinstance(tree, dict):
        return {key: shorten_paths(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [shorten_paths(value) for value in tree]
    if isinstance(tree, str) and tree.startswith("/"):
        return short_place(Path(tree))
    return tree


def _nodes(source: Source) -> Iterator[Source]:
    yield source
    for below in source.sources:
        yield from _nodes(below)


def _text(source: Source) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(tree(source, place=short_place))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _data(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(d["name"], d["path"], f"{d['rows']:,}" if "rows" in d else "", d["sha256"][:12]) for d in manifest["data"]]


def _metrics(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(name, f"{value:.4g}") for name, value in manifest["metrics"].items()]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "none"
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
