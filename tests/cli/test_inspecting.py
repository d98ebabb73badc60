"""`inspect` on every form of target, what it says of memory, and options that commands do not use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

import anydepth
import hub_cache
from anydepth.cli.options import app
from anydepth.engine.backends.cpu.native import why_not
from anydepth.errors import UserError
from commands import refused
from tiny import byte_tokenizer, save_base, save_gguf, tiny_llama

MIB = 2**20
RUN = ("--device", "--dtype", "--threads")
needs_kernels = pytest.mark.skipif(
    why_not(torch.bfloat16, torch.device("cpu")) is not None, reason="no C++ compiler on this machine"
)


def inspected(target: Path | str, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["inspect", str(target), "--json", "--quiet", *options])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def save_adapter(folder: Path, base: str) -> Path:
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)  # type: ignore[arg-type]
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | str]:
    """A target of each form, by its name."""
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "cache"))
    hub = hub_cache.use(monkeypatch, tmp_path / "hub")
    base = save_base(tmp_path / "base")
    hub_cache.add(hub, "user/base", base, "v1")
    (hub / "models--user--base/refs/main").write_text(hub_cache.COMMIT)
    adapter = save_adapter(tmp_path / "adapter", "user/base")
    hub_cache.add(hub, "user/adapter", adapter)
    adapted = anydepth.attach(anydepth.load_model("user/base")[0], anydepth.SkipSet.Config(skip_layers=[2]))
    hub_cache.add(hub, "user/router", anydepth.save(adapted, tmp_path / "router"))
    save_gguf(tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "parts").mkdir()
    save_gguf(tmp_path / "parts" / "model.gguf", "Q4_0", parts_of=20)
    save_gguf(tmp_path / "other.gguf", "IQ4_NL")
    return {
        "folder": base,
        "hub name": "user/base",
        "revision": "user/base@v1",
        "adapter": adapter,
        "adapter of the hub": "user/adapter",
        "checkpoint": tmp_path / "router",
        "checkpoint of the hub": "user/router",
        "gguf": tmp_path / "model.gguf",
        "part": tmp_path / "parts" / "model-00002-of-00003.gguf",
        "parts": tmp_path / "parts",
        "other type": tmp_path / "other.gguf",
    }


def test_every_form_of_target_is_inspected(targets: dict[str, Path | str]) -> None:
    for name, target in targets.items():
        found = inspected(target)
        assert (found["family"], found["num_layers"]) == ("llama", 6), name
        assert found["attached"] == (["skip_set"] if "checkpoint" in name else []), name


@needs_kernels
def test_memory_of_a_gguf_file_as_it_runs_and_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is that of the file, without its tokenizer; the second that of transformers."""
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    model = save_gguf(path, "Q8_0", hidden_size=256)
    found = inspected(path)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert (found["num_parameters"], found["dtype"], found["in_blocks"]) == (size, "bfloat16", True)
    assert found["dense_bytes"] == 2 * size
    assert found["weight_bytes"] == pytest.approx(path.stat().st_size, rel=0.02)
    dense = inspected(path, "--dtype", "float32")
    assert (dense["in_blocks"], dense["weight_bytes"], dense["dense_bytes"]) == (False, 4 * size, 4 * size)
    said = CliRunner().invoke(app, ["inspect", str(path)]).stdout
    assert f"weights: {found['weight_bytes'] / MIB:.0f} MiB as they run, in the file's own blocks" in said
    assert f"{2 * size / MIB:.0f} MiB dense, in bfloat16" in said
    for layer, wanted in zip(found["layers"], dense["layers"], strict=True):
        assert layer["mixer_parameters"] == wanted["mixer_parameters"] and layer["ffn_flops"] == wanted["ffn_flops"]


def test_targets_that_are_refused_in_one_line(tmp_path: Path) -> None:
    save_gguf(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "cut.gguf").read_bytes()[:9000])
    (tmp_path / "empty").mkdir()
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path / "classifier")
    byte_tokenizer().save_pretrained(tmp_path / "classifier")
    for target, complaint in (
        ("/etc/passwd", "is not a model"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "cut.gguf", "damaged or incomplete: fetch or copy them again"),
        (tmp_path / "classifier", "no head that predicts tokens"),
        ("user/nowhere", "no such model in the hub cache"),
        ("user/base@", "names no revision"),
    ):
        assert complaint in refused("inspect", target)


@pytest.mark.parametrize(
    ("command", "unused"),
    [("cache", ("--seed", *RUN)), ("methods", ("--seed", *RUN)), ("conform", RUN)],
)
def test_commands_have_no_options_that_they_do_not_use(command: str, unused: tuple[str, ...]) -> None:
    said = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "--json" in said and not any(option in said for option in unused)


def test_a_hub_name_that_is_no_checkpoint_is_refused_by_name(targets: dict[str, Path | str]) -> None:
    with pytest.raises(UserError, match="user/base has no anydepth checkpoint"):
        anydepth.load("user/base")
    assert targets["hub name"] == "user/base"
