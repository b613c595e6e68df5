"""The rollout role: prompts in, sampled responses out, weights replaced under way.

Consumes prompts (token ids) and weight bundles; produces ``Rollout``s with the sampler's own log-probabilities.
Waits for nobody: calls run concurrently and share the engine's batches.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import Awaitable
from typing import Any, TypedDict

import torch

from actors.vllm_engine import Request, VllmEngine, set_environment
from actors.weights import WeightBundle, read_safetensors, safetensors_shapes, unpack, verify
from rayllm.data.experience import Experience
from rayllm.data.rollout import Rollout, collate

MIN_TEMPERATURE = 0.01
"""vLLM raises what lies between 0 and this, and says so in its log only."""


class RolloutInfo(TypedDict):
    """What a run report or a test asks of a live actor."""

    pid: int
    import_seconds: float
    init_seconds: float
    omp_num_threads: int
    rss_bytes: int
    max_model_len: int


class RolloutActor:
    """Samples responses from one copy of the policy. Make it a Ray actor with ``ray.remote(max_concurrency=...)``.

    After a restart it serves the weights of ``model_dir`` as version 0: push the current ones before using it,
    and do not let Ray repeat a ``generate`` by itself (``max_task_retries=0``).

    Args:
        model_dir: local Hugging Face folder: config, tokenizer, safetensors weights.
        engine: vLLM's EngineArgs, over ``vllm_engine.default_engine_args``; ``max_model_len`` is the model's unless
            given here.
        seed: of the sampling. Actors that serve one run get the same one.
    """

    def __init__(self, model_dir: str, *, engine: dict[str, Any], seed: int) -> None:
        set_environment()
        from rayllm.data.tokenizer import stop_token_ids
        from rayllm.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model_dir)
        self._seed = seed
        self._pad_token_id = int(tokenizer.pad_token_id)
        self._prompts: list[list[int]] = []
        self._sampling: dict[str, Any] = {}
        self._engine = VllmEngine(model_dir, stop_token_ids=stop_token_ids(tokenizer), overrides=engine)

    async def generate(
        self,
        prompts: list[tuple[int, list[int]]],
        *,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        step: int,
    ) -> list[Rollout]:
        """Sample ``num_samples`` responses to each prompt: prompts in order, samples of one prompt adjacent.

        What a sample says depends on the weights, the actor's seed, ``step``, the prompt id and the number of the
        sample; not on the actor, the order or the other requests (float32 on CPU; elsewhere batches may differ in
        the last bits).

        Args:
            prompts: prompt id and token ids.
            temperature: 0 is greedy. Log-probabilities are of softmax(logits / temperature) over the whole
                vocabulary; greedy ones are of softmax(logits).
            max_new_tokens: stop token included.
            step: changes the seeds.

        Raises:
            ValueError: a prompt that is empty, too long or has an unknown token, named by its id; or a setting out
                of range. Nothing has been sampled then.
        """
        self._check(prompts, num_samples=num_samples, temperature=temperature, max_new_tokens=max_new_tokens)
        seen: Counter[int] = Counter()
        requests = []
        for prompt_id, token_ids in prompts:
            for sample in range(num_samples):
                seed = sample_seed(self._seed, step, prompt_id, sample, seen[prompt_id])
                requests.append(Request(token_ids=token_ids, seed=seed))
            seen[prompt_id] += 1
        responses = await self._engine.generate(
            requests, temperature=temperature, max_new_tokens=max_new_tokens
        )
        return [
            Rollout(
                prompt_id=prompts[place // num_samples][0],
                prompt_token_ids=tuple(prompts[place // num_samples][1]),
                token_ids=response.token_ids,
                logprobs=response.logprobs,
                finish_reason=response.finish_reason,
                policy_version=response.version,
            )
            for place, response in enumerate(responses)
        ]

    async def set_prompts(
        self, prompts: list[list[int]], *, num_samples: int, temperature: float, max_new_tokens: int
    ) -> None:
        """Keep the training prompts and how to sample them, so that a step is asked for by numbers only.

        Args:
            prompts: token ids; the prompt id is the index.
        """
        self._prompts = prompts
        self._sampling = {
            "num_samples": num_samples, "temperature": temperature, "max_new_tokens": max_new_tokens
        }

    async def experience(self, prompt_ids: list[int], *, step: int) -> Experience:
        """Sample responses to some of the kept prompts and put them into one batch."""
        prompts = [(prompt_id, self._prompts[prompt_id]) for prompt_id in prompt_ids]
        rollouts = await self.generate(prompts, step=step, **self._sampling)
        return collate(rollouts, pad_token_id=self._pad_token_id)

    async def greedy(self, shard: Experience, *, step: int) -> Experience:
        """One greedy response to the prompt of every row of a shard (ReMax's baseline)."""
        unique = list(dict.fromkeys(shard.prompt_ids.tolist()))
        prompts = [(prompt_id, self._prompts[prompt_id]) for prompt_id in unique]
        limit = self._sampling["max_new_tokens"]
        rollouts = await self.generate(prompts, step=step, num_samples=1, temperature=0.0, max_new_tokens=limit)
        found = dict(zip(unique, rollouts, strict=True))
        return collate([found[i] for i in shard.prompt_ids.tolist()], pad_token_id=self._pad_token_id)

    async def update_weights(self, bundle: WeightBundle | list[Awaitable[WeightBundle]]) -> int:
        """Replace the weights between two engine steps and drop the prefix cache; returns their version.

        Responses under way go on with the new weights, and keep the version of their first token.

        Args:
            bundle: the weights, or a list with the one ``ObjectRef`` that holds them.

        Raises:
            RuntimeError: the bundle is damaged, lacks a tensor of the checkpoint, has one too many or one of
                another shape. The old weights go on serving.
        """
        if isinstance(bundle, list):
            (reference,) = bundle
            bundle = await reference
        await asyncio.to_thread(verify, bundle)
        return await self._engine.update(unpack(bundle), bundle.shapes(), version=bundle.version)

    async def load(self, model_dir: str, *, version: int = 0) -> int:
        """Replace the weights by those of a model folder of the same shape; returns ``version``."""
        return await self._engine.update(
            read_safetensors(model_dir), safetensors_shapes(model_dir), version=version
        )

    async def version(self) -> int:
        """Number of policy updates in the weights that serve now."""
        return self._engine.version

    async def info(self) -> RolloutInfo:
        import psutil

        return RolloutInfo(
            pid=os.getpid(),
            import_seconds=self._engine.import_seconds,
            init_seconds=self._engine.init_seconds,
            omp_num_threads=torch.get_num_threads(),
            rss_bytes=psutil.Process().memory_info().rss,
            max_model_len=self._engine.max_model_len,
        )

    async def shutdown(self) -> None:
        """Free the engine; calls under way fail. The actor serves nothing afterwards."""
        await self._engine.shutdown()

    def _check(
        self,
        prompts: list[tuple[int, list[int]]],
        *,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        if num_samples < 1 or max_new_tokens < 1:
            raise ValueError(
                f"num_samples={num_samples} and max_new_tokens={max_new_tokens} must be at least 1"
            )
        if temperature != 0 and temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        limit, vocab_size = self._engine.max_model_len, self._engine.vocab_size
        for prompt_id, token_ids in prompts:
            if not token_ids:
                raise ValueError(f"prompt {prompt_id} is empty")
            if len(token_ids) + max_new_tokens > limit:
                raise ValueError(
                    f"prompt {prompt_id} does not fit: {len(token_ids)} tokens + max_new_tokens={max_new_tokens} "
                    f"> max_model_len={limit}"
                )
            unknown = [token for token in token_ids if not 0 <= token < vocab_size]
            if unknown:
                raise ValueError(
                    f"prompt {prompt_id} has token {unknown[0]}, outside the vocabulary of {vocab_size}"
                )


def sample_seed(seed: int, step: int, prompt_id: int, sample: int, occurrence: int) -> int:
    """63 bits that name one sample of a run.

    Hashed: vLLM seeds the samples of one request consecutively, and plain sums would collide between prompts.
    """
    text = f"{seed}/{step}/{prompt_id}/{sample}/{occurrence}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
