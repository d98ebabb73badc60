"""`calibrate`, and thresholds by share at the commands that run a model, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import anydepth
from anydepth import HFEngine
from anydepth.measure.evaluate import evaluate
from anydepth.models.load import load_model
from anydepth.recipe import TrainConfig
from anydepth.runs.run import summary_of
from anydepth.training.checkpoint import load_target
from anydepth.training.corpora import validation_of
from anydepth.training.data import load_windows
from anydepth.training.train import prepare
from commands import anydepth as run
from commands import refused, write_recipe
from tiny import NUM_LAYERS, save_base

SMALL = ("--num-windows", 2, "--sequence-length", 32, "--num-runs", 2, "--prompt-tokens", 8, "--new-tokens", 4)
LENGTH = 32


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FFN routers that tell tokens apart, and a LoRA adapter that changes the model; saved without score quantiles."""
    folder = tmp_path_factory.mktemp("routers")
    model, _ = load_model(str(save_base(folder / "base")))
    adapted = anydepth.attach(prepare(model, TrainConfig.model_validate({"lora": {"rank": 2}})), {"name": "ffn_router"})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, part in adapted.named_parameters():
            if "lora_" in name or "direct." in name:
                part.copy_(torch.randn(part.shape, generator=generator) * 0.3)
        adapted.get_buffer("methods.ffn_router.thresholds").zero_()
    return anydepth.save(adapted, folder / "old", base=str(folder / "base"))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, routers: Path, text: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    done = run("calibrate", routers, *SMALL, "--data", text, "--skip-share", 0.45, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def ffn_share(target: Path, text: Path, *options: object) -> float:
    """The share of FFNs that run, from the counts of `eval`."""
    done = run("eval", target, "--data", text, "--sequence-length", LENGTH, "--limit", 4, *options, "--json", "-q")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    shares = document["per_layer"]["ffn"][1:]
    assert 1 - document["skip_share"]["ffn_router"] == pytest.approx(sum(shares) / len(shares))
    return sum(shares) / len(shares)


def test_a_skip_rate_is_set_and_measured_on_held_out_text(calibrated: tuple[Path, dict[str, Any]], text: Path) -> None:
    """C14: the document has the share of held-out text, which is what forwards of it count."""
    folder, document = calibrated
    row = document["skip_share"]["ffn_router"]
    assert row["target"] == 0.45 and row["calibration"] == pytest.approx(0.45, abs=0.02)
    adapted, tokenizer = load_target(str(folder))
    windows = load_windows(str(text), tokenizer, LENGTH)[2:4]
    skipped = []
    for window in windows:
        adapted(input_ids=window[None], use_cache=False)
        skipped.append(1 - adapted.last_trace.ffn_keep[1:].double().mean().item())
    assert row["held_out"] == pytest.approx(sum(skipped) / 2, abs=1e-6)
    assert document["met"] == (abs(row["held_out"] - 0.45) <= 0.045) == (not document["warnings"])


@pytest.mark.parametrize("capacity", [0.1, 0.4, 0.9])
def test_a_capacity_at_inference_holds(calibrated: tuple[Path, dict[str, Any]], text: Path, capacity: float) -> None:
    """C13: from the kept quantiles, without text."""
    assert ffn_share(calibrated[0], text, "--capacity", capacity) == pytest.approx(capacity, abs=0.08)


def test_every_command_that_runs_a_model_takes_a_skip_rate(calibrated: tuple[Path, dict[str, Any]], text: Path) -> None:
    """C13: and each refuses it in one line where a checkpoint keeps no quantiles."""
    folder, _ = calibrated
    whole, half = (ffn_share(folder, text, "--skip-share", share) for share in (0, 0.5))
    assert whole == 1 and half < 0.6
    options = ("--prompt", "the sea", "--max-new-tokens", 6, "--engine", "hf", "--json", "-q")
    deep, flat = (run("generate", folder, *options, "--capacity", capacity) for capacity in (1, 0.2))
    assert sum(json.loads(flat.stdout)["depths"]) < sum(json.loads(deep.stdout)["depths"])
    sizes = ("--prompt-tokens", 8, "--new-tokens", 4, "--num-runs", 1, "--engine", "hf")
    done = run("bench", folder, "--data", text, *sizes, "--capacity", 0.2, "--json", "-q")
    assert json.loads(done.stdout)["rows"][0]["adapted"]["mean_depth"] < 5


def test_a_checkpoint_without_quantiles_names_the_way(routers: Path, text: Path) -> None:
    """C13: folders that were written before quantiles were kept load, and say how to get some."""
    weights = routers / json.loads((routers / "anydepth.json").read_text())["weights"] / "methods.safetensors"
    tensors = load_file(weights)
    assert not any("score_quantiles" in name for name in tensors)
    commands: dict[str, tuple[object, ...]] = {
        "eval": (),
        "generate": ("--prompt", "the sea"),
        "bench": (),
        "serve": (),
        "chat": (),
    }
    for command, options in commands.items():
        line = refused(command, routers, *options, "--capacity", 0.4)
        assert "saved without score quantiles" in line and "anydepth calibrate TARGET --skip-share 0.6" in line
    assert "ffn_router.capacity is read in training alone" in refused(
        "eval", routers, "--set", "ffn_router.capacity=0.1"
    )
    assert "give one of them" in refused("eval", routers, "--capacity", 0.4, "--skip-share", 0.6)
    assert "got 1.5" in refused("eval", routers, "--capacity", 1.5)
    assert "got 1" in refused("eval", routers, "--skip-share", 1)


def test_a_speed_that_nothing_reaches_is_refused(routers: Path, text: Path, tmp_path: Path) -> None:
    """C12: exit 1 with the best, and nothing written."""
    command = ("calibrate", routers, *SMALL, "--data", text, "--target-speedup", 40, "--out", tmp_path / "out", "-q")
    assert "out of reach here: the most measured was" in refused(*command, code=1)
    assert not (tmp_path / "out").exists()


def test_the_reference_of_perplexity_is_the_same_model(routers: Path, text: Path, tmp_path: Path) -> None:
    """C15: LoRA on; the untouched model stands beside it. Both from forwards of their own."""
    out = tmp_path / "out"
    command = ("calibrate", routers, *SMALL, "--data", text, "--max-perplexity-increase", 3.0, "--out", out)
    done = run(*command, "--json", "-q")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    adapted, tokenizer = load_target(str(out))
    windows = load_windows(str(text), tokenizer, LENGTH, max_windows=4)
    with torch.no_grad():
        ours = adapted(windows[:2], labels=windows[:2], use_cache=False).loss
        with adapted.disabled():
            full = adapted(windows[:2], labels=windows[:2], use_cache=False).loss
            held_out = adapted(windows[2:], labels=windows[2:], use_cache=False).loss
        with adapted.untouched():
            base = adapted(windows[2:], labels=windows[2:], use_cache=False).loss
    assert document["perplexity_increase"] == pytest.approx((ours - full).expm1().item(), abs=1e-4)
    assert document["perplexity_increase"] <= 3.0
    assert document["held_out"]["full_depth_perplexity"] == pytest.approx(held_out.exp().item(), rel=1e-4)
    assert document["held_out"]["untouched_perplexity"] == pytest.approx(base.exp().item(), rel=1e-4)
    assert not torch.isclose(base, held_out, rtol=1e-3), "the adapter changes the model"


def test_evaluation_has_both_kinds_of_full_depth(routers: Path, text: Path) -> None:
    """C15: `full_depth` is the untouched model, `full_depth_adapted` the same one with gates off."""
    adapted, tokenizer = load_target(str(routers))
    windows = load_windows(str(text), tokenizer, LENGTH, max_windows=2)
    found = evaluate(HFEngine(adapted), windows)
    with torch.no_grad():
        logits = adapted(windows, use_cache=False).logits
        with adapted.disabled():
            full = adapted(windows, labels=windows, use_cache=False)
    assert found["full_depth_adapted"]["loss"] == pytest.approx(full.loss.item(), abs=1e-4)
    assert found["full_depth"]["loss"] != pytest.approx(full.loss.item(), abs=1e-2)
    same = (logits.argmax(-1) == full.logits.argmax(-1))[:, :-1].double().mean().item()
    assert found["agreement_adapted"] == pytest.approx(same)
    merged, _ = load_target(str(routers), merge=True)
    assert "full_depth_adapted" not in evaluate(HFEngine(merged), windows), "one full depth is left"


def test_several_capacities_of_one_checkpoint(routers: Path, text: Path, tmp_path: Path) -> None:
    """A row per capacity and the control; the folder keeps its thresholds and has quantiles then."""
    out = tmp_path / "out"
    command = ("calibrate", routers, *SMALL, "--data", text, "--sweep", "0.4,0.9,1", "--out", out)
    done = run(*command, "--engine", "fast", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "calibrate.json").read_text())
    assert "increase" in done.stdout and "int8" in done.stdout and document["met"] is None
    nothing, first, second = document["sweep"]
    assert nothing["realised_capacity"] == 1 and nothing["speedup"] is None is nothing["speedup_interval"]
    assert not nothing["is_noise"]
    assert (first["capacity"], second["capacity"]) == (0.9, 0.4)
    assert first["realised_capacity"] > second["realised_capacity"]
    for row in (first, second, document["control"]):
        assert row["speedup_range"][0] <= row["speedup"] <= row["speedup_range"][1]
        interval = row["speedup_interval"]
        assert row["is_noise"] == (interval[0] <= 1 <= interval[1])
        low, high = row["perplexity_increase_range"]
        assert low <= row["perplexity_increase"] <= high
    assert document["thresholds"] == {"ffn_router": 0.0}
    assert ffn_share(out, text, "--capacity", 0.4) == pytest.approx(0.4, abs=0.08)
    page = tmp_path / "report.html"
    assert run("report", out, "--out", page).returncode == 0
    assert "full depth, int8" in page.read_text()


