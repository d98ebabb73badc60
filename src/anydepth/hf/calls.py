"""State of the calls of an adapted model, which is not state of the model: the forward in progress, and the last one.

Each thread has its own, so that several threads can run one model at a time. A copy of a model starts without any. A
layer that backward recomputes (gradient checkpointing) belongs to its original forward, whatever ran since.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from anydepth.gating.plan import Plan
    from anydepth.gating.trace import PassRecord
    from anydepth.hf.partial import Run
    from anydepth.methods._base.method import Method

_CHECKPOINT = "_gradient_checkpointing_func"


class Calls(threading.local):
    """State of the calls that this thread makes.

    Attributes:
        run: the forward in progress; None outside of a forward, and at full depth.
        records: records of the forwards of the last sequence.
        enabled, sparse, stand_ins, plan: settings of `disabled`, `masked`, `deciding` and `running`.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.last: Run | None = None
        self.records: list[PassRecord] = []
        self.enabled = True
        self.sparse = True
        self.stand_ins: Sequence[Method] | None = None
        self.plan: Plan | None = None

    def __reduce__(self) -> Any:
        """Copy as the state before any call."""
        return Calls, ()

    @contextmanager
    def setting(self, **values: Any) -> Iterator[None]:
        """Set attributes within a context, and restore them at its end."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


class JoinedCheckpoint:
    """Gradient checkpointing of a layer as a part of the forward that called it.

    Reentrant checkpointing misses gradients of tensors that are not arguments of the layer, such as gates. So the
    non-reentrant kind runs, with the same gradients otherwise and the same memory.
    """

    def __init__(self, own: Callable[..., Any], calls: Calls) -> None:
        self.own, self.calls = own, calls
        self.checkpoint = own
        if isinstance(own, functools.partial):  # as transformers sets it
            self.checkpoint = functools.partial(own.func, *own.args, **{**own.keywords, "use_reentrant": False})

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        run = self.calls.run

        def resumed(*args: Any) -> Any:
            with self.calls.setting(run=run):
                return function(*args)

        return self.checkpoint(resumed, *args)


def join_checkpoints(layers: Sequence[nn.Module], calls: Calls) -> None:
    """Replace the checkpoint functions of layers by `JoinedCheckpoint`, also those set after `attach`."""
    for layer in layers:
        own = layer.__dict__.get(_CHECKPOINT)
        if own is not None and not isinstance(own, JoinedCheckpoint):
            setattr(layer, _CHECKPOINT, JoinedCheckpoint(own, calls))


def leave_checkpoints(layers: Sequence[nn.Module]) -> None:
    """Restore the checkpoint functions that transformers set."""
    for layer in layers:
        joined = layer.__dict__.get(_CHECKPOINT)
        if isinstance(joined, JoinedCheckpoint):
            setattr(layer, _CHECKPOINT, joined.own)
