"""`tune`: what it tries, what it keeps, and the folder that runs as it found."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import anydepth
from anydepth.calibration.shares import collect_scores, keep_scores
from anydepth.decoding.engines import FastEngine
from anydepth.errors import UserError
from anydepth.measure import race
from anydepth.measure.evaluate import evaluate
from anydepth.recipe import TuneConfig
from anydepth.report import wording
from anydepth.runs import tune, tune_texts
from anydepth.runs.candidates import SHARES
from anydepth.runs.tune import Tuner, on_front
from anydepth.serve.opening import open_service, open_target
from anydepth.training.checkpoint import load_target
from anydepth.training.data import load_windows
from tiny import save_base, save_gguf, save_text, windows

pytestmark = pytest.mark.timeout(300)
SHAPES: dict[str, Any] = {"prompt_tokens": [8, 16], "new_tokens": 8, "minutes": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    save_base(folder / "base")
    save_text(folder / "text.txt", 2500)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"LENGTH": 64, "NUM_CHOOSING": 4, "NUM_UNSEEN": 4}.items():
        monkeypatch.setattr(tune_texts, name, value)
    for name, value in {"CONFIRMING": 2, "BASELINE": 1}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "cache"))


def tuner_of(folder: Path, target: str = "", dtype: str = "auto", **options: Any) -> Tuner:
    config = TuneConfig(**{"data": str(folder / "text.txt"), "dtype": dtype, **SHAPES, **options})
    return Tuner(target or str(folder / "base"), config)


def tuned(folder: Path, out: Path, target: str = "", dtype: str = "auto", **options: Any) -> dict[str, Any]:
    tuner = tuner_of(folder, target, dtype, **options)
    fields = tuner.run()
    tuner.write(out)
    return json.loads(json.dumps(fields))


def generated(engine: Any) -> torch.Tensor:
    ids = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    return engine.generate(input_ids=ids, max_new_tokens=16, do_sample=False, pad_token_id=0)


def test_lossless_settings_have_the_text_of_full_depth(folder: Path, tmp_path: Path) -> None:
    found = tuned(folder, tmp_path / "out")
    assert found["met"] and found["bound"]["lossless"]
    assert {one["setting"]["weights"] for one in found["candidates"]} == {"float32"}
    assert [one["setting"]["draft"] for one in found["candidates"]] == [None, "prompt lookup"]
    assert all(one["identical_tokens"] and one["perplexity_increase"] == 0 for one in found["candidates"])
    assert found["baselines"]["transformers"]["setting"]["engine"] == "hf"
    assert found["confirmed"]["identical_tokens"] and found["confirmed"]["num_runs"] >= 4
    engine, _ = open_target(str(tmp_path / "out"))
    assert engine.weights == "float32" and (engine.draft is not None) == (
        found["chosen"]["setting"]["draft"] is not None
    )
    plain = FastEngine(load_target(str(folder / "base"))[0])
    assert torch.equal(generated(engine), generated(plain))


def test_lossy_settings_keep_the_bound_and_say_why_others_do_not(folder: Path, tmp_path: Path) -> None:
    found = tuned(folder, tmp_path / "out", dtype="bfloat16", max_perplexity_increase=0.02)
    kinds = {one["setting"]["weights"] for one in found["candidates"]}
    assert kinds == {"bfloat16", "int8", "int4"}
    assert found["chosen"]["perplexity_increase"] <= 0.02
    for one in found["candidates"]:
        assert one["perplexity_increase"] <= 0.02 or "perplexity" in one["dropped"]
    assert set(found["front"]) <= {one["label"] for one in found["candidates"] if one["num_runs"]}


def test_the_same_text_is_confirmed_next_to_a_lossy_winner(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are made up: full depth 1 ms, drafts for it 0.8 ms, int8 0.5 ms."""
    own = race.time_generation

    def made_up(engine: Any, *args: Any, full_depth: bool) -> Any:
        milliseconds = 0.5 if engine.weights == "int8" else 0.8 if engine.draft is not None else 1.0
        return replace(own(engine, *args, full_depth=full_depth), total=milliseconds / 1000)

    monkeypatch.setattr(race, "time_generation", made_up)
    found = tuned(folder, tmp_path / "out", dtype="bfloat16", max_perplexity_increase=0.5)
    assert found["chosen"]["setting"]["weights"] == "int8" and found["confirmed"]["speedup"] == pytest.approx(2.0)
    same = found["confirmed_lossless"]
    assert same["setting"] == {**found["candidates"][0]["setting"], "draft": same["setting"]["draft"]}
    assert same["speedup"] == pytest.approx(1.25) and same["identical_tokens"]
    assert same["num_runs"] == found["confirmed"]["num_runs"]
    assert wording.tuning(found)[-2:] == [
        f"with the text of full depth: {same['label']}",
        "full depth ÷ its time: 1.25× (1.25–1.25) where it was chosen, 1.25× (1.25–1.25) on other prompts",
    ]
    lossless = tuned(folder, tmp_path / "lossless", dtype="bfloat16")
    assert lossless["chosen"]["setting"]["draft"] and lossless["confirmed_lossless"] is None