def test_what_calibrate_is_asked_for(routers: Path) -> None:
    shared = ("calibrate", routers, "--out", "never")
    assert "calibrate takes --target-speedup" in refused(*shared)
    assert "calibrate takes --target-speedup" in refused(*shared, "--skip-share", 0.3, "--sweep", "0.5")
    assert "--sweep takes fractions" in refused(*shared, "--sweep", "0.5,1.5")
    assert "--sweep takes fractions with commas" in refused(*shared, "--sweep", "half")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--target-speedup", "nan", "factor above 1"),
        ("--target-speedup", "inf", "factor above 1"),
        ("--max-perplexity-increase", "nan", "at least 0"),
        ("--max-perplexity-increase", "inf", "at least 0"),
        ("--skip-share", "nan", "from 0 to less than 1"),
        ("--capacity", "nan", "above 0 up to 1"),
        ("--sweep", "0.5,nan", "above 0 up to 1"),
        ("--max-risk", "nan", "between 0 and 1"),
        ("--num-runs", 0, "at least 1; got 0"),
        ("--new-tokens", 0, "at least 1; got 0"),
        ("--num-prompts", 0, "at least 1; got 0"),
        ("--num-windows", 0, "at least 1; got 0"),
        ("--sequence-length", 1, "at least 2; got 1"),
    ],
)
def test_bounds_and_sizes_outside_their_range(option: str, value: object, named: str) -> None:
    assert named in refused("calibrate", "no such target", "--out", "never", option, value)


