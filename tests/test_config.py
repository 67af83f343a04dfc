"""Recipes: every bad setting is named before anything runs; resolved recipes read back equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from qirl_fast.config import (
    Config,
    ConfigError,
    changes,
    config_hash,
    default_recipe,
    derived,
    describe,
    load_config,
    refuse_changes,
    save_resolved,
)
from qirl_fast.config.wording import schema_of

RECIPE = Path(__file__).with_name("recipe.yaml")
DRAWN = ["rollout.window=null", "rollout.sde_steps={count: 2, high: 5}"]


def load(*argv: str) -> Config:
    """Load tests/recipe.yaml, or the recipe named in argv, with overrides."""
    named = any(arg.endswith(".yaml") for arg in argv)
    return load_config(argv if named else [str(RECIPE), *argv])


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_no_argument_is_the_packaged_recipe() -> None:
    cfg = load_config([])
    assert cfg.model.path == "tiny" and cfg.run == "tiny_grpo-seed0"
    assert cfg == load_config([str(default_recipe())])
    assert load_config(["seed=3"]).run == "tiny_grpo-seed3"


def my_judge(images: object, metadata: object) -> object:
    raise NotImplementedError


def test_judges_may_be_named_by_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_judges", sys.modules[__name__])
    cfg = load("rewards={'my_judges:my_judge': 1}")
    assert cfg.rewards == {"alignment": 0.5, "my_judges:my_judge": 0.5}
    (line,) = problems("rewards={'my_judges:other': 1}")
    assert line.startswith("rewards.my_judges:other: judge ")


def test_overrides_are_typed_by_their_key() -> None:
    cfg = load(
        "run=007", "train.lr=1e-4", "train.betas=[0.8,0.9]", "train.ema={decay: 0.5}", *DRAWN
    )
    assert cfg.run == "007"
    assert cfg.train.lr == 1e-4 and cfg.train.betas == (0.8, 0.9)
    assert cfg.train.ema is not None and cfg.train.ema.decay == 0.5 and cfg.train.ema.every == 8
    assert cfg.rollout.window is None and cfg.rollout.sde_steps is not None
    assert cfg.rollout.sde_steps.count == 2
    assert load("run=null").run == "recipe-seed0"
    assert load("train.max_grad_norm=2").train.max_grad_norm == 2.0


def test_later_overrides_win_over_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.read_text() + "\nseed: 5\n")
    cfg = load("seed=6", str(recipe), "seed=7")
    assert cfg.seed == 7 and cfg.run == "mine-seed7"


def test_config_is_frozen() -> None:
    cfg = load()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(cfg.train, "lr", 1.0)  # noqa: B010 (mypy knows that it is frozen)


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("rollout.group_sise=4", "rollout.group_sise", "rollout.group_size"),
        ("lr=1", "lr", "train.lr"),
        ("rolout.steps=4", "rolout", "rollout"),
        ("train.guidance=2", "train.guidance", "rollout.guidance"),
        ("rollout.window.begin=2", "rollout.window.begin", None),
        ("model.lora.rnak=2", "model.lora.rnak", "model.lora.rank"),
        ("zzzz=2", "zzzz", None),
    ],
)
def test_unknown_key_names_the_nearest(override: str, key: str, nearest: str | None) -> None:
    (line,) = problems(override)
    assert line.startswith(f"{key}: unknown key; ")
    assert line.endswith(f"did you mean {nearest}?") if nearest else "allowed here: " in line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "rollout.group_size=0",
            "rollout.group_size: got 0 (whole number); wanted a whole number >=",
        ),
        (
            "rollout.group_size=ten",
            "rollout.group_size: got 'ten' (text); wanted a whole number >= 1",
        ),
        (
            "rollout.group_size=4.0",
            "rollout.group_size: got 4.0 (number); wanted a whole number >= 1",
        ),
        ("seed=true", "seed: got True (true/false value); wanted a whole number >= 0"),
        ("train.lr=true", "train.lr: got True (true/false value); wanted a number > 0"),
        ("train.lr=.nan", "train.lr: got nan (number); wanted a finite number > 0"),
        ("train.lr='1e-3'", "train.lr: got '1e-3' (text); wanted a number > 0"),
        (
            "train.betas=[0.9]",
            "train.betas.1: required, but nothing came; wanted a number >= 0, < 1",
        ),
        ("tracking.wandb=1", "tracking.wandb: got 1 (whole number); wanted true or false"),
        ("model.dtype=float16", "model.dtype: got 'float16' (text); wanted one of 'float32', 'bfl"),
        ("rollout=null", "rollout: got null; wanted a section with the keys group_size, height"),
        (
            "rollout.height=40",
            "rollout.height: got 40 (whole number); wanted a whole number >= 16, a ",
        ),
        ("rewards.alignment=-1", "rewards.alignment: got -1 (whole number); wanted a number >= 0"),
        ("run=../elsewhere", "run: got '../elsewhere' (text); wanted text"),
        ("watch=aesthetics", "watch: got 'aesthetics' (text); wanted a list of text"),
        ("algorithm.name=ppo", "algorithm.name: got 'ppo'; wanted one of 'awm', 'dppo'"),
    ],
)
def test_wrong_value_names_key_what_came_and_what_is_allowed(override: str, line: str) -> None:
    (found,) = problems(override)
    assert found.startswith(line)


def test_a_mapping_of_any_values_is_named_so() -> None:
    line = problems("judges={mine: {kind: python, path: 'm:J', arguments: 3}}", "watch=[mine]")[0]
    assert line.startswith("judges.mine.arguments: got 3 (whole number); wanted a mapping of names")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: tiny}\n")
    keys = {line.partition(":")[0] for line in problems(str(recipe))}
    assert keys == {"data", "rollout", "rewards", "train"}


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["rollout.window={start: 6, size: 2}"], "rollout.window: steps 6 to 7 do not fit"),
        (["rollout.window={start: 99, size: 1}"], "rollout.window: steps 99 to 99 do not fit"),
        (["rollout.window=null"], "rollout.window, rollout.sde_steps: got neither"),
        (["rollout.sde_steps={count: 1}"], "rollout.window, rollout.sde_steps: got both"),
        (
            ["rollout.window=null", "rollout.sde_steps={count: 1, high: 8}"],
            "rollout.sde_steps.high: got 8; with rollout.steps=8 allowed: 1 to 7",
        ),
        (
            ["rollout.window=null", "rollout.sde_steps={count: 8}"],
            "rollout.sde_steps.count: got 8 distinct steps out of the first 7; allowed: 1 to 7",
        ),
        (["rollout.dynamics=ode"], "rollout.dynamics: got 'ode', which has no density"),
        (["rollout.dynamics=cps", "rollout.eta=1.1"], "rollout.eta: got 1.1; for cps allowed"),
        (
            ["rollout.guidance=1.5", "rollout.ratio_mode=null"],
            "rollout.ratio_mode: not declared, but rollout.guidance=1.5",
        ),
        (
            ["rollout.guidance_interval=[0.8,0.3]"],
            "rollout.guidance_interval: got [0.8, 0.3], which ends before it begins",
        ),
        (
            ["data.prompts_per_step=3", "rollout.group_size=4", "train.updates_per_rollout=5"],
            "does not divide the 12 samples of a rollout (data.prompts_per_step 3 x rollout.group_"
            "size 4); allowed: 1, 2, 3, 4, 6, 12",
        ),
        (["rewards.alignment=0"], "rewards: all weights are 0"),
        (["category_weights={counting: {}}"], "category_weights.counting: is empty"),
        (
            ["category_weights={counting: {aesthetics: 1}}"],
            "category_weights.counting.aesthetics: judge 'aesthetics' is not among rewards",
        ),
        (["watch=[alignment]"], "watch: 'alignment' is already optimised"),
        (["watch=[aesthetics, aesthetics]"], "repeats a judge"),
        (
            ["rewards.aligment=1"],
            "rewards.aligment: no judge is called 'aligment': did you mean 'al",
        ),
        (["watch=[beauty]"], "watch: no judge is called 'beauty': known are alignment, aesthetics"),
        (["data.train=/no/such.jsonl"], "data.train: no such file: '/no/such.jsonl'"),
        (["data.heldout=tiny:held"], "data.heldout: got 'tiny:held'; packaged prompts: "),
        (["model.path=/no/model"], "model.path: no such folder: '/no/model'"),
        (["resume=/no/checkpoint"], "resume: no such checkpoint folder: '/no/checkpoint'"),
        (["--dry-run"], "--dry-run: not understood; wanted a .yaml recipe or key=value"),
        (["a.yaml", "b.yaml"], "got 2 recipes (a.yaml, b.yaml); wanted at most one"),
        (["/no/recipe.yaml"], "/no/recipe.yaml: no such recipe file"),
    ],
)
def test_settings_that_cannot_work_together(argv: list[str], part: str) -> None:
    (line,) = problems(*argv)
    assert part in line


def test_windows_at_the_edge_are_allowed() -> None:
    load("rollout.window={start: 5, size: 2}")
    load("rollout.window=null", "rollout.sde_steps={count: 7, high: 7}")
    load("rollout.guidance=1", "rollout.ratio_mode=null")
    load("rollout.dynamics=cps", "rollout.eta=1.0")


def test_all_problems_come_at_once() -> None:
    """Kinds that are found at different stages, none hiding another."""
    found = problems(
        "rollout.group_size=1",
        "train.lrr=1",
        "train.betas=[2]",
        "rollout.window.start=7",
        "rollout.ratio_mode=null",
        "rewards.nope=1",
        "data.train=nowhere.txt",
    )
    starts = [line.partition(": ")[0] for line in found]
    assert sorted(starts) == sorted(
        [
            "rollout.group_size",
            "train.lrr",
            "train.betas.0",
            "train.betas.1",
            "rollout.window",
            "rollout.ratio_mode",
            "rewards.nope",
            "data.train",
        ]
    )


def test_a_wrong_key_raises_no_second_problem() -> None:
    """steps is unusable, so the window cannot be judged and must not be reported as not fitting."""
    assert len(problems("rollout.steps=two", "rollout.window.start=50")) == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\nseed: 2\n", "duplicate"),
        ("seed: [1\n", "line 2"),
        ("- a\n- b\n", "got a list"),
        ("seed: ${nothing}\n", "nothing"),
    ],
)
def test_broken_yaml_names_the_file(tmp_path: Path, text: str, part: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    (line,) = problems(str(recipe))
    assert line.startswith(str(recipe)) and part in line


def make_model_folder(folder: Path) -> Path:
    parts = {"transformer": ["diffusers", "T"], "vae": ["diffusers", "V"], "note": [None, None]}
    parts |= {"scheduler": ["diffusers", "S"]}
    for name in ("transformer", "vae", "scheduler"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"_class_name": "X"}')
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "P", **parts}))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    shards = {"weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors"}}
    (folder / "transformer" / "m.safetensors.index.json").write_text(json.dumps(shards))
    for name in ("s-1", "s-2"):
        (folder / "transformer" / f"{name}.safetensors").write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("removed", "part"),
    [
        ("model_index.json", "holds no model_index.json"),
        ("vae/diffusion_pytorch_model.safetensors", "holds no .safetensors weights"),
        ("transformer/s-2.safetensors", "s-2.safetensors is missing (named in m.safetensors.index"),
        ("transformer/config.json", "config.json is missing"),
        ("scheduler/config.json", "scheduler is missing or empty"),
    ],
)
def test_half_a_model_folder(tmp_path: Path, removed: str, part: str) -> None:
    folder = make_model_folder(tmp_path / "model")
    assert load(f"model.path={folder}").model.path == str(folder)
    (folder / removed).unlink()
    (line,) = problems(f"model.path={folder}")
    assert line.startswith("model.path: ") and part in line


def test_weights_sum_to_one_and_stay_when_read_back(tmp_path: Path) -> None:
    weights = ["rewards={alignment: 3, aesthetics: 4}", "watch=[]"]
    cfg = load(*weights, "category_weights={counting: {aesthetics: 0.2, alignment: 0.1}}")
    assert cfg.rewards == {"alignment": 3 / 7, "aesthetics": 4 / 7}
    counting = cfg.category_weights["counting"]
    assert counting["aesthetics"] == pytest.approx(2 / 3, rel=1e-15)
    assert counting["aesthetics"] + counting["alignment"] == pytest.approx(1, abs=1e-15)
    save_resolved(cfg, tmp_path / "r.yaml")
    back = load(str(tmp_path / "r.yaml"))
    assert back == cfg and config_hash(back) == config_hash(cfg)


def test_hash_and_changes_follow_the_numbers_only() -> None:
    cfg = load()
    same = load("run=x", "output=other", "resume=auto", "threads=1", "tracking.keep_checkpoints=9")
    assert config_hash(same) == config_hash(cfg) and changes(cfg, same) == []
    for override in ("seed=1", "train.lr=2e-3", "evaluation.prompts=97", "train.ema={}"):
        other = load(override)
        assert config_hash(other) != config_hash(cfg)
        assert len(changes(cfg, other)) >= 1
    assert changes(cfg, load("train.lr=2e-3")) == ["train.lr: was 0.001, is now 0.002"]


def test_steps_may_not_grow_where_the_learning_rate_counts_down_to_the_last() -> None:
    cfg = load("train.steps=50", "train.decay=10")
    with pytest.raises(ConfigError, match=r"train\.steps: was 50, is now 51"):
        refuse_changes(cfg, load("train.steps=51", "train.decay=10"), "here")
    assert config_hash(load("train.steps=51", "train.decay=10")) != config_hash(cfg)


def test_only_train_steps_may_grow() -> None:
    cfg = load("train.steps=50")
    saved = json.loads(json.dumps(cfg.model_dump(mode="json")))
    refuse_changes(saved, load("train.steps=51"), "here")
    assert config_hash(load("train.steps=51")) == config_hash(cfg)
    with pytest.raises(ConfigError, match=r"train\.steps: was 50, is now 49"):
        refuse_changes(saved, load("train.steps=49"), "here")
    with pytest.raises(ConfigError) as caught:
        refuse_changes(saved, load("train.steps=50", "seed=4", "rollout.eta=0.5"), "checkpoint-7")
    assert caught.value.problems[0].startswith("checkpoint-7 was made with other settings")
    assert {line.partition(":")[0] for line in caught.value.problems[1:]} == {"seed", "rollout.eta"}


def test_a_run_made_before_a_key_existed_goes_on_at_its_default() -> None:
    cfg = load()
    saved = cfg.model_dump(mode="json")
    for section, key in (("model", "fp8"), ("train", "replay_steps")):
        saved[section].pop(key)
    saved["rollout"]["cuda_graphs"] = False  # a key that is no more
    refuse_changes(saved, cfg, "here")
    with pytest.raises(ConfigError, match=r"train\.replay_steps: was 'absent', is now 2"):
        refuse_changes(saved, load("train.replay_steps=2"), "here")


def test_derived_sizes() -> None:
    argv = ["data.prompts_per_step=6", "rollout.group_size=8", "train.updates_per_rollout=4"]
    argv += ["rollout.steps=10", "rollout.guidance=2", "train.steps=3"]
    argv += ["evaluation.prompts=5", "evaluation.samples_per_prompt=7"]
    size = derived(load(*argv))
    assert (size.samples, size.minibatch_samples, size.recorded_steps) == (48, 12, 3)
    assert (size.replays, size.sampled_rows) == (48 * 3, 48 * 10 * 2)
    assert (size.evaluation_images, size.total_samples) == (35, 144)
    text = describe(load(*argv))
    assert "48 = 6 prompts x 8 samples" in text and "144 (sample, step) pairs" in text
    assert derived(load(*argv, *DRAWN)).recorded_steps == 2
    assert derived(load(*argv, "rollout.guidance=1")).sampled_rows == 480
    assert [derived(load(*argv, f"train.replay_steps={n}")).replay_rows for n in (1, 2, 3, 9)] == [
        12,
        24,
        36,
        36,
    ]
    limited = describe(load(*argv, "rollout.guidance_interval=[0.2,0.9]"))
    assert "at most 960, of 12 samples at a time" in limited


def test_every_key_is_documented() -> None:
    schema = schema_of(Config)
    sections = {key.rpartition(".")[0] for key in schema.dotted_keys()}
    leaves = [key for key in schema.dotted_keys() if key not in sections]
    assert len(leaves) > 60
    bare = [key for key in leaves if not schema.node(key.split(".")).get("description")]
    assert not bare


JUDGES = "judges={text: {kind: ocr}, far: {kind: remote, url: http://127.0.0.1:9, judge: x}}"


def test_judges_of_the_recipe_are_known_to_rewards_and_watch() -> None:
    cfg = load(JUDGES, "rewards={far: 1.0}", "watch=[text, sharpness]")
    assert cfg.judges["text"].kind == "ocr" and cfg.judges["far"].kind == "remote"
    again = load(JUDGES, "rewards={far: 1.0}", "watch=[text, sharpness]", "judges.far.deadline_s=9")
    moved = load(JUDGES, "rewards={far: 1.0}", "watch=[text, sharpness]", "judges.far.judge=y")
    assert changes(cfg, again) == [] and again != cfg, "where a judge is changes no number"
    assert changes(cfg, moved) == ["judges.far.judge: was 'x', is now 'y'"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("rewards={txt: 1.0}", JUDGES),
            "rewards.txt: no judge is called 'txt': did you mean 'text",
        ),
        (("judges={alignment: {kind: ocr}}",), "judges.alignment: is the name of a packaged judge"),
        (("rewards={sharpness: 1.0}",), "rewards.sharpness: sharpness is a monitor"),
        (("tiers=[{judge: x, fails_below: 1}]",), "tiers: judge 'x' is not among rewards"),
        (
            ("tiers=[{judge: alignment, fails_below: 1, cap: {nobody: 1}}]",),
            "caps 'nobody', which is no lower tier",
        ),
    ],
)
def test_judges_and_tiers_that_cannot_be(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*settings)
    assert message in str(caught.value)
