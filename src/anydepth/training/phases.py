"""Several trainings in turn, each of some methods, such as first routers and then exits.

Each phase saves its result in a separate folder, complete or not at all, so that an interrupted run resumes in its
phase.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.json_io import write_json
from anydepth.methods._base.method import Method
from anydepth.processes import rank
from anydepth.recipe import PhaseConfig, TrainConfig
from anydepth.training.parallel import wait_for_all
from anydepth.training.train import Row, TrainResult, train

PHASES = "phases"
STATE = "state.safetensors"
DONE = "phase.json"
"""The file that is written last into a phase's folder."""


def train_phases(
    adapted: AdaptedModel,
    windows: Tensor,
    config: TrainConfig,
    phases: Sequence[PhaseConfig],
    out: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    on_step: Callable[[Row], None] | None = None,
) -> tuple[AdaptedModel, TrainResult]:
    """Train the methods of `adapted` phase by phase on (N, T) windows.

    A method that a phase neither trains nor freezes is detached in it; a frozen one decides as at inference.

    Args:
        config: the settings of every phase, which a phase may replace.

    Returns:
        The model with all of its methods attached, and the losses of all phases in order, each with its `phase`.
    """
    configs = {method.name: method.config for method in adapted.active_methods}
    states = {name: part.state_dict() for name, part in adapted.methods.items()}
    history: list[Row] = []
    seconds = tokens = 0.0
    for number, phase in enumerate(phases):
        folder = out / PHASES / phase.name
        model = detach(adapted)
        adapted = attach(model, [configs[name] for name in configs if name in (*phase.train, *phase.frozen)])
        _load_states(adapted, states)
        if not all((folder / name).exists() for name in (STATE, DONE)):
            _require_gradients(adapted, phase)

            def report(row: Row, first: int = len(history), number: int = number) -> None:
                if on_step is not None:
                    on_step({**row, "step": row["step"] + first, "phase": number})

            settings = _settings(config, phase)
            result = train(adapted, windows, settings, folder, seed=seed + number, resume=resume, on_step=report)
            if rank() == 0:
                _save(adapted, folder, result)
            wait_for_all()
        done = json.loads((folder / DONE).read_text())
        _restore(adapted, load_file(folder / STATE))
        states |= {name: part.state_dict() for name, part in adapted.methods.items()}
        history += [{**row, "step": row["step"] + len(history), "phase": number} for row in done["loss_history"]]
        seconds, tokens = seconds + done["seconds"], tokens + done["tokens_per_second"] * done["seconds"]
    adapted = attach(detach(adapted), list(configs.values()))
    _load_states(adapted, states)
    return adapted.eval(), TrainResult(history, seconds, tokens / max(seconds, 1e-9))


def _settings(config: TrainConfig, phase: PhaseConfig) -> TrainConfig:
    own = {key: getattr(phase, key) for key in ("learning_rate", "router_learning_rate", "warmup_steps")}
    length = {"max_steps": phase.max_steps, "num_epochs": phase.num_epochs}
    return config.model_copy(update=length | {key: value for key, value in own.items() if value is not None})


def _load_states(adapted: AdaptedModel, states: dict[str, dict[str, Tensor]]) -> None:
    for name, part in adapted.methods.items():
        part.load_state_dict(states[name])


def _require_gradients(adapted: AdaptedModel, phase: PhaseConfig) -> None:
    for name, method in adapted.methods.items():
        assert isinstance(method, Method)
        method.is_frozen = name in phase.frozen
        method.requires_grad_(not method.is_frozen)
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(phase.train_lora)


def _adapter(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return the parameters of the LoRA adapter by name."""
    if not isinstance(adapted.model, PeftModel):
        return {}
    return {f"model.{name}": part for name, part in adapted.model.named_parameters() if "lora_" in name}


def _save(adapted: AdaptedModel, folder: Path, result: TrainResult) -> None:
    """Write the methods with their buffers and the adapter, and then `DONE`."""
    methods = {f"methods.{name}": part for name, part in adapted.methods.state_dict().items()}
    state = {name: part.detach().cpu().contiguous() for name, part in {**methods, **_adapter(adapted)}.items()}
    save_file(state, folder / STATE)
    fields: dict[str, Any] = {
        "loss_history": result.loss_history,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    write_json(folder / DONE, fields)


@torch.no_grad()
def _restore(adapted: AdaptedModel, state: dict[str, Tensor]) -> None:
    own = {f"methods.{name}": part for name, part in adapted.methods.state_dict(keep_vars=True).items()}
    for name, part in {**own, **_adapter(adapted)}.items():
        part.copy_(state[name])
