"""Self-generated text with the states of its tokens: the training data of a drafter.

A chat model samples a prompt, after its template's start of a user's turn (Magpie, Xu et al. 2024) and often a prompt
seed for variety; then it writes the completion greedily, as at inference. Any other model samples the beginning of a
text and continues greedily. A drafter trained on the model's own text has the model's own licence.
"""

# The types of torch and safetensors are not complete; a file alone can relax rules of `strict`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

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
OPENED = 0.85
"""Fraction of prompts that begin with a prompt seed."""
MAX_PROMPT = MAX_COMPLETION = 96
"""Most tokens of a prompt, and of a completion; completions are greedy, so that long ones repeat."""
NUM_TEXTS = 48
"""Texts generated at a time."""
# fmt: off
PROMPT_SEEDS = (
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
"""First words of prompts."""


@dataclass(frozen=True)
class Template:
    """Token ids around the turns of a chat; a model without a chat template has its first token alone.

    Attributes:
        start: tokens before the prompt. between: tokens between prompt and completion.
        ends: tokens that end a turn.
    """

    start: list[int]
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
        start, _, between = text.partition(MARK)

        def ids(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

        between_ids = ids(between)
        return cls(ids(start), between_ids, frozenset([end, between_ids[0]]))


@dataclass(frozen=True)
class Text:
    """A text: (T,) ids, (T, taps, D) states, and the positions where prompt and completion begin."""

    ids: Tensor
    states: Tensor
    prompt: int
    completion: int


class Writer:
    """Writes texts, many at a time, each a sampled prompt and a greedy completion.

    Args:
        taps: layers, counted from 1, of which output states are captured; those of the last layer are before the norm.
        prompt_seeds: token ids that a fraction `OPENED` of the prompts begins with.
    """

    def __init__(
        self,
        engine: FastEngine,
        template: Template,
        taps: list[int],
        config: OwnTextConfig,
        prompt_seeds: Sequence[list[int]] = (),
        seed: int = 0,
    ) -> None:
        self.template, self.config, self.prompt_seeds = template, config, prompt_seeds
        self.generator = torch.Generator().manual_seed(seed)
        self.processors = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
        self.scheduler = Scheduler(engine, NUM_TEXTS, is_interactive=False)
        self.reader = engine.new_session(1, captures=taps)
        self.prompts: dict[Request, int] = {}  # by request, where the prompt begins
        self.completions: dict[Request, int] = {}

    def step(self) -> list[Text]:
        """Read prompts, or write one more token of each text; return the texts that have ended."""
        while len(self.prompts) + len(self.completions) < NUM_TEXTS:
            self._start_prompt()
        ended: list[Text] = []
        for request in self.scheduler.step():
            if request.failure is not None:
                raise request.failure
            if not request.is_finished:
                continue
            if request in self.prompts:
                self._start_completion(request, self.prompts.pop(request))
            else:
                ended.append(self._text(request, self.completions.pop(request)))
        return ended

    def _start_prompt(self) -> None:
        ids, seeds = list(self.template.start), self.prompt_seeds
        if self.template.between and seeds and torch.rand((), generator=self.generator) < OPENED:
            ids += seeds[int(torch.randint(len(seeds), (1,), generator=self.generator))]
        sampler = Sampler(self.processors, sampling=True, generator=self.generator)
        request = self._add(ids, sampler, MAX_PROMPT)
        self.prompts[request] = len(self.template.start)

    def _start_completion(self, prompt: Request, begin: int) -> None:
        """Queue the completion of a prompt; a model without a chat template continues the text."""
        ids, has_ended = prompt.ids, prompt.ids[-1] in self.template.ends
        if has_ended and not self.template.between:
            return  # all of the text was sampled
        ids = [*(ids[:-1] if has_ended else ids), *self.template.between]
        self.completions[self._add(ids, Sampler(), MAX_COMPLETION)] = min(begin, len(ids))

    def _add(self, ids: list[int], sampler: Sampler, num_new: int) -> Request:
        stops = Stops.at(len(ids) + num_new, self.template.ends)
        request = Request(ids, sampler, stops, full_depth=True, is_traced=False)
        self.scheduler.add(request)
        return request

    def _text(self, request: Request, begin: int) -> Text:
        """Run a text to capture its states; leave out its last token, which has none."""
        ids, sequence = request.ids[:-1], self.reader.open()
        with torch.no_grad():
            self.reader.read(sequence, ids, FULL_DEPTH, num_logits=0, capture=True)
        states = torch.stack(self.reader.captured(sequence), dim=1)
        self.reader.close(sequence)
        return Text(torch.tensor(ids), states, begin, request.num_prompt)


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
    """Write self-generated texts to `folder`, or load those that are there; return them and the seconds of writing.

    Each file is written atomically and from its own seed, so that an interrupted run can resume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = min(config.num_tokens, SHARD_TOKENS)
    template = Template.of(tokenizer)
    template = replace(template, ends=template.ends | end_ids(adapted, tokenizer))
    seeds = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in PROMPT_SEEDS]  # type: ignore[arg-type]
    texts, seconds, engine = list[Text](), 0.0, None
    for number in range(-(-config.num_tokens // size)):
        path = folder / f"{number:03d}.safetensors"
        if not path.exists():
            engine = engine or FastEngine(adapted)
            writer = Writer(engine, template, taps, config, seeds, seed * 100_003 + number)
            say(f"generating training text, {number * size} of {config.num_tokens} tokens …")
            _write_shard(writer, path, size)
        shard = load_file(path)
        lengths, begins = shard["lengths"].tolist(), (shard["questions"].tolist(), shard["answers"].tolist())
        parts = (shard["ids"].long().split(lengths), shard["states"].split(lengths), *begins)
        texts += [Text(*text) for text in zip(*parts, strict=True)]
        seconds += shard["seconds"].item()
    return texts, seconds


def _write_shard(writer: Writer, path: Path, num_tokens: int) -> None:
    """Write texts of at least `num_tokens` tokens to a file.

    Its tensors are `ids` (N,), `states` (N, taps, D), `lengths` of the texts, the positions where prompts (`questions`)
    and completions (`answers`) begin, and the `seconds` of writing.
    """
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
            "questions": torch.tensor([text.prompt for text in texts]),
            "answers": torch.tensor([text.completion for text in texts]),
            "states": torch.cat([text.states for text in texts]),
            "seconds": torch.tensor(time.monotonic() - started),
        },
        part,
    )
    part.replace(path)
