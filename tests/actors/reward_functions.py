"""Reward functions, good and bad. They run in a child process: what they saw is told by what they return."""

from __future__ import annotations

import asyncio
import os
import re
import time


def first_tokens(prompts, responses, token_ids, rows):
    expected = (["What colour?", "France", "France"], ["white", "Paris is", "Paris"])
    assert (prompts, responses) == expected, (prompts, responses)
    assert [row["answer"] for row in rows] == ["2", "1", "1"], rows
    return [ids[0] for ids in token_ids]


loops: set[int] = set()


async def loops_seen(prompts, responses, token_ids, rows):
    await asyncio.sleep(0)
    loops.add(id(asyncio.get_running_loop()))
    return [len(loops)] * len(rows)


def by_id(prompts, responses, token_ids, rows, sample_ids):
    return {sample_id: float(row["answer"]) for sample_id, row in reversed([*zip(sample_ids, rows, strict=True)])}


def process_id(prompts, responses, token_ids, rows):
    return [os.getpid()] * len(rows)


def raises(prompts, responses, token_ids, rows):
    return {}["no such key"]


def nan_for_the_second(prompts, responses, token_ids, rows):
    return [1.0, float("nan"), 3.0]


def one_too_few(prompts, responses, token_ids, rows):
    return [1.0, 2.0]


def words(prompts, responses, token_ids, rows):
    return ["good"] * len(rows)


def sleeps(prompts, responses, token_ids, rows):
    time.sleep(1000)


async def sleeps_async(prompts, responses, token_ids, rows):
    await asyncio.sleep(1000)


def never_gives_the_interpreter_back(prompts, responses, token_ids, rows):
    re.match(r"(a+)+$", "a" * 200 + "b")


def exits(prompts, responses, token_ids, rows):
    os._exit(3)


def fails_once(prompts, responses, token_ids, rows):
    path = rows[0]["path"]
    if not os.path.exists(path):
        open(path, "x").close()
        raise ConnectionError("not yet")
    return [7.0] * len(rows)


def nan_for_every_third(prompts, responses, token_ids, rows, sample_ids):
    return {sample_id: float("nan") if sample_id.endswith("/1") else 1.0 for sample_id in reversed(sample_ids)}
