"""Models with methods in place: what generation needs of their cache."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import anydepth
import families


@torch.no_grad()
def test_models_of_recurrent_layers_alone_generate_at_full_depth_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own cache cannot tell how long their sequence is."""
    config = families.CONFIGS["qwen3_next"]()
    config.layer_types = ["linear_attention"] * config.num_hidden_layers
    monkeypatch.setitem(families.CONFIGS, "qwen3_next", lambda: config)
    adapted = anydepth.attach(families.build("qwen3_next"), {"name": "skip_set", "skip_layers": [2]})
    for context in (adapted.disabled(), nullcontext()):
        ids = families.token_ids(batch_size=1)[:, :7]
        with context:
            said = adapted.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            for _ in range(5):
                following = adapted(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, following], dim=1)
        assert torch.equal(said, ids)
