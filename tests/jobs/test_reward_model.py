"""The reward-model job: what it trains on, and the folders and reports that it leaves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jobs.reward_model import RewardModelTask, bootstraps, make_examples
from rayllm.algorithms.ranking import pairwise_loss
from rayllm.config.base import load_config
from rayllm.config.reward_model import RewardModelConfig
from rayllm.data.files import write_parquet
from rayllm.data.preferences import Ranking, read_rankings
from rayllm.errors import InputError
from rayllm.models.heads import ScalarModel
from rayllm.report.reward import REPORT
from tests.jobs.conftest import dies_behind_its_last_checkpoint, rayllm


def config(*overrides: str) -> RewardModelConfig:
    required = ["run_dir=r", "model=m", "rankings=r", "heldout_rankings=h", "center_coef=0", "batch_size=3"]
    return load_config(RewardModelConfig, None, [*required, *overrides]).config


def ranking(number: int, ranks: list[int], **more) -> Ranking:
    rng = np.random.default_rng(number)
    return Ranking([rng.integers(5, 300, size=4 + i + number) for i in range(len(ranks))], ranks, 3, **more)


RANKINGS = [
    ranking(0, [0, 1, 2], labeler="ana", scores=[3.0, 1.0, 0.0]),
    ranking(1, [1, 0], labeler="bo", scores=[0.0, 2.0]),
    ranking(2, [0, 0, 1], labeler="bo", scores=[2.0, 2.0, 0.0]),
]


class OneProcess:
    """What a task asks of an engine, without DeepSpeed."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, model: ScalarModel) -> None:
        self.model = model

    def __call__(self, **inputs):
        return self.model(**inputs)

    def sum_tensor(self, values):
        return values


def loss_of(task: RewardModelTask, engine: OneProcess) -> torch.Tensor:
    return torch.stack([task.loss(engine, batch) for batch in task.micro_batches(0, 0, 1)]).sum()


def task_of(cfg: RewardModelConfig, **more) -> RewardModelTask:
    examples = make_examples(RANKINGS, cfg)
    return RewardModelTask(cfg, examples, more.get("heldout", RANKINGS), 0, 1)


@pytest.fixture(scope="module")
def engine(tiny_model_dir):
    return OneProcess(ScalarModel.from_folder(tiny_model_dir, seed=0).eval())


@pytest.mark.parametrize("setting", ["loss=all_pairs", "loss=plackett_luce", "label_smoothing=0.2", "margin_coef=0.5", "center_coef=2"])
def test_the_micro_batch_size_does_not_change_the_loss(engine, setting):
    small, large = (loss_of(task_of(config(f"micro_batch_size={n}", setting)), engine) for n in (3, 64))
    torch.testing.assert_close(small, large)


def test_pairwise_reads_each_pair_by_itself(engine):
    cfg = config("loss=pairwise", "batch_size=6")
    task = task_of(cfg)
    assert len(task.train) == 3 + 1 + 2 and all(example.ranking.num_pairs == 1 for example in task.train)
    tokens = sum(task.num_tokens(batch) for batch in task.micro_batches(0, 0, 1))
    whole = task_of(config())
    assert tokens > sum(whole.num_tokens(batch) for batch in whole.micro_batches(0, 0, 1))
    rewards = engine.model(*_padded([s for e in task.train for s in e.ranking.sequences])).detach()
    rewards = torch.stack(
        [row[len(s) - 1] for row, s in zip(rewards, [s for e in task.train for s in e.ranking.sequences], strict=True)]
    )
    torch.testing.assert_close(loss_of(task, engine), pairwise_loss(rewards[::2], rewards[1::2]))


def _padded(sequences):
    from rayllm.data.padding import pad_right

    return pad_right(sequences, 0)


def test_labelers_weights_have_a_mean_of_one():
    cfg = config("labeler_weights={ana: 0, bo: 3}")
    assert [example.weights.tolist() for example in make_examples(RANKINGS, cfg)] == [[0], [1.5], [1.5]]
    with pytest.raises(InputError, match="nobody called 'cy' ranked; known: 'ana', 'bo'"):
        make_examples(RANKINGS, config("labeler_weights={cy: 1}"))
    with pytest.raises(InputError, match="no ranking is left"):
        make_examples(RANKINGS, config("labeler_weights={ana: 0, bo: 0}"))


def test_a_labeler_of_no_weight_teaches_nothing(tiny_model_dir):
    model = ScalarModel.from_folder(tiny_model_dir, seed=0)
    grads = []
    for ranks in ([0, 1, 2], [2, 1, 0]):
        rows = [Ranking(RANKINGS[0].sequences, ranks, 3, "ana"), *RANKINGS[1:]]
        cfg = config("labeler_weights={ana: 0}")
        loss = loss_of(RewardModelTask(cfg, make_examples(rows, cfg), rows, 0, 1), OneProcess(model))
        grads.append(torch.autograd.grad(loss, model.classifier.score.weight)[0])
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_each_head_draws_its_own_bootstrap():
    drawn = bootstraps(50, 3, seed=1)
    assert (drawn.sum(0) == 50).all() and (drawn == bootstraps(50, 3, seed=1)).all()
    assert (drawn != bootstraps(50, 3, seed=2)).any() and (drawn[:, 0] != drawn[:, 1]).any()
    assert (bootstraps(50, 1, seed=1) == 1).all()


