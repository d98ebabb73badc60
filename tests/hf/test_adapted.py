"""Models with methods in place, used as transformers uses models: generation with a cache, its Trainer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

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


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 ties its head
@pytest.mark.parametrize("methods", [[{"name": "layer_router", "always_keep": 1}], [{"name": "ffn_router"}]])
def test_transformers_trainer_trains_it(methods: list[dict[str, Any]], family: str, tmp_path: Path) -> None:
    """C26: a stock Trainer finds the columns of its data in the signature, evaluates with their labels, and saves."""
    adapted = anydepth.attach(families.build(family), methods)
    adapted.backbone.model.requires_grad_(False)
    before = {name: part.clone() for name, part in adapted.named_parameters()}
    ids = families.token_ids(8, 12)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    labels = torch.where(mask.bool() & (mask.cumsum(1) > 1), ids, -100)  # none is predicted from padding
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels, "other": mask}
    columns["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)  # a column that the model's own forward has
    rows = [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    with torch.no_grad():
        positions = columns["position_ids"]
        output = adapted.eval()(ids, attention_mask=mask, position_ids=positions, labels=labels)
        if family == "llama":  # arguments come in the order of the model's own
            assert torch.equal(adapted(ids, mask, positions).logits, output.logits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    changed = {name for name, part in adapted.named_parameters() if not torch.equal(part, before[name])}
    assert changed and all(name.startswith("methods.") for name in changed)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(saved[name], part) for name, part in adapted.state_dict().items())


def test_a_state_dict_is_the_weights_themselves() -> None:
    """C26, sharded models: only the second name of a tied weight has a copy, whatever the tensors' addresses are."""
    for family, num_copies in (("llama", 0), ("gpt2", 1)):
        adapted = anydepth.attach(families.build(family), {"name": "ffn_router"})
        state = adapted.state_dict(prefix="outer.")
        own = dict(adapted.named_parameters(remove_duplicate=False))
        copies = [name for name in own if state[f"outer.{name}"].data_ptr() != own[name].data_ptr()]
        assert len(copies) == num_copies