def test_a_rate_to_search_for_is_finite(routers: Path, tmp_path: Path) -> None:
    line = refused("search", routers.parent / "base", "--budget", "nan", "--out", tmp_path / "out", "-q")
    assert "between 0 and 1, such as 0.25; came nan" in line


def test_quality_is_measured_on_the_validation_text_of_a_corpus(routers: Path, tmp_path: Path) -> None:
    """Not on what follows in its training text, which recipes train on."""
    assert [validation_of(spec) for spec in ("embedded", "wikitext-2:train")] == ["embedded:valid", "wikitext-2:valid"]
    assert validation_of("embedded:valid") is None
    out = tmp_path / "out"
    done = run("calibrate", routers, *SMALL, "--skip-share", 0.3, "--out", out, "--json", "-q")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    adapted, tokenizer = load_target(str(out))
    windows = load_windows("embedded:valid", tokenizer, LENGTH, max_windows=2)
    with torch.no_grad():
        wanted = adapted(windows, labels=windows, use_cache=False).loss.exp().item()
    assert document["config"]["held_out"] == "embedded:valid"
    assert document["held_out"]["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert "no file 'nothing.txt'" in refused(
        "calibrate", "no such target", "--skip-share", 0.3, "--held-out", "nothing.txt", "--out", out
    )


@pytest.mark.parametrize("command", ["calibrate", "search"])
def test_a_folder_that_may_not_be_written_to(tmp_path: Path, command: str) -> None:
    """A file, and a run whose results would be of other weights: refused before the target is looked at."""
    options = ("--skip-share", 0.3) if command == "calibrate" else ()
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(command, "no such target", *options, "--out", tmp_path / "file")
    (tmp_path / "recipe.yaml").write_text("")
    assert "holds the run of a recipe" in refused(command, "no such target", *options, "--out", tmp_path)


