"""Weights read through PEFT's wrappers are what PEFT's own forward uses: on the engine, folded, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import anydepth
import families
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.models.backbone import Backbone
from anydepth.models.load import base_fingerprint
from anydepth.models.plain import fold_adapters, plain_state
from anydepth.speculation.trained_drafter import DraftNetwork
from tiny import byte_tokenizer, save_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of tied models


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=list(targets), **options)


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora on the head": lambda: lora("o_proj", "lm_head"),
    "lora on the embedding": lambda: lora("o_proj", "embed_tokens"),
    "lora on both": lambda: lora("embed_tokens", "lm_head"),
    "lora on both, tied": lambda: lora("embed_tokens", "lm_head", ensure_weight_tying=True),
    "dora": lambda: lora("o_proj", "lm_head", use_dora=True),
    "rslora": lambda: lora("down_proj", "lm_head", use_rslora=True),
    "a head of its own": lambda: lora("o_proj", modules_to_save=["lm_head"]),
    "an embedding of its own": lambda: lora("o_proj", modules_to_save=["embed_tokens"]),
    "norms of their own": lambda: lora("o_proj", modules_to_save=["norm", "post_attention_layernorm"]),
    "ffn of its own": lambda: lora("o_proj", modules_to_save=["layers.1.mlp"]),
    "attention of its own": lambda: lora("down_proj", modules_to_save=["layers.1.self_attn"]),
    "some tokens": lambda: lora("o_proj", trainable_token_indices={"embed_tokens": [3, 5]}),
    "ia3": lambda: peft.IA3Config(
        target_modules=["o_proj", "down_proj", "lm_head"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=["down_proj", "lm_head"], init_weights=False),
    "norm tuning": lambda: peft.LNTuningConfig(target_modules=["norm", "post_attention_layernorm"]),
}
FAMILIES = {"llama": False, "gemma2": True, "phi3": True, "olmo2": False, "gemma3_text": True}
"""Families, and whether the head is tied to the embedding."""


def base(family: str, *, tied: bool) -> PreTrainedModel:
    """A model of the family with a head of its own, or the embedding as its head."""
    model = families.build(family)
    model.config.tie_word_embeddings = tied
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


@torch.no_grad()
def learnt(model: PreTrainedModel, config: peft.PeftConfig) -> peft.PeftModel:
    """An adapter on the model, every weight of it away from where it began."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


def difference(ours: Tensor, wanted: Tensor) -> float:
    return ((ours - wanted).norm() / wanted.norm()).item()


