"""Train a drafter on many more of a model's own tokens, on a GPU: `network.safetensors` and `train.json` in `--out`.

    python benchmarks/drafter_scale.py write --device cuda --seed 1 --out runs/scale/texts-1.safetensors
    python benchmarks/drafter_scale.py train --device cuda --texts runs/scale --out runs/scale/four
    python benchmarks/drafter_scale.py ship runs/scale/four smollm2-135m

The same texts, loss and network as `anydepth train recipes/drafter.yaml`, in the batches that a GPU needs: thousands of
texts written at a time by transformers' own `generate`, and the model's states computed anew in each step instead of
stored. `write` runs as several processes with a seed each. `train` takes as many steps as fit into the minutes, and
measures the drafter on texts that are left out of its training, next to the one in the package.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from ship_drafter import ship
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import anydepth
from anydepth.draft_sections import DrafterConfig, OwnTextConfig
from anydepth.hf.adapted import attach, detach
from anydepth.json_io import read_document, write_json
from anydepth.measure.results import document
from anydepth.models.tokens import end_ids
from anydepth.speculation.draft import Draft, default_draft, folder, unpack
from anydepth.speculation.drafter_training import MAX_GRADIENT_NORM, DraftTraining, batches_of, rate_at, vocabulary_of
from anydepth.speculation.self_generated import MAX_COMPLETION, MAX_PROMPT, OPENED, PROMPT_SEEDS, Template, Text

TAPS = [10, 20, 30]
NO_STATES = torch.empty(0)
SCHEMA = "anydepth.drafter-scale/1"
NETWORK, RECORD = "network.safetensors", "train.json"
PARTS = 10_000
"""Parts of the minutes, by which the learning rate changes."""


# --- texts ------------------------------------------------------------------------------------------------------------


def write(arguments: argparse.Namespace) -> None:
    """Write texts of so many tokens, or as many as the minutes allow, to a file."""
    torch.manual_seed(arguments.seed)
    model, tokenizer = anydepth.load_model(arguments.target, dtype="bfloat16", device=arguments.device)
    template = Template.of(tokenizer)
    adapted = attach(model, [])
    ends = template.ends | end_ids(adapted, tokenizer)
    detach(adapted)
    seeds = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in PROMPT_SEEDS]
    texts, written, started = list[Text](), 0, time.monotonic()
    while written < arguments.tokens and time.monotonic() - started < arguments.minutes * 60:
        openings = [list(template.start) for _ in range(arguments.batch)]
        for ids in openings:
            if torch.rand(()) < OPENED:
                ids += seeds[int(torch.randint(len(seeds), ()))]
        prompts = continued(model, openings, ends, MAX_PROMPT, do_sample=True, temperature=OwnTextConfig().temperature)
        prompts = [[*(ids[:-1] if ids[-1] in ends else ids), *template.between] for ids in prompts]
        whole = continued(model, prompts, ends, MAX_COMPLETION, do_sample=False)
        new = [
            Text(torch.tensor(ids[:-1]), NO_STATES, len(template.start), len(prompt))
            for ids, prompt in zip(whole, prompts, strict=True)
        ]
        texts += new
        written += sum(len(text.ids) for text in new)
        print(f"{written} tokens in {time.monotonic() - started:.0f} s", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "ids": torch.cat([text.ids for text in texts]).to(torch.int32),
        "lengths": torch.tensor([len(text.ids) for text in texts]),
        "prompts": torch.tensor([text.prompt for text in texts]),
        "completions": torch.tensor([text.completion for text in texts]),
    }
    save_file(tensors, arguments.out, {"seconds": str(time.monotonic() - started)})


def continued(
    model: Any, starts: list[list[int]], ends: frozenset[int], num_new: int, **options: Any
) -> list[list[int]]:
    """Return token lists continued up to their first end token, or by so many tokens."""
    longest, end = max(map(len, starts)), min(ends)
    ids = torch.tensor([[end] * (longest - len(start)) + start for start in starts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in starts], device=model.device)
    options |= {"top_k": 0, "top_p": 1.0} if options["do_sample"] else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=num_new,
        eos_token_id=sorted(ends),
        pad_token_id=end,
        **options,
    )
    found = []
    for start, new in zip(starts, output[:, longest:].tolist(), strict=True):
        last = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        found.append([*start, *new[:last]])
    return found


def read(texts_folder: Path) -> list[Text]:
    texts = list[Text]()
    for path in sorted(texts_folder.glob("texts-*.safetensors")):
        shard = load_file(path)
        parts = shard["ids"].long().split(shard["lengths"].tolist())
        begins = zip(parts, shard["prompts"].tolist(), shard["completions"].tolist(), strict=True)
        texts += [Text(ids, NO_STATES, prompt, completion) for ids, prompt, completion in begins]
    return texts


# --- training ---------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of texts with the states that the model has after the taps."""

    def __init__(self, adapted: Any, texts: Sequence[Text], tokens: int) -> None:
        self.decoder, self.texts, self.tokens = adapted.backbone.decoder, texts, tokens
        self.device, self.captured = adapted.device, dict[int, Tensor]()
        for tap in TAPS:
            adapted.backbone.layers[tap - 1].module.register_forward_hook(self._keep(tap))

    def _keep(self, tap: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.captured[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    def of(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        texts = [self.texts[number] for number in numbers]
        ids = pad_sequence([text.ids for text in texts], batch_first=True).to(self.device)
        with torch.no_grad():
            self.decoder(input_ids=ids, use_cache=False)  # causal: padding on the right changes nothing before it
        states = torch.stack([self.captured[tap] for tap in TAPS], dim=2)
        lengths, starts = [len(text.ids) for text in texts], [text.prompt for text in texts]
        return ids, states, torch.tensor(lengths, device=self.device), torch.tensor(starts, device=self.device)

    def in_order(self, seed: int) -> list[list[int]]:
        return batches_of(self.texts, self.tokens, torch.Generator().manual_seed(seed))

    def forever(self, seed: int) -> Iterator[list[int]]:
        for epoch in itertools.count():
            yield from self.in_order(seed * 1009 + epoch)


def train(arguments: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")
    model, _ = anydepth.load_model(arguments.target, dtype="bfloat16", device=arguments.device)
    adapted = attach(model, []).eval()
    texts = read(arguments.texts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    left_out, kept = order[: arguments.left_out], order[arguments.left_out :]
    if not kept:
        raise SystemExit(f"{arguments.texts} has {len(texts)} texts; leave out fewer than that, or write more")
    held_out = Batches(adapted, [texts[i] for i in left_out], arguments.batch_tokens)
    batches = Batches(adapted, [texts[i] for i in kept], arguments.batch_tokens)
    num_own = sum(len(text.ids) for text in batches.texts)
    options = {"network": {"taps": TAPS, "vocabulary_size": arguments.vocabulary}, "seed": arguments.seed}
    draft = Draft(adapted, options)
    network = draft.network
    assert network is not None
    vocabulary = vocabulary_of(batches.texts, len(network.vocabulary), model.config.vocab_size)
    network.vocabulary.copy_(vocabulary)
    training = DraftTraining(network, adapted.backbone, arguments.drafted)
    shipped = default_draft(adapted).network
    before = (
        rights(DraftTraining(shipped, adapted.backbone, arguments.drafted), held_out) if shipped is not None else None
    )
    print(f"{num_own} self-generated tokens; the package's drafter: {before}", flush=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.rate, weight_decay=0.01)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = DrafterConfig(learning_rate=arguments.rate, max_steps=PARTS, warmup_steps=PARTS // 50)
    curve, num_seen, started, passed = list[dict[str, Any]](), 0, time.monotonic(), 0.0
    for number, chosen in enumerate(batches.forever(arguments.seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(max(round(passed * PARTS), 1), config)
        inputs = batches.of(chosen)
        with torch.autocast(adapted.device.type, torch.bfloat16):
            loss, _ = training(*inputs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        num_seen += int(inputs[2].sum())
        passed = (time.monotonic() - started) / (arguments.minutes * 60)
        if number % arguments.every == 0 or passed >= 1:
            row = {"step": number, "tokens": num_seen, "loss": loss.item(), "right": rights(training, held_out)}
            curve.append(row | {"seconds": time.monotonic() - started})
            print(json.dumps(curve[-1]), flush=True)
            save(network, arguments.out / NETWORK)
        if passed >= 1:
            break
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "run"}
    record = {
        "options": options,
        "num_own_tokens": num_own,
        "num_texts": len(batches.texts),
        "of_package": before,
        "curve": curve,
        "seconds": time.monotonic() - started,
    }
    write_json(arguments.out / RECORD, document(SCHEMA, seed=arguments.seed, config=settings, **record))


def save(network: nn.Module, path: Path) -> None:
    """Save floats in bfloat16."""
    weights = network.state_dict().items()
    save_file({name: (one.bfloat16() if one.is_floating_point() else one).contiguous() for name, one in weights}, path)


@torch.no_grad()
def rights(training: DraftTraining, batches: Batches) -> list[float]:
    """Return, for each position in the draft, the fraction of draft tokens that are right (`DraftTraining`)."""
    counts = torch.zeros(training.num_drafted, 2)
    for chosen in batches.in_order(0):
        with torch.autocast(batches.device.type, torch.bfloat16):
            _, right = training(*batches.of(chosen))
        counts += torch.tensor(right)
    return [round(value, 4) for value in (counts[:, 0] / counts[:, 1]).tolist()]


def ship_run(arguments: argparse.Namespace) -> None:
    record = read_document(arguments.checkpoint / RECORD)
    model, _ = anydepth.load_model(record["config"]["target"], dtype="bfloat16")
    adapted = attach(model, []).eval()
    draft = Draft(adapted, record["options"])
    assert draft.network is not None
    draft.network.load_state_dict(unpack(load_file(arguments.checkpoint / NETWORK)))
    about = {key: record[key] for key in ("commit", "dirty", "seed", "num_own_tokens", "seconds")}
    ship(adapted, draft, folder() / arguments.name, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--target", default="embedded")
    shared.add_argument("--device", default="cpu")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--out", type=Path, required=True)
    one = commands.add_parser("write", parents=[shared])
    one.add_argument("--tokens", type=int, default=5_000_000)
    one.add_argument("--minutes", type=float, default=60.0)
    one.add_argument("--batch", type=int, default=2048)
    one.set_defaults(run=write)
    one = commands.add_parser("train", parents=[shared])
    one.add_argument("--texts", type=Path, required=True)
    one.add_argument("--vocabulary", type=int, default=8192)
    one.add_argument("--drafted", type=int, default=4, help="draft tokens in a row that it is trained for")
    one.add_argument("--minutes", type=float, default=5.0)
    one.add_argument("--batch-tokens", type=int, default=8192)
    one.add_argument("--rate", type=float, default=1e-3)
    one.add_argument("--every", type=int, default=500)
    one.add_argument("--left-out", type=int, default=2048, help="texts left out of training")
    one.set_defaults(run=train)
    one = commands.add_parser("ship")
    one.add_argument("checkpoint", type=Path)
    one.add_argument("name")
    one.set_defaults(run=ship_run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
