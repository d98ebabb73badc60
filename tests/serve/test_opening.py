"""Opening a target in its own blocks first, and its service: budgets of depth, drafts and defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import anydepth
from anydepth.cli import app
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.errors import Unsupported, UserError
from anydepth.models.load import NATIVE
from anydepth.serve import opening
from anydepth.serve.api import Settings, create_app
from anydepth.serve.opening import native_first, open_service, open_target
from anydepth.serve.service import Service
from tiny import save_gguf


@contextmanager
def opened(target: Path, **options: Any) -> Iterator[Service]:
    """Yield the service of the router or the base in the folder `target`."""
    data = str(target.parent / "text.txt")
    service, tokenizer = open_service(str(target), data=data, dtype="float32", **options)
    assert service.tokenizer is tokenizer
    try:
        yield service
    finally:
        service.close()


def saved(target: Path, out: Path, spec: dict[str, Any]) -> Path:
    """A checkpoint of an untrained method on the base that `target` has."""
    model, _ = anydepth.load_model(str(target / "base"))
    (out / "text.txt").write_text((target / "text.txt").read_text())
    return anydepth.save(anydepth.attach(model, spec), out / "saved", base=str(target / "base"))


def test_a_method_with_a_threshold_has_depth_budgets(target: Path) -> None:
    """Measured on the text that is given; other options are limits of the service."""
    with opened(target / "router", max_batch_size=3, max_queue=5) as service:
        assert (service.max_batch_size, service.max_queue) == (3, 5)
        assert service.budgets is not None
        shallow, deep = (
            service.budgets.plan_of(Request([5], Sampler(), Stops.at(12), budget=budget)) for budget in (0.1, 0.9)
        )
        assert shallow is not deep
        assert service.engine.drafting is not None  # by the router itself


def test_a_base_has_no_budgets_and_drafts_by_lookup(target: Path) -> None:
    with opened(target / "base") as service:
        assert service.budgets is None and service.engine.drafting is not None


def test_random_gates_have_no_budgets(target: Path, tmp_path: Path) -> None:
    """They compare nothing with a threshold."""
    spec = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": 0.5}
    with opened(saved(target, tmp_path, spec)) as service:
        assert service.budgets is None


def test_recurrent_mixers_draft_nothing(target: Path, tmp_path: Path) -> None:
    """Drafting would have to undo their state."""
    with opened(saved(target, tmp_path, {"name": "mixer_router", "layers": [2]})) as service:
        assert service.engine.drafting is None


@pytest.mark.parametrize(("source", "wanted"), [("auto", (0.7, 20)), ("none", (None, None))])
def test_requests_default_to_the_models_own_options_unless_they_are_dropped(
    tmp_path: Path, target: Path, source: str, wanted: tuple[Any, Any]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in (target / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": 0, "pad_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("")  # nothing is attached, so that it is not read
    with opened(base, generation_config=source) as service:
        config = service.engine.adapted.generation_config
        assert (config.temperature, config.top_k) == wanted and service.end_ids == {0}


def test_a_misspelt_corpus_is_found_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "load_target", None)
    with pytest.raises(UserError, match="did you mean 'embedded'"):
        open_service("embedded", data="embeded:train")


def kinds_tried(
    target: str,
    weights: str | None = None,
    *,
    error: UserError | None = None,
    said: list[str] | None = None,
    **how: Any,
) -> list[str | None]:
    """Return the kinds of weights that a target is opened with, in order; native ones fail with an error."""
    tried: list[str | None] = []

    def open_as(kind: str | None) -> None:
        tried.append(kind)
        if error is not None and kind == NATIVE:
            raise error

    native_first(open_as, target, weights, ([] if said is None else said).append, **how)
    return tried


def test_a_gguf_file_runs_in_its_own_blocks_unless_other_weights_are_named(tmp_path: Path) -> None:
    files = {kind: str(tmp_path / f"{kind}.gguf") for kind in ("Q8_0", "F16")}
    for kind, path in files.items():
        save_gguf(Path(path), kind)
    assert kinds_tried("embedded") == kinds_tried(files["Q8_0"], dtype="bfloat16", engine="fast") == [NATIVE]
    assert kinds_tried("embedded", "int8") == ["int8"]
    asked: list[dict[str, Any]] = [{"engine": "hf"}, {"dtype": "float32"}, {"device": "cuda"}, {"compiled": True}]
    assert [kinds_tried("embedded", **how) for how in asked] == [[None]] * 4
    assert [kinds_tried(target) for target in (files["F16"], "missing.gguf", "runs/checkpoint")] == [[None]] * 3


def test_a_file_that_cannot_run_in_blocks_is_dequantised_and_the_reason_is_printed() -> None:
    said: list[str] = []
    assert kinds_tried("embedded", error=Unsupported("no compiler"), said=said) == [NATIVE, None]
    assert said == ["embedded is dequantised: no compiler"]
    with pytest.raises(UserError, match="no compiler"):
        kinds_tried("embedded", NATIVE, error=Unsupported("no compiler"))
    with pytest.raises(UserError, match="misspelt"):  # a mistake that another load would not mend
        kinds_tried("embedded", error=UserError("misspelt"))


def test_open_target_opens_the_weights_that_are_named(tmp_path: Path) -> None:
    path = str(tmp_path / "model.gguf")
    save_gguf(Path(path), "Q8_0")
    assert open_target(path)[0].weights == NATIVE
    dense, _ = open_target(path, weights="bfloat16")
    assert (dense.name, dense.weights) == ("fast", "bfloat16")
    assert open_target(path, engine="hf")[0].name == "hf"
    with pytest.raises(UserError, match="nothing is attached|is not attached"):
        open_target(path, overrides={"skip_set": {"skip_layers": [0]}})


def test_a_folder_calibrated_by_risk_bounds_the_risk_of_a_request(target: Path, tmp_path: Path) -> None:
    """Each bound selects from the settings that were tested; where nothing is shown nothing is skipped."""
    text = str(target / "text.txt")
    options = ["--data", text, "--dtype", "float32", "--sequence-length", "32", "--prompt-tokens", "8"]
    options += ["--num-prompts", "40", "--new-tokens", "6", "--num-windows", "2", "--max-risk", "0.95"]
    found = CliRunner().invoke(
        app, ["calibrate", str(target / "router"), "--out", str(tmp_path / "calibrated"), *options]
    )
    assert found.exit_code == 0, found.output
    ask = {"model": "tiny", "prompt": "the sea", "max_tokens": 4, "temperature": 0}
    (tmp_path / "text.txt").write_text(Path(text).read_text())
    with opened(tmp_path / "calibrated") as service:
        assert service.budgets is not None
        loose, tight = (
            service.budgets.plan_of(Request([5], Sampler(), Stops.at(12), max_risk=bound)) for bound in (0.95, 0.0001)
        )
        assert not loose.is_empty and tight.is_empty
        client = TestClient(create_app(service, service.tokenizer, Settings("tiny")))
        risks = [
            client.post("/v1/completions", json={**ask, "anydepth": {"max_risk": bound}}).json()["usage"]["anydepth"][
                "risk"
            ]
            for bound in (0.95, 0.0001)
        ]
        assert risks[0]["max_risk"] == 0.95 and 0 <= risks[0]["measured"] < 0.95 and risks[1]["measured"] is None
        card = client.get("/v1/models").json()["data"][0]["anydepth"]
        assert card["depth_budget"] and card["max_risk"]


def test_without_a_calibration_by_risk_a_bound_is_refused_by_name(target: Path) -> None:
    with opened(target / "router") as service:
        client = TestClient(create_app(service, service.tokenizer, Settings("tiny")))
        body = {"model": "tiny", "prompt": "the sea", "anydepth": {"max_risk": 0.1}}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("anydepth.max_risk: ")
