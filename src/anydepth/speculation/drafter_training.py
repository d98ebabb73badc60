"""Training of a drafter (`DraftNetwork`) on text that its model wrote itself, by the model's own distributions.

Behind every token it learns what the model says one token later: KL against the model's distribution over the drafter's
vocabulary, which the states of that later token give. It is unrolled as it will be used: from the second guess on, its
own output stands in for states, and the tokens in front of the guessed ones are seen by their real states (EAGLE-3, Li
et al. 2025, training-time test).
"""

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
from anydepth.models.llama_like import head_weights, logits_softcap
from anydepth.speculation.draft_network import DraftNetwork
from anydepth.speculation.self_generated import Text

STATE, HISTORY = "drafter.safetensors", "history"


class DraftTraining(nn.Module):
    """The loss of a drafter over a batch of texts, padded on the right."""

    def __init__(self, network: DraftNetwork, backbone: Backbone, num_guesses: int) -> None:
        super().__init__()
        self.network, self.num_guesses = network, num_guesses
        self.rotary: Any = backbone.decoder.get_submodule("rotary_emb")
        self.softcap = logits_softcap(backbone)
        self.final_norm, self.embedding = backbone.final_norm, backbone.model.get_input_embeddings()
        self.head = head_weights(backbone).weight[network.vocabulary].float()

    def forward(
        self, ids: Tensor, states: Tensor, lengths: Tensor, questions: Tensor
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Mean loss, and by guess how many were the model's own first choice, of how many.

        Args:
            ids: (B, T). states: (B, T, taps, D). lengths: (B,) of the texts. questions: (B,) where they begin: nothing
                in front of them is to be guessed.
        """
        network, places = self.network, torch.arange(ids.shape[1], device=ids.device)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            teacher = self.teacher(states[:, :, -1])  # (B, T, V'): what follows each token
            best = teacher.argmax(-1)
            embedded = self.embedding(ids).float()  # type: ignore[operator]
        cache: Any = DynamicCache()
        feature = network.read(states.flatten(2).to(network.read.weight.dtype))
        total, counted, right = torch.zeros((), device=ids.device), 0.0, []
        for guess in range(self.num_guesses):
            num_tokens = ids.shape[1] - 1 - guess  # with a token behind to join
            known = embedded[:, 1 + guess :]
            feature = self._layer(network.join(torch.cat([feature[:, :num_tokens], known], -1)), guess, cache)
            logits = self._capped(F.linear(network.norm(feature), self.head))
            said = places[1 + guess :][None]  # the token behind which the model's distribution is guessed
            wanted = (said < lengths[:, None]) & (said + 1 >= questions[:, None])
            loss = divergence(logits[wanted], teacher[:, 1 + guess :][wanted])
            weight = 0.8**guess
            total = total + weight * loss.sum()
            counted += int(wanted.sum()) * weight
            right.append((int((logits.argmax(-1) == best[:, 1 + guess :])[wanted].sum()), int(wanted.sum())))
        return total / counted, right

    def teacher(self, last: Tensor) -> Tensor:
        """(..., V') logits of (..., D) states behind the model's last layer, in float32."""
        dtype = next(self.final_norm.parameters()).dtype
        return self._capped(F.linear(self.final_norm(last.to(dtype)).float(), self.head))

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def _layer(self, hidden: Tensor, guess: int, cache: Any) -> Tensor:
        """The layer over (B, N, D): each token sees the real ones up to `guess` before it, and its own guesses."""
        num_tokens, device = hidden.shape[1], hidden.device
        places = torch.arange(num_tokens, device=device)
        columns = [places[None] <= places[:, None]]
        if guess:
            before = torch.arange(num_tokens + guess, device=device)
            columns = [before[None] <= places[:, None]]  # of the first round, by place of the first guess
            columns += [before[None, : num_tokens + guess - earlier] == places[:, None] for earlier in range(1, guess)]
            columns.append(places[None] == places[:, None])
        mask = torch.cat(columns, dim=1)[None, None]
        positions = (places + guess)[None]
        output = self.network.layer(
            hidden,
            attention_mask=mask.expand(hidden.shape[0], -1, -1, -1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self.rotary(hidden, positions),
        )
        return output[0] if isinstance(output, tuple) else output


def vocabulary_of(texts: Sequence[Text], size: int, vocabulary_size: int) -> Tensor:
    """The ids that stand most often in answers, in order of the ids."""
    counts = torch.zeros(vocabulary_size, dtype=torch.long)
    for text in texts:
        counts += torch.bincount(text.ids[text.answer :], minlength=vocabulary_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def batches_of(texts: Sequence[Text], tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Texts of similar lengths together, up to so many tokens with padding; in random order."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number].ids))
    batches, batch = [], []
    for number in order:
        if batch and (len(batch) + 1) * len(texts[number].ids) > tokens:
            batches.append(batch)
            batch = []
        batch.append(number)
    batches.append(batch)
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def collate(texts: Sequence[Text]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded ids and states, the lengths, and where the questions begin: the model's own words."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.stack([F.pad(text.ids, (0, longest - len(text.ids))) for text in texts])
    states = torch.stack([F.pad(text.states, (0, 0, 0, 0, 0, longest - len(text.ids))) for text in texts])
    lengths, questions = [len(text.ids) for text in texts], [text.question for text in texts]
    return ids, states, torch.tensor(lengths), torch.tensor(questions)


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
    """Train a drafter in place; returns a row of losses and shares of right guesses for each step.

    Raises:
        RunError: the loss is not finite.
    """
    network.vocabulary.copy_(vocabulary_of(texts, len(network.vocabulary), backbone.model.config.vocab_size))
    device = network.vocabulary.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    out.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, Any]] = []
    if resume and (out / STATE).exists():
        history = _restore(network, optimizer, out / STATE)  # its vocabulary, too
    training = DraftTraining(network, backbone, config.num_guesses)
    number, epoch = 0, 0
    started = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
    while number < config.max_steps:
        for batch in batches_of(texts, config.batch_tokens, torch.Generator().manual_seed(seed * 1009 + epoch)):
            number += 1
            if number > config.max_steps:
                break
            if number <= len(history):
                continue
            rate = _rate(number, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs = [part.to(device) for part in collate([texts[i] for i in batch])]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss, right = training(*inputs)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.max_gradient_norm)
            optimizer.step()
            row = {"step": float(number), "loss": loss.item(), "learning_rate": rate}
            row["figures"] = {f"right_{place + 1}": hits / max(seen, 1) for place, (hits, seen) in enumerate(right)}
            row["seconds"] = time.monotonic() - started
            if not row["loss"] < float("inf"):
                raise RunError(f"step {number}: the loss is not finite; lower the learning rate")
            history.append(row)
            on_step(row)
            if number % config.save_every == 0 or number == config.max_steps:
                _keep(network, optimizer, history, out / STATE)
        epoch += 1
    return history


def _rate(step: int, config: DrafterConfig) -> float:
    """Linear warm-up, cosine to a twentieth."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return config.learning_rate * (0.05 + 0.475 * (1 + torch.cos(torch.tensor(share * torch.pi)).item()))


def _keep(network: DraftNetwork, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]], path: Path) -> None:
    """Weights, optimiser and history in one file, whole or not at all."""
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
            _, number, what = name.split(".")
            state[int(number)][what] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
    return json.loads(history)
