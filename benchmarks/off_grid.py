"""Build SmolLM2 off the grid: a model of 16-bit weights that no 4-bit format holds exactly.

The embedded model was 4-bit before it was 16-bit, so that int4 gives its weights back. Here every linear layer gets
seeded uniform noise of half a step, what rounding took from it at most, and is then distilled from the original until
WikiText-2's perplexity is within 15% of it. Stopped and started again, it continues from the last evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import anydepth
from anydepth.models.blocks import BlockLinear
from anydepth.training.data import load_windows

SEED = 0
WITHIN = 1.15
WINDOW, WINDOWS_PER_STEP, EVERY, RATE = 512, 4, 25, 1e-4
MOST_STEPS = 2000
STATE, DONE = "training.pt", "off_grid.json"


def steps_of(module: BlockLinear) -> Tensor:
    """Return the (out, in) steps of Q4_1 blocks: 20 bytes of 32 weights, of which the first two are the step."""
    assert module.kind.name == "Q4_1", module.kind
    blocks = module.data.view(len(module.data), -1, 20)
    return blocks[:, :, :2].contiguous().view(torch.float16).float().expand(-1, -1, 32).flatten(1)


@torch.no_grad()
def noisy() -> Any:
    """Return the embedded model in float32 with noise of half a step on every linear layer."""
    blocks, _ = anydepth.load_model("embedded", native=True)
    model, _ = anydepth.load_model("embedded", dtype="float32")
    generator = torch.Generator().manual_seed(SEED)
    for name, module in blocks.named_modules():
        if isinstance(module, BlockLinear) and name != "lm_head":
            steps = steps_of(module)
            model.get_submodule(name).weight += (torch.rand(steps.shape, generator=generator) - 0.5) * steps
    return model


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    losses = [model(input_ids=one[None], labels=one[None]).loss.double() for one in windows]
    return float(torch.stack(losses).mean().exp())


def build(folder: Path) -> Path:
    """Build the model in a folder, unless it is there."""
    if (folder / DONE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    held_out = load_windows("wikitext-2:valid", tokenizer, WINDOW, max_windows=24)
    train = load_windows("wikitext-2:train", tokenizer, WINDOW, max_windows=MOST_STEPS * WINDOWS_PER_STEP)
    student, step, log = noisy(), 0, list[dict[str, float]]()
    wanted = WITHIN * perplexity(teacher, held_out)
    optimiser = torch.optim.AdamW(student.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    if (folder / STATE).exists():
        state = torch.load(folder / STATE, weights_only=True)
        student.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, log = state["step"], state["log"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
    while step < MOST_STEPS:
        if step % EVERY == 0 and (not log or log[-1]["step"] < step):
            log.append({"step": step, "perplexity": perplexity(student.eval(), held_out)})
            print(f"step {step}: perplexity {log[-1]['perplexity']:.2f}, wanted {wanted:.2f}", flush=True)
            part = folder / f"{STATE}.part"
            torch.save(
                {"model": student.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "log": log}, part
            )
            part.replace(folder / STATE)
            if log[-1]["perplexity"] <= wanted:
                break
        ids = train[order[(step * WINDOWS_PER_STEP + torch.arange(WINDOWS_PER_STEP)) % len(order)]]
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / EVERY, 1.0)
        for part in ids.split(1):  # one window at a time: the logits of four do not fit the caches
            with torch.no_grad():
                wished = teacher(input_ids=part).logits[0].float().log_softmax(-1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = student.train()(input_ids=part).logits[0]
            loss = F.kl_div(logits.float().log_softmax(-1), wished, reduction="batchmean", log_target=True)
            (loss / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
    student.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / DONE).write_text(json.dumps({"seed": SEED, "wanted": wanted, "log": log}, indent=2) + "\n")
    (folder / STATE).unlink(missing_ok=True)
    return folder
