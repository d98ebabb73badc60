"""What a search measures: next tokens and influences next to stock transformers, and candidates as options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import anydepth
import families
from anydepth.search.problem import Problem, as_lists, influences, next_tokens
from tiny import tiny_llama, windows

IDS = windows(3, 40)


def test_candidates_are_sorted_options_of_a_skip_set() -> None:
    chosen = [("layer", 4), ("ffn", 2), ("layer", 0), ("ffn", 1)]
    assert as_lists(chosen) == {"skip_layers": [0, 4], "skip_mixers": [], "skip_ffns": [1, 2]}


@torch.no_grad()
def test_agreement_is_the_fraction_of_equal_next_tokens() -> None:
    """Of a model without two layers, which stock transformers runs, too."""
    wanted = tiny_llama()(IDS).logits.argmax(-1)
    cut = tiny_llama()
    cut.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(cut.model.layers) if i not in (1, 4))
    cut.config.num_hidden_layers = 4
    fraction = (cut(IDS, use_cache=False).logits.argmax(-1) == wanted).double().mean().item()
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set"})
    assert torch.equal(next_tokens(adapted, IDS), wanted)
    problem = Problem(adapted, IDS, [("layer", 1), ("layer", 4)], 2, wanted)
    assert problem.agreement(problem.candidates) == pytest.approx(fraction)
    assert 0 < fraction < 1 == problem.agreement([])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon"])
def test_influence_is_one_minus_cosine(family: str) -> None:
    """Of the states around a layer, with and without its mixer or FFN, at full depth; Falcon runs both in parallel."""
    model, names, ids = families.build(family), families.names_of(family), families.token_ids(3, 12)
    branches: dict[str, list[Tensor]] = {"mixer": [], "ffn": []}
    hooks = []
    for layer in model.get_submodule(names.layers).children():
        for kind, name in (("mixer", names.mixer_ends[0]), ("ffn", names.ffn_end)):

            def keep(_: Any, __: Any, output: Any, kind: str = kind) -> None:
                branches[kind].append((output[0] if isinstance(output, tuple) else output).clone())

            hooks.append(layer.get_submodule(name).register_forward_hook(keep))
    states = model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    measured = influences(anydepth.attach(model, {"name": "skip_set", "skip_layers": [2]}), ids)
    assert len(measured) == 15
    for layer_idx in range(4):  # the last recorded state has the final norm applied
        before, after = states[layer_idx], states[layer_idx + 1]
        mixed, without = before + branches["mixer"][layer_idx], after - branches["ffn"][layer_idx]
        for kind, old, new in (("layer", before, after), ("mixer", before, mixed), ("ffn", without, after)):
            wanted = 1 - F.cosine_similarity(old, new, dim=-1).mean().item()
            assert measured[kind, layer_idx] == pytest.approx(wanted, abs=1e-5), (kind, layer_idx)
