"""The structure of every family next to stock transformers: states, K/V, heads, logits, and models that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
from anydepth.errors import UserError
from anydepth.models.backbone import Backbone, RotarySwitch, recorded_inputs
from anydepth.models.families import FAMILIES, Family

NUM_KV_HEADS = {
    "gpt2": 4,
    "gpt_neox": 4,
    "gptj": 4,
    "opt": 4,
    "falcon_multi_query": 1,
    "deepseek_v2": 1,
    "deepseek_v3": 1,
}
"""Heads of keys and values where they are not two; compressed K/V are one."""
HEAD_DIM = {"deepseek_v2": 10, "deepseek_v3": 10}


def variant(family: str, **changes: Any) -> PreTrainedModel:
    """A model of the family with some options of its configuration changed before it is built."""
    config = families.CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def assert_states_are_those_of(model: PreTrainedModel) -> None:
    backbone, ids = Backbone(model), families.token_ids(2, 9)
    with backbone.layer_outputs() as outputs:
        wanted = model(ids, output_hidden_states=True)
    for layer_idx in range(4):  # the last state of transformers has the final norm applied
        assert torch.equal(outputs[layer_idx], wanted.hidden_states[layer_idx + 1])
    torch.testing.assert_close(backbone.logits_of(outputs[4]), wanted.logits)
    some = torch.tensor([3, 4, 90])
    torch.testing.assert_close(backbone.logits_of(outputs[4], some), wanted.logits[..., some])


def test_outputs_of_layers_and_their_logits_are_those_of_the_model(model: PreTrainedModel) -> None:
    """The cap on the logits of Gemma-2 included, and logits of a few tokens alone."""
    assert_states_are_those_of(model)


@pytest.mark.parametrize("change", [{"word_embed_proj_dim": 16}, {"_remove_final_layer_norm": True}])
def test_logits_of_opt_with_a_projection_or_without_the_last_norm(change: dict[str, Any]) -> None:
    assert_states_are_those_of(variant("opt", **change))


@torch.no_grad()
def test_projected_keys_and_values_are_those_of_the_models_cache(model: PreTrainedModel) -> None:
    """From the states that each layer reads; recurrent layers have none."""
    backbone = Backbone(model)
    softmax = [view for view in backbone.layers if not view.is_recurrent]
    with recorded_inputs(softmax) as records:
        cache = model(families.token_ids(2, 9), use_cache=True).past_key_values
    for view in [view for view in softmax if view.kv_source is None]:
        hidden, arguments = records[view.layer_idx]
        keys, values = view.project_kv(view.normalise(hidden), view.positions_of(arguments))
        torch.testing.assert_close(keys, cache.layers[view.layer_idx].keys)
        torch.testing.assert_close(values, cache.layers[view.layer_idx].values)


def test_heads_are_those_of_the_configuration(family: str, model: PreTrainedModel) -> None:
    for view in Backbone(model).layers:
        if not view.is_recurrent and not families.names_of(family).whole_layers:
            assert view.heads == (4, NUM_KV_HEADS.get(family, 2), HEAD_DIM.get(family, 8))
        if family.startswith("gemma4") and view.layer_idx == 1:  # full attention, of other widths
            assert view.heads == (4, 1 if family.endswith("moe") else 2, 16)


def test_recurrent_layers_are_those_with_linear_attention() -> None:
    model = families.build("qwen3_next")
    wanted = ["recurrent" if kind == "linear_attention" else "attention" for kind in model.config.layer_types]
    assert Backbone(model).layer_types() == wanted
    assert len(set(wanted)) == 2


# --- the check on attach ---------------------------------------------------------------------------------------------


def test_a_wrong_line_in_the_table_of_families_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the norm before K/V, which changes them."""
    monkeypatch.setitem(FAMILIES, "llama", Family(kv_norm=()))
    with pytest.raises(UserError, match="layer 0 of this llama model projects K/V differently"):
        Backbone(families.build("llama")).verify()


def test_the_check_restores_the_mode_of_every_module() -> None:
    model = families.build("llama").train()
    model.get_submodule("model.layers.2").eval()
    before = {name: module.training for name, module in model.named_modules()}
    Backbone(model).verify()
    assert {name: module.training for name, module in model.named_modules()} == before


# --- rotary embeddings that depend on the length ---------------------------------------------------------------------

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
SWITCHES: dict[str, tuple[str, dict[str, Any], RotarySwitch | None]] = {
    "one that does not": ("llama", {"rope_type": "default"}, None),
    "dynamic": ("llama", DYNAMIC, RotarySwitch(160, again=True, restarts=False)),
    "long": ("llama", LONG, RotarySwitch(24, again=False, restarts=False)),
    "Phi-3 reads again": ("phi3", LONG, RotarySwitch(24, again=False, restarts=True)),
    "the first of two kinds": (
        "gemma3_text",
        {"sliding_attention": DYNAMIC, "full_attention": LONG},
        RotarySwitch(24, again=False, restarts=False),
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_the_length_at_which_the_rotary_embedding_changes(name: str) -> None:
    family, parameters, wanted = SWITCHES[name]
    model = families.build(family)
    model.config.rope_parameters = parameters
    assert Backbone(model).rotary_switch == wanted


# --- models that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False, which .*norms after each branch"),
        ("falcon", {"alibi": True}, "alibi=True, which .*ALiBi positions"),
    ],
)
def test_variants_of_a_family_that_are_not_supported(family: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Backbone(variant(family, **change))


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = families.build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="'flash_attention_2' cannot run a part of the tokens"):
        Backbone(model)


def test_a_layer_that_lacks_a_branch_is_named() -> None:
    model = families.build("llama")
    del model.get_submodule("model.layers.1").mlp
    with pytest.raises(UserError, match=r"layer 1 \(LlamaDecoderLayer\) has none of mlp"):
        Backbone(model)
