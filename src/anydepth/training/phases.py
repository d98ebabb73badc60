"""Several trainings in turn, each of some methods, such as first routers and then exits.

Each phase trains in a separate folder, so that an interrupted run resumes in its phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.recipe import PhaseConfig, TrainConfig
from anydepth.training.train import Row, TrainResult, train

PHASES = "phases"


def train_phases(
    adapted: AdaptedModel,
    windows: Tensor,
    config: TrainConfig,
    phases: Sequence[PhaseConfig],
    out: Path,
    *,
    seed: int = 0,
    on_step: Callable[[Row], None] = lambda row: None,
) -> tuple[AdaptedModel, TrainResult]:
    """Train the methods of `adapted` phase by phase on (N, T) windows; a phase may replace settings of `config`.

    A method that a phase neither trains nor freezes is detached in it; a frozen one decides as at inference. Return the
    model with all of its methods attached, and the losses of all phases in order, each with its `phase`.
    """
    configs = {method.name: method.config for method in adapted.attached}
    states = {name: part.state_dict() for name, part in adapted.methods.items()}
    history: list[Row] = []
    seconds = tokens = 0.0
    for number, phase in enumerate(phases):
        adapted = attach(detach(adapted), [configs[name] for name in configs if name in (*phase.train, *phase.frozen)])
        _load_states(adapted, states)
        _require_gradients(adapted, phase)

        def report(row: Row, number: int = number, first: int = len(history)) -> None:
            on_step(_numbered(row, number, first))

        settings, folder = _settings(config, phase), out / PHASES / phase.name
        result = train(adapted, windows, settings, folder, seed=seed + number, on_step=report)
        states |= {name: part.state_dict() for name, part in adapted.methods.items()}
        history += [_numbered(row, number, len(history)) for row in result.loss_history]
        seconds, tokens = seconds + result.seconds, tokens + result.tokens_per_second * result.seconds
    adapted = attach(detach(adapted), list(configs.values()))
    _load_states(adapted, states)
    return adapted.eval(), TrainResult(history, seconds, tokens / max(seconds, 1e-9))


def _numbered(row: Row, phase: int, first: int) -> Row:
    """Return a row of a phase that starts after `first` steps as a row of the whole training."""
    return {**row, "step": row["step"] + first, "phase": phase}


def _settings(config: TrainConfig, phase: PhaseConfig) -> TrainConfig:
    own = {key: getattr(phase, key) for key in ("learning_rate", "router_learning_rate", "warmup_steps")}
    length = {"max_steps": phase.max_steps, "num_epochs": phase.num_epochs}
    return config.model_copy(update=length | {key: value for key, value in own.items() if value is not None})


def _load_states(adapted: AdaptedModel, states: dict[str, dict[str, Tensor]]) -> None:
    for name, part in adapted.methods.items():
        part.load_state_dict(states[name])


def _require_gradients(adapted: AdaptedModel, phase: PhaseConfig) -> None:
    for method in adapted.attached:
        method.is_frozen = method.name in phase.frozen
        method.requires_grad_(not method.is_frozen)
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(phase.train_lora)
