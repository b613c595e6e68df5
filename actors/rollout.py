"""The rollout role: prompts in, sampled responses out, weights replaced under way.

Consumes prompts (token ids, or rows for an environment to converse about) and weight bundles; produces ``Rollout``s
with the sampler's own log-probabilities.
Waits for nobody: calls run concurrently and share the engine's batches.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypedDict, TypeVar

import torch

from actors.conversation import Conversations
from actors.environment import this_node
from actors.proof import Prover, Served
from actors.publishing import Published, Seat, Sent
from actors.seeds import sample_seed
from actors.vllm_engine import Request, make_engine, set_environment
from actors.weights import WeightBundle, merged, read_safetensors, safetensors_shapes, unpack, verify
from rayllm import faults
from rayllm.config.environment import EnvironmentConfig
from rayllm.data.experience import Experience
from rayllm.data.files import Row
from rayllm.data.prompts import PromptSpan, PromptStream
from rayllm.data.rollout import Rollout, collate

PromptT = TypeVar("PromptT")

MIN_TEMPERATURE = 0.01
"""vLLM raises what lies between 0 and this, and says so in its log only."""


class RolloutInfo(TypedDict):
    """What a run report or a test asks of a live actor."""

    pid: int
    node: str
    import_seconds: float
    init_seconds: float
    omp_num_threads: int
    rss_bytes: int
    max_model_len: int


class RolloutActor(Prover):
    """Samples responses from one copy of the policy. Make it a Ray actor with ``ray.remote(max_concurrency=...)``.

    It starts with the weights of ``model_dir`` as version 0: let it `sync` the current ones before using it, and do not
    let Ray restart it by itself, which would put these back.

    Args:
        model_dir: local Hugging Face folder: config, tokenizer, safetensors weights.
        engine: vLLM's EngineArgs, over ``vllm_engine.default_engine_args``; ``max_model_len`` is the model's unless
            given here.
        seed: of the sampling. Actors that serve one run get the same one.
        environment: what the policy converses with; without a name, prompts get single responses.
        ignore_stop: nothing but ``max_new_tokens`` ends a response.
        timeout_s: seconds that a call may take; None for any number.
    """

    make_engine = staticmethod(make_engine)

    def __init__(
        self,
        model_dir: str,
        *,
        engine: dict[str, Any],
        seed: int,
        environment: EnvironmentConfig = EnvironmentConfig(),
        ignore_stop: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        set_environment()
        faults.reach("rollout.init")
        from rayllm.data.tokenizer import stop_token_ids
        from rayllm.models.folders import load_tokenizer

        tokenizer = load_tokenizer(model_dir)
        self._model_dir, self._seed, self._timeout_s = model_dir, seed, timeout_s
        self._probes: dict[int, asyncio.Task[Served | None]] = {}
        """Of the weights that serve, and of those that are on their way."""
        self._pad_token_id = int(tokenizer.pad_token_id)
        self._prompts: list[Any] = []
        self._order: PromptStream
        self._sampling: dict[str, Any] = {}
        stops = [] if ignore_stop else stop_token_ids(tokenizer)
        self._engine = self.make_engine(model_dir, stop_token_ids=stops, overrides=engine)
        self._conversations: Conversations | None = None
        if environment.name is not None:
            self._conversations = Conversations(environment, self._engine, tokenizer, where=model_dir)

    async def generate(
        self,
        prompts: list[tuple[int, list[int]]],
        *,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        step: int,
        again: int = 0,
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
            again: how often the step had these prompts before; changes them too.

        Raises:
            ValueError: a prompt that is empty, too long or has an unknown token, named by its id; or a setting out
                of range. Nothing has been sampled then.
            TimeoutError: not done in time; the engine has given the responses up.
        """
        check_sampling(num_samples=num_samples, temperature=temperature, max_new_tokens=max_new_tokens)
        for prompt_id, token_ids in prompts:
            problem = self._engine.problem(token_ids, max_new_tokens=max_new_tokens)
            if problem:
                raise ValueError(f"prompt {prompt_id} {problem}")
        samples = self._samples(prompts, num_samples, step, again)
        async with self._deadline(len(samples)):
            faults.reach("rollout.generate")
            responses = await self._engine.generate(
                [Request(token_ids=token_ids, seed=seed) for _, token_ids, seed in samples],
                temperature=temperature,
                max_new_tokens=max_new_tokens,
            )
        return [
            Rollout(
                prompt_id=prompt_id,
                prompt_token_ids=tuple(token_ids),
                token_ids=response.token_ids,
                logprobs=response.logprobs,
                finish_reason=response.finish_reason,
                policy_versions=response.versions,
            )
            for (prompt_id, token_ids, _), response in zip(samples, responses, strict=True)
        ]

    async def converse(
        self,
        prompts: list[tuple[int, Row]],
        *,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        step: int,
        again: int = 0,
    ) -> list[Rollout]:
        """Let the policy converse with the environment, ``num_samples`` times about each prompt.

        Like ``generate`` in order and seeds. All conversations go on at once, each as soon as its own turn is done.

        Args:
            prompts: prompt id and row, from which the environment makes the prompt.
            temperature: as in ``generate``.
            max_new_tokens: of each turn of the policy.
            step, again: as in ``generate``.

        Raises:
            ValueError: a setting out of range.
            RuntimeError: the environment failed; the text names prompt and turn. The other conversations are given up:
                a batch without the ones that break the environment would teach the policy to break it.
            TimeoutError: as in ``generate``.
        """
        assert self._conversations is not None, "made without an environment"
        check_sampling(num_samples=num_samples, temperature=temperature, max_new_tokens=max_new_tokens)
        sampling: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        tasks = [
            asyncio.create_task(self._conversations.play(prompt_id, row, seed=seed, **sampling))
            for prompt_id, row, seed in self._samples(prompts, num_samples, step, again)
        ]
        try:
            async with self._deadline(len(tasks)):
                return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    @asynccontextmanager
    async def _deadline(self, num_responses: int) -> AsyncIterator[None]:
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise TimeoutError(
                f"{num_responses} responses were not done within rollout.timeout_s={self._timeout_s:g} seconds"
            ) from error

    def _samples(
        self, prompts: Sequence[tuple[int, PromptT]], num_samples: int, step: int, again: int
    ) -> list[tuple[int, PromptT, int]]:
        """Prompt id, prompt and seed of every sample. A prompt id that stands twice is sampled twice."""
        seen: Counter[int] = Counter()
        samples = []
        for prompt_id, prompt in prompts:
            for sample in range(num_samples):
                seed = sample_seed(self._seed, step, prompt_id, sample, again + seen[prompt_id])
                samples.append((prompt_id, prompt, seed))
            seen[prompt_id] += 1
        return samples

    async def set_prompts(
        self, prompts: list[list[int]] | list[Row], *, num_samples: int, temperature: float, max_new_tokens: int
    ) -> None:
        """Keep the training prompts and how to sample them, so that a step is asked for by numbers only.

        Args:
            prompts: token ids, or rows if there is an environment; the prompt id is the index.
        """
        self._prompts, self._order = prompts, PromptStream(len(prompts), seed=self._seed)
        self._sampling = {
            "num_samples": num_samples, "temperature": temperature, "max_new_tokens": max_new_tokens
        }

    async def experience(self, span: PromptSpan, *, step: int, again: int = 0) -> Experience:
        """Sample responses to some of the kept prompts, or converse about them, and put all into one batch.

        Args:
            span: of the run's prompts in their order.
            step, again: as in ``generate``.
        """
        prompts = [(prompt_id, self._prompts[prompt_id]) for prompt_id in self._order.ids(span)]
        sample = self.generate if self._conversations is None else self.converse
        rollouts = await sample(prompts, step=step, again=again, **self._sampling)
        return collate(rollouts, pad_token_id=self._pad_token_id)

    async def greedy(self, shard: Experience, *, step: int) -> Experience:
        """One greedy response to the prompt of every row of a shard (ReMax's baseline)."""
        unique = list(dict.fromkeys(shard.prompt_ids.tolist()))
        prompts = [(prompt_id, self._prompts[prompt_id]) for prompt_id in unique]
        limit = self._sampling["max_new_tokens"]
        rollouts = await self.generate(prompts, step=step, num_samples=1, temperature=0.0, max_new_tokens=limit)
        found = dict(zip(unique, rollouts, strict=True))
        return collate([found[i] for i in shard.prompt_ids.tolist()], pad_token_id=self._pad_token_id)

    async def join(self, seat: Seat) -> None:
        """Meet the learner in a `WeightGroup`; the seat is that of this engine's first worker."""
        await self._engine.join(seat)

    async def update_weights(
        self, weights: Published | WeightBundle | Sent, *, keep_cache: bool = False
    ) -> int:
        """Replace the weights between two engine steps and drop the prefix cache; returns their version.

        Responses under way go on with the new weights; each token tells the version that sampled it.

        Args:
            weights: all of them, or adapters of the model folder's; or word that they come through the group.
            keep_cache: as in ``VllmEngine.update``.

        Raises:
            RuntimeError: the weights are damaged, lack a tensor of the checkpoint, have one too many or one of
                another shape. The old ones go on serving.
        """
        faults.reach("rollout.update_weights")
        if isinstance(weights, Sent):
            return await self._engine.receive(version=weights.version, keep_cache=keep_cache)
        bundle = weights if isinstance(weights, WeightBundle) else await asyncio.to_thread(weights.fetch)
        await asyncio.to_thread(verify, bundle)
        if bundle.scaling:
            tensors, shapes = merged(bundle, self._model_dir), safetensors_shapes(self._model_dir)
        else:
            tensors, shapes = unpack(bundle), bundle.shapes()
        return await self._engine.update(tensors, shapes, version=bundle.version, keep_cache=keep_cache)

    async def sync(
        self, weights: Published | WeightBundle | Sent, *, probe: list[int], keep_cache: bool = False
    ) -> int:
        """`update_weights`, and begin to find out how probable ``probe`` is under them; see `served`.

        Args:
            probe: token ids of a text; computed from the tokens alone, with nothing out of a cache.
        """
        updating = asyncio.create_task(self.update_weights(weights, keep_cache=keep_cache))
        probing = asyncio.create_task(self._probe(updating, probe))
        probing.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if nobody asks
        serving = self._engine.version
        self._probes = {v: p for v, p in self._probes.items() if v == serving} | {weights.version: probing}
        return await updating

    async def _probe(self, updating: asyncio.Task[int], probe: list[int]) -> Served | None:
        version = await updating
        logprobs = await self._engine.prompt_logprobs(probe)
        # Else it waited behind others until newer weights came, whose own probe is under way.
        return Served(version, logprobs) if self._engine.version == version else None

    async def served(self) -> Served | None:
        while (probing := self._probes.get(version := self._engine.version)) is not None:
            found = await asyncio.shield(probing)
            if version == self._engine.version:
                return found
        return None

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Leave the GPU's memory to others, once the probe of the last `sync` is done; the next one wakes the engine.
        What is asked for meanwhile is refused. ``keep_weights``, and errors: `VllmEngine.sleep`."""
        await self.served()
        await self._engine.sleep(keep_weights=keep_weights)

    async def wake(self) -> None:
        """Serve again without new weights, where the old ones were kept."""
        await self._engine.wake()

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
            node=this_node(),
            import_seconds=self._engine.import_seconds,
            init_seconds=self._engine.init_seconds,
            omp_num_threads=torch.get_num_threads(),
            rss_bytes=psutil.Process().memory_info().rss,
            max_model_len=self._engine.max_model_len,
        )

    async def shutdown(self) -> None:
        """Free the engine; calls under way fail. The actor serves nothing afterwards."""
        await self._engine.shutdown()


def check_sampling(*, num_samples: int, temperature: float, max_new_tokens: int) -> None:
    """Raise ValueError for a setting out of range."""
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"num_samples={num_samples} and max_new_tokens={max_new_tokens} must be at least 1")
    if temperature != 0 and temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or at least {MIN_TEMPERATURE}")
