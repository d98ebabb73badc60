"""Draft with a skip set, verify at full depth: the same text, and how much of each draft was right.

python examples/lossless.py [TARGET]
"""

from __future__ import annotations

import sys

import torch

import anydepth

model, tokenizer = anydepth.load_model(sys.argv[1] if len(sys.argv) > 1 else "embedded", dtype="bfloat16")
adapted = anydepth.attach(model, anydepth.SkipSet.Config(skip_layers=[2]))
engine = anydepth.FastEngine(adapted, draft=anydepth.Draft(adapted, {"lookup": True}))
prompt = tokenizer("The most important thing about the sea is", return_tensors="pt")
options = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
drafted = engine.generate(**prompt, **options)
with adapted.disabled():
    full_depth = engine.generate(**prompt, **options)
assert torch.equal(drafted, full_depth)
engine.generate(**prompt, **options)
print(tokenizer.decode(drafted[0]))
print(f"{engine.draft_counts.mean_acceptance_length:.2f} tokens per verification")