def test_a_wide_bound_finds_what_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    found = tuned(folder, tmp_path / "out", max_perplexity_increase=0.5)
    skipping = [one for one in found["candidates"] if "skip_mixers" in one["setting"]]
    sizes = [len(one["setting"]["skip_mixers"]) + len(one["setting"]["skip_ffns"]) for one in skipping]
    assert sizes == list(range(1, len(sizes) + 1)) and len(sizes) >= 2
    assert all(one["perplexity_increase"] <= 0.5 or one["dropped"] for one in skipping)


@pytest.mark.parametrize("weights", ["int8", "native"])
def test_the_folder_runs_as_recorded(weights: str, folder: Path, tmp_path: Path) -> None:
    """generate, serve, bench and eval take weights, engine and type from it; options override them."""
    target = str(tmp_path / "model.gguf")
    save_gguf(Path(target), "Q8_0")
    tuner = tuner_of(folder, target)
    assert tuner.own.weights == "native"
    skips = (("mixer", 2), ("ffn", 4))
    tuner.chosen = tune.Entrant(tune.Setting("fast", weights, skips=skips), tuner.own, tuner.adapted.deciding)
    tuner.write(tmp_path / "out")
    engine, tokenizer = open_target(str(tmp_path / "out"))
    assert engine.weights == weights and [method.name for method in engine.adapted.attached] == ["skip_set"]
    assert engine.adapted.methods["skip_set"].config.skip_mixers == [2]
    assert open_target(str(tmp_path / "out"), weights="bfloat16")[0].weights == "bfloat16"
    assert open_target(str(tmp_path / "out"), engine="hf")[0].name == "hf"
    assert open_target(str(tmp_path / "out"), dtype="float32")[0].weights == "float32"
    scores = evaluate(engine, load_windows(str(folder / "text.txt"), tokenizer, 32, max_windows=2))
    assert scores["mean_depth"] == 5 and scores["full_depth"]["mean_depth"] == 6


def test_a_router_is_tuned_by_its_thresholds(folder: Path, tmp_path: Path) -> None:
    model, _ = anydepth.load_model(str(folder / "base"))
    router = anydepth.attach(model, {"name": "layer_router", "always_keep": 2, "initial_bias": 1.0}).eval()
    keep_scores(router, collect_scores(router, windows(4, 32)))
    target = anydepth.save(router, tmp_path / "router", base=str(folder / "base"))
    found = tuned(folder, tmp_path / "out", str(target), max_perplexity_increase=5.0)
    shares = [one["setting"]["skip_share"] for one in found["candidates"] if one["setting"]["skip_share"] is not None]
    assert shares and set(shares) <= set(SHARES)
    assert not any("without" in one["label"] for one in found["candidates"])  # no skip set is searched next to it
    chosen, again = found["chosen"]["setting"], load_target(str(tmp_path / "out"))[0]
    if chosen["skip_share"] is not None:
        router.methods["layer_router"].set_skip_share(chosen["skip_share"])
        assert again.methods["layer_router"].threshold == router.methods["layer_router"].threshold
    else:
        assert bool(again.attached) == (chosen["draft"] is not None)


def test_an_adapter_is_saved_unmerged(folder: Path, tmp_path: Path) -> None:
    """Its weights are merged while settings are timed; the folder has the adapter, and writes its text."""
    model, _ = anydepth.load_model(str(folder / "base"))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(str(tmp_path / "lora"))
    tuned(folder, tmp_path / "out", str(tmp_path / "lora"))
    engine, _ = open_target(str(tmp_path / "out"))
    wanted = FastEngine(load_target(str(tmp_path / "lora"), merge=True)[0])
    assert torch.equal(generated(engine), generated(wanted))
    assert list((tmp_path / "out").glob("weights-*/adapter"))


def test_drafting_is_the_default_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """Server and chat draft as `generate` does, and the text is that of full depth, whatever is attached."""
    model, _ = anydepth.load_model(str(folder / "base"))
    adapted = anydepth.attach(model, {"name": "skip_set", "skip_layers": [3]}).eval()
    draft = anydepth.Draft(adapted, {})
    target = str(
        anydepth.save(adapted, tmp_path / "out", base=str(folder / "base"), draft=draft, run={"engine": "fast"})
    )
    service, _ = open_service(target, data=str(folder / "text.txt"))
    try:
        assert service.is_lossless and service.engine.drafts
    finally:
        service.close()
    plain = str(anydepth.save(adapted, tmp_path / "plain", base=str(folder / "base")))
    service, _ = open_service(plain, data=str(folder / "text.txt"))
    try:
        assert not service.is_lossless
    finally:
        service.close()


