"""Forward hooks for models that several threads run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


class Hooks(ExitStack):
    """Forward hooks that only forwards of the current thread call; they are removed at the end of `with`."""

    def before(self, module: nn.Module, hook: Callable[..., object], *, with_kwargs: bool = False) -> None:
        """Call `hook(module, args)`, or `hook(module, args, kwargs)`, before each forward of a module."""
        handle = module.register_forward_pre_hook(_of_this_thread(hook), with_kwargs=with_kwargs)
        self.callback(handle.remove)

    def after(self, module: nn.Module, hook: Callable[..., object]) -> None:
        """Call `hook(module, args, output)` after each forward of a module."""
        self.callback(module.register_forward_hook(_of_this_thread(hook)).remove)


def _of_this_thread(hook: Callable[..., object]) -> Callable[..., None]:
    thread = threading.get_ident()

    def own(*args: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args)

    return own
