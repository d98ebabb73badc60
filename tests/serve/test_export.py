"""Plain checkpoints say what the adapted model says, in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import anydepth
import families
from anydepth.errors import RunError, UserError
from anydepth.recipe import TrainConfig
from anydepth.serve import export as exporting
from anydepth.serve.export import export
from anydepth.training.train import prepare
from commands import anydepth as anydepth_command
from tiny import byte_tokenizer, save_base, tiny_llama

SKIPS = {"name": "skip_set", "skip_layers": [2, 4]}


@torch.no_grad()
def test_a_skip_set_is_a_shorter_model(family: str, tmp_path: Path) -> None:
    adapted = anydepth.attach(families.build(family), SKIPS)
    if family.startswith("gemma4"):
        with pytest.raises(UserError, match="widths or K/V by their index"):
            export(adapted, byte_tokenizer(), "static", tmp_path / "out")
        return
    fields = export(adapted, byte_tokenizer(), "static", tmp_path / "out")
    ids = families.token_ids()
    wanted = adapted(input_ids=ids, use_cache=False).logits
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.num_hidden_layers == 3 and fields["layers"] == [0, 1, 3]
    assert (stock(ids).logits - wanted).norm() <= 1e-5 * wanted.norm()
    text = stock.generate(ids[:1, :9], max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(text, adapted.generate(ids[:1, :9], max_new_tokens=9, do_sample=False, pad_token_id=0))


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_nth_layer_with_experts_becomes_a_list(step: int, tmp_path: Path) -> None:
    """C11: `decoder_sparse_step` counts layers of the whole model."""
    config = families.CONFIGS["qwen3_next"]()
    config.decoder_sparse_step = step
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    adapted = anydepth.attach(model, {"name": "skip_set", "skip_layers": [0, 2]})
    export(adapted, byte_tokenizer(), "static", tmp_path / "out")
    ids = families.token_ids()
    wanted = adapted(input_ids=ids, use_cache=False).logits
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits - wanted).norm() <= 1e-5 * wanted.norm()


def test_an_export_of_recurrent_layers_alone_is_refused(tmp_path: Path) -> None:
    """C11: transformers' cache cannot tell the length of such a model."""
    adapted = anydepth.attach(families.build("qwen3_next"), {"name": "skip_set", "skip_layers": [1, 3]})
    with pytest.raises(UserError, match="softmax attention"):
        export(adapted, byte_tokenizer(), "static", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_first_layers_without_experts_are_counted_anew(tmp_path: Path) -> None:
    adapted = anydepth.attach(families.build("deepseek_v3"), {"name": "skip_set", "skip_layers": [0, 2]})
    export(adapted, byte_tokenizer(), "static", tmp_path / "out")
    ids = families.token_ids()
    wanted = adapted(input_ids=ids, use_cache=False).logits
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits - wanted).norm() <= 1e-5 * wanted.norm()


