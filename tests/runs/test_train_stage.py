"""The train stage: what it leaves where measuring fails, and on which text thresholds are set and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import anydepth
from anydepth.calibration.shares import NotTrained
from anydepth.config import validate
from anydepth.draft_sections import DraftConfig
from anydepth.errors import UserError
from anydepth.recipe import Recipe
from anydepth.runs import train_stage
from anydepth.runs.inputs import Inputs
from anydepth.runs.run import Runner
from anydepth.runs.train_stage import Training
from anydepth.training.checkpoint import is_checkpoint, load_draft
from tiny import save_base, save_text

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_stage")
    save_base(folder / "base")
    save_text(folder / "text.txt")
    return folder


def recipe_of(folder: Path, *methods: Any, **sections: Any) -> Recipe:
    text = str(folder / "text.txt")
    shared = {"model": {"target": str(folder / "base")}, "data": {"train": text, "sequence_length": LENGTH}}
    content = {**shared, "methods": list(methods), "eval": {"data": text}, **sections}
    return validate(Recipe, content, where="recipe")


def fields_of(recipe: Recipe, out: Path, said: list[str]) -> dict[str, Any]:
    return Training(recipe, out, said.append, lambda row: None).run()


class Settled:
    """Stands in for `settle_shares`, and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], Any]] = []
        self.failure = failure
        monkeypatch.setattr(train_stage, "settle_shares", self)

    def __call__(self, adapted: Any, windows: Tensor, held_out: Tensor, share: Any) -> dict[str, Any]:
        self.calls.append((tuple(windows.shape), tuple(held_out.shape), share))
        if self.failure is not None:
            raise self.failure
        return {"skip_share": {"ffn_router": 0.25}, "warnings": ["a fraction is off"]}


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibrate", "wanted"), [(None, (2, None)), ({"skip_share": 0.3, "num_windows": 5}, (5, 0.3))]
)
def test_thresholds_are_set_on_training_text_and_checked_on_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: Any, wanted: tuple[int, float | None]
) -> None:
    """Without `calibrate` score quantiles alone, on two windows; windows of both texts have one length."""
    settled, said = Settled(monkeypatch), list[str]()
    fields = fields_of(recipe_of(folder, "ffn_router", calibrate=calibrate), tmp_path, said)
    num_windows, share = wanted
    assert settled.calls == [((num_windows, LENGTH), (4, LENGTH), share)]
    assert fields["skip_share"] == {"ffn_router": 0.25} and "warning: a fraction is off" in said
    assert (fields["loss_history"], fields["num_processes"], fields["sharded"]) == ([], 1, False)
    assert fields["checkpoint"] == str(tmp_path) and is_checkpoint(tmp_path)


def test_methods_without_a_threshold_have_nothing_to_measure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = Settled(monkeypatch)
    fields = fields_of(recipe_of(folder, {"name": "skip_set", "skip_layers": [1]}), tmp_path, [])
    assert settled.calls == [] and "skip_share" not in fields and "gates" not in fields
    assert anydepth.load(tmp_path).methods["skip_set"].config.skip_layers == [1]


@pytest.mark.parametrize("calibrate", [None, {"skip_share": 0.3}])
def test_gates_that_are_not_trained_fail_a_calibration_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: Any
) -> None:
    """A recipe that asks for no fraction has none; either way the folder is a checkpoint."""
    Settled(monkeypatch, NotTrained("train it first"))
    recipe = recipe_of(folder, "ffn_router", calibrate=calibrate)
    if calibrate is None:
        assert "skip_share" not in fields_of(recipe, tmp_path, [])
    else:
        with pytest.raises(NotTrained):
            fields_of(recipe, tmp_path, [])
    assert is_checkpoint(tmp_path)


def test_training_is_kept_where_measuring_shares_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is a checkpoint with the trained weights, and the stage counts as not done."""
    train = {"max_steps": 1, "lora": {"rank": 2}}
    runner = Runner(recipe_of(folder, "ffn_router", train=train), tmp_path / "out", say=lambda line: None)
    Settled(monkeypatch, UserError("the disk with the text is gone"))
    with pytest.raises(UserError, match="is gone"):
        runner.train()
    assert is_checkpoint(tmp_path / "out") and "train" in runner.missing
    assert any("lora_" in name for name, _ in anydepth.load(tmp_path / "out").named_parameters())


# --- drafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "wanted"), [({}, 7), ({"seed": 0}, 0)])
def test_the_seed_of_the_recipe_reaches_drafting(options: dict[str, int], wanted: int) -> None:
    """Unless drafting has one, even if it is the default."""
    assert train_stage._seeded(DraftConfig.model_validate(options), 7).seed == wanted


def test_drafting_is_part_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    """A recipe that trains nothing leaves one as well."""
    fields_of(recipe_of(folder, draft={"exit_layers": [2]}), tmp_path, [])
    draft = load_draft(str(tmp_path), anydepth.load(tmp_path))
    assert draft is not None and draft.config.exit_layers == [2]


# --- several processes -----------------------------------------------------------------------------------------------

PHASES = [{"name": "a", "train": ["ffn_router"], "max_steps": 1}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a drafter": ({"draft": {"network": {}}, "drafter": {}}, "false"),
    "phases with sharded weights": ({"train": {"lora": {}}, "phases": PHASES}, "true"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_trains_in_one_process_is_refused_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sections, sharded = REFUSED[name]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    monkeypatch.setattr(Inputs, "base", None)
    with pytest.raises(UserError, match="start fewer, or use DDP"):
        fields_of(recipe_of(folder, "ffn_router", **sections), tmp_path, [])