def test_what_is_attached_is_tried_as_it_is(folder: Path, tmp_path: Path) -> None:
    model, _ = anydepth.load_model(str(folder / "base"))
    adapted = anydepth.attach(model, {"name": "skip_set", "skip_layers": [3]}).eval()
    target = anydepth.save(adapted, tmp_path / "skip", base=str(folder / "base"))
    found = tuned(folder, tmp_path / "out", str(target), max_perplexity_increase=5.0)
    (own,) = [one for one in found["candidates"] if one["setting"]["attached"]]
    assert own["label"] == "engine float32, as attached" and own["perplexity_increase"] != 0
    again = load_target(str(tmp_path / "out"))[0]
    assert bool(again.attached) == (
        found["chosen"]["setting"]["attached"] or found["chosen"]["setting"]["draft"] is not None
    )


def test_risk_is_tested_on_enough_texts(folder: Path, tmp_path: Path) -> None:
    found = tuned(folder, tmp_path / "out", dtype="bfloat16", max_risk=0.3)
    confirmed = found["confirmed"]
    keeps_the_text = {**confirmed["setting"], "draft": None} == found["candidates"][0]["setting"]
    assert confirmed["identical_tokens"] if keeps_the_text else confirmed["p_value"] <= 0.05


def test_a_risk_that_cannot_be_shown_in_time_is_said_before_the_race(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = TuneConfig(**{"data": str(folder / "text.txt"), **SHAPES, "minutes": 0.02, "max_risk": 0.01})
    found = Tuner(str(folder / "base"), config, say=lines.append).run()
    why = found["why_lossless"]
    assert re.match(r"a risk of 0.01 takes 7\d\d texts to show, about \d minutes: give --minutes \d", why)
    raced = next(place for place, line in enumerate(lines) if line.startswith("racing"))
    assert any(why in line for line in lines[:raced])
    assert all(one["identical_tokens"] for one in found["candidates"] if one["num_runs"])
    assert f"nothing lossy was raced: {why}" in wording.tuning(found)


def test_the_time_is_kept_where_full_depth_is_slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes 0.4 s, and all 7 settings would take over 5 s of 6 for one run each."""
    own = race.time_generation

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        timing = own(*args, **kwargs)
        return replace(timing, total=timing.total + 0.2)

    monkeypatch.setattr(race, "time_generation", slow)
    started = time.monotonic()
    found = tuner_of(folder, dtype="bfloat16", max_perplexity_increase=0.5, minutes=0.1).run()
    assert time.monotonic() - started < 20  # it is about 6 s on two cores
    late = [one for one in found["candidates"] if one["dropped"] == "no time for it: give --minutes more"]
    assert late and not any(one["num_runs"] for one in late)
    assert found["confirmed"]["num_runs"] >= 2


def test_too_little_text_is_said_before_anything_is_timed(folder: Path, tmp_path: Path) -> None:
    save_text(tmp_path / "short.txt", 8)
    with pytest.raises(UserError, match="give more text"):
        tuner_of(folder, data=str(tmp_path / "short.txt")).run()


def test_the_pareto_front_needs_a_clear_difference() -> None:
    def row(label: str, speedup: float, spread: float, perplexity: float) -> dict[str, Any]:
        interval = [speedup - spread, speedup + spread]
        return {"label": label, "speedup": speedup, "speedup_interval": interval, "perplexity": perplexity}

    rows = [row("full", 1.0, 0.0, 10.0), row("a", 2.0, 0.1, 11.0), row("b", 1.95, 0.2, 10.5), row("c", 1.5, 0.1, 12.0)]
    assert on_front(rows) == ["b", "full"]
    assert on_front([*rows, {"label": "not timed", "speedup": None}]) == ["b", "full"]


def test_prompts_may_leave_early(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are scored after a prompt, next to full depth there; the folder has the method."""
    assert not any(one.setting.prompt_layers for one in tuner_of(folder, max_perplexity_increase=50.0).entrants())
    monkeypatch.setattr(tune_texts, "LENGTH", 128)
    tuner = tuner_of(folder, dtype="float32", max_perplexity_increase=50.0, prompt_tokens=[12, 100])
    texts, settings = tuner.texts, {one.setting.prompt_layers: one for one in tuner.entrants()}
    assert {layers for layers in settings if layers is not None} == {4, 5}  # of 6
    quality = settings[4].quality
    assert quality["num_tokens"] == 4 * 32 and quality["perplexity_increase"] != 0
    model, _ = anydepth.load_model(str(folder / "base"), dtype="float32")
    own = anydepth.attach(model, anydepth.PromptExit.Config(layer=4)).eval()
    before = evaluate(FastEngine(own), texts.windows[0], prompt_tokens=96)
    tuner.chosen = settings[4]
    tuner.write(tmp_path / "out")
    again, _ = load_target(str(tmp_path / "out"))
    assert again.methods["prompt_exit"].config == anydepth.PromptExit.Config(layer=4, fitted=True)
    after = evaluate(FastEngine(again), texts.windows[0], prompt_tokens=96)
    increase = math.expm1(after["loss"] - after["full_depth"]["loss"])
    assert quality["perplexity_increase"] == pytest.approx(increase, 1e-3) and after["loss"] != before["loss"]
    whole = evaluate(FastEngine(own), texts.windows[0])["full_depth"]["loss"]
    assert quality["perplexity"] == pytest.approx(math.exp(whole) * (1 + increase), 1e-3)
