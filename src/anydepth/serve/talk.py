"""A conversation in turns, on a `Service`."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Stops
from anydepth.decoding.sampling_options import SamplingOptions
from anydepth.errors import RunError, UserError
from anydepth.serve.service import Job, Piece, Service
from anydepth.serve.text_stream import TextStream


class Talk:
    """A conversation: the turns so far, and the next answer.

    All sampling options except `temperature` are the model's defaults.
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
        self.options = SamplingOptions.of(service.engine.adapted.generation_config, temperature=temperature)
        self.seed = seed  # of the next answer: drafts of an earlier one draw noise for tokens that it never takes

    def answer(self, line: str) -> Iterator[tuple[str, float]]:
        """Yield pieces of the answer, each with its mean depth in layers; closing the generator cancels the answer.

        Raise `UserError` if the conversation is longer than the model's window, `RunError` if decoding fails.
        """
        turns = [*self.turns, {"role": "user", "content": line}]
        prompt = list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        most = self.service.max_length
        if len(prompt) >= most:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, of at most {most - 1} that fit; begin a new one"
            )
        sampler = self.service.sampler(self.options, self.seed)
        self.seed += 1
        stops = Stops.at(min(most, len(prompt) + self.max_new_tokens), self.service.end_ids)
        request = Request(prompt, sampler, stops)  # type: ignore[arg-type]
        pieces: queue.Queue[Piece] = queue.Queue()
        stream = TextStream(self.tokenizer, request.prompt)
        job = Job(request, stream, pieces.put, lossless=self.lossless)
        self.service.submit(job)
        text = ""
        try:
            while True:
                piece = pieces.get()
                if piece.finish_reason == "error":
                    raise RunError("decoding failed; the log says why")
                depths = [sum(token.layers or []) for token in piece.tokens]
                text += piece.text
                yield piece.text, sum(depths) / max(len(depths), 1)
                if piece.finish_reason is not None:
                    return
        finally:
            self.service.cancel(job)
            self.turns = [*turns, {"role": "assistant", "content": text}]