CASES = [("llama", tied, name) for tied in (False, True) for name in CONFIGS] + [
    (family, tied, name)
    for family, tied in FAMILIES.items()
    for name in ("lora on the head", "lora on the embedding", "norms of their own", "norm tuning")
    if family != "llama"
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "tied", "name"), CASES)
def test_the_engine_computes_what_peft_computes(family: str, tied: bool, name: str) -> None:
    """C1: every module with a wrapper around its weight, on tied and untied models."""
    ids = families.token_ids(1, 24)
    model = base(family, tied=tied)
    before = model(ids).logits
    wrapped = learnt(model, CONFIGS[name]())
    wanted = wrapped(input_ids=ids).logits
    assert difference(before, wanted) > 1e-2, "the adapter does something"
    engine = anydepth.FastEngine(anydepth.attach(wrapped, []))
    assert difference(engine.logits(ids[0]), wanted[0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_folded_is_what_peft_computes(name: str, tied: bool, tmp_path: Path) -> None:
    """C5: folding into a tied model unties what differs, also in what is saved."""
    ids = families.token_ids(1, 24)
    model = base("llama", tied=tied)
    wrapped = learnt(model, CONFIGS[name]())
    wanted = wrapped(input_ids=ids).logits
    folded = fold_adapters(wrapped)
    assert folded is model and not any("base_layer" in part or "original" in part for part in folded.state_dict())
    assert difference(folded(ids).logits, wanted) <= 1e-5
    folded.save_pretrained(tmp_path)
    again = type(folded).from_pretrained(tmp_path)
    assert difference(again(ids).logits, wanted) <= 1e-5
    assert again.config.tie_word_embeddings == torch.equal(folded.lm_head.weight, folded.model.embed_tokens.weight)


@torch.no_grad()
@pytest.mark.parametrize("name", ["two active", "off", "merged", "only one of two"])
def test_the_engine_reads_adapters_as_they_are_set(name: str) -> None:
    """C1: several active adapters, adapters that are off, and merged ones."""
    ids = families.token_ids(1, 24)
    wrapped = learnt(base("llama", tied=False), lora("q_proj", "lm_head"))
    wrapped.add_adapter("second", lora("q_proj", "lm_head", use_dora=name == "only one of two"))
    wrapped.base_model.set_adapter(["default", "second"] if name == "two active" else ["second"])
    if name == "merged":
        wrapped.merge_adapter()
    if name == "off":
        wrapped.base_model.disable_adapter_layers()
    wanted = wrapped(input_ids=ids).logits
    assert difference(anydepth.FastEngine(anydepth.attach(wrapped, [])).logits(ids[0]), wanted[0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora on the head", "a head of its own", "some tokens"])
def test_exits_over_a_part_of_the_vocabulary_read_the_adapter(name: str) -> None:
    """C1: the head's rows of some tokens are those of the whole head."""
    backbone = Backbone(learnt(base("llama", tied=True), CONFIGS[name]()))
    states, vocabulary = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4, 5, 90])
    assert difference(backbone.logits_of(states, vocabulary), backbone.logits_of(states)[:, vocabulary]) <= 1e-6


@torch.no_grad()
def test_a_draft_network_starts_from_layers_with_an_adapter() -> None:
    """C1: what is copied out of the model is what the model computes."""
    config = lora("q_proj", "down_proj", modules_to_save=["norm", "post_attention_layernorm"])
    wrapped = learnt(base("llama", tied=False), config)
    backbone = Backbone(wrapped)
    network = DraftNetwork(backbone, [2, 5], 64)
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    rotation = backbone.decoder.get_submodule("rotary_emb")(hidden, torch.arange(6)[None])
    outputs = [layer(hidden, position_embeddings=rotation) for layer in (network.layer, backbone.layers[-1].module)]
    assert difference(*outputs) <= 1e-5
    assert difference(network.norm(hidden), backbone.final_norm(hidden)) <= 1e-6
    assert not any("modules_to_save" in name for name in network.state_dict())


def test_counts_only_what_runs() -> None:
    """C1: a head that PEFT keeps twice runs once, and an adapter that is not active does not run."""
    plain = base("llama", tied=False)
    per_token = cost._linear_flops(plain.lm_head)
    wrapped = learnt(plain, lora("q_proj", modules_to_save=["lm_head"]))
    backbone = Backbone(wrapped)
    assert cost._linear_flops(backbone.head) == per_token
    query = backbone.layers[0].mixer.get_submodule("q_proj")
    one = cost._linear_flops(query)
    assert one == 2 * (32 * 32 + 4 * 32 + 4 * 32)
    wrapped.add_adapter("second", lora("q_proj"))
    assert cost._linear_flops(query) == one


@torch.no_grad()
def test_a_gate_on_the_model_does_not_travel_with_a_folded_copy() -> None:
    """The hooks of an attached head lead to the whole model."""
    wrapped = learnt(base("llama", tied=False), lora("lm_head"))
    adapted = anydepth.attach(wrapped, [])
    state = plain_state(adapted.backbone.model)
    assert set(state) == set(base("llama", tied=False).state_dict())


@torch.no_grad()
def test_what_cannot_be_folded_is_refused_in_one_line() -> None:
    """C1: a bias that only the adapter has fits into no weight of the base."""
    wrapped = learnt(base("llama", tied=False), lora("lm_head", lora_bias=True))
    with pytest.raises(UserError, match="cannot be folded into its weight") as caught:
        anydepth.FastEngine(anydepth.attach(wrapped, []))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_adapters_that_are_no_weights_are_refused(kind: type[peft.PromptLearningConfig]) -> None:
    """C1: tokens in front of the prompt, which the engine would not see."""
    model = peft.get_peft_model(base("llama", tied=False), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="such as LoRA"):
        anydepth.attach(model, [])


def test_adapters_that_act_by_position_are_refused() -> None:
    """C1: aLoRA counts tokens behind its invocation; a layer that runs for some tokens has others there."""
    model = peft.get_peft_model(
        base("llama", tied=False), peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    )
    with pytest.raises(UserError, match="aLoRA"):
        anydepth.attach(model, [])


SAVED = {
    **CONFIGS,
    "biases": lambda: lora("q_proj", bias="all"),
    "biases of adapted maps": lambda: lora("q_proj", "lm_head", bias="lora_only"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SAVED)
def test_adapters_of_every_kind_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """C8: the fingerprint of the base counts nothing that PEFT adds."""
    model = base("qwen2", tied=True)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer(families.VOCABULARY).save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    before = base_fingerprint(model)
    wrapped = learnt(model, SAVED[name]())
    if "biases" not in name:
        assert base_fingerprint(wrapped) == before
    adapted = anydepth.attach(wrapped, {"name": "layer_router", "always_keep": 2})
    folder = anydepth.save(adapted, tmp_path / "saved")
    again = anydepth.load(folder)
    ids = families.token_ids(1, 24)
    with adapted.disabled(), again.disabled():
        assert torch.equal(adapted(input_ids=ids).logits, again(input_ids=ids).logits)
    with adapted.disabled():
        wanted = adapted(input_ids=ids).logits
    merged, _ = anydepth.training.checkpoint.load_target(str(folder), merge=True)
    assert not isinstance(merged.model, peft.PeftModel)
    with merged.disabled():
        assert difference(merged(input_ids=ids).logits, wanted) <= 1e-5


@torch.no_grad()
def test_several_active_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    """C8: all that is active comes back, under its own name."""
    model, _ = anydepth.load_model(str(save_base(tmp_path / "base")))
    wrapped = peft.get_peft_model(model, lora("q_proj"), "first").eval()
    wrapped.add_adapter("second", lora("down_proj"))
    wrapped.base_model.set_adapter(["first", "second"])
    adapted = anydepth.attach(wrapped, [])
    again = anydepth.load(anydepth.save(adapted, tmp_path / "saved"))
    ids = torch.arange(3, 27)[None]
    assert torch.equal(adapted(input_ids=ids).logits, again(input_ids=ids).logits)


@torch.no_grad()
def test_an_adapter_without_a_wrapper_is_not_left_out_silently(tmp_path: Path) -> None:
    """C8: transformers can add an adapter itself; its weights would not be in the checkpoint."""
    model, _ = anydepth.load_model(str(save_base(tmp_path / "base")))
    model.add_adapter(lora("q_proj"))
    with pytest.raises(UserError, match="without a wrapper"):
        anydepth.save(anydepth.attach(model, []), tmp_path / "saved")
