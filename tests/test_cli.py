"""The command line as a user meets it: in processes of their own, with mistakes, pipes and signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from commands import anydepth
from tiny import NUM_LAYERS, WINDOW, save_base, save_text

RECIPE = {
    "methods": [{"name": "layer_router", "always_keep": 2, "initial_bias": 1.0, "target_skip": 0.3}],
    "train": {"max_steps": 4, "save_every": 2, "lora": {"rank": 2}},
    "calibrate": {"skip_share": 0.3, "num_windows": 4},
    "eval": {"sequence_length": 64, "max_windows": 3},
    "bench": {"prompt_tokens": [16], "new_tokens": 4, "num_runs": 2},
    "analyze": {"sequence_length": 32, "num_windows": 2, "num_permutations": 9},
    "generate": {"prompt": "the sea", "max_new_tokens": 6},
}


def refused(*arguments: object, code: int = 2) -> str:
    """One line on standard error, nothing on standard output, the exit code of a mistake."""
    done = anydepth(*arguments)
    lines = [line for line in done.stderr.splitlines() if "…" not in line]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("anydepth: "), done.stderr
    assert done.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


def write_recipe(path: Path, base: Path, text: Path, **changes: object) -> Path:
    recipe = {"model": {"target": str(base)}, "data": {"train": str(text), "sequence_length": 32}, **RECIPE}
    recipe["eval"] = {**recipe["eval"], "data": str(text)}
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, base: Path, text: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", base, text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = anydepth("run", recipe, "--out", out, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    (out / "stdout.json").write_text(done.stdout)
    return out


def test_a_run_ends_in_one_document_and_a_page(finished: Path) -> None:
    document = json.loads((finished / "stdout.json").read_text())
    assert document["schema"] == "anydepth.run/1"
    fields = {"anydepth_version", "commit", "seed", "hardware", "versions", "config", "summary"}
    assert fields <= set(document)
    schemas = [stage["schema"] for stage in document["stages"]]
    assert schemas == [f"anydepth.{name}/1" for name in ("train", "eval", "bench", "analyze", "generate")]
    assert document["stages"][0]["gates"][0]["fraction"] == pytest.approx(0.7, abs=0.05)  # calibrated
    assert document["stages"][3]["gates"][0]["method"] == "layer_router"
    evaluation = document["stages"][1]
    assert evaluation["num_tokens"] == 3 * 63
    assert evaluation["full_depth"]["mean_depth"] == 6 > evaluation["mean_depth"]
    row = document["stages"][2]["rows"][0]
    assert row["realised"] == pytest.approx(row["speedup"] / row["ideal_speedup"])
    assert "</html>" in (finished / "report.html").read_text()


def test_analysis_of_a_run_and_of_another_seed(finished: Path, text: Path) -> None:
    options = ["--data", text, "--sequence-length", 32, "--limit", 3, "--permutations", 9]
    done = anydepth("analyze", finished, *options, "--compare", finished, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.analyze/1"
    assert document["num_tokens"] == 3 * 32
    assert document["seeds"][0]["agreement"] == 1.0
    for_people = anydepth("analyze", finished, *options, "--quiet")
    assert "tokens that are" in for_people.stdout and "rank correlation" in for_people.stdout
    assert "layer_router: 4 gates let" in for_people.stdout


def test_analysis_of_whole_texts(finished: Path) -> None:
    options = ["--data", "embedded:valid", "--sequence-length", 32, "--limit", 2, "--permutations", 1]
    done = anydepth("analyze", finished, *options, "--samples", 5, "--json", "--quiet")
    found = json.loads(done.stdout)["correlations"]
    assert (found["unit"], found["num_samples"], len(found["samples"])) == ("paragraph", 5, 5)
    assert all(row["length"] <= 32 for row in found["samples"])
    none = anydepth("analyze", finished, *options, "--samples", 0, "--json", "--quiet")
    assert json.loads(none.stdout)["correlations"] is None
    assert "--samples is a number of at least 0; got -1" in refused("analyze", finished, "--samples", -1, "--quiet")
    for_people = anydepth("analyze", finished, *options, "--samples", 5)
    assert "of 5 paragraphs with" in for_people.stdout and "up to 5 texts of at most 32 tokens" in for_people.stderr


def test_training_says_which_gates_decide_nothing(tmp_path: Path, base: Path, text: Path) -> None:
    """Gates that start open and are not priced stay open: in the progress, and in the document."""
    stuck = {"name": "layer_router", "always_keep": 2, "initial_bias": 9.0, "target_weight": 0.0}
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text, methods=[stuck], calibrate=None)
    done = anydepth("train", recipe, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    (gates,) = json.loads(done.stdout)["gates"]
    assert (gates["method"], gates["branch"], gates["fraction"]) == ("layer_router", "layer", 1.0)
    assert [row["layer"] for row in gates["gates"]] == [2, 3, 4, 5]
    assert f"warning: {gates['warnings'][0]}" in done.stderr
    assert "almost every token runs the gated layers (mean fraction 1.000, limit 0.98)" in gates["warnings"][0]


def test_a_decoder_from_scratch_is_a_target_like_any_other(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_layers": 4, "num_heads": 2, "ffn_size": 48, "tokenizer": {"size": 600}}
    recipe = tmp_path / "scratch.yaml"
    described = {
        "model": {"scratch": shape},
        "data": {"train": "embedded:valid", "sequence_length": 64},
        "methods": [{"name": "layer_router", "always_keep": 1}],
        "train": {"backbone": True, "max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "save_every": 4},
    }
    recipe.write_text(yaml.safe_dump(described))
    done = anydepth("train", recipe, "--out", tmp_path / "out", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    losses = [row["lm_loss"] for row in json.loads(done.stdout)["loss_history"]]
    assert losses[-1] < losses[0] - 0.3
    (tmp_path / "out").rename(tmp_path / "moved")
    done = anydepth(
        "eval", tmp_path / "moved", "--data", "embedded:valid", "--sequence-length", 64, "--limit", 4, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["full_depth"]["loss"] < losses[0]  # the trained weights, not the first ones
    described["train"] = None
    recipe.write_text(yaml.safe_dump(described))
    assert "train.backbone: true" in refused("train", recipe, "--out", tmp_path / "other")


def test_a_second_run_keeps_what_is_done(finished: Path, recipe: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.json") if path.name != "run.json"}
    done = anydepth("run", recipe, "--out", finished)
    assert done.returncode == 0
    assert done.stderr.count("done already") == 5
    assert all((finished / name).read_bytes() == content for name, content in before.items())


def test_another_recipe_does_not_overwrite_a_run(finished: Path, recipe: Path) -> None:
    assert "another recipe" in refused("run", recipe, "--out", finished, "--set", "train.max_steps=5")


@pytest.mark.parametrize("command", ["inspect", "eval", "bench", "generate"])
def test_commands_on_a_checkpoint_print_one_document(command: str, finished: Path, text: Path) -> None:
    options: dict[str, list[object]] = {
        "eval": ["--data", text, "--sequence-length", 64, "--limit", 2],
        "bench": ["--data", text, "--prompt-tokens", "8,16", "--new-tokens", 3, "--num-runs", 1],
        "generate": ["--prompt", "the", "--max-new-tokens", 5],
    }
    done = anydepth(command, finished, "--json", *options.get(command, []))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == f"anydepth.{command}/1"
    assert done.stdout.count("\n") == 1


def test_search_writes_a_folder_that_others_take(tmp_path: Path, base: Path, text: Path) -> None:
    done = anydepth(
        "search",
        base,
        "--strategy",
        "greedy",
        "--budget",
        0.34,
        "--data",
        text,
        "--num-windows",
        2,
        "--sequence-length",
        48,
        "--out",
        tmp_path / "set",
        "--json",
    )
    document = json.loads(done.stdout)
    assert len(document["skip_layers"]) == 2 and len(document["trajectory"]) == 2
    unseen = document["held_out"]
    assert [row["label"] for row in unseen["rows"]][:3] == ["full depth", "skip set", "int8 weights"]
    assert unseen["num_tokens"] == 2 * 47 and "int8" in unseen["warning"]
    shown = json.loads(
        anydepth("generate", tmp_path / "set", "--prompt", "the", "--max-new-tokens", 3, "--json").stdout
    )
    assert shown["depths"] == [4.0] * 3
    for layers in shown["layers"]:
        assert [i for i, ran in enumerate(layers) if not ran] == document["skip_layers"]


def test_bench_against_a_method_on_a_base(base: Path, text: Path) -> None:
    done = anydepth(
        "bench",
        base,
        "--against",
        "skip_set",
        "--set",
        "skip_layers=[1,2]",
        "--data",
        text,
        "--prompt-tokens",
        8,
        "--new-tokens",
        3,
        "--num-runs",
        1,
        "--batch-sizes",
        "1,2",
        "--requests",
        5,
        "--json",
        "--quiet",
    )
    document = json.loads(done.stdout)
    row = document["rows"][0]
    assert row["adapted"]["mean_depth"] == 4
    assert row["ideal_speedup"] > 1
    assert [(queue["batch_size"], queue["num_requests"]) for queue in document["queues"]] == [(1, 5), (2, 5)]
    assert all(queue["adapted"]["tokens_per_second"] > 0 for queue in document["queues"])


def test_calibrate_writes_a_checkpoint_that_keeps_its_bound(tmp_path: Path, finished: Path, text: Path) -> None:
    command = ["calibrate", finished, "--data", text, "--sequence-length", 32, "--num-windows", 2, "--num-runs", 1]
    done = anydepth(*command, "--max-perplexity-increase", 0.5, "--out", tmp_path / "set", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.calibrate/1" and document["met"]
    assert document["perplexity_increase"] <= 0.5
    manifest = json.loads((tmp_path / "set" / "anydepth.json").read_text())
    assert manifest["methods"][0]["threshold"] == document["thresholds"]["layer_router"]
    again = anydepth(
        "eval", tmp_path / "set", "--data", text, "--sequence-length", 32, "--limit", 2, "--json", "--quiet"
    )
    scores = json.loads(again.stdout)
    same = scores.get("full_depth_adapted", scores["full_depth"])  # LoRA is on in both
    assert scores["perplexity"] / same["perplexity"] - 1 == pytest.approx(document["perplexity_increase"], abs=1e-4)


def test_calibrate_refuses_what_is_out_of_reach(tmp_path: Path, finished: Path, base: Path, text: Path) -> None:
    command = ["calibrate", finished, "--out", tmp_path / "set", "--data", text, "--quiet", "--sequence-length", 32]
    small = ["--num-windows", 2, "--num-runs", 1, "--prompt-tokens", 8, "--new-tokens", 4]
    line = refused(*command, *small, "--target-speedup", 50, code=1)
    assert "speed-up of 50 is out of reach here: the most measured was" in line
    assert not (tmp_path / "set").exists()
    assert "--target-speedup 1.3" in refused(*command)
    assert "got 0.5" in refused(*command, "--target-speedup", 0.5)
    command[1] = base
    assert "nothing to calibrate" in refused(*command, "--target-speedup", 1.2, code=1)


def test_bench_of_given_prompts(tmp_path: Path, finished: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "the sea"}, {"turns": ["the night is long", "why"]}, {"messages": [{"content": "light"}]}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    done = anydepth("bench", finished, "--prompts", prompts, "--batch-sizes", "1,3", "--new-tokens", 3, "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["rows"]
    assert [row["batch_size"] for row in measured] == [1, 3]
    assert all(least <= row["num_runs"] <= 3 * least for row, least in zip(measured, (3, 1), strict=True))
    assert measured[0]["prompt_tokens"] == len("the night is long")
    prompts.write_text('{"text": "no prompt"}')
    assert "line 1" in refused("bench", finished, "--prompts", prompts, "--quiet")


def test_lossless_text_is_that_of_full_depth(base: Path, finished: Path) -> None:
    options = ("--prompt", "the sea is wide and the sea is", "--max-new-tokens", 24, "--json")
    wanted = json.loads(anydepth("generate", base, *options).stdout)
    for target, drafts in ((base, "[2, 4]"), (finished, "[3]")):
        for engine in ("hf", "fast"):
            command = ("generate", target, *options, "--lossless", "--engine", engine, "--temperature", 0.0)
            done = anydepth(*command, "--set", f"draft.exit_layers={drafts}")
            assert done.returncode == 0, done.stderr
            document = json.loads(done.stdout)
            if target == base:
                assert document["token_ids"] == wanted["token_ids"]
            assert document["mean_acceptance_length"] >= 1 and document["depths"][0] == NUM_LAYERS
    assert "early_exit is not attached" in refused("generate", base, *options, "--set", "early_exit.thresholds=0.5")
    assert "METHOD.OPTION=VALUE" in refused("generate", base, *options, "--set", "thresholds=0.5")


@pytest.mark.parametrize(
    ("engine", "dtype", "differs"), [("hf", "bfloat16", True), ("hf", "float32", False), ("fast", "bfloat16", False)]
)
def test_lossless_says_where_rounding_may_decide(base: Path, engine: str, dtype: str, differs: bool) -> None:
    """C10: transformers' operators round differently for one token and for several."""
    options = ("--prompt", "the sea is wide", "--max-new-tokens", 2, "--lossless", "--engine", engine, "--dtype", dtype)
    done = anydepth("generate", base, *options)
    assert done.returncode == 0, done.stderr
    assert ("rounding can decide a near tie differently" in done.stderr) == differs


