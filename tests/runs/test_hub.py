"""Uploads to the hub: what is sent, and refused, without a network; what was sent loads from the local cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

import anydepth
import hub_cache
from anydepth.errors import RunError, UserError
from anydepth.models.load import load_model
from tiny import save_base


class Hub:
    """A stand-in of `HfApi` that keeps what it gets in the local cache."""

    error: Exception | None = None

    def __init__(self, cache: Path) -> None:
        self.cache, self.asked = cache, list[dict[str, Any]]()

    def __call__(self, token: str | None = None) -> Hub:
        return self

    def create_repo(self, repository: str, **options: Any) -> None:
        huggingface_hub.utils.validate_repo_id(repository)
        if self.error is not None:
            raise self.error
        self.asked.append({"repository": repository, **options})

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> SimpleNamespace:
        self.asked.append(options)
        shutil.rmtree(self.cache / f"models--{repo_id.replace('/', '--')}", ignore_errors=True)
        hub_cache.add(self.cache, repo_id, folder_path)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(hub_cache.use(monkeypatch, tmp_path / "hub"))
    monkeypatch.setattr("anydepth.runs.hub.HfApi", made)
    return made


@pytest.fixture
def adapted(hub: Hub, tmp_path: Path) -> anydepth.AdaptedModel:
    hub_cache.add(hub.cache, "user/base", save_base(tmp_path / "base"))
    return anydepth.attach(load_model("user/base")[0], anydepth.SkipSet.Config(skip_layers=[1, 3]))


@torch.no_grad()
def test_an_adapted_model_comes_back_from_the_hub(hub: Hub, adapted: anydepth.AdaptedModel) -> None:
    with pytest.raises(UserError, match="has no anydepth checkpoint"):
        anydepth.load("user/router")
    assert anydepth.push_to_hub(adapted, "user/router", private=True) == "https://huggingface.co/user/router/commit/1"
    assert hub.asked[0] == {"repository": "user/router", "private": True, "exist_ok": True}
    assert hub.asked[1]["delete_patterns"] == "weights-*/*"
    ids = torch.arange(3, 20)[None]
    assert torch.equal(anydepth.load("user/router")(input_ids=ids).logits, adapted(input_ids=ids).logits)
    files = {path.name for path in next((hub.cache / "models--user--router/snapshots").iterdir()).iterdir()}
    assert {name for name in files if not name.startswith("weights-")} == {"README.md", "anydepth.json"}


def card_of(hub: Hub, name: str) -> huggingface_hub.ModelCard:
    snapshot = next((hub.cache / f"models--{name.replace('/', '--')}/snapshots").iterdir())
    return huggingface_hub.ModelCard.load(snapshot / "README.md")


def test_the_card_says_what_it_is(hub: Hub, adapted: anydepth.AdaptedModel, tmp_path: Path) -> None:
    anydepth.push_to_hub(anydepth.save(adapted, tmp_path / "saved"), "user/router")
    card = card_of(hub, "user/router")
    found: Any = card.data
    assert (found.library_name, found.base_model, found.pipeline_tag) == ("anydepth", "user/base", "text-generation")
    assert "skip-set" in found.tags and 'anydepth.load("user/router")' in card.text and "Pareto" not in card.text


def test_the_card_shows_the_measured_pareto_front(hub: Hub, adapted: anydepth.AdaptedModel, tmp_path: Path) -> None:
    folder = anydepth.save(adapted, tmp_path / "saved")
    rows = [
        {"label": "full depth", "perplexity": 9.5, "speedup": 1.0},
        {"label": "slow", "perplexity": 12.0, "speedup": 0.9},
        {"label": "skip 2", "perplexity": 10.25, "speedup": 1.31},
    ]
    tuned = {
        "schema": "anydepth.tune/1",
        "candidates": rows,
        "front": ["skip 2", "full depth"],
        "hardware": {"cpu": "X1"},
    }
    (folder / "tune.json").write_text(json.dumps(tuned))
    anydepth.push_to_hub(folder, "user/tuned")
    text = card_of(hub, "user/tuned").text
    assert "measured on X1" in text and "slow" not in text
    assert "| skip 2 | 10.25 | 1.31 |\n| full depth | 9.5 | 1 |" in text
    (folder / "tune.json").unlink()
    swept = [
        {"capacity": 1.0, "perplexity": 9.5, "speedup": 1.0},
        {"capacity": 0.8, "perplexity": 9.9, "speedup": 0.98},
        {"capacity": 0.6, "perplexity": 10.5, "speedup": 1.4},
    ]
    (folder / "calibrate.json").write_text(json.dumps({"schema": "anydepth.calibrate/1", "sweep": swept}))
    anydepth.push_to_hub(str(folder), "user/swept")
    text = card_of(hub, "user/swept").text
    assert "| capacity 0.6 | 10.5 | 1.4 |\n| capacity 1 | 9.5 | 1 |" in text and "0.8" not in text


def test_a_base_that_others_do_not_have(hub: Hub, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapted = anydepth.attach(load_model(str(base))[0], [])
    with pytest.raises(UserError, match=r"its base model is .*base on this machine.*give base= with the hub name"):
        anydepth.push_to_hub(adapted, "user/router")
    assert not hub.asked
    anydepth.push_to_hub(adapted, "user/router", base="user/base")
    assert "`user/base`" in card_of(hub, "user/router").text
    with pytest.raises(UserError, match="no anydepth checkpoint"):
        anydepth.push_to_hub(base, "user/router")
    with pytest.raises(UserError, match="base is of a model that is not saved yet"):
        anydepth.push_to_hub(base, "user/router", base="user/base")


def refused(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError("refused\nin lines", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("name", "error", "kind", "complaint"),
    [
        ("not a name", None, UserError, "not a name cannot be pushed"),
        ("user/router", OfflineModeIsEnabled("offline"), UserError, "with the hub in reach"),
        ("user/router", refused(401), UserError, "log in with: hf auth login"),
        ("user/router", refused(500), RunError, "the upload to user/router failed .refused.; try again"),
        ("user/router", ConnectionError("no route"), RunError, "could not be reached .no route."),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, adapted: anydepth.AdaptedModel, name: str, error: Exception | None, kind: type[Exception], complaint: str
) -> None:
    hub.error = error
    with pytest.raises(kind, match=complaint) as caught:
        anydepth.push_to_hub(adapted, name)
    assert "\n" not in str(caught.value)


def test_the_method_of_the_model_is_not_reached(adapted: anydepth.AdaptedModel) -> None:
    """It would upload the model without what is attached."""
    with pytest.raises(UserError, match=r"anydepth.push_to_hub\(adapted, 'user/router'\) uploads that"):
        adapted.push_to_hub("user/router")
