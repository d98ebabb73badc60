"""Train a token router next to LoRA in a loop of your own, save it, and see which layers a text runs.

python examples/train_a_router.py [TARGET] [STEPS]
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

import anydepth

target = sys.argv[1] if len(sys.argv) > 1 else "embedded"
num_steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
model, tokenizer = anydepth.load_model(target, dtype="float32")
for parameter in model.parameters():
    parameter.requires_grad_(False)
adapted = anydepth.attach(model, anydepth.LayerRouter.Config(always_keep=2, target_skip=0.3)).train()
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
text = "The sea is wide, and the night is long, but the light comes back. " * 40
ids = torch.tensor(tokenizer(text)["input_ids"])[:512].view(4, -1)
for step in range(num_steps):
    logits = adapted(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    terms = adapted.auxiliary_losses()  # keeps the fraction of skipped layers at its target
    (loss + sum(terms.values())).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}, depth {adapted.last_trace.mean_depth:.1f}")
anydepth.save(adapted.eval(), "router", base=target)
again = anydepth.load("router")
again.generate(**tokenizer("The sea is", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(f"{again.last_trace.mean_depth:.1f} of {again.backbone.num_layers} layers a token")