def test_bench_of_lossless_decoding(base: Path, text: Path) -> None:
    command = ("bench", base, "--data", text, "--prompt-tokens", 16, "--new-tokens", 12, "--num-runs", 2)
    done = anydepth(*command, "--against", "self_speculation", "--engine", "both", "--json")
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["rows"]:
        assert row["identical_tokens"] and row["adapted"]["mean_depth"] == NUM_LAYERS
        assert row["adapted"]["mean_acceptance_length"] >= 1 and row["ideal_speedup"] == 1


def test_calibrating_to_a_risk(tmp_path: Path, base: Path, text: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        base,
        text,
        methods=[{"name": "early_exit", "layers": [3, 5]}],
        calibrate=None,
        train=None,
    )
    assert anydepth("train", recipe, "--out", tmp_path / "exits", "--quiet").returncode == 0
    shared = ("--data", text, "--num-windows", 2, "--sequence-length", 32, "--prompt-tokens", 8, "--new-tokens", 4)
    command = ("calibrate", tmp_path / "exits", *shared, "--out", tmp_path / "safe")
    done = anydepth(*command, "--max-risk", 0.9, "--confidence", 0.8, "--num-prompts", 20, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["met"] and document["risk"] < 0.9 and document["num_sequences"] == 20
    assert 0 < document["thresholds"]["early_exit"] < 1
    done = anydepth(*command, "--max-risk", 0.01, "--num-prompts", 20)
    assert done.returncode == 0 and "299" in done.stderr and "nothing is skipped" in done.stdout
    document = json.loads((tmp_path / "safe" / "calibrate.json").read_text())
    assert not document["met"] and document["risk"] is None and document["thresholds"]["early_exit"] == "Infinity"
    shown = anydepth("generate", tmp_path / "safe", "--prompt", "the sea", "--max-new-tokens", 4, "--json")
    assert set(json.loads(shown.stdout)["depths"]) == {NUM_LAYERS}
    assert "a bound of its own" in refused(*command, "--max-risk", 0.1, "--target-speedup", 1.2)


def test_calibrating_each_exit_to_a_risk(tmp_path: Path, base: Path, text: Path) -> None:
    """The list in the folder and in the file are the same, "Infinity" included, and give the same tokens."""
    exits = [{"name": "early_exit", "layers": [1, 3, 5]}]
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text, methods=exits, calibrate=None, train=None)
    assert anydepth("train", recipe, "--out", tmp_path / "exits", "--quiet").returncode == 0
    shared = ("--data", text, "--num-windows", 2, "--sequence-length", 32, "--prompt-tokens", 8, "--new-tokens", 4)
    command = ("calibrate", tmp_path / "exits", *shared, "--num-prompts", 20, "--out", tmp_path / "safe")
    done = anydepth(*command, "--max-risk", 0.25, "--confidence", 0.8, "--per-exit", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    limits = document["thresholds"]["early_exit"]
    assert document["met"] and document["risk"] < 0.25
    assert len(limits) == 3 and limits[0] == "Infinity" and limits[2] < 1
    assert document["trajectory"][document["chosen"]]["thresholds"]["early_exit"] == limits
    manifest = json.loads((tmp_path / "safe" / "anydepth.json").read_text())
    assert manifest["methods"][0]["thresholds"] == limits
    path = tmp_path / "safe" / "thresholds.json"
    assert json.loads(path.read_text()) == {"layers": [1, 3, 5], "thresholds": limits}
    for engine in ("hf", "fast"):
        options = ("--prompt", "the sea is", "--max-new-tokens", 12, "--engine", engine, "--json")
        written = json.loads(anydepth("generate", tmp_path / "safe", *options).stdout)
        done = anydepth("generate", tmp_path / "exits", *options, "--set", f"early_exit.thresholds={path}")
        assert done.returncode == 0, done.stderr
        again = json.loads(done.stdout)
        assert again["token_ids"] == written["token_ids"] and again["depths"] == written["depths"]
        assert min(written["depths"]) < NUM_LAYERS
    path.write_text("[0.5]")
    shown = ("generate", tmp_path / "exits", "--prompt", "the sea", "--quiet", "--set")
    assert "1 values; there are 3" in refused(*shown, f"early_exit.thresholds={path}")
    assert "none.json" in refused(*shown, f"early_exit.thresholds={tmp_path / 'none.json'}")


def test_options_of_a_risk_are_checked_at_once(tmp_path: Path) -> None:
    """Nothing is loaded first: the target does not even exist."""
    command = ("calibrate", tmp_path / "none", "--out", tmp_path / "out")
    risk = (*command, "--max-risk", 0.1)
    assert "tests are fixed-sequence, bonferroni" in refused(*risk, "--test", "holm")
    assert "risks are consistency, quality, difference" in refused(*risk, "--risk", "beauty")
    assert "belong to --max-risk" in refused(*command, "--target-speedup", 1.1, "--per-exit")
    assert "belong to --max-risk" in refused(*command, "--max-perplexity-increase", 0.1, "--test", "bonferroni")


def test_losses_after_every_layer(base: Path, text: Path) -> None:
    done = anydepth("eval", base, "--data", text, "--sequence-length", 64, "--limit", 2, "--exits", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = document["exits"]
    assert [row["layers"] for row in rows] == list(range(1, NUM_LAYERS + 1))
    assert rows[-1]["agreement"] == 1 and abs(rows[-1]["loss"] - document["loss"]) < 1e-4
    assert anydepth("eval", base, "--data", text, "--sequence-length", 64, "--limit", 1, "--exits").returncode == 0


def test_report_reads_results(tmp_path: Path, finished: Path) -> None:
    done = anydepth("report", finished, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page_files" / "summary.csv").is_file()


def test_prompt_from_standard_input_and_depth_in_a_pipe(finished: Path) -> None:
    done = anydepth("generate", finished, "--prompt", "-", "--show-depth", "--max-new-tokens", 4, input="the sea")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "depths: " in done.stdout


def test_methods_and_help_read_well() -> None:
    listed = json.loads(anydepth("methods", "--json").stdout)["methods"]
    assert [method["name"] for method in listed] == [
        "skip_set",
        "stochastic_depth",
        "layer_router",
        "mixture_of_depths",
        "exit_gate",
        "ffn_router",
        "early_exit",
        "mixer_router",
        "draft",
    ]
    assert all(option["help"] for method in listed for option in method["options"].values())
    for arguments in (["--help"], ["run", "--help"], ["bench", "-h"]):
        assert anydepth(*arguments).returncode == 0


# --- mistakes: one line, exit code 2, nothing half-written ------------------------------------------------


def test_unknown_option_and_command(base: Path) -> None:
    assert "--frobnicate" in refused("inspect", base, "--frobnicate")
    assert "evaluate" in refused("evaluate", base)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"methods": [{"name": "layer_ruoter"}]}, "did you mean 'layer_router'"),
        ({"methods": [{"name": "layer_router", "traget_skip": 0.1}]}, "did you mean 'target_skip'"),
        ({"train": {"max_stepz": 3}}, "did you mean 'max_steps'"),
        ({"train": {"max_steps": "many"}}, "many"),
        ({"tarin": {}}, "did you mean 'train'"),
        ({"data": {"train": "no/such.txt"}}, "no/such.txt"),
        ({"model": {"target": "/no/such/folder"}}, "/no/such/folder"),
        ({"bench": {"prompt_tokens": [4000]}}, str(WINDOW)),
    ],
)
def test_bad_recipes(tmp_path: Path, base: Path, text: Path, change: dict[str, object], named: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text, **change)
    assert named in refused("run", recipe, "--out", tmp_path / "out", "--quiet")
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("content", ["- a list", "just text", "a: [", ""])
def test_recipes_of_the_wrong_type(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    refused("run", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus(tmp_path: Path, base: Path, finished: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert "no text" in refused("eval", base, "--data", tmp_path / "empty.txt", "--quiet")
    assert "no corpus" in refused("eval", base, "--data", "wikitext-3:valid", "--quiet")


def test_a_prompt_longer_than_the_window(finished: Path) -> None:
    line = refused("generate", finished, "--prompt", "word " * 100, "--quiet")
    assert str(WINDOW) in line
    assert "empty" in refused("generate", finished, "--prompt", "", "--quiet")


def test_a_truncated_checkpoint_and_another_base(tmp_path: Path, base: Path, text: Path) -> None:
    (tmp_path / "base").mkdir()
    mine = save_base(tmp_path / "base")
    anydepth(
        "search",
        mine,
        "--budget",
        0.2,
        "--data",
        text,
        "--num-windows",
        1,
        "--sequence-length",
        32,
        "--out",
        tmp_path / "set",
    )
    save_base(mine, seed=1)
    assert "weights differ" in refused("generate", tmp_path / "set", "--prompt", "the")
    save_base(mine)
    weights = next((tmp_path / "set").glob("weights-*/methods.safetensors"))
    weights.write_bytes(weights.read_bytes()[:4])
    assert "damaged" in refused("generate", tmp_path / "set", "--prompt", "the")


def test_a_truncated_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    assert "damaged" in refused("inspect", base)


def test_values_out_of_range(base: Path, finished: Path) -> None:
    assert "strategy 'bayes'" in refused("search", base, "--strategy", "bayes", "--out", "x", "--quiet")
    assert "'fp8'" in refused("inspect", base, "--dtype", "fp8")
    assert "-1" in refused("generate", finished, "--prompt", "a", "--temperature", -1)
    assert "1,x" in refused("bench", finished, "--batch-sizes", "1,x", "--quiet")
    assert "no method attached" in refused("bench", base, "--quiet")
    assert "did you mean 'arc_easy'" in refused("eval", base, "--tasks", "arc_eazy", "--quiet")
    assert "--permutations is a number of at least 1; got 0" in refused("analyze", base, "--permutations", 0, "--quiet")
    assert "cuda:7" in refused("inspect", base, "--device", "cuda:7")


def test_interrupting_training_loses_nothing(tmp_path: Path, base: Path, text: Path) -> None:
    """Ctrl-C: one line, exit code 130; the same command goes on and ends."""
    train = {**RECIPE["train"], "max_steps": 40, "save_every": 3}
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text, train=train)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "anydepth.cli", "train", str(recipe), "--resume", "--out", str(out)]
    # A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heeding)
    while not list(out.glob("steps/checkpoint-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("anydepth: interrupted")
    assert not (out / "train.json").exists()
    done = anydepth("train", recipe, "--resume", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["loss_history"]) == 40