def test_another_rule_by_index_is_refused_in_one_line(tmp_path: Path) -> None:
    adapted = anydepth.attach(families.build("ernie4_5_moe"), {"name": "skip_set", "skip_layers": [0]})
    with pytest.raises(UserError, match="ernie4_5_moe decides by a layer's index") as error:
        export(adapted, byte_tokenizer(), "static", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_lists_that_are_not_per_layer_are_left_alone(family: str) -> None:
    """C11: three end tokens of a model that happens to have as many layers stay three."""
    config = families.CONFIGS[family]()
    num_layers = config.num_hidden_layers
    config.eos_token_id = list(range(num_layers))
    config.architectures = ["Some"] * num_layers
    kept = [0, 1, 3]
    if family.startswith("gemma4"):
        with pytest.raises(UserError, match="widths or K/V by their index"):
            exporting.shortened(config, kept)
        return
    short = exporting.shortened(config, kept)
    assert short.eos_token_id == config.eos_token_id and short.architectures == config.architectures
    for name in ("layer_types", "no_rope_layers"):
        whole = getattr(config, name, None)
        assert getattr(short, name, None) == (None if whole is None else [whole[layer_idx] for layer_idx in kept])
    assert short.num_hidden_layers == 3 and config.num_hidden_layers == num_layers


def test_an_export_builds_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C11: the comparison runs without gradients."""
    seen, own = [], exporting._logits_of
    monkeypatch.setattr(exporting, "_logits_of", lambda *arguments: seen.append(own(*arguments)) or seen[0])
    export(anydepth.attach(tiny_llama(), SKIPS), byte_tokenizer(), "static", tmp_path / "out")
    assert not seen[0].requires_grad


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # PEFT, as the adapter is made
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj"]])
@pytest.mark.parametrize("kind", ["merged", "static"])
def test_an_adapter_on_a_tied_model_is_exported_as_it_computes(kind: str, targets: list[str], tmp_path: Path) -> None:
    """C5: the head and the embedding are no longer tied where the adapter made them differ."""
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "tie_word_embeddings": True})
    torch.manual_seed(0)
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=targets)
    wrapped = get_peft_model(LlamaForCausalLM(config), lora)  # type: ignore[arg-type]
    adapted = anydepth.attach(wrapped.eval(), [] if kind == "merged" else SKIPS)
    ids = torch.arange(3, 33)[None]
    wanted = adapted(input_ids=ids, use_cache=False).logits
    export(adapted, byte_tokenizer(), kind, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (stock(ids).logits - wanted).norm() <= 1e-5 * wanted.norm()
    assert stock.config.tie_word_embeddings == (targets == ["q_proj"])
    assert config.tie_word_embeddings, "the model itself stays as it is"


@torch.no_grad()
def test_a_draft_is_the_first_layers(tmp_path: Path) -> None:
    model = tiny_llama()
    adapted = anydepth.attach(model, [])
    export(adapted, byte_tokenizer(), "draft", tmp_path / "draft", exit_layer=4)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    ids = torch.arange(3, 33)[None]
    anydepth.detach(adapted)
    states: list[torch.Tensor] = []
    model.model.layers[3].register_forward_hook(lambda *parts: states.append(parts[-1]))
    model(ids)
    wanted = model.lm_head(model.model.norm(states[0]))
    assert torch.allclose(draft(ids).logits, wanted, atol=1e-4)
    # stock transformers takes it as an assistant
    text = model.generate(ids, assistant_model=draft, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(text, model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0))


@torch.no_grad()
def test_merged_is_the_model_with_its_adapter(tmp_path: Path) -> None:
    model = prepare(tiny_llama(), TrainConfig.model_validate({"lora": {"rank": 2}}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 33)[None]
    wanted = model(input_ids=ids).logits
    adapted = anydepth.attach(model.merge_and_unload(), [])  # type: ignore[operator]
    export(adapted, byte_tokenizer(), "merged", tmp_path / "merged")
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (logits - wanted).norm() <= 5e-5 * wanted.norm()  # a sum of weights rounds otherwise than a sum of outputs


@pytest.mark.parametrize(
    ("methods", "kind", "options", "complaint"),
    [
        ([], "static", {}, "no layer is left out"),
        (["layer_router"], "static", {}, "not a fixed set"),
        ([{"name": "skip_set", "skip_mixers": [1]}], "static", {}, "whole layers"),
        ([], "draft", {}, "give --exit-layer"),
        ([], "draft", {"exit_layer": 9}, "from 1 to 6; got 9"),
        ([SKIPS], "merged", {}, "skip_set skips work"),
        ([], "onnx", {}, "static, draft, merged"),
    ],
)
def test_targets_that_no_plain_checkpoint_can_hold(
    methods: list[Any], kind: str, options: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    specs = [{"name": spec} if isinstance(spec, str) else spec for spec in methods]
    adapted = anydepth.attach(tiny_llama(), specs)
    with pytest.raises(UserError, match=complaint):
        export(adapted, byte_tokenizer(), kind, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_other_logits_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_logits_of", lambda *_: torch.ones(2, 48, 257))
    adapted = anydepth.attach(tiny_llama(), SKIPS)
    with pytest.raises(RunError, match="differ by"):
        export(adapted, byte_tokenizer(), "static", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_refuses_to_write_twice(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    command = ["export", base, "--as", "draft", "--exit-layer", 2, "--out", tmp_path / "draft", "--json", "--quiet"]
    done = anydepth_command(*command)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.export/1" and document["layers"] == [0, 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "draft")("a")["input_ids"]
    again = anydepth_command(*command)
    assert again.returncode == 2 and "is not empty" in again.stderr
