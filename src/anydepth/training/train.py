"""Training of methods, LoRA adapters or whole models on transformers' Trainer.

Interrupted training goes on with bitwise the same loss curve: the order of the windows, the methods' randomness and
the teacher depend on (seed, step) alone, and the rest is in the Trainer's checkpoints, each of which counts only
once its last file is written.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from anydepth.config import TrainConfig
from anydepth.errors import RunError, UserError
from anydepth.execution.adapted import AdaptedModel, without_adapter
from anydepth.measure.results import write_json
from anydepth.methods.method import Method
from anydepth.models.backbone import unwrap
from anydepth.models.load import is_quantised
from anydepth.training.checkpoint import trainable_state
from anydepth.training.data import WindowDataset
from anydepth.training.losses import distillation_loss, expected_exit_loss, token_losses

STEPS = "steps"
COMPLETE = "history.json"
"""Last file of a training checkpoint: its presence says that the others are whole."""


Row = dict[str, Any]
"""Of the history, one for each optimiser step: `step`, `learning_rate` and `mean_depth`; `lm_loss` and every auxiliary
loss by its name; under `figures` what methods tell that is no loss, their schedules included; and, a hundred times per
training, under `layers` the share of tokens that ran each `mixer` and `ffn`, decisions sampled."""


@dataclass(frozen=True)
class TrainResult:
    """What training did: one row of losses per optimiser step, and how long it took, interrupted sessions included."""

    loss_history: list[Row]
    seconds: float
    tokens_per_second: float


def prepare(model: PreTrainedModel, config: TrainConfig, *, seed: int = 0) -> PreTrainedModel | PeftModel:
    """The model as the recipe trains it: whole, frozen with a LoRA adapter, or just frozen."""
    model.requires_grad_(config.backbone)
    if config.lora is None:
        return model
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target,
    )
    try:
        return get_peft_model(model, lora)  # type: ignore[return-value]
    except ValueError as error:
        raise UserError(f"train.lora.target: {str(error).splitlines()[0]}") from error


def train(
    model: nn.Module,
    windows: Tensor,
    config: TrainConfig,
    out: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    on_step: Callable[[Row], None] | None = None,
) -> TrainResult:
    """Train what asks for a gradient on (N, T) windows; checkpoints go to `out`/steps.

    Args:
        model: an `AdaptedModel`, or a `PeftModel` alone (LoRA at full depth).
        seed: of everything random in training.
        resume: go on from the last complete checkpoint of `out`, if there is one.
        on_step: called with each new row of the loss history.

    Raises:
        UserError: nothing to train. RunError: a gate got no gradient, or the loss is not finite.
    """
    if not trainable_state(model):
        raise UserError("nothing to train: the recipe names no trained method, no train.lora and no train.backbone")
    start = _last_complete(out) if resume else None
    if not resume:
        shutil.rmtree(out / STEPS, ignore_errors=True)
    if config.gradient_checkpointing:
        unwrap(model.model if isinstance(model, AdaptedModel) else model).gradient_checkpointing_enable()
    trainer = AdaptedTrainer(model, windows, config, out / STEPS, seed)
    trainer.on_step = on_step
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    model.eval()
    tokens = config.max_steps * config.batch_size * config.gradient_accumulation_steps * windows.shape[1]
    return TrainResult(trainer.history, trainer.seconds, tokens / max(trainer.seconds, 1e-9))


class AdaptedTrainer(Trainer):
    """transformers' Trainer with the loss terms apart, light checkpoints and a watch on the gates' gradients."""

    def __init__(self, model: nn.Module, windows: Tensor, config: TrainConfig, out: Path, seed: int) -> None:
        self.settings = config
        self.seed = seed
        self.history: list[Row] = []
        self.on_step: Callable[[Row], None] | None = None
        self.first_step = 0
        self.started = time.monotonic()
        self.micro_step = 0
        self.terms: dict[str, float] = defaultdict(float)
        self.figures: dict[str, float] = defaultdict(float)
        batch = config.batch_size * config.gradient_accumulation_steps
        self.windows = WindowDataset(windows, num_items=config.max_steps * batch, seed=seed)
        if isinstance(model, AdaptedModel) and is_quantised(model.model):
            # The Trainer refuses a 4-bit base without; what is trained here stands beside it.
            vars(model)["_hf_peft_config_loaded"] = True
        super().__init__(model=model, args=_arguments(config, out, seed), train_dataset=self.windows)
        self.model_accepts_loss_kwargs = False  # our losses are means already
        self.remove_callback(_progress_callback(self))
        self.add_callback(_StepWatch(self))

    @property
    def seconds(self) -> float:
        """Spent so far, in earlier sessions too."""
        return time.monotonic() - self.started

    @property
    def module(self) -> nn.Module:
        """The model as it was given, never a wrapper of a parallel run."""
        assert isinstance(self.model, nn.Module)
        return self.model

    # --- loss --------------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        adapted = self.module
        methods = list(adapted.methods.values()) if isinstance(adapted, AdaptedModel) else []
        for number, method in enumerate(methods):
            assert isinstance(method, Method)
            step = self.state.global_step
            method.set_progress(step / max(self.settings.max_steps - 1, 1), step)
            method.reseed(_seed_of(self.seed, self.micro_step, number))
        with _execution(adapted, self.settings.execution):
            output = model(**inputs, use_cache=False)
        terms = {"lm_loss": output.loss}
        if isinstance(adapted, AdaptedModel):
            terms |= adapted.auxiliary_losses() | adapted.outcome_losses(output.logits)
            if any(method.learns_by_policy for method in adapted.active_methods):
                terms |= adapted.policy_losses(token_losses(output.logits.detach(), inputs["labels"]))
            for name, exits in adapted.exit_states().items():
                terms[f"{name}/expected"] = expected_exit_loss(
                    exits, output.logits, inputs["labels"], adapted.backbone.logits_of
                )
        weight = 1.0
        distillation = self.settings.distillation
        if distillation is not None and self.state.global_step >= distillation.warmup_steps:
            teacher = _teacher_logits(adapted, inputs)
            terms["distillation"] = distillation_loss(
                output.logits, teacher, inputs["labels"], distillation.temperature
            )
            weight = 1 - distillation.weight
            terms["distillation"] = distillation.weight * terms["distillation"]
        self._note(terms)
        return weight * terms["lm_loss"] + sum(value for name, value in terms.items() if name != "lm_loss")

    def _note(self, terms: dict[str, Tensor]) -> None:
        share = 1 / self.settings.gradient_accumulation_steps
        for name, value in terms.items():
            self.terms[name] += share * value.item()
        if isinstance(self.model, AdaptedModel):
            self.terms["mean_depth"] += share * self.model.last_trace.mean_depth
            for method in self.model.active_methods:
                told = {name: float(getattr(method, name)) for name in method.scheduled}
                for name, figure in {**told, **method.metrics(self.model.context)}.items():
                    self.figures[f"{method.name}/{name}"] += share * figure
        self.micro_step += 1

    def finish_step(self) -> None:
        """One row of the history per optimiser step."""
        row: Row = {"step": self.state.global_step, **self.terms, "learning_rate": self._get_learning_rate()}
        if self.figures:
            row["figures"] = dict(self.figures)
        if (
            isinstance(self.model, AdaptedModel)
            and self.state.global_step % max(self.settings.max_steps // 100, 1) == 0
        ):
            trace = self.model.last_trace
            mixers, ffns = trace.executed_share()
            mixers = [own + other for own, other in zip(mixers, trace.other_share(), strict=True)]
            row["layers"] = {"mixer": [round(share, 4) for share in mixers], "ffn": [round(share, 4) for share in ffns]}
        losses = [*self.terms.values()]
        self.terms, self.figures = defaultdict(float), defaultdict(float)
        self.history.append(row)
        if self.on_step is not None:
            self.on_step(row)
        if not all(map(math.isfinite, losses)):
            raise RunError(f"step {row['step']}: a loss is not finite ({row}); lower train.learning_rate")

    # --- optimiser and data ------------------------------------------------------------------------------------

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        gates = {part for method in _methods_of(self.module) for part in method.gate_parameters()}
        learning = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        routers = [parameter for parameter in learning if parameter in gates]
        others = [parameter for parameter in learning if parameter not in gates]
        settings = self.settings
        groups = [
            {"params": others, "lr": settings.learning_rate},
            {"params": routers, "lr": settings.router_learning_rate or settings.learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], weight_decay=settings.weight_decay
        )
        return self.optimizer

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.windows)  # the dataset itself is in its order, see WindowDataset

    # --- checkpoints -------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = {**trainable_state(self.module), **_method_buffers(self.module)}
        state = {name: value.cpu().contiguous() for name, value in state.items()}
        save_file(state, folder / "trainable.safetensors")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        write_json(folder / COMPLETE, {"micro_step": self.micro_step, "history": self.history, "seconds": self.seconds})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        state = load_file(folder / "trainable.safetensors")
        parameters = {**dict(self.module.named_parameters()), **_method_buffers(self.module)}
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)
        done = json.loads((folder / COMPLETE).read_text())
        self.history, self.micro_step = done["history"], done["micro_step"]
        self.first_step = len(self.history)
        self.started = time.monotonic() - done["seconds"]


class _StepWatch(TrainerCallback):
    """Row per step, and an error when a gate that should learn gets no gradient."""

    def __init__(self, trainer: AdaptedTrainer) -> None:
        self.trainer = trainer
        self.silent: set[str] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not isinstance(self.trainer.model, AdaptedModel):
            return
        gates = [(name, gate) for name, gate in self.trainer.model.methods.named_parameters() if gate.requires_grad]
        silent = {name for name, gate in gates if gate.grad is None or not gate.grad.any()}
        self.silent = silent if self.silent is None else self.silent & silent
        if self.silent and state.global_step + 1 - self.trainer.first_step >= 5:
            raise RunError(
                f"{len(self.silent)} gate parameters got no gradient in 5 steps ({sorted(self.silent)[0]}): every "
                "layer is kept or skipped by all tokens; lower initial_bias or train with execution: masked"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_step()


def _arguments(config: TrainConfig, out: Path, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_gradient_norm,
        bf16=config.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
    )


def _progress_callback(trainer: Trainer) -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    return PrinterCallback if trainer.args.disable_tqdm else ProgressCallback


def _last_complete(out: Path) -> Path | None:
    """The newest whole checkpoint; what a kill left half-written is removed."""
    complete: list[tuple[int, Path]] = []
    for folder in (out / STEPS).glob("checkpoint-*"):
        if (folder / COMPLETE).exists():
            complete.append((int(folder.name.rpartition("-")[2]), folder))
        else:
            shutil.rmtree(folder)
    return max(complete)[1] if complete else None


def _methods_of(model: nn.Module) -> list[Method]:
    attached = model.methods.values() if isinstance(model, AdaptedModel) else ()
    return [method for method in attached if isinstance(method, Method)]


def _method_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What methods learn without a gradient, such as running quantiles."""
    return {name: value for name, value in model.named_buffers() if name.startswith("methods.")}


def _seed_of(seed: int, micro_step: int, number: int) -> int:
    return (seed * 1_000_003 + micro_step) * 31 + number


@contextlib.contextmanager
def _execution(model: nn.Module, execution: str) -> Iterator[None]:
    with model.masked() if isinstance(model, AdaptedModel) and execution == "masked" else contextlib.nullcontext():
        yield


@torch.no_grad()
def _teacher_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the same model with gates and LoRA off."""
    untouched = model.untouched() if isinstance(model, AdaptedModel) else without_adapter(model)
    with untouched:
        return model(input_ids=inputs["input_ids"], use_cache=False).logits