@pytest.mark.parametrize("also", [(), ("--per-exit",)])
def test_a_risk_of_a_model_that_only_drafts_is_refused(text: Path, tmp_path: Path, also: tuple[str, ...]) -> None:
    """Its text is that of full depth: a risk of 0 says nothing of its thresholds."""
    model, _ = load_model(str(save_base(tmp_path / "base")))
    adapted = anydepth.attach(model, {"name": "early_exit", "layers": [2, 4]})
    draft = anydepth.Draft(adapted, {})
    folder = anydepth.save(adapted, tmp_path / "drafts", base=str(tmp_path / "base"), draft=draft)
    command = ("calibrate", folder, *SMALL, "--data", text, "--max-risk", 0.5, *also, "--out", tmp_path / "out", "-q")
    assert "skips only in drafts" in refused(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("also", [(), ("--per-exit",)])
def test_a_risk_leaves_quantiles_and_an_old_table_goes(
    routers: Path, text: Path, tmp_path: Path, also: tuple[str, ...]
) -> None:
    """Any capacity can be set later; thresholds.json is of the calibration that wrote the folder last."""
    model, _ = load_model(str(save_base(tmp_path / "base")))
    adapted = anydepth.attach(model, {"name": "early_exit", "layers": [2, 4]})
    folder = anydepth.save(adapted, tmp_path / "exits", base=str(tmp_path / "base"))
    out = tmp_path / "out"
    risk = ("--max-risk", 0.9, "--confidence", 0.8, "--num-prompts", 20, *also)
    done = run("calibrate", folder, *SMALL, "--data", text, *risk, "--out", out, "-q")
    assert done.returncode == 0, done.stderr
    assert (out / "thresholds.json").exists()
    options = ("--data", text, "--sequence-length", LENGTH, "--limit", 4, "--capacity", 0.5, "--json", "-q")
    done = run("eval", out, *options)
    assert json.loads(done.stdout)["skip_share"]["early_exit"] == pytest.approx(0.5, abs=0.15), done.stderr
    if not also:
        done = run("calibrate", routers, *SMALL, "--data", text, "--skip-share", 0.3, "--out", out, "-q")
        assert done.returncode == 0, done.stderr
        assert not (out / "thresholds.json").exists()


def test_options_of_a_fresh_method_that_change_nothing(routers: Path, text: Path) -> None:
    """C13: bench takes no option that it would not use, with --against and without."""
    base = routers.parent / "base"
    sizes = ("--data", text, "--prompt-tokens", 8, "--new-tokens", 2, "--num-runs", 1, "-q")
    line = refused("bench", base, "--against", "ffn_router", "--set", "capacity=0.3", *sizes)
    assert "ffn_router.capacity is read in training alone" in line
    assert "--against names" in refused("bench", routers, "--set", "threshold=1", *sizes)


def test_training_keeps_quantiles_and_looks_at_its_target(routers: Path, text: Path, tmp_path: Path) -> None:
    """C28, C13: `train` tells target and realised share, warns, and leaves a checkpoint that takes any capacity."""
    recipe = {
        "model": {"target": str(routers.parent / "base")},
        "methods": [{"name": "ffn_router", "capacity": 0.5}, {"name": "exit_gate", "target_depth": 0.5}],
        "data": {"train": str(text), "sequence_length": LENGTH},
        "train": {"max_steps": 2, "warmup_steps": 1},
        "eval": {"data": str(text), "sequence_length": LENGTH},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    done = run("train", tmp_path / "recipe.yaml", "--out", out)
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "train.json").read_text())
    rows = document["skip_share"]
    assert rows["ffn_router"]["target"] == 0.5
    assert rows["exit_gate"]["target"] == pytest.approx(0.6), "half of six layers is 60% of those behind the first gate"
    assert rows["exit_gate"]["held_out"] == 0, "gates that hardly learned let every token go on"
    (line,) = [line for line in document["warnings"] if line.startswith("exit_gate")]
    assert "skips 0.0% of its decisions on held-out text where 60.0% was wanted" in line
    assert " ".join(line.split()) in " ".join(done.stderr.split())
    assert ffn_share(out, text, "--capacity", 1) == 1
    less = run(
        "eval", out, "--data", text, "--sequence-length", LENGTH, "--limit", 4, "--capacity", 0.3, "--json", "-q"
    )
    assert json.loads(less.stdout)["skip_share"]["ffn_router"] > 0.4, less.stderr


