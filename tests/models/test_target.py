"""Targets: what each form is, and one line for what is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import anydepth
import hub_cache
from anydepth.errors import UserError
from anydepth.models import target
from anydepth.models.load import load_model
from anydepth.models.target import (
    ADAPTER_FILES,
    Target,
    find_target,
    forget_snapshots,
    gguf_of,
    is_local,
    local_folder,
    split_revision,
)
from anydepth.training.checkpoint import is_checkpoint, load_target, run_options
from tiny import byte_tokenizer, save_base, save_gguf


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return hub_cache.use(monkeypatch, tmp_path / "hub")


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("notes.txt", b"To do\nmilk\n", r"notes.txt is not a model \(it begins with 'To do'\); give 'embedded', a hub"),
        ("empty", b"", r"empty is not a model \(it is no GGUF\); give 'embedded'"),
        ("noise", bytes(range(128, 200)), "noise is not a model"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "is one file of weights; give the folder that holds it"),
        (
            "page.gguf",
            b"<!doctype html>\n<html>",
            "page.gguf is not a GGUF file .* '<!doctype html>'.*: fetch it again",
        ),
        ("lfs.gguf", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS.*git lfs pull"),
    ],
)
def test_files_that_are_no_models(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        find_target(str(tmp_path / name))
    refusal(tmp_path / name)


def test_files_of_the_system_are_no_models() -> None:
    assert "/etc/passwd is not a model (it begins with 'root" in refusal("/etc/passwd")
    assert "/dev/null is not a model" in refusal("/dev/null")


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty (no config.json); give a folder that save_pretrained wrote" in refusal(tmp_path / "empty")
    save_base(tmp_path / "above" / "base")
    assert f"holds no config.json, but {tmp_path / 'above' / 'base'} does; give that one" in refusal(tmp_path / "above")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    assert "holds 2 .gguf models; give one of them, such as" in refusal(tmp_path)
    saved = anydepth.save(anydepth.attach(load_model(str(tmp_path / "above" / "base"))[0], []), tmp_path / "saved")
    assert "is a checkpoint of anydepth" in refusal(saved)


def test_a_folder_with_pickles_or_without_a_tokenizer(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "as pickles (pytorch_model.bin), which can run any code when they are read; give the" in refusal(base)
    (base / "pytorch_model.bin").rename(base / "model.safetensors")
    for path in base.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer (tokenizer.json); copy that of the model into it" in refusal(base)


def test_a_folder_with_one_gguf_and_a_gguf_by_any_name(tmp_path: Path) -> None:
    """Other programs keep .gguf files under their hash."""
    save_gguf(tmp_path / "model.gguf")
    path = (tmp_path / "model.gguf").rename(tmp_path / "sha256-abc")
    assert gguf_of(str(path)) == path
    (tmp_path / "folder").mkdir()
    moved = path.rename(tmp_path / "folder" / "only.gguf")
    assert find_target(str(tmp_path / "folder")) == Target(str(tmp_path / "folder"), gguf=moved)


def test_names_of_the_hub() -> None:
    assert split_revision("user/model@v1.0") == ("user/model", "v1.0")
    assert split_revision("gpt2") == ("gpt2", None)
    assert not is_local("user/model@refs/pr/1") and is_local("a/b/c") and is_local("./model@v1")
    with pytest.raises(UserError, match="names no revision"):
        split_revision("user/model@")


@torch.no_grad()
def test_a_revision_of_a_model_in_the_hub_cache(hub: Path, tmp_path: Path) -> None:
    for seed, revision, commit in ((0, "main", "a" * 40), (1, "v2", "b" * 40)):
        hub_cache.add(hub, "user/model", save_base(tmp_path / revision, seed), revision, commit)
    ids = torch.arange(3, 20)[None]
    for name, folder in (("user/model", "main"), ("user/model@v2", "v2"), (f"user/model@{'b' * 40}", "v2")):
        model, _ = load_model(name)
        assert torch.equal(model(ids).logits, load_model(str(tmp_path / folder))[0](ids).logits)
        assert model.name_or_path == name
    again = anydepth.load(anydepth.save(anydepth.attach(load_model("user/model@v2")[0], []), tmp_path / "saved"))
    assert torch.equal(again(input_ids=ids).logits, load_model(str(tmp_path / "v2"))[0](ids).logits)
    assert "there is no folder 'user/model@v3', and no such model in the hub cache" in refusal("user/model@v3")
    assert "no folder 'user/other'" in refusal("user/other")


@torch.no_grad()
def test_an_adapter_of_the_hub_finds_its_base_there(hub: Path, tmp_path: Path) -> None:
    hub_cache.add(hub, "user/base", save_base(tmp_path / "base"))
    base = LlamaForCausalLM.from_pretrained("user/base")
    wrapped = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))  # type: ignore[arg-type]
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    snapshot = hub_cache.add(hub, "user/adapter", tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    adapted, tokenizer = load_target("user/adapter")
    assert torch.equal(adapted(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits)
    assert len(tokenizer) == len(byte_tokenizer()) and find_target("user/adapter").adapter == snapshot


def test_a_checkpoint_of_the_hub_is_a_target_of_every_command(hub: Path, tmp_path: Path) -> None:
    hub_cache.add(hub, "user/base", save_base(tmp_path / "base"))
    adapted = anydepth.attach(load_model("user/base")[0], anydepth.SkipSet.Config(skip_layers=[2]))
    anydepth.save(adapted, tmp_path / "saved", run={"engine": "hf"})
    snapshot = hub_cache.add(hub, "user/router", tmp_path / "saved")
    assert is_checkpoint("user/router") and local_folder("user/router") == snapshot
    assert run_options("user/router")["engine"] == "hf"
    again = anydepth.load("user/router")
    assert list(again.methods) == ["skip_set"] and again.methods["skip_set"].config.skip_layers == [2]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="user/base has no anydepth checkpoint.*or the hub name of one"):
        anydepth.load("user/base")


def test_a_gguf_file_of_the_hub_is_named_by_its_end(hub: Path, tmp_path: Path) -> None:
    """Repositories of GGUF files hold one model in several kinds, some in parts, with or without a config."""
    (tmp_path / "one").mkdir()
    save_gguf(tmp_path / "one" / "sea-Q8_0.gguf")
    snapshot = hub_cache.add(hub, "user/one-GGUF", tmp_path / "one")
    assert find_target("user/one-GGUF").gguf == snapshot / "sea-Q8_0.gguf" == gguf_of("user/one-GGUF:q8_0")
    model, _ = load_model("user/one-GGUF")
    assert model.name_or_path == "user/one-GGUF"
    for name in ("sea-Q4_0", "sky-Q8_0-00001-of-00002", "sky-Q8_0-00002-of-00002"):
        shutil.copy(snapshot / "sea-Q8_0.gguf", tmp_path / "one" / f"{name}.gguf")
    snapshot = hub_cache.add(hub, "user/many-GGUF", tmp_path / "one")
    assert gguf_of("user/many-GGUF:Q4_0") == snapshot / "sea-Q4_0.gguf"
    assert gguf_of("user/many-GGUF:sky-Q8_0") == snapshot / "sky-Q8_0-00001-of-00002.gguf"
    for name, count in (("", 3), (":Q8_0", 2), (":Q5_K", 0)):
        with pytest.raises(UserError, match=f"fits {count} of the 3 .gguf models there; .*user/many-GGUF:sea-Q4_0"):
            find_target(f"user/many-GGUF{name}")
    shutil.copy(snapshot / "sea-Q4_0.gguf", snapshot / "mmproj-sea-Q4_0.gguf")
    (snapshot / "sky-Q8_0-00002-of-00002.gguf").unlink()  # as after a fetch that was interrupted
    forget_snapshots()
    assert gguf_of("user/many-GGUF:sea-Q4_0") == snapshot / "sea-Q4_0.gguf"
    with pytest.raises(UserError, match="fits 0 of the 3"):
        find_target("user/many-GGUF:sky-Q8_0")
    (snapshot / "mmproj-sea-Q4_0.gguf").unlink()
    (snapshot / "config.json").write_text("{}")
    forget_snapshots()
    assert gguf_of("user/many-GGUF") is None  # a model of transformers, unless a file is named
    assert gguf_of("user/many-GGUF:Q4_0") == snapshot / "sea-Q4_0.gguf"
    with pytest.raises(UserError, match="no .gguf files of user/none are known"):
        find_target("user/none:Q4_0")


@pytest.mark.parametrize(("files", "patterns"), [(["anydepth.json"], None), (["adapter_config.json"], ADAPTER_FILES)])
def test_a_repository_that_is_not_cached_is_fetched_as_what_it_is(
    files: list[str], patterns: list[str] | None, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetched(name: str, revision: str | None, allow_patterns: list[str] | None) -> str:
        asked.append((name, revision, allow_patterns))
        return str(hub)

    def info(name: str, revision: str | None, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    monkeypatch.setattr(target.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(target, "HfApi", lambda: SimpleNamespace(model_info=info))
    monkeypatch.setattr(target, "snapshot_download", fetched)
    assert local_folder("user/new@v2") == local_folder("user/new@v2") == hub
    assert asked == [("user/new", "v2", patterns)]


def test_a_hub_that_does_not_answer_is_left_to_the_loader(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(target.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(target, "HfApi", lambda: SimpleNamespace(model_info=fail))
    assert local_folder("user/new") == Path("user/new") and not is_checkpoint("user/new")
