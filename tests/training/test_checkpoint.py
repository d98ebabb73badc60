"""Checkpoints: bitwise back, nothing of the backbone in them, refused when damaged or made for another base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import anydepth
from anydepth.errors import UserError
from anydepth.recipe import TrainConfig
from anydepth.training import checkpoint
from anydepth.training.checkpoint import load_draft, load_target
from anydepth.training.train import prepare
from tiny import save_base, tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 2, "initial_bias": 0.5}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def saved(tmp_path: Path, base: Path) -> Path:
    model, _ = anydepth.load_model(str(base))
    config = TrainConfig.model_validate({"lora": {"rank": 2}})
    adapted = anydepth.attach(prepare(model, config), ROUTER)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or name.startswith("methods."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    folder = anydepth.save(adapted, tmp_path / "saved")
    torch.save({name: value.clone() for name, value in adapted.state_dict().items()}, tmp_path / "state.pt")
    return folder


def weights_of(folder: Path) -> Path:
    return folder / json.loads((folder / "anydepth.json").read_text())["weights"]


def test_everything_comes_back_bitwise(saved: Path) -> None:
    adapted = anydepth.load(saved)
    for name, value in torch.load(saved.parent / "state.pt").items():
        assert torch.equal(adapted.state_dict()[name], value), name


def test_no_tensor_of_the_backbone_is_saved(saved: Path) -> None:
    files = list(weights_of(saved).rglob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                assert "lora_" in name or name.startswith("layer_router."), name


def test_a_base_that_was_trained_is_part_of_the_checkpoint(tmp_path: Path, base: Path) -> None:
    model, tokenizer = anydepth.load_model(str(base))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    folder = anydepth.save(anydepth.attach(model, ROUTER), tmp_path / "saved", own_base=tokenizer)
    moved = folder.rename(tmp_path / "moved")
    adapted = anydepth.load(moved)
    for name, value in model.state_dict().items():
        assert torch.equal(adapted.model.state_dict()[name], value), name
    plain, _ = anydepth.load_model(str(weights_of(moved) / "base"))  # and a Hugging Face checkpoint of its own
    ids = torch.arange(1, 9)[None]
    with adapted.disabled():
        assert torch.equal(plain(ids).logits, adapted(ids).logits)


def test_saving_again_leaves_one_set_of_weights(saved: Path) -> None:
    anydepth.save(anydepth.load(saved), saved)
    assert len(list(saved.glob("weights-*"))) == 1
    assert not list(saved.glob(".staging*"))


@pytest.mark.parametrize("name", ["methods.safetensors", "adapter/adapter_model.safetensors"])
def test_a_truncated_file_is_refused(saved: Path, name: str) -> None:
    path = weights_of(saved) / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        anydepth.load(saved)


def test_a_missing_file_is_refused(saved: Path) -> None:
    (weights_of(saved) / "methods.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        anydepth.load(saved)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema": "anydepth.checkpoint/1"}',
        '{"schema": 3}',
        '{"weights": "w", "files": [1], "methods": [], "base": {"fingerprint": ""}}',
        '{"weights": "w", "files": {}, "methods": [3], "base": {"fingerprint": ""}}',
        '{"weights": "w", "files": {}, "methods": [], "adapters": 3, "base": {"fingerprint": ""}}',
    ],
)
def test_a_damaged_manifest_is_refused(saved: Path, text: str) -> None:
    (saved / "anydepth.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        anydepth.load(saved)


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no anydepth checkpoint"):
        anydepth.load(tmp_path)


def test_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="weights differ"):
        anydepth.load(saved, base=str(other))


def test_a_missing_base_is_refused(saved: Path, base: Path) -> None:
    base.rename(base.with_name("moved"))
    with pytest.raises(UserError, match=f"there is no {base}; put it back"):
        anydepth.load(saved)
    assert anydepth.load(saved, base=str(base.with_name("moved"))).methods


def test_a_base_given_by_a_relative_path_is_found_from_everywhere(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = anydepth.load_model("base")
    anydepth.save(anydepth.attach(model, ROUTER), "mine")
    monkeypatch.chdir("/")
    assert anydepth.load(tmp_path / "mine").attached
    (tmp_path / "moved").mkdir()
    for name in ("base", "mine"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert anydepth.load(tmp_path / "moved" / "mine").attached
    (tmp_path / "moved" / "base").rename(tmp_path / "other")
    with pytest.raises(UserError, match=f"there is no {base} nor {tmp_path / 'moved' / 'base'}; put it back"):
        anydepth.load(tmp_path / "moved" / "mine")


def test_saving_a_skip_set_needs_no_tensors(tmp_path: Path) -> None:
    adapted = anydepth.attach(tiny_llama(), anydepth.SkipSet.Config(skip_layers=[3]))
    folder = anydepth.save(adapted, tmp_path / "set", base=str(save_base(tmp_path / "base")))
    assert anydepth.load(folder).methods["skip_set"].config.skip_layers == [3]


# --- drafting --------------------------------------------------------------------------------------------------------


def test_a_draft_comes_back_with_its_network(tmp_path: Path, base: Path) -> None:
    model, _ = anydepth.load_model(str(base), dtype="float32")
    adapted = anydepth.attach(model, {"name": "skip_set", "skip_layers": [2]})
    draft = anydepth.Draft(adapted, {"exit_layers": [1], "network": {"taps": [2, 6], "vocabulary_size": 50}, "seed": 3})
    anydepth.save(adapted, tmp_path / "own", base=str(base), draft=draft)
    target = str(tmp_path / "own")
    again, _ = load_target(target)
    found = load_draft(target, again)
    assert found is not None and found.config == draft.config and list(again.methods) == ["skip_set"]
    for name, value in draft.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    other = load_draft(target, again, options={"lookup": False})
    assert other is not None and other.config == draft.config.model_copy(update={"lookup": False})
    with pytest.raises(UserError, match="weights of another shape"):
        load_draft(target, again, options={"network": {"taps": [6], "vocabulary_size": 50}})
    assert load_draft(str(base), again) is None and load_draft(str(base), again, lossless=True) is not None


def test_checkpoints_from_when_drafting_was_a_method(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The method's options are the draft's, its weights the network's, and one line says so."""
    model, _ = anydepth.load_model(str(base), dtype="float32")
    adapted = anydepth.attach(model, {"name": "skip_set", "skip_layers": [2]})
    draft = anydepth.Draft(adapted, {"network": {"taps": [2, 6], "vocabulary_size": 50}})
    folder = anydepth.save(adapted, tmp_path / "own", base=str(base), draft=draft)
    manifest = json.loads((folder / "anydepth.json").read_text())
    weights = folder / manifest["weights"]
    (weights / "draft.safetensors").unlink()
    save_file(
        {f"self_speculation.{name}": value.contiguous() for name, value in draft.state_dict().items()},
        weights / "methods.safetensors",
    )
    files = {name: hashlib.sha256((weights / name).read_bytes()).hexdigest() for name in ("methods.safetensors",)}
    manifest["methods"].insert(0, {"name": "self_speculation", **manifest.pop("run")["draft"]})
    (folder / "anydepth.json").write_text(json.dumps({**manifest, "files": files}))
    again, _ = load_target(str(folder))
    found = load_draft(str(folder), again)
    assert list(again.methods) == ["skip_set"] and found is not None and found.config == draft.config
    assert all(torch.equal(found.state_dict()[name], value) for name, value in draft.state_dict().items())
    assert "write draft:" in caplog.text


def test_an_option_of_draft_keeps_the_drafter_of_the_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--lossless --set draft.exit_layers=[2]` lost the trained network."""
    model, _ = anydepth.load_model(str(base))
    adapted = anydepth.attach(model, [])
    shipped = anydepth.Draft(adapted, {"network": {"taps": [4, 6], "vocabulary_size": 64}, "seed": 3})
    monkeypatch.setattr(checkpoint, "default_draft", lambda adapted: shipped)
    draft = checkpoint.load_draft(str(base), adapted, lossless=True, options={"exit_layers": [2]})
    assert draft is not None and draft.config.exit_layers == [2] and draft.config.network == shipped.config.network
    weights = draft.state_dict()
    assert weights and all(torch.equal(weights[name], value) for name, value in shipped.state_dict().items())
    assert checkpoint.load_draft(str(base), adapted, options={"exit_layers": [2]}).config.network is None  # type: ignore[union-attr]
