"""Training of a drafter (`DraftNetwork`) on self-generated text, with the model's distributions as targets.

After every token it learns the model's prediction of the token after the next: KL against the model's distribution over
the drafter's vocabulary. Training unrolls the drafter as decoding does: from the second draft token on, its own output
replaces the model's states, while earlier tokens keep theirs (EAGLE-3, Li et al. 2025, training-time test).
"""

# The types of torch and safetensors are not complete; a file alone can relax rules of `strict`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from anydepth.draft_sections import DrafterConfig
from anydepth.errors import RunError
from anydepth.losses import divergence
from anydepth.models.backbone import Backbone
from anydepth.models.layer_view import LayerView
from anydepth.models.llama_like import layer_parts, rotation_of, weights_of
from anydepth.speculation.self_generated import Text
from anydepth.speculation.trained_drafter import DraftNetwork

STATE, HISTORY = "drafter.safetensors", "history"
NUM_DRAFTED = 2
"""Draft tokens in a row that it is trained for."""
MAX_GRADIENT_NORM = 1.0
"""Norm that gradients are clipped to."""


class DraftTraining(nn.Module):
    """The loss of a drafter over a batch of texts, padded on the right."""

    def __init__(self, network: DraftNetwork, backbone: Backbone, num_drafted: int = NUM_DRAFTED) -> None:
        super().__init__()
        self.network, self.num_drafted = network, num_drafted
        self.rotary: Any = backbone.decoder.get_submodule("rotary_emb")
        view = LayerView(network.layer, 0, backbone.family, backbone.hidden_size)
        self.rotation_kind = layer_parts(view).rotation_kind
        self.softcap = backbone.logits_softcap
        self.final_norm, self.embedding = backbone.final_norm, backbone.model.get_input_embeddings()
        self.embedding_scale = backbone.embedding_scale
        self.dtype, self.family = backbone.model.dtype, backbone.family
        head, scale = weights_of(backbone.head).rows(network.vocabulary), backbone.logits_scale
        self.head, self.head_bias = head.weight.float() * scale, None if head.bias is None else head.bias.float()

    def forward(
        self, ids: Tensor, states: Tensor, lengths: Tensor, starts: Tensor
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Compute the mean loss, and for each position in the draft (right, all) draft tokens.

        A draft token is right if it is the model's most likely token of the drafter's vocabulary.

        Args:
            ids: (B, T). states: (B, T, taps, D). lengths: (B,) of the texts.
            starts: (B,) first positions that the model wrote itself; no token before them is a target.
        """
        network, positions = self.network, torch.arange(ids.shape[1], device=ids.device)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            teacher = self.teacher(states[:, :, -1])  # (B, T, V'), for the token after each position
            best = teacher.argmax(-1)
            embedded = self.embedding(ids).float() * self.embedding_scale  # type: ignore[operator]
        cache: Any = DynamicCache()
        feature = network.read(states.flatten(2).to(network.read.weight.dtype))
        total, counted, right = torch.zeros((), device=ids.device), 0.0, list[tuple[int, int]]()
        for number in range(self.num_drafted):
            num_tokens = ids.shape[1] - 1 - number  # each is joined with the embedding of the next token
            following = embedded[:, 1 + number :]
            feature = self._layer(network.join(torch.cat([feature[:, :num_tokens], following], -1)), number, cache)
            logits = self._logits(network.norm(feature))
            last = positions[1 + number :][None]  # position of the token before the target
            is_target = (last < lengths[:, None]) & (last + 1 >= starts[:, None])
            loss = divergence(logits[is_target], teacher[:, 1 + number :][is_target])
            weight = 0.8**number
            total = total + weight * loss.sum()
            counted += int(is_target.sum()) * weight
            is_right = (logits.argmax(-1) == best[:, 1 + number :])[is_target]
            right.append((int(is_right.sum()), int(is_target.sum())))
        return total / counted, right

    def teacher(self, last: Tensor) -> Tensor:
        """Return (..., V') float32 logits of (..., D) states after the model's last layer."""
        return self._logits(self.final_norm(last.to(self.dtype)).float())

    def _logits(self, normed: Tensor) -> Tensor:
        logits = F.linear(normed, self.head, self.head_bias)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def _layer(self, hidden: Tensor, number: int, cache: Any) -> Tensor:
        """Run the layer over (B, N, D) for draft token `number`, counted from 0, after every token.

        Each sees the model's states up to the first draft token, and then the earlier tokens of its own draft.
        """
        num_tokens, device = hidden.shape[1], hidden.device
        starts = torch.arange(num_tokens, device=device)
        columns = [starts[None] <= starts[:, None]]
        if number:
            before = torch.arange(num_tokens + number, device=device)
            columns = [before[None] <= starts[:, None]]  # K/V of number 0, which come from the model's states
            columns += [
                before[None, : num_tokens + number - earlier] == starts[:, None] for earlier in range(1, number)
            ]
            columns.append(starts[None] == starts[:, None])
        mask = torch.cat(columns, dim=1)[None, None]
        position_ids = (starts + number)[None]
        output = self.network.layer(
            hidden,
            attention_mask=mask.expand(hidden.shape[0], -1, -1, -1),
            position_ids=position_ids,
            use_cache=True,
            position_embeddings=rotation_of(self.rotary, self.rotation_kind, hidden, position_ids),
            **{**dict.fromkeys(self.family.unused_arguments), self.family.cache_argument: cache},
        )
        return output[0] if isinstance(output, tuple) else output


def vocabulary_of(texts: Sequence[Text], size: int, vocabulary_size: int) -> Tensor:
    """Return the `size` most frequent token ids of completions, in ascending order."""
    counts = torch.zeros(vocabulary_size, dtype=torch.long)
    for text in texts:
        counts += torch.bincount(text.ids[text.completion :], minlength=vocabulary_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def batches_of(texts: Sequence[Text], tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Group texts of similar length into batches of up to `tokens` tokens, padding included, in random order."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number].ids))
    batches, batch = list[list[int]](), list[int]()
    for number in order:
        if batch and (len(batch) + 1) * len(texts[number].ids) > tokens:
            batches.append(batch)
            batch = []
        batch.append(number)
    batches.append(batch)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def collate(texts: Sequence[Text]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids and states padded on the right, lengths, and the positions where prompts begin."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.stack([F.pad(text.ids, (0, longest - len(text.ids))) for text in texts])
    states = torch.stack([F.pad(text.states, (0, 0, 0, 0, 0, longest - len(text.ids))) for text in texts])
    lengths, starts = [len(text.ids) for text in texts], [text.prompt for text in texts]
    return ids, states, torch.tensor(lengths), torch.tensor(starts)


def train_drafter(
    network: DraftNetwork,
    backbone: Backbone,
    texts: Sequence[Text],
    config: DrafterConfig,
    out: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train a drafter in place; return a row of losses and fractions of right draft tokens for each step.

    Raises:
        RunError: the loss is not finite.
    """
    network.vocabulary.copy_(vocabulary_of(texts, len(network.vocabulary), backbone.model.config.vocab_size))
    device = network.vocabulary.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    out.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, Any]] = []
    if resume and (out / STATE).exists():
        history = _restore(network, optimizer, out / STATE)  # restores the vocabulary too
    training = DraftTraining(network, backbone)
    number, epoch = 0, 0
    started = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
    while number < config.max_steps:
        for batch in batches_of(texts, config.batch_tokens, torch.Generator().manual_seed(seed * 1009 + epoch)):
            number += 1
            if number > config.max_steps:
                break
            if number <= len(history):
                continue
            rate = rate_at(number, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs = [part.to(device) for part in collate([texts[i] for i in batch])]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss, right = training(*inputs)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            row = {"step": float(number), "loss": loss.item(), "learning_rate": rate}
            row["figures"] = {f"right_{number}": hits / max(seen, 1) for number, (hits, seen) in enumerate(right, 1)}
            row["seconds"] = time.monotonic() - started
            if not row["loss"] < float("inf"):
                raise RunError(f"step {number}: the loss is {row['loss']}, not finite; lower the learning rate")
            history.append(row)
            on_step(row)
            if number % config.save_every == 0 or number == config.max_steps:
                _save(network, optimizer, history, out / STATE)
        epoch += 1
    return history


def rate_at(step: int, config: DrafterConfig) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine to a twentieth of the peak."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return config.learning_rate * (0.05 + 0.475 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()))


def _save(network: DraftNetwork, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]], path: Path) -> None:
    tensors = {f"weights.{name}": value for name, value in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, {HISTORY: json.dumps(history)})
    part.replace(path)


def _restore(network: DraftNetwork, optimizer: torch.optim.Optimizer, path: Path) -> list[dict[str, Any]]:
    prefix, state = "weights.", defaultdict[int, dict[str, Tensor]](dict)
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        tensors, history = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()[HISTORY]  # noqa: SIM118
    network.load_state_dict({name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)})
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, key = name.split(".")
            state[int(number)][key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
    return json.loads(history)
