"""Around the steps of an RL run: timing, log, evaluation, checkpoints, and what adapts from step to step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.markup import escape

from actors.fleet import generate
from actors.group import collect
from actors.policy import PolicyActor
from actors.reward_source import SourceActor
from actors.rollout import RolloutActor
from jobs import stopping
from jobs.judging import judge_rollouts
from jobs.ppo_batches import Batches
from jobs.ppo_rewards import RewardScales, ShardScores, check_failures, problems, step_metrics
from jobs.ppo_roles import Roles
from jobs.session import cluster_lives
from rayllm.algorithms.alarms import alarms
from rayllm.algorithms.kl import next_kl_coef
from rayllm.checkpoints import Checkpoints, read_state
from rayllm.config.ppo import PPOConfig
from rayllm.data.prompts import PromptData
from rayllm.data.rollout import collate
from rayllm.data.scores import Mix, mixed, stats
from rayllm.data.text import held_out_text
from rayllm.report.run import Run
from rayllm.report.terminal import Progress
from rayllm.world.summary import summarize

SHOWN = (
    "objective/rewards", "objective/kl", "response/length_mean", "response/stop_rate", "policy/clipfrac",
    "value/explained_variance", "rollout/logprob_mismatch", "eval/rewards", "eval/gold", "eval/bits_per_byte",
    "time/step",
)  # fmt: skip
"""Metrics on the screen; events.jsonl has all."""


PATIENCE = 3
"""Steps in a row with an alarm after which ``on_alarm=stop`` ends the run."""


class Controls:
    """Scalars that follow the run: the KL coefficient, and the scale of each source's scores."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.kl_coef = config.algorithm.kl_coef
        self.scales = RewardScales(config.reward)
        self._stats: Any = None
        self.problems: list[str] = []
        """Of the last step's sources of rewards."""

    def mix(self, roles: Roles, scores: list[ShardScores]) -> Mix:
        """How the sources' scores count in this step."""
        self._stats = roles.reward.stats(scores)
        if self.scales.needs_all:
            (step,) = collect([self._stats], "reward")
            check_failures(step, self.scales.sources)
            self.scales.add(step)  # a step's scores are on the scale of all so far, its own included
        return self.scales.mix()

    def after(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt to a step's metrics; returns what to log."""
        algorithm = self.config.algorithm
        (step,) = collect([self._stats], "reward")
        check_failures(step, self.scales.sources)
        self.problems = problems(step)
        found = step_metrics(step)
        if algorithm.kl_target is None:
            return found
        used = self.kl_coef
        self.kl_coef = next_kl_coef(
            used,
            metrics["objective/kl"],
            target=algorithm.kl_target,
            num_samples=self.config.prompts_per_step * self.config.samples_per_prompt,
            horizon=algorithm.kl_horizon,
        )
        return found | {"objective/kl_coef": used}

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "scales": self.scales.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.kl_coef = state["kl_coef"]
        self.scales.load(state["scales"])


def teller(job: Run, console: Console) -> Callable[[str, str], None]:
    """Who writes down what is decided about engines: on the screen, in events.jsonl, details in the logs."""

    def tell(line: str, detail: str) -> None:
        if detail:
            job.logs_dir.mkdir(exist_ok=True)
            with (job.logs_dir / "rollout-stacks.txt").open("a") as file:
                file.write(f"{line}\n{detail}\n")
        console.print(f"rollout: {line}", markup=False, highlight=False, soft_wrap=True)
        job.note(f"rollout: {line}")

    return tell


class Watch:
    """Log, evaluation and checkpoints of a run."""

    def __init__(
        self,
        job: Run,
        config: PPOConfig,
        roles: Roles,
        batches: Batches,
        controls: Controls,
        progress: Progress,
        held_out: PromptData | None,
        tokenizer: Any,
    ) -> None:
        self.job, self.config, self.roles, self.progress = job, config, roles, progress
        self.batches, self.controls = batches, controls
        self.held_out, self.tokenizer = held_out, tokenizer
        self.checkpoints = Checkpoints(
            job.checkpoints_dir.absolute(), keep=config.checkpoint.keep, max_gib=config.checkpoint.max_gib
        )
        self.first_step = 0
        self._boundary: dict[str, Any] | None = None
        """What a checkpoint needs beside the learners: as it was when the last step ended."""
        self._start = self._state(0)
        self._learning = False
        self.changed = False
        """Whether policy or critic may be other than at their start."""

        self.last: dict[str, float] = {}
        self._times: dict[str, float] = {}
        self._alarming = 0
        documents, limit = config.eval.documents, config.max_bad_rows
        self._text = None if documents is None else held_out_text(documents, tokenizer, max_bad_rows=limit)

    @property
    def shown(self) -> dict[str, float]:
        """Of ``last``, for the screen."""
        return _shown(self.last)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._times[name] = time.perf_counter() - began

    def after(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` steps are done."""
        metrics = {**metrics, **self._times}
        rows = self.config.prompts_per_step * self.config.samples_per_prompt
        metrics["rollout/engines"] = float(self.roles.rollout.num_engines)
        metrics["perf/tokens_per_second"] = rows * metrics["response/length_mean"] / metrics["time/step"]
        if step % self.config.eval.every_steps == 0 or step == self.config.num_steps:
            metrics |= self.evaluate()
        self.last.update(metrics)
        self.job.log(step, metrics)
        for problem in self.controls.problems:
            self.job.note(f"step {step}: {problem}")
        self._heed(step, alarms(metrics, kl_estimator=self.config.algorithm.kl_estimator))
        self.progress.update(step, _shown(metrics))
        self.batches.done()
        self._boundary = self._state(step)
        if step % self.config.checkpoint.every_steps == 0 or step == self.config.num_steps:
            self._save(self._boundary)
        self._learning = False
        stopping.release()

    def learning(self) -> None:
        """From here on the weights change: the step is finished, up to `after`, before a signal ends the run."""
        stopping.check()
        self._learning = self.changed = True
        stopping.hold()

    @property
    def step(self) -> int | None:
        """Steps that are done; None before the start is measured, and when policy or critic lost them."""
        return None if self._boundary is None else int(self._boundary["step"])

    def step_again(self, *, score: bool) -> None:
        """The step under way begins again, with all as it was; ``score``: what is under way is scored anew."""
        assert self._boundary is not None
        self.controls.load(self._boundary)
        self.batches.put_back(score=score)
        self.first_step = self._boundary["step"]
        self._let_go()

    def forget_step(self) -> None:
        """The learners are lost, or in the middle of a step: what they hold is of no use to a checkpoint."""
        self._boundary = None
        self._let_go()

    def _let_go(self) -> None:
        if self._learning:
            self._learning = False
            stopping.release()

    @contextmanager
    def saved_on_stop(self) -> Iterator[None]:
        """A run that is stopped inside leaves a checkpoint of the last finished step."""
        try:
            yield
        except KeyboardInterrupt:
            state = self._boundary
            with stopping.held():
                if state is not None and state["step"] not in self.checkpoints.steps() and cluster_lives():
                    self.roles.rollout.stop()  # what is being sampled is drawn again; nobody waits for it
                    try:
                        self._save(state)
                    except RuntimeError as error:  # who is to save may be who was lost
                        self.tell(f"no checkpoint of step {state['step']}: {error}")
            raise

    def _state(self, step: int) -> dict[str, Any]:
        return {"step": step, **self.batches.state(), **self.controls.state()}

    def _save(self, state: dict[str, Any]) -> None:
        """A checkpoint; without room for it the run goes on, a few times."""
        step = state["step"]
        try:
            folder = self.checkpoints.prepare(step, self.roles.checkpoint_bytes())
            self.checkpoints.commit(step, self.roles.save(folder), state)
        except OSError as error:
            self.tell(self.checkpoints.failed(step, str(error)))
        else:
            self.job.store_checkpoint(step, keep=self.config.checkpoint.keep)

    def tell(self, note: str) -> None:
        """A line for people: on the screen and in events.jsonl."""
        self.job.note(note)
        self.progress.console.print(f"[yellow]{escape(note)}[/yellow]", highlight=False, soft_wrap=True)

    def _heed(self, step: int, found: list[str]) -> None:
        """Raise RuntimeError when alarms have gone on for too long, if that is to end the run."""
        self._alarming = self._alarming + 1 if found else 0
        for text in found:
            self.job.note(f"step {step}: {text}")
            self.progress.console.print(f"[yellow]step {step}: {escape(text)}[/yellow]", highlight=False)
        if self.config.on_alarm == "stop" and self._alarming >= PATIENCE:
            raise RuntimeError(f"on_alarm=stop: {PATIENCE} steps in a row: {'; '.join(found)}")

    def evaluate(self) -> dict[str, float]:
        """Held-out prompts, sampled as in training, by the reward model and, if asked for, the gold judge; and
        held-out text."""
        figures: dict[str, float] = {}
        if self._text is not None:
            rows, factor = self._text
            figures["bits_per_byte"] = self.roles.policy.call(PolicyActor.mean_nats, rows)[0] * factor
        if self.held_out is not None:
            figures |= self._ask(self.held_out)
        return {f"eval/{name}": value for name, value in figures.items()}

    def _ask(self, held_out: PromptData) -> dict[str, float]:
        converses = self.config.environment.name is not None
        prompts: list[Any] = held_out.rows if converses else held_out.token_ids
        rollouts = generate(
            self.roles.rollout,
            list(enumerate(prompts)),
            method=RolloutActor.converse if converses else RolloutActor.generate,
            num_samples=1,
            temperature=self.config.rollout.temperature,
            max_new_tokens=self.config.rollout.max_new_tokens,
            step=-1,
        )
        figures: dict[str, float] = {}
        batch = [collate(rollouts, pad_token_id=self.tokenizer.pad_token_id)]
        reward = self.roles.reward
        scores = collect(reward.score(batch, rows=ray.put(held_out.rows))[0], "reward")
        figures |= step_metrics([stats(scores)]) if len(scores) > 1 else {}
        figures["rewards"] = float(mixed(batch[0], scores, self.controls.scales.mix(running=False)).nanmean())
        members_of = [group.map(SourceActor.members, batch)[0] for group in reward.groups.values()]
        for members in collect(members_of, "reward"):
            if members.shape[1] > 1:  # each before disagreement takes anything off
                figures |= {f"rewards_{number}": float(mean) for number, mean in enumerate(members.mean(0))}
                figures["rewards_spread"] = float(members.std(1, correction=0).mean())
        if self.config.eval.judge == "gold":
            figures |= summarize(judge_rollouts(held_out.rows, rollouts, self.tokenizer))
        return figures

    def resume(self, startup: dict[str, float]) -> None:
        """Continue from the newest checkpoint, or measure the start; ``startup`` is logged with it."""
        refused = self.job.fetch_checkpoint()
        found = self.checkpoints.newest()
        self.last, self._alarming = {}, 0
        try:
            self.checkpoints.require_room(self.roles.checkpoint_bytes())
        except OSError as error:
            raise RuntimeError(str(error)) from None
        for note in refused + self.checkpoints.refused:
            self.tell(note)
        step, folder = found or (0, None)
        state = self._start if folder is None else read_state(folder)
        if folder is not None:
            self.changed = True
            self.roles.load(folder)
        self.controls.load(state)
        self.batches.load(state)
        for past, metrics in self.job.rewind(step if found else -1):
            self.last.update(metrics if past else {})  # of the start is told apart
        self.roles.sync_weights(version=step)
        if folder is None:
            self.job.log(0, startup | self.evaluate())
        self.first_step = step
        self._boundary = state


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name in SHOWN}
