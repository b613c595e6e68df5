"""Config files: what is accepted, where values are from, and what a wrong line is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from rayllm.algorithms.preference import KINDS
from rayllm.config.base import describe_fields, load_config
from rayllm.config.common import OptimizerConfig
from rayllm.config.label import LabelConfig
from rayllm.config.online_preference import OnlinePreferenceConfig
from rayllm.config.pipeline import WIRING, PipelineConfig
from rayllm.config.ppo import PPOConfig
from rayllm.config.preference import PreferenceConfig
from rayllm.config.sft import SftConfig
from rayllm.errors import InputError
from rayllm.lineage import config_inputs, fingerprint

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ["run_dir=r", "model=m", "reward_model=w", "prompts=p"]


def ppo(*overrides: str):
    return load_config(PPOConfig, None, [*REQUIRED, *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_stesp=3", r"num_stesp: unknown key. Did you mean num_steps \(default 40\)\? Steps: one batch"),
        ("policy.optimizer.learing_rate=1", r"Did you mean policy.optimizer.learning_rate \(default 0.0001\)"),
        ("polcy.num_actors=1", "polcy: unknown key. Did you mean the section policy"),
        ("zzz=1", "zzz: unknown key. Known here: algorithm, "),
        ("algorithm.kl_coef=-1", "algorithm.kl_coef: got -1; input should be greater than or equal to 0"),
        ("algorithm.kl_estimator=k9", "algorithm.kl_estimator: got 'k9'; input should be 'k1', 'k2' or 'k3'"),
        ("num_steps=many", "num_steps: got 'many'; input should be a valid integer"),
        ("prompts_per_step=97", "nearest that does: prompts_per_step=96"),
        ("algorithm.num_minibatches=1000", "set it to at most 96"),
        ("num_steps", "expected section.key=value"),
        ("num_steps.x=1", "num_steps: got"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(override, message):
    with pytest.raises(InputError, match=message):
        ppo(override)


def test_errors_in_a_file_name_file_and_line(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text("run_dir: r\nmodel: m\nreward_model: w\nprompts: p\npolicy:\n  optimizer:\n    lerning_rate: 1\n")
    with pytest.raises(InputError, match=rf"{path}:7: policy.optimizer.lerning_rate: unknown key"):
        load_config(PPOConfig, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2", "expected 'key: value' lines, got a list")],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(PPOConfig, path)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.yaml: No such file"):
        load_config(PPOConfig, tmp_path / "none.yaml")


def test_missing_required_keys_are_all_listed():
    with pytest.raises(InputError) as error:
        load_config(PPOConfig)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["run_dir", "model"]


def test_a_partly_given_section_keeps_the_defaults_of_its_place():
    # The policy's and the critic's optimizers have other defaults than an optimizer elsewhere.
    config = ppo("policy.optimizer.learning_rate=3e-4", "critic.optimizer.weight_decay=0.5").config
    assert config.policy.optimizer.schedule == "linear" and config.policy.optimizer.weight_decay == 0.0
    assert config.critic.optimizer.schedule == "constant" and config.critic.optimizer.learning_rate == 3e-4


def test_changes_name_value_default_and_origin(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("num_steps: 7\nrollout:\n  temperature: 1.0\n")
    loaded = load_config(PPOConfig, path, [*REQUIRED, "seed=3"])
    changes = loaded.changes()
    assert (changes["num_steps"].value, changes["num_steps"].default, changes["num_steps"].origin) == (7, 40, f"{path}:1")
    assert changes["rollout.temperature"].origin == f"{path}:3"
    assert changes["seed"].origin == "command line"
    assert "algorithm.gamma" not in changes


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        ppo().config.num_steps = 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_of_every_command_is_documented(name):
    rows = describe_fields(COMMANDS[name].config_class())
    assert rows
    assert not [key for key, _, _, doc in rows if not doc]


def test_ppo_stays_a_config_that_one_can_read():
    # The fields that are PPO's own; an optimizer, a learner or the placement is the same everywhere.
    shared = re.compile(r"\.optimizer\.|\.learner\.|^placement\.")
    own = [key for key, *_ in describe_fields(PPOConfig) if not shared.search(key)]
    assert len(own) <= 106


QUICKSTART = ("quickstart", "preference-quickstart", "online-preference-quickstart")
PREFERENCE = ("kto", "orpo", "simpo")
PRESETS = sorted(path for path in (ROOT / "jobs/configs").glob("*.yaml") if path.stem not in QUICKSTART)


def test_the_quickstart_loads():
    load_config(PipelineConfig, ROOT / "jobs/configs/quickstart.yaml")
    keys = ["run_dir=r", "model=m"]
    load_config(PreferenceConfig, ROOT / "jobs/configs/preference-quickstart.yaml", [*keys, "preferences=p"])
    keys += ["label.prompts=p", "label.heldout_prompts=h"]
    load_config(OnlinePreferenceConfig, ROOT / "jobs/configs/online-preference-quickstart.yaml", keys)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_go_on_top_of_a_run(path, tmp_path):
    base = tmp_path / "base.yaml"
    if path.stem in PREFERENCE:
        base.write_text("run_dir: r\nmodel: m\npreferences: p\nheldout_preferences: h\nmax_length: 99\n")
        loaded = load_config(PreferenceConfig, [base, path], ["beta=0.7"])
        assert (loaded.config.kind, loaded.config.max_length, loaded.config.beta) == (path.stem, 99, 0.7)
        assert "https://" in path.read_text()
        return
    base.write_text("run_dir: r\nmodel: m\nreward_model: rm\nprompts: p\nnum_steps: 7\n")
    loaded = load_config(PPOConfig, [base, path], ["algorithm.num_epochs=2"])
    assert loaded.config.num_steps == 7 and loaded.config.algorithm.num_epochs == 2
    origins = {change.origin.split(":")[0] for change in loaded.changes().values()}
    assert str(path) in origins
    assert "https://" in path.read_text() or path.stem == "gpus-32"  # where its values are from


def test_an_override_of_an_aliased_section_leaves_the_other_alone(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\nmodel: m\nreward_model: r\nprompts: p\nreference: &same {cpus_per_actor: 0.5}\nreward: *same\n")
    config = load_config(PPOConfig, path, ["reward.cpus_per_actor=0.2"]).config
    assert (config.reference.cpus_per_actor, config.reward.cpus_per_actor) == (0.5, 0.2)


def test_the_second_file_wins(tmp_path):
    for name, text in (("a", "seed: 1\nalgorithm: {gamma: 0.5, gae_lambda: 0.5}"), ("b", "algorithm: {gamma: 0.9}")):
        (tmp_path / name).write_text(text)
    config = load_config(PPOConfig, [tmp_path / "a", tmp_path / "b"], REQUIRED).config
    assert (config.algorithm.gamma, config.algorithm.gae_lambda, config.seed) == (0.9, 0.5, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.advantage=grpo"], "samples_per_prompt is 1; set it to 2 or more"),
        (["shaping.resample_rounds=2"], "samples_per_prompt is 1; set it to 2 or more"),
        (["algorithm.kl_coef=0", "algorithm.kl_target=6"], "needs a reference: set algorithm.kl_coef above 0"),
        (["algorithm.advantage=remax", "shaping.normalize=group", "samples_per_prompt=2"], "takes away the mean"),
        (["algorithm.kl_in=loss"], "on average k1 has no gradient, and nothing would hold"),
        (["reference.update_every=2", "policy.learner.lora.rank=4"], "the policy without its adapters, which stays"),
        (["ptx.documents=d", "ptx.batch_size=3", "policy.num_actors=2"], "does not divide over policy.num_actors=2"),
        (["reward_model=null"], "reward_model: required but not given"),
        (["prompts=null"], "prompts: required but not given"),
        (["reward.source=function"], "reward.source=function with reward.function=None: a function is named"),
        (["reward.source=gold", "reward.sources.a.kind=model"], "name all sources in reward.sources"),
        (["reward.sources.a.kind=modle"], "sources.a: kind=modle, expected one of model, gold"),
        (["reward.sources.a.kind=http", "reward.sources.a.ulr=http://h"], "sources.a.ulr: unknown .*Did you mean url?"),
        (["reward.sources.a.kind=http", "reward.sources.a.url=h"], r"reward.sources.a.url: got 'h', expected http://"),
        (["reward.sources.a.kind=function"], r"reward.sources.a.function: required but not given"),
        (["reward.sources.a-b.kind=model"], "the name 'a-b' may have letters, digits and _ only"),
        (["reward.sources={a: {kind: verifier, verifier: regex}}"], "reward.sources.a: verifier=regex with pattern=None"),
        (["reward.sources={a: {kind: verifier, verifier: format, pattern: '('}}"], "is no regular expression"),
        (["reward.sources={a: {kind: judge, url: http://h, model: m, template: x}}"], "template: {response} does not"),
        (["reward.sources={a: {kind: judge, url: http://h, model: m, pattern: x}}"], "pattern='x' has no group"),
        (["reward.sources={a: {kind: gold, weight: .inf}}"], "reward.sources.a.weight: expected a finite number"),
        (["reward.sources.a.kind=environment"], "reward.source=environment: no environment.name given"),
        (["reward.function=m:f"], "reward.source=model with reward.function=m:f: a function is named"),
        (["environment.name=calculator", "rollout.ignore_stop=true"], "rollout.ignore_stop=true: a turn that"),
    ],
)
def test_settings_that_do_not_fit_together(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(PPOConfig, None, [*REQUIRED, *overrides])


def test_an_unknown_estimator_or_loss_is_told_the_known_ones():
    with pytest.raises(InputError, match=r"algorithm.advantage.*'grop' is not known; known: gae, grpo"):
        ppo("algorithm.advantage=grop")
    with pytest.raises(InputError, match=r"algorithm.policy_loss.*known: ppo, gspo, cispo"):
        ppo("algorithm.policy_loss=ppp")


def test_the_pipeline_wires_every_stage_below_its_run_dir():
    config = load_config(PipelineConfig, ROOT / "jobs/configs/quickstart.yaml", ["run_dir=/x", "seed=5"]).config
    for stage in WIRING:
        section = getattr(config, stage)
        assert section.run_dir == Path("/x") / stage and section.seed == 5 and section.overwrite
    assert config.sft.model == Path("/x/pretrain/model")
    assert config.ppo.eval.prompts == Path("/x/world/prompts_new.parquet")
    assert config.evaluate.models["ppo"] == Path("/x/ppo/model")


def test_a_pipeline_stage_may_name_its_own_files_and_seed():
    overrides = ["run_dir=/x", "sft.data=/mine.jsonl", "sft.seed=9"]
    config = load_config(PipelineConfig, None, overrides).config
    assert config.sft.data == Path("/mine.jsonl") and config.sft.seed == 9 and config.label.seed == 0


def test_batch_must_divide_over_workers():
    overrides = ["run_dir=r", "model=m", "data=d", "batch_size=15", "workers.num_workers=2"]
    with pytest.raises(InputError, match="batch_size=15 does not divide over workers.num_workers=2; nearest .* batch_size=16"):
        load_config(SftConfig, None, overrides)


def test_learning_rate_schedules_by_hand():
    # 2 warm-up steps to 1.0, then 8 steps of decay to 0.1: half way the cosine and the line are at 0.55.
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=2, final_ratio=0.1)
    assert [cosine.learning_rate_at(s, 10) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine.learning_rate_at(6, 10) == pytest.approx(0.55)
    linear = cosine.model_copy(update={"schedule": "linear"})
    assert linear.learning_rate_at(6, 10) == pytest.approx(0.55)
    assert linear.learning_rate_at(8, 10) == pytest.approx(0.1 + 0.9 * 0.25)
    assert cosine.model_copy(update={"schedule": "constant"}).learning_rate_at(9, 10) == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.num_actors=2", "rollout.min_engines=3"], "rollout.min_engines=3 is more than the rollout.num_actors=2"),
        (["rollout.num_actors=4", "rollout.max_engines=3"], "rollout.max_engines=3 is less than rollout.num_actors=4"),
        (["rollout.max_engines=2", "rollout.weight_transfer=broadcast"], "rollout.max_engines=2 .* rollout.weight_transfer=broadcast"),
        (["rollout.max_engines=5", "prompts_per_step=97"], r"97 does not divide into 2 shards \(.*, rollout.max_engines=5\)"),
    ],
)
def test_the_fleet_stays_within_its_bounds(overrides, message):
    with pytest.raises(InputError, match=message):
        ppo(*overrides)


def test_a_step_has_pieces_for_all_engines_that_may_come():
    config = ppo("rollout.num_actors=1", "rollout.max_engines=8").config
    assert (config.num_shards, config.pieces_per_shard) == (2, 4)


def test_where_the_tail_is_cut_each_engine_has_shards_of_its_own():
    """The late ones are taken a step later: as few as come late."""
    config = ppo("rollout.num_actors=8", "max_policy_lag=1", "rollout.cut_tail=true").config
    assert (config.num_shards, config.pieces_per_shard) == (8, 1)


@pytest.mark.parametrize(
    ("policy", "critic", "rollout", "shards", "pieces"),
    [(1, 1, 1, 2, 1), (2, 1, 1, 2, 1), (2, 2, 3, 4, 3), (2, 3, 1, 6, 1), (1, 1, 3, 2, 3),
     (1, 1, 16, 2, 8), (2, 1, 12, 4, 3), (8, 8, 8, 8, 1), (1, 1, 6, 2, 3)],
)  # fmt: skip
def test_shards_divide_over_learner_ranks_and_their_pieces_over_rollout_actors(policy, critic, rollout, shards, pieces):
    config = ppo(f"policy.num_actors={policy}", f"critic.num_actors={critic}", f"rollout.num_actors={rollout}").config
    assert (config.num_shards, config.pieces_per_shard) == (shards, pieces)
    assert shards * pieces % rollout == 0


@pytest.mark.parametrize("text", ["42", "yes", "Answer: yes", "[a", "1e-3"])
def test_text_on_the_command_line_stays_text(text):
    from rayllm.config.chat import ChatConfig

    assert load_config(ChatConfig, None, [f"prompt={text}"]).config.prompt == text
    assert load_config(ChatConfig, None, ["prompt=null"]).config.prompt is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "labeler=gold needs heldout_prompts"),
        (["labeler=reward-model"], "labeler=reward-model needs reward_model"),
        (["heldout_prompts=h", "reward_model=w"], "labeler=gold does not use reward_model="),
        (["labeler=reward-model", "reward_model=w", "heldout_prompts=h"], "does not use heldout_prompts="),
        (["heldout_prompts=h", "rollout.num_actors=4", "max_actors=2"], "max_actors=2 is less than rollout.num_actors=4"),
        (["heldout_prompts=h", "set_aside_below=0.4"], "set_aside_below: got 0.4"),
    ],
)
def test_a_labeler_gets_what_it_needs_and_nothing_else(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(LabelConfig, None, ["run_dir=r", "model=m", "prompts=p", *overrides])


def test_several_reward_models_are_inputs_of_their_own(tmp_path):
    config = ppo("reward_model=[one, two]").config
    assert [path.name for path in config.reward_models] == ["one", "two"] and config.critic_start.name == "one"
    assert all(path.is_absolute() for path in config.reward_models)
    inputs = config_inputs(config)
    assert inputs["reward_model.0"].name == "one" and inputs["reward_model.1"].name == "two"
    ids = dict.fromkeys(inputs, "same")
    elsewhere = ppo(f"reward_model=[{tmp_path}/a, {tmp_path}/b]").config
    assert fingerprint("ppo", config, ids) == fingerprint("ppo", elsewhere, ids)  # by content, not by name
    assert fingerprint("ppo", config, ids) != fingerprint("ppo", config, {**ids, "reward_model.1": "other"})
    assert ppo().config.reward_models[0].name == "w"


def test_sources_of_rewards_take_from_their_section_what_they_do_not_say():
    overrides = [
        "reward.timeout_s=5", "reward.on_failure=drop", "reward.sources.good.kind=model", "reward.sources.good.model=m",
        "reward.sources.right.kind=verifier", "reward.sources.right.verifier=math", "reward.sources.right.weight=2",
        "reward.sources.right.timeout_s=1",
    ]  # fmt: skip
    loaded = load_config(PPOConfig, None, [*REQUIRED, *overrides])
    good, right = loaded.config.reward.by_name.values()
    assert (good.kind, good.weight, good.timeout_s, good.on_failure) == ("model", 1.0, 5.0, "drop")
    assert (right.kind, right.weight, right.timeout_s, right.on_failure) == ("verifier", 2.0, 1.0, "drop")
    assert config_inputs(loaded.config)["reward.sources.good.model"].name == "m"
    changed = loaded.changes()["reward.sources"]
    assert json.loads(json.dumps(changed.value))["right"]["verifier"] == "math"


def test_one_source_is_named_by_its_kind():
    reward = load_config(PPOConfig, None, [*REQUIRED, "reward.source=gold", "reward.timeout_s=7"]).config.reward
    assert {name: source.timeout_s for name, source in reward.by_name.items()} == {"gold": 7.0}
def test_the_preference_config_knows_every_kind_of_loss():
    assert set(PreferenceConfig.model_fields["kind"].annotation.__args__) == set(KINDS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=ipo", "label_smoothing=0.1"], "label_smoothing=0.1 has no effect with kind=ipo; set kind=dpo or robust"),
        (["target_margin=1"], "has no effect with kind=dpo; set kind=simpo, or target_margin=0"),
        (["desirable_weight=2"], "set kind=kto, or desirable_weight=1"),
        (["kind=orpo"], "kind=orpo needs sft_coef > 0"),
        (["kind=kto", "sft_coef=1"], "needs pairs, and kind=kto has none"),
    ],
)
def test_preference_settings_that_do_not_fit_together(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(PreferenceConfig, None, ["run_dir=r", "model=m", "preferences=p", "heldout_preferences=h", *overrides])


def test_every_round_of_online_preference_starts_from_the_last_ones_model():
    keys = ["run_dir=/x", "model=/m", "seed=5", "label.prompts=p", "label.heldout_prompts=h", "preference.kind=ipo"]
    config = load_config(OnlinePreferenceConfig, None, keys).config
    label, preference = config.round(2, Path("/x/round-1/preference/model"))
    assert label.model == preference.model == Path("/x/round-1/preference/model")
    assert (label.seed, preference.seed, preference.kind) == (6, 6, "ipo")
    assert preference.preferences == Path("/x/round-2/label/rankings.parquet")
    assert label.run_dir == Path("/x/round-2/label") and preference.run_dir == Path("/x/round-2/preference")


@pytest.mark.parametrize(
    ("mode", "more", "shares"),
    [
        ("split", (), [["policy"], ["critic"], ["reference"], ["reward"], ["rollout"]]),
        ("colocated", (), [["policy", "critic", "reference", "reward", "rollout"]]),
        ("pairs", (), [["policy", "reference"], ["critic", "reward"], ["rollout"]]),
        ("pairs", ("algorithm.advantage=grpo", "samples_per_prompt=2"), [["policy", "reference"], ["reward"], ["rollout"]]),
        ("pairs", ("algorithm.kl_coef=0", "reward.sources.a.kind=gold", "reward.sources.b.kind=gold"),
         [["policy"], ["critic", "reward.a", "reward.b"], ["rollout"]]),
    ],
)  # fmt: skip
def test_roles_that_share_gpus(mode, more, shares):
    config = ppo(f"placement.mode={mode}", *more).config
    assert config.placement.shares(list(config.roles)) == shares


def test_a_role_goes_to_its_usual_type_where_nodes_have_types():
    usual = ppo().config.placement
    assert usual.node_type("policy", labelled=False) is None
    assert [usual.node_type(role, labelled=True) for role in ("critic", "rollout", "reward.exact", "workers")] == [
        "learner", "rollout", "scorer", "learner"
    ]  # fmt: skip
    given = ppo("placement.node_types={reward: cheap, rollout: any}").config.placement
    assert given.node_type("reward.exact", labelled=False) == "cheap"  # said: it must be there
    assert given.node_type("rollout", labelled=True) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_policy_lag=1"], "placement.mode=colocated with max_policy_lag=1: engines that share"),
        (["rollout.gpus_per_actor=2"], "rollout.gpus_per_actor=2 with placement.mode=colocated"),
        (["policy.learner.zero_stage=3"], "placement.mode=colocated with policy.learner.zero_stage=3"),
        (["critic.learner.zero_stage=0"], "placement.mode=colocated with critic.learner.zero_stage=0"),
        (["rollout.weight_transfer=broadcast"], "placement.mode=colocated with rollout.weight_transfer=broadcast"),
        (["rollout.engine.enable_sleep_mode=false"], "enable_sleep_mode=false with placement.mode=colocated"),
        (["placement.node_types.reward=scorer"], "placement.node_types.reward=scorer with placement.mode=colocated"),
        (["placement.node_types.polcy=learner"], "'polcy' is no role; did you mean policy?"),
        (["placement.mode=split", "rollout.weight_transfer=ipc"], "placement.mode=split does not give"),
    ],
)
def test_what_cannot_be_colocated_is_refused(overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ppo("placement.mode=colocated", *overrides)


def test_engines_that_share_gpus_can_sleep_and_leave_room():
    assert ppo("placement.mode=colocated").config.engine == {}  # vLLM refuses to sleep on CPU
    colocated = ppo("placement.mode=colocated", "rollout.gpus_per_actor=1", "rollout.engine.max_model_len=99").config
    assert colocated.engine == {"gpu_memory_utilization": 0.5, "enable_sleep_mode": True, "max_model_len": 99}
    more = ppo("placement.mode=colocated", "rollout.gpus_per_actor=1", "rollout.engine.gpu_memory_utilization=0.7")
    assert more.config.engine["gpu_memory_utilization"] == 0.7
    assert ppo("placement.mode=pairs", "rollout.gpus_per_actor=1").config.engine == {}
