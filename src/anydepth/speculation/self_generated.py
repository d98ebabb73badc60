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
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TemperatureLogitsWarper

from anydepth.decoding.engines import FastEngine
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.decoding.scheduler import Scheduler
from anydepth.draft_sections import OwnTextConfig
from anydepth.gating.plan import FULL_DEPTH
from anydepth.hf.adapted import AdaptedModel
from anydepth.models.tokens import end_ids

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


class Writer:
    """Writes texts, many at a time: a question that is sampled, and after it an answer that is greedy.

    Args:
        taps: layers whose output states are kept, counted from 1; the last is what the head reads, before its norm.
        openings: token ids that questions begin with, and a share of `config.opened` does.
    """

    def __init__(
        self,
        engine: FastEngine,
        template: Template,
        taps: list[int],
        config: OwnTextConfig,
        openings: Sequence[list[int]] = (),
        seed: int = 0,
    ) -> None:
        self.template, self.config, self.openings = template, config, openings
        self.generator = torch.Generator().manual_seed(seed)
        self.warm = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
        self.scheduler = Scheduler(engine, config.num_slots, is_interactive=False)
        self.reader = engine.new_session(1, captures=taps)
        self.read = self.reader.open()
        self.questions: dict[Request, int] = {}  # where each begins
        self.answers: dict[Request, int] = {}

    def step(self) -> list[Text]:
        """Write one token more of each text; return those that have ended."""
        while len(self.questions) + len(self.answers) < self.config.num_slots:
            self._ask()
        ended = []
        for request in self.scheduler.step():
            if request.failure is not None:
                raise request.failure
            if not request.is_finished:
                continue
            if request in self.questions:
                self._answer(request, self.questions.pop(request))
            else:
                ended.append(self._text(request, self.answers.pop(request)))
        return ended

    def _ask(self) -> None:
        ids = list(self.template.opening)
        if self.template.between and self.openings and torch.rand((), generator=self.generator) < self.config.opened:
            ids += self.openings[int(torch.randint(len(self.openings), (1,), generator=self.generator))]
        sampler = Sampler(self.warm, sampling=True, generator=self.generator)
        request = self._add(ids, sampler, self.config.max_question)
        self.questions[request] = len(self.template.opening)

    def _answer(self, question: Request, begin: int) -> None:
        """Let the model answer a question; of a model without turns, let it go on greedily."""
        ids, has_ended = question.ids, question.ids[-1] in self.template.ends
        if has_ended and not self.template.between:
            return  # all of the text was sampled
        ids = [*(ids[:-1] if has_ended else ids), *self.template.between]
        self.answers[self._add(ids, Sampler(), self.config.max_answer)] = min(begin, len(ids))

    def _add(self, ids: list[int], sampler: Sampler, num_new: int) -> Request:
        request = Request(ids, sampler, Stops.at(len(ids) + num_new, self.template.ends), full_depth=True)
        self.scheduler.add(request)
        return request

    def _text(self, answer: Request, question: int) -> Text:
        """Return a text and its states; the last token has none."""
        ids = answer.ids[:-1]
        with torch.no_grad():
            self.reader.read(self.read, ids, FULL_DEPTH, num_logits=0, capture=True)
        states = torch.stack(self.reader.captured(self.read), dim=1)
        self.reader.close(self.read)
        self.read = self.reader.open()
        return Text(torch.tensor(ids), states, question, answer.num_prompt)


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
    texts, seconds, engine = [], 0.0, None
    for number in range(-(-config.num_tokens // size)):
        path = folder / f"{number:03d}.safetensors"
        if not path.exists():
            engine = engine or FastEngine(adapted)
            writer = Writer(engine, template, taps, config, openings, seed * 100_003 + number)
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