def test_a_summary_has_the_same_model_at_full_depth() -> None:
    """C15: with LoRA the row between is what skipping alone is compared with."""
    part = {"perplexity": 9.0, "mean_depth": 6.0, "layer_token_share": 1.0, "agreement": 1.0, "gflops_per_token": 1.0}
    quality = {"schema": "anydepth.eval/1", "label": "ffn_router + LoRA", **part, "full_depth": part}
    assert [row["label"] for row in summary_of([quality])] == ["base model", "ffn_router + LoRA"]
    with_lora = {**quality, "full_depth_adapted": {**part, "perplexity": 8.0}}
    base, same, adapted = summary_of([with_lora])
    assert (base["perplexity"], same["perplexity"], adapted["perplexity"]) == (9.0, 8.0, 9.0)


def test_calibrate_writes_a_checkpoint_that_keeps_its_bound(tmp_path: Path, finished: Path, text: Path) -> None:
    command = ["calibrate", finished, "--data", text, "--sequence-length", 32, "--num-windows", 2, "--num-runs", 1]
    done = run(*command, "--max-perplexity-increase", 0.5, "--out", tmp_path / "set", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.calibrate/1" and document["met"]
    assert document["perplexity_increase"] <= 0.5
    manifest = json.loads((tmp_path / "set" / "anydepth.json").read_text())
    assert manifest["methods"][0]["threshold"] == document["thresholds"]["layer_router"]
    again = run("eval", tmp_path / "set", "--data", text, "--sequence-length", 32, "--limit", 2, "--json", "--quiet")
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


def test_calibrating_to_a_risk(tmp_path: Path, base: Path, text: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        base,
        text,
        methods=[{"name": "early_exit", "layers": [3, 5]}],
        calibrate=None,
        train=None,
    )
    assert run("train", recipe, "--out", tmp_path / "exits", "--quiet").returncode == 0
    shared = ("--data", text, "--num-windows", 2, "--sequence-length", 32, "--prompt-tokens", 8, "--new-tokens", 4)
    command = ("calibrate", tmp_path / "exits", *shared, "--out", tmp_path / "safe")
    done = run(*command, "--max-risk", 0.9, "--confidence", 0.8, "--num-prompts", 20, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["met"] and document["risk"] < 0.9 and document["num_sequences"] == 20
    assert 0 < document["thresholds"]["early_exit"] < 1
    done = run(*command, "--max-risk", 0.01, "--num-prompts", 20)
    assert done.returncode == 0 and "299" in done.stderr and "nothing is skipped" in done.stdout
    document = json.loads((tmp_path / "safe" / "calibrate.json").read_text())
    assert not document["met"] and document["risk"] is None and document["thresholds"]["early_exit"] == "Infinity"
    shown = run("generate", tmp_path / "safe", "--prompt", "the sea", "--max-new-tokens", 4, "--json")
    assert set(json.loads(shown.stdout)["depths"]) == {NUM_LAYERS}
    assert "a bound of its own" in refused(*command, "--max-risk", 0.1, "--target-speedup", 1.2)


def test_calibrating_each_exit_to_a_risk(tmp_path: Path, base: Path, text: Path) -> None:
    """The list in the folder and in the file are the same, "Infinity" included, and give the same tokens."""
    exits = [{"name": "early_exit", "layers": [1, 3, 5]}]
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text, methods=exits, calibrate=None, train=None)
    assert run("train", recipe, "--out", tmp_path / "exits", "--quiet").returncode == 0
    shared = ("--data", text, "--num-windows", 2, "--sequence-length", 32, "--prompt-tokens", 8, "--new-tokens", 4)
    command = ("calibrate", tmp_path / "exits", *shared, "--num-prompts", 20, "--out", tmp_path / "safe")
    done = run(*command, "--max-risk", 0.25, "--confidence", 0.8, "--per-exit", "--json")
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
        written = json.loads(run("generate", tmp_path / "safe", *options).stdout)
        done = run("generate", tmp_path / "exits", *options, "--set", f"early_exit.thresholds={path}")
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
