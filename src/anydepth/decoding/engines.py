"""The engines: transformers and the fast engine, with one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anydepth.cores import THREADS
from anydepth.decoding.engine import Draft, Engine
from anydepth.decoding.generate import generate_batch
from anydepth.decoding.int4 import int4_blocks
from anydepth.engine.backends.cpu.native import why_not
from anydepth.engine.model import EngineModel
from anydepth.engine.session import FastSession
from anydepth.engine.weights import Int4
from anydepth.errors import Unsupported, UserError
from anydepth.gating import cost
from anydepth.gating.plan import FULL_DEPTH
from anydepth.hf.adapted import AdaptedModel
from anydepth.hf.session import HFSession
from anydepth.models.blocks import Blocks
from anydepth.models.load import dtype_name
from anydepth.models.plain import is_peft


class HFEngine(Engine):
    """Runs the Hugging Face model itself, of any family; without a draft by transformers' own `generate`."""

    name = "hf"

    def __init__(self, adapted: AdaptedModel, draft: Draft | None = None) -> None:
        self.weights = dtype_name(adapted)
        super().__init__(adapted, draft)

    def new_session(self, num_sequences: int, max_length: int | None = None, captures: Sequence[int] = ()) -> HFSession:
        return HFSession(self.adapted, num_sequences, max_length)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Generate by transformers' own loop; drafted requests run one by one, each with its own cache."""
        if not self.drafts:
            self.last.counts = None
            THREADS.adapt()
            return self.adapted.generate(*args, **kwargs)
        return generate_batch(self, *args, **kwargs)

    @torch.no_grad()
    def logits(self, token_ids: Tensor, num_prompt: int = 0) -> Tensor:
        if num_prompt:
            return super().logits(token_ids, num_prompt)
        with self.adapted.running(FULL_DEPTH) if self.drafts else nullcontext():
            return self.adapted(input_ids=token_ids[None], use_cache=False).logits[0]

    def check_batch(self, input_ids: Tensor, mask: Tensor | None, max_length: int | None) -> None:
        """Raise `UserError` where a row's tokens would depend on the length of other rows, or on its padding.

        A rotary embedding that changes with the length changes for a whole batch at once, when its longest row,
        padding included, is that long; rows that draft run alone.
        """
        switch = self.adapted.backbone.rotary_switch
        if switch is None or (len(input_ids) == 1 and (mask is None or bool(mask.all()))):
            return
        if max_length is None or max_length > switch.length:
            raise UserError(
                f"this model's rotary embedding changes at {switch.length} tokens, for all rows of a batch at once, "
                "and rows that draft run alone; generate prompts one by one without padding, or at full depth "
                "(adapted.disabled())"
            )

    def exit_logits(self, states: Tensor, vocabulary: Tensor | None) -> Tensor:
        return self.adapted.backbone.logits_of(states, vocabulary)

    def weight_bytes(self) -> tuple[list[tuple[int, int]], int]:
        backbone = self.adapted.backbone
        return [cost.branch_weight_bytes(view) for view in backbone.layers], cost.weight_bytes(backbone.head)

    def expert_bytes(self) -> list[int]:
        return [cost.expert_bytes(view) for view in self.adapted.backbone.layers]


class FastEngine(Engine):
    """Decodes Llama-like families at the speed of the memory.

    Holds a second, packed copy of the weights; later changes (training, a LoRA adapter) do not reach it.

    Args:
        weights: float32, bfloat16, float16, int8, int4, int4-nearest or native; None is the model's own precision.
        draft: see `Engine`.
        native: decode with the compiled kernels where they are available, else with PyTorch's own operators.
        compiled: run the branches through `torch.compile` instead, for GPUs; the first start takes a minute.
        blocks: for int4, linear layers that are rounded already, by module name (`int4_blocks`); the others are
            rounded to the nearest.

    Raises:
        UserError: a family or weights that the engine does not support.
    """

    name = "fast"
    model: EngineModel
    shares_prefixes = True

    def __init__(
        self,
        adapted: AdaptedModel,
        weights: str | None = None,
        *,
        draft: Draft | None = None,
        native: bool = True,
        compiled: bool = False,
        blocks: Mapping[str, Blocks] | None = None,
    ) -> None:
        for method in adapted.attached:
            if method.routes_mixers:
                raise Unsupported(f"{method.name} has alternate mixers, which the fast engine lacks; use engine hf")
        self.model = EngineModel(adapted.backbone, weights, native=native, compiled=compiled, blocks=blocks)
        self.weights = self.model.weights
        super().__init__(adapted, draft)

    def new_session(
        self, num_sequences: int, max_length: int | None = None, captures: Sequence[int] = ()
    ) -> FastSession:
        return FastSession(self.model, num_sequences, max_length, captures)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Generate with transformers' options: greedy or sampled, for any batch with left padding."""
        return generate_batch(self, *args, **kwargs)

    def exit_logits(self, states: Tensor, vocabulary: Tensor | None) -> Tensor:
        return self.model.exit_head(vocabulary)(states)

    def weight_bytes(self) -> tuple[list[tuple[int, int]], int]:
        return [(layer.mixer_bytes, layer.ffn_bytes) for layer in self.model.layers], self.model.head.num_bytes

    def expert_bytes(self) -> list[int]:
        return [0 if layer.mixture is None else layer.mixture.expert_bytes for layer in self.model.layers]


ENGINES = ("auto", "hf", "fast")


def label_of(*engines: Engine) -> str:
    """Return a label of the attached methods, a LoRA adapter, and quantised weights of the engines."""
    adapted = engines[0].adapted
    label = f"{adapted.label} + LoRA" if is_peft(adapted.model) else adapted.label
    packed = dict.fromkeys(engine.weights for engine in engines if engine.is_quantised)
    return ", ".join([label, *(f"{kind} weights" for kind in packed)])


def open_engine(
    adapted: AdaptedModel,
    engine: str = "auto",
    weights: str | None = None,
    say: Callable[[str], None] = print,
    *,
    draft: Draft | None = None,
    compiled: bool = False,
) -> Engine:
    """Return the engine of a name.

    Args:
        engine: `hf`, `fast`, or `auto`: fast if it supports the model.
        weights: precision of the fast engine's weights, see `FastEngine`.
        compiled: option of the fast engine, see `FastEngine`.
        say: called with one line if `auto` chooses hf, or if the compiled kernels are not available.

    Raises:
        UserError: an unknown engine; `fast` for a model that it does not support; weights with `hf`.
    """
    if engine not in ENGINES:
        raise UserError(f"engine '{engine}' is unknown; engines are {', '.join(ENGINES)}")
    if engine == "hf":
        if weights is not None:
            raise UserError(f"weights {weights} are the fast engine's; use engine fast, or leave weights out")
        if compiled:
            raise UserError("compile is an option of the fast engine; use engine fast, or leave compile out")
        return HFEngine(adapted, draft)
    try:
        blocks = None
        if weights == Int4.name and why_not(torch.bfloat16, adapted.device) is None:
            blocks = int4_blocks(adapted, partial(FastEngine, adapted), say)
        fast = FastEngine(adapted, weights, draft=draft, compiled=compiled, blocks=blocks)
    except UserError as error:
        if engine == "fast" or weights is not None or compiled:
            raise
        say(f"engine hf: {error}")
        return HFEngine(adapted, draft)
    if fast.model.why_not_native is not None and not compiled:
        say(f"engine fast with PyTorch's own operators, which are slower: {fast.model.why_not_native}")
    return fast