@pytest.mark.parametrize("key", ["label_smoothing=0.1", "margin_coef=1"])
def test_what_is_of_pairs_is_refused_for_whole_orders(key):
    with pytest.raises(InputError, match="about pairs, loss=plackett_luce has none"):
        config("loss=plackett_luce", key)


def test_held_out_scores_are_of_their_responses(engine):
    task = task_of(config("micro_batch_size=3"))
    with torch.no_grad():
        figures = task.evaluate(engine)
    expected = [float(engine.model(*_padded([s]))[0, -1].detach()) for r in RANKINGS for s in r.sequences]
    np.testing.assert_allclose(task.scored.scores[:, 0], expected, atol=1e-5)
    assert figures["eval/reward_mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert figures["eval/reward_std"] == pytest.approx(np.std(expected), abs=1e-5)


def test_a_folder_whose_padding_is_its_end_of_turn_gives_the_same_number(tiny_model_dir, tmp_path):
    start = shutil.copytree(tiny_model_dir, tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(start)
    task = task_of(config(f"model={start}"))
    module = ScalarModel.from_folder(start, seed=0).eval()
    with torch.no_grad():
        task.evaluate(OneProcess(module))
    task.save(module, module.state_dict(), tmp_path / "run" / "model")
    ids = torch.tensor([[5, 6, tokenizer.eos_token_id, 7, tokenizer.eos_token_id]])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    with torch.no_grad():
        expected = module(ids, torch.ones_like(ids))[0, -1]
        torch.testing.assert_close(plain(input_ids=ids).logits[0, 0], expected, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="batch sizes > 1"):  # refused, where a number would be of the wrong token
            plain(input_ids=ids.repeat(2, 1))


def test_an_ensemble_trains_and_its_folder_and_report_agree(tiny_run, tmp_path):
    source, _ = tiny_run
    overrides = ["loss=plackett_luce", "ensemble.num_heads=3", "labeler_weights={'gold, noise 0.2': 2}"]
    done = rayllm(
        "reward-model", "--config", source / "reward_model/config.yaml", f"run_dir={tmp_path / 'rm'}", *overrides
    )
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "rm" / REPORT).read_text())
    assert report["num_heads"] == 3 and {row["group"] for row in report["by_category"]} <= {
        "fact",
        "howto",
        "unknown",
        "unsafe",
        "chat",
    }
    assert "Reward model: " in (tmp_path / "rm/report.html").read_text()
    before = dies_behind_its_last_checkpoint(tmp_path / "rm")
    done = rayllm(
        "reward-model", "--config", source / "reward_model/config.yaml", f"run_dir={tmp_path / 'rm'}", *overrides
    )
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "rm" / REPORT).read_text()) == report
    after = json.loads((tmp_path / "rm/run.json").read_text())
    assert after["model"]["id"] == before["model"]["id"] and after["metrics"] == before["metrics"]
    assert 'id="reward-model"' in (source / "report.html").read_text()  # that of the pipeline shows its own

    # Plain transformers gives the very scores whose moments the folder holds. (Its pooling would pass over a response's
    # last token where that is the padding token, as one that was cut off may have.)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm/model")
    data = read_rankings(source / "label/heldout_rankings.parquet", tokenizer, max_length=512)
    with torch.no_grad():
        hidden = [
            classifier.model(input_ids=torch.tensor(s)[None]).last_hidden_state[:, -1]
            for r in data.rankings
            for s in r.sequences
        ]
        scores = classifier.score(torch.cat(hidden))
    np.testing.assert_allclose(classifier.config.reward_mean, scores.mean(0), atol=1e-5)
    np.testing.assert_allclose(classifier.config.reward_std, scores.std(0, correction=0), atol=1e-5)

    # Read again by the report's own job, from a plain file of pairs of another format's columns.
    rows = pq.read_table(source / "label/heldout_rankings.parquet").to_pylist()
    write_parquet(
        [{key: row[key] for key in ("prompt", "responses", "ranks")} for row in rows], tmp_path / "rows.parquet"
    )
    again = rayllm("reward-report", f"run_dir={tmp_path / 'report'}", f"model={tmp_path / 'rm/model'}",
                   f"rankings={tmp_path / 'rows.parquet'}", "reward.num_actors=2", "reward.micro_batch_size=7")  # fmt: skip
    assert again.returncode == 0, again.stdout
    assert "pairs in the right order" in " ".join(again.stdout.split())
    found = json.loads((tmp_path / "report" / REPORT).read_text())
    assert found["num_pairs"] > 0 and found["num_heads"] == 3


def test_ppo_takes_several_reward_models_and_logs_each(tiny_run, tmp_path):
    source, _ = tiny_run
    models = f"reward_model=[{source / 'reward_model/model'}, {source / 'ppo/critic'}]"
    done = rayllm("ppo", "--config", source / "ppo/config.yaml", f"run_dir={tmp_path / 'run'}", models, "num_steps=1",
                  "reward.uncertainty=worst")  # fmt: skip
    assert done.returncode == 0, done.stdout
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    last = events[-1]["metrics"]
    assert (
        last["eval/rewards"] <= min(last["eval/rewards_0"], last["eval/rewards_1"]) and last["eval/rewards_spread"] > 0
    )
    parents = json.loads((tmp_path / "run/run.json").read_text())["parents"]
    assert {"reward_model.0", "reward_model.1"} <= {parent["role"] for parent in parents}
