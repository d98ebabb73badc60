"""Jobs out of the bodies of requests: prompts by the tokenizer and its template, sampling, stops, and what fits."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from transformers import LogitsProcessor, MinNewTokensLengthLogitsProcessor, PreTrainedTokenizerBase

from anydepth.decoding import request as decoding
from anydepth.decoding.sampler import Stops
from anydepth.decoding.sampling_options import LogitBias, Penalties, SamplingOptions
from anydepth.errors import UserError
from anydepth.models.tokens import encode_batch
from anydepth.serve.grammar import Grammars
from anydepth.serve.protocol import ChatCompletion, Completion, Extra, Sampling, is_text
from anydepth.serve.service import Job, Service
from anydepth.serve.text_stream import TextStream

DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS = 16, 4096
"""New tokens of a completion where a request does not say how many, and at most of any answer."""
TEMPLATE_OPTIONS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
"""Options of transformers' own, which are no inputs of a template."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        name: that of the model. seed: of requests without one; None: a new one each.
        is_strict: refuse a `max_tokens` that does not fit, which is cut to what fits otherwise.
        hosts: names that it answers to; empty: any.
        origins: web pages that may read it.
    """

    name: str
    api_key: str | None = None
    request_seconds: float = 600.0
    seed: int | None = None
    is_strict: bool = False
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()


class Jobs:
    """Makes jobs of the bodies of requests; an `HTTPException` says what does not fit."""

    def __init__(self, service: Service, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.service, self.tokenizer, self.settings = service, tokenizer, settings
        self.seeds = random.Random(settings.seed)
        self.grammars = Grammars(tokenizer, service.engine.adapted.config.vocab_size, service.end_ids)

    def text_of(self, body: Completion, place: int, prompt: list[int]) -> str:
        """Return the text of a prompt as it was sent, or that of its token ids."""
        sent: Any = body.prompt if isinstance(body.prompt, str) else body.prompt[place]
        if isinstance(sent, str):
            return sent
        return str(self.tokenizer.decode(prompt, skip_special_tokens=body.skip_special_tokens is not False))

    def chat_prompt(self, body: ChatCompletion) -> list[int]:
        """Return the token ids of a conversation, by the model's template."""
        turns = [message.as_turn() for message in body.messages]
        own = body.chat_template_kwargs or {}
        if taken := sorted(own.keys() & TEMPLATE_OPTIONS):  # a template of the client's could run for ever
            raise HTTPException(400, f"chat_template_kwargs: {taken[0]} is not an input of a template; leave it out")
        options: dict[str, Any] = {
            **own,
            "add_generation_prompt": body.add_generation_prompt is not False and not body.continue_final_message,
            "continue_final_message": bool(body.continue_final_message),
            **({"tools": body.offered} if body.offered else {}),
        }
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except Exception as failed:  # templates raise errors of any type about the order of roles
            raise HTTPException(400, "the chat template does not support these roles in this order") from failed
        if not is_text(text):  # JSON within JSON, such as arguments of a call, can spell one
            raise HTTPException(400, "messages: half of a surrogate pair is not a character; send the whole character")
        (prompt,) = encode_batch(self.tokenizer, [text], special=bool(body.add_special_tokens))
        return prompt

    def prompts(self, body: Completion) -> list[list[int]]:
        prompt: Any = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
        if isinstance(prompt[0], str):
            return encode_batch(self.tokenizer, prompt, special=body.add_special_tokens is not False)
        size = self.service.engine.adapted.config.vocab_size
        if max(map(max, prompt)) >= size:
            raise HTTPException(400, f"prompt: token ids must be below {size}")
        return prompt

    def _capacity(self, prompt: list[int]) -> int:
        """Return the number of new tokens that fit after a prompt."""
        most = self.service.max_length
        if not prompt:
            raise HTTPException(400, "the prompt is empty; give at least one token")
        if len(prompt) >= most:
            raise HTTPException(
                400,
                f"the prompt has {len(prompt)} tokens; at most {most - 1} fit here (the model's window, or "
                "the server's --max-tokens divided by --max-batch-size)",
            )
        return most - len(prompt)

    def job(self, body: Sampling, prompt: list[int], wanted: int, number: int, num_logprobs: int | None) -> Job:
        capacity = min(self._capacity(prompt), MAX_NEW_TOKENS)
        is_asked = bool(getattr(body, "max_completion_tokens", None) or body.max_tokens)  # type: ignore[attr-defined]
        if wanted > capacity and is_asked and self.settings.is_strict:
            raise HTTPException(
                400, f"{wanted} new tokens do not fit after a prompt of {len(prompt)}; ask for at most {capacity}"
            )
        wanted = min(wanted, capacity)
        risk = self._risk(body.anydepth)
        config = self.service.engine.adapted.generation_config
        chosen = {name: getattr(body, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        options = SamplingOptions.of(config, **chosen, top_k=None if body.top_k is None else max(body.top_k, 0))
        end_ids = [*([] if body.ignore_eos else self.service.end_ids), *(body.stop_token_ids or [])]
        seed = self.seeds.getrandbits(63) if body.seed is None else body.seed + number
        request = decoding.Request(
            prompt,
            self.service.sampler(options, seed, *self._penalties(body, prompt, end_ids)),
            Stops.at(len(prompt) + wanted, end_ids),
            full_depth=body.anydepth.full_depth,
            budget=body.anydepth.depth_budget,
            max_risk=body.anydepth.max_risk,
            num_logprobs=num_logprobs,
            is_traced=body.anydepth.depth,
        )
        # The marks of calls are special tokens in some tokenizers.
        shows_special = body.skip_special_tokens is False or bool(getattr(body, "offered", None))
        stream = TextStream(self.tokenizer, prompt, body.stops, shows_special=shows_special)
        return Job(
            request,
            stream,
            put=lambda piece: None,
            lossless=self._is_lossless(body),
            seconds=self.settings.request_seconds,
            risk=risk,
        )

    def _risk(self, own: Extra) -> float | None:
        """Return the risk of the setting within a request's bound; raise a refusal where no threshold can be set."""
        budgets = self.service.budgets
        if own.depth_budget is not None and budgets is None:
            raise HTTPException(
                400,
                "anydepth.depth_budget: no attached method has a threshold to set, as routers and exit gates have; "
                "leave it out",
            )
        if own.max_risk is None:
            return None
        if budgets is None or budgets.tested is None:
            raise HTTPException(
                400,
                "anydepth.max_risk: this model was not calibrated by risk as it is served; serve a folder that "
                "`anydepth calibrate TARGET --max-risk` wrote, without other options, or leave it out",
            )
        return budgets.within(own.max_risk)[1]

    def _penalties(self, body: Sampling, prompt: list[int], end_ids: list[int]) -> list[LogitsProcessor]:
        """Return the processors of a request that come before temperature and the like."""
        found: list[LogitsProcessor] = []
        if body.bias:
            size = self.service.engine.adapted.config.vocab_size
            if max(body.bias) >= size:
                raise HTTPException(400, f"logit_bias: token ids must be below {size}")
            found.append(LogitBias(body.bias))
        if body.presence_penalty or body.frequency_penalty:
            found.append(Penalties(len(prompt), body.presence_penalty or 0.0, body.frequency_penalty or 0.0))
        if body.min_tokens and end_ids:
            device: Any = self.service.engine.adapted.device
            found.append(MinNewTokensLengthLogitsProcessor(len(prompt), body.min_tokens, end_ids, device=device))
        if body.form is not None:
            try:
                found.append(self.grammars.processor(body.form, len(prompt)))
            except UserError as failed:
                names = ["tools"] if getattr(body, "offered", None) else []
                names += ["response_format"] if body.response_schema is not None else []
                raise HTTPException(400, f"{' or '.join(names)}: {failed}") from failed
        return found

    def _is_lossless(self, body: Sampling) -> bool:
        own = body.anydepth
        if own.lossless is None:
            return self.service.is_lossless and not own.skips and not own.full_depth
        return own.lossless
