"""Text that a model writes itself, with the states that its tokens went through: what a drafter learns from.

A chat model first makes up what somebody might ask, behind its own template's opening of a user's turn (Xu et al.
2024, Magpie) and often a first word or two, for variety; then it answers greedily, as it will at inference. Any other
model begins a text by sampling, and goes on greedily. Many texts are written at a time by the fast engine, and a text
that ends makes room for the next. Nothing but the model itself goes in, so what is trained on it has the model's own
licence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.decoding.sampler import largest
from anydepth.engine.model import EngineModel
from anydepth.hf.adapted import AdaptedModel
from anydepth.models.tokens import end_ids
from anydepth.recipe import OwnTextConfig

MARK = "\x00"
# fmt: off
OPENINGS = (
    "Write a", "Write an", "Compose a", "Draft a", "Create a", "Design a", "Develop a", "Suggest", "Recommend",
    "Explain", "Describe", "Discuss", "Define", "Compare", "Evaluate", "Analyze", "Outline", "Identify", "Discover",
    "What is", "What are", "What was", "What does", "What happens if", "How do", "How does", "How many", "How can I",
    "Who was", "Who wrote", "When did", "Where is", "Which", "Why do", "Why is", "Is it true that", "Can you",
    "Could", "Imagine you are", "Pretend to be", "Picture yourself as", "You are a", "Act as a",
    "Given the following", "If a", "If you have", "Suppose", "Solve", "Calculate", "Find the", "Let", "A farmer",
    "A store", "John has", "Mary", "Write a Python", "Write a function", "Implement", "Fix the bug in",
    "Write a C++ program", "Write an SQL query", "Summarize:", "Summarize the following", "Rewrite", "Paraphrase",
    "Extract", "List", "Name", "Classify", "Edit", "Translate to English:", "Translate German to English:",
    "Translate French to English:", "Answer the question:", "The", "In", "There are", "According to",
    "Read the following", "Please", "I am", "I want to", "My", "For", "Tell me about", "Tell a", "Help me", "Give me",
    "Provide", "Make", "Plan", "Do you", "Are", "Does", "Should",
)
# fmt: on
"""First words of questions: what people ask for."""


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


@dataclass(frozen=True)
class Text:
    """One that was written: (T,) ids, (T, taps, D) states, and where the question and the answer begin."""

    ids: Tensor
    states: Tensor
    question: int
    answer: int


@dataclass
class _Text:
    """One that is being written: `ids`, all but the last of which the model has seen.

    Attributes:
        states: (most, taps, D), of which the first `num_seen` are there. One block: so many small ones would be
            scattered over memory that is then never given back.
        asks: whether this is the question's turn, which is sampled. turn: tokens of the turn so far.
        answer: where the answer begins.
    """

    ids: list[int]
    states: Tensor
    num_seen: int = 0
    asks: bool = True
    turn: int = 0
    answer: int = 1


class Writer:
    """Writes texts in all slots of one cache.

    Args:
        taps: layers behind which states are kept, counted from 1; the last is what the head reads, before its norm.
        openings: token ids that questions begin with, and a share of `config.opened` does.
    """

    def __init__(
        self,
        model: EngineModel,
        template: Template,
        taps: list[int],
        config: OwnTextConfig,
        openings: Sequence[list[int]] = (),
        seed: int = 0,
    ) -> None:
        self.model, self.template, self.taps, self.config = model, template, taps, config
        self.generator = torch.Generator().manual_seed(seed)
        self.openings = openings
        self.cache = model.new_cache(config.num_slots)
        self.texts = {self.cache.take_slot(): self._new() for _ in range(config.num_slots)}

    def _new(self) -> _Text:
        ids = list(self.template.opening)
        if self.template.between and self.openings and torch.rand((), generator=self.generator) < self.config.opened:
            ids += self.openings[int(torch.randint(len(self.openings), (1,), generator=self.generator))]
        most = len(ids) + len(self.template.between) + self.config.max_question + self.config.max_answer
        states = torch.empty(most, len(self.taps), self.model.backbone.hidden_size, dtype=self.model.dtype)
        return _Text(ids, states)

    @torch.no_grad()
    def step(self) -> list[Text]:
        """A token more of each text; returns those that have ended."""
        unseen = {slot: text.ids[text.num_seen :] for slot, text in self.texts.items()}
        longer = [slot for slot, ids in unseen.items() if len(ids) > 1]
        last: dict[int, Tensor] = {}
        for slot in longer:
            last |= self._see([slot], [unseen[slot]])
        rest = [slot for slot in self.texts if slot not in longer]
        if rest:
            last |= self._see(rest, [unseen[slot] for slot in rest])
        slots = list(self.texts)
        logits = self.model.logits(torch.stack([last[slot] for slot in slots]))
        said = largest(logits)
        asking = [number for number, slot in enumerate(slots) if self.texts[slot].asks]
        for number, token in zip(asking, self._sample(logits[asking]), strict=True):
            said[number] = token
        ended = []
        for number, slot in enumerate(slots):
            text = self.texts[slot]
            text.ids.append(said[number])
            text.turn += 1
            if text.ids[-1] in self.template.ends or text.turn >= (
                self.config.max_question if text.asks else self.config.max_answer
            ):
                self._end_turn(slot, text, ended)
        return ended

    def _sample(self, logits: Tensor) -> list[int]:
        """By where one uniform number lies among the summed shares: `torch.multinomial` draws one for every token."""
        sums = (logits.float().cpu() / self.config.temperature).softmax(-1).double().cumsum(-1)
        places = torch.rand(len(sums), 1, generator=self.generator, dtype=torch.double) * sums[:, -1:]
        return torch.searchsorted(sums, places, right=True).clamp(max=sums.shape[1] - 1)[:, 0].tolist()

    def _end_turn(self, slot: int, text: _Text, ended: list[Text]) -> None:
        has_ended = text.ids[-1] in self.template.ends
        if text.asks and (self.template.between or not has_ended):
            if has_ended:
                text.ids.pop()
            text.ids += self.template.between
            text.asks, text.turn, text.answer = False, 0, len(text.ids)
            return
        if not text.asks:
            ids = torch.tensor(text.ids[: text.num_seen])
            question = min(len(self.template.opening), text.answer)
            ended.append(Text(ids, text.states[: text.num_seen].clone(), question, text.answer))
        self.cache.rewind(slot, 0)
        self.texts[slot] = self._new()

    def _see(self, slots: list[int], ids: list[list[int]]) -> dict[int, Tensor]:
        """States (D,) behind the last layer of the last tokens, by slot; those at the taps are kept."""
        states = [self.model.embedding(torch.tensor(part, device=self.model.device)) for part in ids]
        kept = self.model.run_to_stops(states, slots, self.cache, 0, self.taps)
        for number, slot in enumerate(slots):
            text = self.texts[slot]
            seen, text.num_seen = text.num_seen, text.num_seen + len(ids[number])
            text.states[seen : text.num_seen] = torch.stack([part[number] for part in kept], dim=1)
            self.cache.lengths[slot] = text.num_seen
        return {slot: kept[-1][number][-1] for number, slot in enumerate(slots)}


OWN_TEXT = "own-text"
SHARD_TOKENS = 100_000


def own_texts(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    taps: list[int],
    config: OwnTextConfig,
    folder: Path,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Text], float]:
    """Texts as `config` asks for them, written to `folder` or found there, and the seconds that writing took.

    Each file is written whole or not at all, and from a seed of its own, so that an interrupted run goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = min(config.num_tokens, SHARD_TOKENS)
    template = Template.of(tokenizer)
    template = replace(template, ends=template.ends | end_ids(adapted, tokenizer))
    openings = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in OPENINGS]  # type: ignore[arg-type]
    texts, seconds, model = [], 0.0, None
    for number in range(-(-config.num_tokens // size)):
        path = folder / f"{number:03d}.safetensors"
        if not path.exists():
            model = model or EngineModel(adapted.backbone)
            writer = Writer(model, template, taps, config, openings, seed * 100_003 + number)
            say(f"writing its own text, {number * size} of {config.num_tokens} tokens …")
            _write_shard(writer, path, size)
        shard = load_file(path)
        lengths, begins = shard["lengths"].tolist(), (shard["questions"].tolist(), shard["answers"].tolist())
        parts = (shard["ids"].long().split(lengths), shard["states"].split(lengths), *begins)
        texts += [Text(*text) for text in zip(*parts, strict=True)]
        seconds += shard["seconds"].item()
    return texts, seconds


def _write_shard(writer: Writer, path: Path, num_tokens: int) -> None:
    """`ids` (N,), `lengths` of texts, where `questions` and `answers` begin, `states` (N, taps, D), what it took."""
    texts, written, started = list[Text](), 0, time.monotonic()
    while written < num_tokens:
        ended = writer.step()
        texts += ended
        written += sum(len(text.ids) for text in ended)
    part = path.with_suffix(".part")
    save_file(
        {
            "ids": torch.cat([text.ids for text in texts]).to(torch.int32),
            "lengths": torch.tensor([len(text.ids) for text in texts]),
            "questions": torch.tensor([text.question for text in texts]),
            "answers": torch.tensor([text.answer for text in texts]),
            "states": torch.cat([text.states for text in texts]),
            "seconds": torch.tensor(time.monotonic() - started),
        },
        part,
    )
    part.replace(path)
