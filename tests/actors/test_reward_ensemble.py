"""A reward model, several heads of one, and several models: what a response is worth to them together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.reward import RewardActor
from rayllm.data.rollout import Rollout, collate
from rayllm.models.heads import ScalarModel, sequence_rewards
from rayllm.models.loading import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> list[Path]:
    """One head with moments, two heads with moments, and another maker's model without any."""
    made = []
    for seed, moments in enumerate([(0.5, 2.0), ([0.1, -0.3], [0.5, 3.0]), None]):
        heads = len(moments[0]) if moments and isinstance(moments[0], list) else 1
        model = ScalarModel.from_folder(tiny_model_dir, seed=seed, num_heads=heads)
        if moments:
            model.classifier.config.reward_mean, model.classifier.config.reward_std = moments
        folder = tmp_path_factory.mktemp(f"reward-{seed}")
        save_model(model.classifier, tiny_tokenizer, folder)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def shard(tiny_tokenizer):
    """Five responses of unequal length."""
    rollouts = [
        Rollout(prompt_id=i, prompt_token_ids=(5, 6), token_ids=tuple(range(7, 9 + 2 * i)), logprobs=(0.0,) * (2 + 2 * i),
                finish_reason="stop", policy_versions=(0,) * (2 + 2 * i))
        for i in range(5)
    ]  # fmt: skip
    return collate(rollouts, pad_token_id=tiny_tokenizer.pad_token_id)


def alone(folder: Path, shard) -> torch.Tensor:
    """(B, H) raw scores, one response at a time."""
    model = ScalarModel.from_folder(folder).eval()
    rows = [row[mask] for row, mask in zip(shard.sequences, shard.attention_mask, strict=True)]
    with torch.no_grad():
        found = [
            sequence_rewards(model(row[None], torch.ones(1, len(row)).bool()), torch.ones(1, len(row))) for row in rows
        ]
    return torch.cat([score.reshape(1, -1) for score in found])


def test_every_head_is_put_on_its_own_scale(folders, shard):
    actor = RewardActor(model=[str(folder) for folder in folders], micro_batch_size=2)
    raw = [alone(folder, shard) for folder in folders]
    expected = torch.cat(
        [(raw[0] - 0.5) / 2, (raw[1] - torch.tensor([0.1, -0.3])) / torch.tensor([0.5, 3.0]), raw[2]], 1
    )
    torch.testing.assert_close(actor.members(shard), expected)
    torch.testing.assert_close(actor.rewards(shard), expected.mean(1))


@pytest.mark.parametrize(("uncertainty", "coef"), [("mean_std", 0.5), ("worst", 1.0)])
def test_disagreement_takes_off(folders, shard, uncertainty, coef):
    models = [str(folder) for folder in folders]
    actor = RewardActor(model=models, micro_batch_size=64, uncertainty=uncertainty, uncertainty_coef=coef)
    members = actor.members(shard).numpy()
    expected = members.min(1) if uncertainty == "worst" else members.mean(1) - coef * members.std(1)
    np.testing.assert_allclose(actor.rewards(shard).numpy(), expected, atol=1e-6)


def test_raw_scores_are_those_of_the_heads(folders, shard):
    rows = [row[mask].numpy() for row, mask in zip(shard.sequences, shard.attention_mask, strict=True)]
    actor = RewardActor(model=str(folders[1]), micro_batch_size=2)
    torch.testing.assert_close(actor.raw_scores(rows), alone(folders[1], shard))
