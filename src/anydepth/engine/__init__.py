"""The fast engine: prefill and decoding of Llama-like decoders at the speed of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from anydepth.errors import UserError

if TYPE_CHECKING:
    from anydepth.engine.fast import FastEngine
    from anydepth.hf.adapted import AdaptedModel

ENGINES = ("auto", "hf", "fast")


def label_of(adapted: AdaptedModel, *engines: FastEngine | None) -> str:
    """Name what is attached, a LoRA adapter too, and the weights of engines that hold them in fewer bits."""
    from peft import PeftModel

    label = f"{adapted.label} + LoRA" if isinstance(adapted.model, PeftModel) else adapted.label
    packed = dict.fromkeys(engine.model.weights for engine in engines if engine is not None and engine.packs)
    return ", ".join([label, *(f"{kind} weights" for kind in packed)])


def choose(
    adapted: AdaptedModel,
    engine: str = "auto",
    weights: str | None = None,
    say: Callable[[str], None] = print,
    *,
    compiled: bool = False,
) -> FastEngine | None:
    """The fast engine, or None for the Hugging Face model's own `generate`.

    Args:
        engine: `hf`, `fast`, or `auto`: fast where it runs the model; `say` is told why not.
        weights, compiled: of the fast engine, see `FastEngine`.

    Raises:
        UserError: an unknown engine; `fast` for a model that it does not run; weights with `hf`.
    """
    from anydepth.engine.fast import FastEngine

    if engine not in ENGINES:
        raise UserError(f"engine '{engine}' is unknown; engines are {', '.join(ENGINES)}")
    if engine == "hf":
        if weights is not None:
            raise UserError(f"weights {weights} are the fast engine's; use engine fast, or leave them out")
        if compiled:
            raise UserError("compile is the fast engine's; use engine fast, or leave it out")
        return None
    try:
        fast = FastEngine(adapted, weights, compiled=compiled)
    except UserError as error:
        if engine == "fast" or weights is not None or compiled:
            raise
        say(f"engine hf: {error}")
        return None
    if fast.model.why_not_native is not None and not compiled:
        say(f"engine fast, by PyTorch's own operators, slower: {fast.model.why_not_native}")
    return fast


def verifies_bitwise(adapted: AdaptedModel, engine: FastEngine | None) -> bool:
    """Return whether drafts cannot change a token: logits of a verification are those of a plain step, near enough.

    The kernels give the same bits for one token and for several; other operators do not, which in float32 decides
    exact ties alone, in half precision near ties as well.
    """
    import torch

    return adapted.dtype == torch.float32 or (engine is not None and engine.model.why_not_native is None)
