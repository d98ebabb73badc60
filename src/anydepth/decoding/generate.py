"""Generation on an engine: transformers' `generate` with our decode loop, and texts with the depth of every token.

Options, logits processors and stop rules are transformers' own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode

from anydepth.decoding.engine import Engine
from anydepth.decoding.request import DraftCounts, Request
from anydepth.decoding.sampler import GREEDY, JointStops, Sampler, Stops
from anydepth.decoding.scheduler import Scheduler
from anydepth.errors import UserError
from anydepth.gating.trace import PassRecord, Trace, joined_rows
from anydepth.hf.adapted import AdaptedModel
from anydepth.models.tokens import end_ids, padded

UNSUPPORTED = ("assistant_model", "inputs_embeds", "position_ids", "past_key_values")
"""Options of `generate` that would otherwise be ignored silently."""
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def generate_batch(
    engine: Engine,
    *args: Any,
    streamer: Any = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Generate on an engine as `adapted.generate` does; return (B, prompt + new) token ids, ended rows padded.

    Raises:
        UserError: an option that the loop lacks, a mask other than left padding, or stop strings without a tokenizer.
    """
    for option in UNSUPPORTED:
        if kwargs.get(option) is not None:
            raise UserError(f"{option} is not supported here; leave it out, or use engine hf at full depth")
    _check_padding(kwargs.get("attention_mask"))
    # transformers 5.23 sends the prompt to the streamer, but passes neither it nor the tokenizer to a custom loop.
    stopping_criteria = StoppingCriteriaList(list(stopping_criteria or []))
    if stop_strings is not None:
        if tokenizer is None:
            raise UserError("stop_strings are matched with the tokens' texts; pass tokenizer= as well")
        stopping_criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return engine.adapted.generate(
        *args,
        custom_generate=partial(_decode, engine, streamer=streamer),
        streamer=streamer,
        stopping_criteria=stopping_criteria,
        **kwargs,
    )


def _check_padding(mask: Tensor | None) -> None:
    if mask is None:
        return
    real = mask.bool()
    if real.dim() != 2 or not real[:, -1].all() or not torch.equal(real.long().cummax(1).values.bool(), real):
        raise UserError(
            "attention_mask must have its zeros before the tokens, and every row at least one token; pad on the left "
            '(tokenizer.padding_side = "left")'
        )


def _check_mode(config: GenerationConfig, engine: Engine) -> None:
    runner = "drafting" if engine.drafts else "the fast engine"
    mode = config.get_generation_mode()
    if mode not in MODES or config.return_dict_in_generate:
        got = f"mode {mode.value}" if mode not in MODES else "return_dict_in_generate"
        raise UserError(
            f"{runner} decodes greedily or samples, and returns token ids; got {got}, which engine hf has at full depth"
        )
    if type(config.watermarking_config).__name__.startswith("SynthID"):
        raise UserError(
            f"{runner} may call logits processors several times for a token, but SynthID watermarking counts its "
            "calls; use engine hf at full depth"
        )
    if config.guidance_scale is not None and config.guidance_scale != 1:
        raise UserError(
            f"{runner} has no classifier-free guidance; got guidance_scale {config.guidance_scale}, which engine hf "
            "has at full depth"
        )


@torch.no_grad()
def _decode(
    engine: Engine,
    hf_model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Decode (B, prompt) token ids in place of transformers' loop; return (B, prompt + new) token ids."""
    _check_mode(generation_config, engine)
    mask, adapted = kwargs.get("attention_mask"), engine.adapted
    engine.check_batch(input_ids, mask, generation_config.max_length)
    num_rows, num_prompt = input_ids.shape
    padding = [0] * num_rows if mask is None else (mask == 0).sum(1).tolist()
    has_end = generation_config._eos_token_tensor is not None  # without one transformers continues rows that ended
    stops = Stops(stopping_criteria) if has_end or num_rows == 1 else JointStops(stopping_criteria, num_rows)
    sampler = Sampler(
        logits_processor,
        num_rows,
        adapted.config.vocab_size,
        input_ids.device,
        sampling=bool(generation_config.do_sample),
        drafts=engine.drafts,
    )
    requests = [
        Request(ids, sampler, stops, num_padding=num_padding, row=row, is_drafted=engine.drafts)
        for row, (ids, num_padding) in enumerate(zip(input_ids.tolist(), padding, strict=True))
    ]
    pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    output = _Output(requests, pad, streamer)
    with engine.turn:
        Scheduler(engine, num_rows, is_interactive=False).run(requests, output.put)
    length = stops.length if isinstance(stops, JointStops) else None
    length = max(len(request.ids) for request in requests) if length is None else length
    sampler.noise.rewind(length - num_prompt)
    token_ids = output.end(length).to(input_ids.device)
    engine.last.counts = None
    if engine.drafts:
        engine.last.counts = DraftCounts()
        for request in requests:
            engine.last.counts.add(request.counts)
        adapted.records = full_depth_records(token_ids, mask, num_prompt, adapted.backbone.num_layers)
    elif adapted.is_enabled:
        adapted.records = _records(requests, num_prompt)
    return token_ids


class _Output:
    """The token ids of a batch, as transformers returns and streams them; `pad` fills rows after their end."""

    def __init__(self, requests: Sequence[Request], pad: int, streamer: Any) -> None:
        self.requests, self.pad, self.streamer = requests, pad, streamer
        self.num_put = requests[0].num_prompt

    def put(self) -> None:
        """Send the streamer each step once all rows have taken it."""
        if self.streamer is not None:
            longest = max(len(request.ids) for request in self.requests)
            self._put(min(longest if request.is_finished else len(request.ids) for request in self.requests))

    def _put(self, length: int) -> None:
        for position in range(self.num_put, length):
            self.streamer.put(torch.tensor([self._token(request, position) for request in self.requests]))
        self.num_put = max(self.num_put, length)

    def end(self, length: int) -> Tensor:
        if self.streamer is not None:
            self._put(length)
            self.streamer.end()
        rows = [request.ids[:length] for request in self.requests]
        return torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])

    def _token(self, request: Request, position: int) -> int:
        return request.ids[position] if position < len(request.ids) else self.pad


