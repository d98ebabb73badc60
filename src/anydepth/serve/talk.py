"""A conversation in turns, through a `Service`."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Stops
from anydepth.decoding.sampling_options import SamplingOptions
from anydepth.errors import RunError, UserError
from anydepth.serve.service import Job, Piece, Service
from anydepth.serve.text_stream import TextStream


class Talk:
    """What was said so far, and the next answer.

    Args:
        system: what the model is told first.
        temperature: 0 is greedy; the other options of sampling are the model's own defaults.
        lossless: answers of full depth.
    """

    def __init__(
        self,
        service: Service,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        *,
        lossless: bool = False,
        seed: int = 0,
    ) -> None:
        self.service, self.tokenizer, self.max_new_tokens, self.lossless = service, tokenizer, max_new_tokens, lossless
        self.turns = [] if system is None else [{"role": "system", "content": system}]
        options = SamplingOptions.of(service.engine.adapted.generation_config, temperature=temperature)
        self.processors = options.processors()
        self.is_greedy, self.seed, self.num_answers = options.is_greedy, seed, 0

    def answer(self, line: str) -> Iterator[tuple[str, float]]:
        """Pieces of the answer, each with the layers run for it. A caller that stops listening ends it.

        Raises:
            UserError: the conversation is longer than the model's window. RunError: decoding failed.
        """
        turns = [*self.turns, {"role": "user", "content": line}]
        prompt = list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        room = self._room(len(prompt))
        sampler = self.service.sampler(self.processors, self._new_generator())
        stops = Stops.at(len(prompt) + min(room, self.max_new_tokens), self.service.end_ids)
        request = Request(prompt, sampler, stops)  # type: ignore[arg-type]
        pieces: queue.Queue[Piece] = queue.Queue()
        stream = TextStream(self.tokenizer, request.prompt)
        job = Job(request, stream, pieces.put, lossless=self.lossless, wants_layers=True)
        self.service.submit(job)
        said = ""
        try:
            while True:
                piece = pieces.get()
                if piece.finish_reason == "error":
                    raise RunError("decoding failed")
                depths = [sum(token.layers or []) for token in piece.tokens]
                said += piece.text
                yield piece.text, sum(depths) / max(len(depths), 1)
                if piece.finish_reason is not None:
                    return
        finally:
            self.service.cancel(job)
            self.turns = [*turns, {"role": "assistant", "content": said}]

    def _new_generator(self) -> torch.Generator | None:
        """Return the generator of the next answer; None for greedy answers.

        Each answer has its own: drafts of an earlier one draw noise for tokens that it never takes.
        """
        if self.is_greedy:
            return None
        generator = torch.Generator(device=self.service.engine.adapted.device)
        self.num_answers += 1
        return generator.manual_seed((self.seed + self.num_answers - 1) % 2**63)

    def _room(self, num_prompt: int) -> int:
        window = getattr(self.service.engine.adapted.config, "max_position_embeddings", None)
        most = min(length for length in (window, self.service.scheduler.session.max_length) if length is not None)
        if num_prompt >= most:
            raise UserError(f"the conversation has {num_prompt} tokens, and the model takes {most}; begin a new one")
        return most - num_prompt
