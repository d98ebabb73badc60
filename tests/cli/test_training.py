"""run, train and search as a user meets them: in processes of their own, with mistakes and signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from commands import RECIPE, anydepth, refused, write_recipe
from tiny import WINDOW


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
