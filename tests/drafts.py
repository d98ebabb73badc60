"""Engines that draft, and self-generated text for trained drafters."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

import anydepth
from anydepth import Draft, FastEngine, HFEngine
from anydepth.decoding.engine import Engine
from anydepth.draft_sections import OwnTextConfig
from anydepth.speculation import self_generated
from anydepth.speculation.self_generated import Text, own_texts
from tiny import byte_tokenizer, tiny_llama

NETWORK = {"taps": [2, 6], "vocabulary_size": 100}
ALONE: dict[str, Any] = {"lookup": False, "adaptive": False, "max_draft": 4}
Spec = tuple[dict[str, Any], list[dict[str, Any]]]
"""Options of drafting, and methods that prune the model in drafts."""
DRAFTERS: dict[str, Spec] = {
    "lookup": ({}, []),
    "first layers": ({**ALONE, "exit_layers": 3}, []),
    "first layers, few tokens": ({**ALONE, "exit_layers": [3], "exit_vocabulary": 60}, []),
    "several exits": ({"exit_layers": [2, 4, 5]}, []),
    "skip set": (ALONE, [{"name": "skip_set", "skip_layers": [2, 4], "skip_ffns": [3]}]),
    "router, project": (ALONE, [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0}]),
    "router, omit": (ALONE, [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, "kv_rule": "omit"}]),
    "sequence router": (
        ALONE,
        [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, "granularity": "sequence", "pool_tokens": 5}],
    ),
    "mixer router": (
        ALONE,
        [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, "branch": "mixer", "reads": "sequential"}],
    ),
    "exits": (ALONE, [{"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.0}]),
    "exits, run later": (
        ALONE,
        [{"name": "early_exit", "layers": [2, 4], "thresholds": 0.1, "kv_rule": "recompute"}],
    ),
    "trained": ({**ALONE, "network": NETWORK}, []),
    "searched": ({**ALONE, "search": {"budget": 0.34, "every": 3, "window": 6}}, []),
    "searched by states": (
        {**ALONE, "search": {"strategy": "dynamic", "budget": 0.34, "every": 9, "window": 6}},
        [],
    ),
    "searched by time": (
        {**ALONE, "search": {"strategy": "knapsack", "budget": 0.34, "every": 9, "window": 6}},
        [],
    ),
    "everything": ({"exit_layers": [2], "network": NETWORK}, [{"name": "skip_set", "skip_layers": [2]}]),
}
ENGINES: dict[str, type[HFEngine] | type[FastEngine]] = {"hf": HFEngine, "fast": FastEngine}


def drafting(path: str, spec: str | Spec, model: PreTrainedModel | None = None) -> Engine:
    """Return an engine (`hf` or `fast`) that drafts by a spec, or by the one of that name."""
    options, methods = DRAFTERS[spec] if isinstance(spec, str) else spec
    adapted = anydepth.attach(tiny_llama() if model is None else model, methods).eval()
    return ENGINES[path](adapted, draft=Draft(adapted, options))


def prompts(num_rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Return prompts of different lengths, padded on the left; some repeat tokens, for prompt lookup."""
    ids = torch.randint(3, 100, (num_rows, 21), generator=torch.Generator().manual_seed(seed))
    ids[:, 12:18] = ids[:, 3:9]
    mask = torch.ones_like(ids)
    if num_rows > 1:
        mask[1, :7] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(engine: Engine, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Return tokens at full depth and drafted, from the same seed."""
    options = {"max_new_tokens": 30, "pad_token_id": 0, **options}
    torch.manual_seed(5)
    with engine.adapted.disabled():
        wanted = engine.generate(**batch, **options)
    torch.manual_seed(5)
    return wanted, engine.generate(**batch, **options)


SHORT = {"MAX_PROMPT": 6, "MAX_COMPLETION": 12, "NUM_TEXTS": 5}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def untrained_draft() -> Draft:
    """Return a draft with an untrained network alone."""
    network = {"taps": [2, 6], "vocabulary_size": 60}
    return Draft(anydepth.attach(tiny_llama(), []).eval(), {"lookup": False, "adaptive": False, "network": network})


def network_of(draft: Draft) -> Any:
    assert draft.network is not None
    return draft.network


def texts_of(folder: Path, *, chat: bool = True) -> list[Text]:
    tokenizer = byte_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT
    adapted = anydepth.attach(tiny_llama(), []).eval()
    with patch.multiple(self_generated, **SHORT):
        texts, seconds = own_texts(adapted, tokenizer, [2, 6], OwnTextConfig(num_tokens=1200), folder)
    assert seconds > 0
    return texts