def _records(requests: Sequence[Request], num_prompt: int) -> list[PassRecord]:
    """Return records of the passes over the prompts, the last ones of all rows together, and of each token."""
    read = [_num_reads(request) for request in requests]
    rows = [[*[None] * (max(read) - own), *request.passes] for request, own in zip(requests, read, strict=True)]
    passes = [[row[number] if number < len(row) else None for row in rows] for number in range(max(map(len, rows)))]
    sizes = [max(found[0].token_mask.shape[1] for found in one if found is not None) for one in passes]
    sizes[0] = num_prompt - sum(sizes[1 : max(read)])  # padding of all rows included
    return [joined_rows(one, size) for one, size in zip(passes, sizes, strict=True)]


def _num_reads(request: Request) -> int:
    """Return how many passes read the prompt of a request."""
    num_tokens = request.num_prompt - request.num_padding - request.num_known
    lengths = accumulate(record.token_mask.shape[1] for record, _ in request.passes)
    return 1 + sum(length < num_tokens for length in lengths)


def full_depth_records(ids: Tensor, mask: Tensor | None, num_prompt: int, num_layers: int) -> list[PassRecord]:
    """Return records of the prompt and of each token after it, all at full depth.

    Args:
        ids: (B, prompt + new) token ids. mask: (B, prompt), False at padding.
    """
    real = torch.ones_like(ids[:, :-1], dtype=torch.bool)
    if mask is not None:
        real[:, :num_prompt] = mask.bool()
    lengths = [num_prompt, *[1] * (real.shape[1] - num_prompt)]
    positions = accumulate([0, *lengths])
    return [
        PassRecord(part, position, cached=True, num_layers=num_layers, head_rows=len(part))
        for part, position in zip(real.split(lengths, dim=1), positions, strict=False)
    ]


# --- texts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_text(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue a prompt; return the fields of `anydepth.generate/1`.

    Args:
        temperature: 0 is greedy; any other value samples with `seed`.

    Raises:
        UserError: an empty prompt, or one that does not fit the model's window with `max_new_tokens`.
    """
    adapted = engine.adapted
    inputs = padded(tokenizer, [prompt], adapted.device)
    num_prompt = inputs["input_ids"].shape[1]
    check_window(adapted, num_prompt, max_new_tokens)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > GREEDY}
    if temperature > GREEDY:
        sampling["temperature"] = temperature
    if ends := sorted(end_ids(adapted, tokenizer)):
        sampling["eos_token_id"] = ends
    started = time.perf_counter()
    token_ids = engine.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
    )[0, num_prompt:]
    seconds = time.perf_counter() - started
    layers, depths = _depths(adapted, num_prompt, len(token_ids))
    ids = torch.cat([inputs["input_ids"][0], token_ids]).tolist()
    mixers = _mixers(adapted.last_trace, [str(tokenizer.decode([token_id])) for token_id in ids])
    counts = engine.draft_counts if engine.drafts else None
    return {
        "prompt": prompt,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "token_ids": token_ids.tolist(),
        "tokens": [tokenizer.decode([token_id]) for token_id in token_ids.tolist()],
        "depths": depths,
        "layers": layers,
        "num_layers": adapted.backbone.num_layers,
        "tokens_per_second": len(token_ids) / seconds,
        **mixers,
        **({} if counts is None else counts.to_json()),
    }


def check_window(model: AdaptedModel | PreTrainedModel, num_prompt: int, max_new_tokens: int) -> None:
    """Raise `UserError` for an empty prompt, or one that does not fit the model's window with the new tokens."""
    if num_prompt == 0:
        raise UserError("the prompt is empty; give at least one word")
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens must be at least 1; got {max_new_tokens}")
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None and num_prompt + max_new_tokens > window:
        raise UserError(
            f"the prompt has {num_prompt} tokens; with {max_new_tokens} new ones that is more than the model's window "
            f"of {window}; shorten the prompt to {max(window - max_new_tokens, 0)} tokens or ask for fewer new ones"
        )


def _mixers(trace: Trace, tokens: list[str]) -> dict[str, Any]:
    """Return the field `mixers` of models that route tokens between mixers, else no field.

    It has the `layers` with an alternate mixer, the `tokens` that ran (all but the last), and for each token whether
    it ran `softmax` attention in each of those layers.
    """
    layers = [layer_idx for layer_idx, fraction in enumerate(trace.other_share()) if fraction]
    if not layers:
        return {}
    softmax = trace.mixer_keep[layers, 0].T.tolist()
    return {"mixers": {"layers": layers, "tokens": tokens[: len(softmax)], "softmax": softmax}}


def _depths(adapted: AdaptedModel, num_prompt: int, num_new: int) -> tuple[list[list[float]], list[float]]:
    """Return for each new token the layers that ran to predict it (0, ½ or 1 each), and their sum.

    The prompt's last token predicts the first new token, which predicts the second, and so on.
    """
    trace = adapted.last_trace
    ran: Tensor = ((trace.mixer_keep | trace.other_keep)[:, 0].float() + trace.ffn_keep[:, 0].float()) / 2
    by_token = ran[:, num_prompt - 1 : num_prompt - 1 + num_new].T
    return by_token.tolist(), by_token.sum(1).tolist()
