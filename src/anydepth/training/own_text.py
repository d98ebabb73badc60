"""Text that a model writes itself, with the states that its tokens went through: what a drafter learns from.

A chat model first makes up what somebody might ask, behind its own template's opening of a user's turn (Xu et al.
2024, Magpie), then answers greedily, as it will at inference; any other model goes on from its first token. Many texts
are written at a time by the fast engine, and a text that ends makes room for the next. Nothing but the model itself
goes in, so what is trained on it has the model's own licence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.inference.engine.model import EngineModel

MARK = "\x00"


@dataclass(frozen=True)
class Template:
    """Token ids around the turns of a chat; of a model without a template, nothing but its first token.

    Attributes:
        opening: up to where a user speaks. between: from there to where the model speaks.
        ends: tokens that end a turn.
    """

    opening: list[int]
    between: list[int]
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        end: Any = tokenizer.eos_token_id
        if tokenizer.chat_template is None:
            first: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
            return cls([first], [], frozenset([end]))
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
            )
        )
        opening, _, between = text.partition(MARK)

        def ids(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

        between_ids = ids(between)
        return cls(ids(opening), between_ids, frozenset([end, between_ids[0]]))


@dataclass
class _Text:
    """One that is being written: `ids`, all but the last of which the model has seen, and their states."""

    ids: list[int]
    asks: bool
    states: list[Tensor] = field(default_factory=list)
    turn: int = 0


class Writer:
    """Writes texts in all slots of one cache.

    Args:
        taps: layers behind which states are kept, counted from 1; the last is what the head reads, before its norm.
        max_question, max_answer: tokens of a turn.
        temperature: of questions; answers are greedy.
    """

    def __init__(
        self,
        model: EngineModel,
        template: Template,
        taps: list[int],
        *,
        num_slots: int = 48,
        max_question: int = 96,
        max_answer: int = 192,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model, self.template, self.taps = model, template, taps
        self.max_question, self.max_answer, self.temperature = max_question, max_answer, temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = model.new_cache(num_slots)
        self.texts = {self.cache.take_slot(): self._new() for _ in range(num_slots)}

    def _new(self) -> _Text:
        return _Text(list(self.template.opening), asks=bool(self.template.between))

    @torch.no_grad()
    def step(self) -> list[_Text]:
        """A token more of each text; returns those that have ended."""
        unseen = {slot: text.ids[len(text.states) :] for slot, text in self.texts.items()}
        longer = [slot for slot, ids in unseen.items() if len(ids) > 1]
        last: dict[int, Tensor] = {}
        for slot in longer:
            last |= self._see([slot], [unseen[slot]])
        rest = [slot for slot in self.texts if slot not in longer]
        if rest:
            last |= self._see(rest, [unseen[slot] for slot in rest])
        slots = list(self.texts)
        logits = self.model.logits(torch.stack([last[slot] for slot in slots])).float()
        greedy = logits.argmax(-1).tolist()
        sampled = torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=self.generator)[:, 0].tolist()
        ended = []
        for number, slot in enumerate(slots):
            text = self.texts[slot]
            text.ids.append(sampled[number] if text.asks else greedy[number])
            text.turn += 1
            if text.ids[-1] in self.template.ends or text.turn >= (self.max_question if text.asks else self.max_answer):
                self._end_turn(slot, text, ended)
        return ended

    def _end_turn(self, slot: int, text: _Text, ended: list[_Text]) -> None:
        if text.asks:
            if text.ids[-1] in self.template.ends:
                text.ids.pop()
            text.ids += self.template.between
            text.asks, text.turn = False, 0
            return
        text.ids = text.ids[: len(text.states)]
        ended.append(text)
        self.cache.rewind(slot, 0)
        self.texts[slot] = self._new()

    def _see(self, slots: list[int], ids: list[list[int]]) -> dict[int, Tensor]:
        """States (D,) behind the last layer of the last tokens, by slot; those at the taps are kept."""
        states = [self.model.embedding(torch.tensor(part)) for part in ids]
        kept, first = [], 0
        for tap in self.taps:
            states = self.model.run_layers(states, slots, self.cache, first, tap)
            kept.append(states)
            first = tap
        for number, slot in enumerate(slots):
            text = self.texts[slot]
            tapped = torch.stack([part[number] for part in kept], dim=1)  # (N, taps, D)
            text.states += list(tapped)
            self.cache.lengths[slot] += len(ids[number])
        return {slot: states[number][-1] for number, slot in enumerate(slots)}


def write_shards(
    writer: Callable[[int], Writer],
    folder: Path,
    *,
    num_shards: int,
    tokens_per_shard: int,
    on_progress: Callable[[int, int], None] = lambda shard, tokens: None,
) -> list[Path]:
    """Files of texts, each written whole or not at all and from a seed of its own, so that an interrupted run goes on.

    Each holds `ids` (N,), `lengths` of the texts, and `states` (N, taps, D).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"own-text-{number:03d}.safetensors" for number in range(num_shards)]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        own, texts, total = writer(number), [], 0
        while total < tokens_per_shard:
            for text in own.step():
                texts.append(text)
                total += len(text.ids)
                on_progress(number, total)
        part = path.with_suffix(".part")
        save_file(
            {
                "ids": torch.tensor([token for text in texts for token in text.ids], dtype=torch.int32),
                "lengths": torch.tensor([len(text.ids) for text in texts]),
                "states": torch.cat([torch.stack(text.states) for text in texts]),
            },
            part,
        )
        part.replace(path)
    return paths


def read_shards(paths: list[Path]) -> list[tuple[Tensor, Tensor]]:
    """All texts: (T,) ids and (T, taps, D) states each."""
    texts = []
    for path in paths:
        shard = load_file(path)
        lengths = shard["lengths"].tolist()
        texts += list(zip(shard["ids"].long().split(lengths), shard["states"].split(lengths), strict=True))
    return texts
