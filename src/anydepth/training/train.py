"""Train methods, LoRA adapters or all weights of a model on transformers' Trainer.

Interrupted training resumes with bitwise the same losses: the order of the windows, the methods' randomness and the
teacher depend on (seed, step) only, and the rest is in the Trainer's checkpoints. A checkpoint is used only if its last
file is there.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from anydepth.errors import RunError, UserError
from anydepth.gating.shared_batch import batch_mean, num_processes
from anydepth.gating.trace import Trace
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import write_json
from anydepth.methods.compose import NOTHING_TO_TRAIN
from anydepth.models.backbone import is_spread
from anydepth.models.load import is_quantised
from anydepth.recipe import TrainConfig
from anydepth.training.data import WindowDataset, collate
from anydepth.training.diagnostics import gate_decisions, lasting_collapse, training_metrics
from anydepth.training.learner import Learner
from anydepth.training.parallel import check_kind, copy_into, first_alone, part_of, shards_on_cpu, wait_for_all, whole

STEPS = "steps"
COMPLETE = "done.json"
"""The file that is written last into a training checkpoint; if it exists, the others are complete."""
TRAINABLE, OPTIMIZER, SCHEDULER = "trainable.safetensors", "optimizer.safetensors", "scheduler.json"

Row = dict[str, Any]
"""The history of one optimiser step: `step`, `learning_rate`, `mean_depth`, `lm_loss` and every auxiliary loss by name.

`figures` has the methods' schedules and metrics, such as those of sampled gates (`gate_…`). A hundred times per
training, `layers` has the fraction of tokens that ran each `mixer` and `ffn`, and the `softmax` mixer where some layers
have an alternate. `warnings` report gates that have collapsed for a while."""


@dataclass(frozen=True)
class TrainResult:
    """Result of training: one row per optimiser step, and the time, interrupted sessions included."""

    loss_history: list[Row]
    seconds: float
    tokens_per_second: float


def prepare(model: PreTrainedModel, config: TrainConfig, *, seed: int = 0) -> PreTrainedModel | PeftModel:
    """Set which weights of a model are trained: all, those of a new LoRA adapter, or none."""
    if isinstance(model, PeftModel) and (config.lora is not None or config.backbone):
        raise UserError(
            "the target is a PEFT adapter, next to which train.lora and train.backbone cannot train; merge it first: "
            "anydepth export TARGET --as merged --out DIR"
        )
    if is_spread(model):
        raise UserError("device auto leaves weights on the disk, where training cannot change them; give one device")
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
    adapted: AdaptedModel,
    windows: Tensor,
    config: TrainConfig,
    out: Path,
    *,
    seed: int = 0,
    on_step: Callable[[Row], None] = lambda row: None,
) -> TrainResult:
    """Train the parameters with `requires_grad` on (N, T) windows of `pack`; checkpoints go to `out`/steps.

    Training resumes from the last complete checkpoint there; `on_step` gets each new row of the history. Raise
    `UserError` if there is nothing to train, `RunError` if a gate gets no gradient or the loss is not finite.
    """
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise UserError(NOTHING_TO_TRAIN)
    with first_alone():
        start = last_complete(out)
    config = config.with_steps(len(windows))
    if config.gradient_checkpointing:
        adapted.backbone.model.gradient_checkpointing_enable()
    trainer = AdaptedTrainer(adapted, windows, config, out / STEPS, seed, on_step)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    adapted.eval()
    return TrainResult(trainer.history, trainer.seconds, trainer.windows.num_tokens / max(trainer.seconds, 1e-9))


class AdaptedTrainer(Trainer):
    """transformers' Trainer with separate loss terms, small checkpoints and a check of the gates' gradients."""

    def __init__(
        self,
        adapted: AdaptedModel,
        windows: Tensor,
        config: TrainConfig,
        out: Path,
        seed: int,
        on_step: Callable[[Row], None],
    ) -> None:
        self.adapted, self.settings, self.on_step = adapted, config, on_step
        self.history: list[Row] = []
        self.first_step = 0
        self.started = time.monotonic()
        self.terms: dict[str, float] = defaultdict(float)
        self.method_metrics: dict[str, float] = defaultdict(float)
        batch = config.batch_size * config.gradient_accumulation_steps
        self.windows = WindowDataset(windows, num_items=config.num_steps * batch, seed=seed)
        if is_quantised(adapted.model):
            # The Trainer requires this for a 4-bit base; the trained weights are separate.
            vars(adapted)["_hf_peft_config_loaded"] = True
        self.learner = Learner(adapted, config, seed)
        arguments = _arguments(config, out, seed)
        super().__init__(model=self.learner, args=arguments, train_dataset=self.windows, data_collator=collate)
        self.model_accepts_loss_kwargs = False  # the losses are means already
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepWatch(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled |= shards_on_cpu(self.accelerator)
        check_kind(self.accelerator)

    @property
    def seconds(self) -> float:
        """Time so far, earlier sessions included."""
        return time.monotonic() - self.started

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        self.learner.step = self.state.global_step
        loss, terms = model(**inputs)
        weight, trace = 1 / self.settings.gradient_accumulation_steps, self.adapted.last_trace
        for name, term in terms.items():
            self.terms[name] += weight * term.item()
        self.terms["mean_depth"] += weight * trace.mean_depth
        for name, value in self._metrics(trace).items():
            self.method_metrics[name] += weight * value
        return loss

    def _metrics(self, trace: Trace) -> dict[str, float]:
        """Return the metrics and schedules of all methods in the last forward."""
        adapted = self.adapted
        gating = [method for method in adapted.attached if method.decides_in_training or method.is_frozen]
        metrics = training_metrics(gate_decisions(trace, gating))
        for method in adapted.trained_methods:
            own = {name: float(getattr(method, name)) for name in method.scheduled} | method.metrics(adapted.context)
            metrics |= {f"{method.name}/{name}": value for name, value in own.items()}
        return metrics

    def finish_step(self) -> None:
        """Add a row to the history, the mean over all processes."""
        step = self.state.global_step
        terms, metrics = self._mean_over_processes(self.terms), self._mean_over_processes(self.method_metrics)
        self.terms, self.method_metrics = defaultdict(float), defaultdict(float)
        row: Row = {"step": step, **terms, "learning_rate": self._get_learning_rate()}
        if metrics:
            row["figures"] = metrics
        if step % max(self.settings.num_steps // 100, 1) == 0:
            row["layers"] = self._fractions_by_layer()
            if warnings := lasting_collapse([*self.history, row], self.adapted.attached, self.settings.num_steps):
                row["warnings"] = warnings
        self.history.append(row)
        self.on_step(row)
        if not all(map(math.isfinite, terms.values())):
            raise RunError(f"step {step}: a loss is not finite ({row}); lower train.learning_rate")

    def _fractions_by_layer(self) -> dict[str, list[float]]:
        """Return the fraction of tokens of the last forward that ran each mixer and FFN, over all processes."""
        trace = self.adapted.last_trace
        (mixers, ffns), others = trace.executed_share(), trace.other_share()
        parts = {"mixer": [own + other for own, other in zip(mixers, others, strict=True)], "ffn": ffns}
        if any(method.routes_mixers for method in self.adapted.attached):
            parts["softmax"] = mixers
        means = batch_mean(torch.tensor(list(parts.values()), device=self.args.device)).tolist()
        return {which: [round(fraction, 4) for fraction in part] for which, part in zip(parts, means, strict=True)}

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        means = batch_mean(torch.tensor(list(values.values()), dtype=torch.float64, device=self.args.device))
        return dict(zip(values, means.tolist(), strict=True))

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        settings = self.settings
        gates = {part for method in self.adapted.trained_methods for part in method.gate_parameters()}
        learning = [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]
        rates = ((False, settings.learning_rate), (True, settings.router_learning_rate or settings.learning_rate))
        groups = [
            {"params": [part for part in learning if (part in gates) == is_gate], "lr": rate} for is_gate, rate in rates
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        return self.optimizer

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.windows)  # the dataset is already in order, see WindowDataset

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = {name: whole(value.detach()).cpu().contiguous() for name, value in _learned(self.adapted).items()}
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / TRAINABLE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save full tensors by the parameters' names, so that any number of processes can resume."""
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = {
            f"{name}/{key}": whole(value).cpu().contiguous()
            for name, parameter in self.adapted.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        if self.args.should_save:
            save_file(state, Path(output_dir, OPTIMIZER))
            write_json(Path(output_dir, SCHEDULER), scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        parameters = dict(self.adapted.named_parameters())
        for path, value in load_file(Path(checkpoint, OPTIMIZER)).items():
            name, _, key = path.rpartition("/")
            parameter = parameters[name]
            # A count of steps stays on the host; other state is placed as its parameter.
            value = value if value.dim() == 0 else part_of(value.to(parameter.device), parameter)
            optimizer.state[parameter][key] = value
        scheduler.load_state_dict(json.loads(Path(checkpoint, SCHEDULER).read_text()))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        wait_for_all()  # until each process has saved its state
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            done = {"forwards": self.learner.forwards, "history": self.history, "seconds": self.seconds}
            write_json(folder / COMPLETE, done)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained(self.adapted, folder)
        done = json.loads((folder / COMPLETE).read_text())
        self.history, self.learner.forwards = done["history"], done["forwards"]
        self.first_step = len(self.history)
        self.started = time.monotonic() - done["seconds"]


def load_trained(adapted: AdaptedModel, folder: Path) -> None:
    """Copy a training checkpoint into a model, sharded or not."""
    own = _learned(adapted)
    for name, value in load_file(folder / TRAINABLE).items():
        copy_into(own[name], value)


def _learned(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return what training changes, by name: weights, and buffers of methods, such as running quantiles."""
    weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    return weights | {name: buffer for name, buffer in adapted.named_buffers() if name.startswith("methods.")}


class _StepWatch(TrainerCallback):
    """A callback that finishes steps, and raises an error if a gate in training gets no gradient."""

    def __init__(self, trainer: AdaptedTrainer) -> None:
        self.trainer = trainer
        self.silent: set[str] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        named = self.trainer.adapted.methods.named_parameters()
        gates = [(name, gate) for name, gate in named if gate.requires_grad]
        silent = {name for name, gate in gates if gate.grad is None or not whole(gate.grad).any()}
        self.silent = silent if self.silent is None else self.silent & silent
        if self.silent and state.global_step + 1 - self.trainer.first_step >= 5:
            raise RunError(
                f"{len(self.silent)} gate parameters got no gradient in 5 steps ({sorted(self.silent)[0]}): every "
                "layer is kept or skipped by all tokens; lower initial_bias or train with execution: masked"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_step()


def _arguments(config: TrainConfig, out: Path, seed: int) -> TrainingArguments:
    if config.batch_size % num_processes():
        raise UserError(
            f"train.batch_size is {config.batch_size}, and {num_processes()} processes share it; give a multiple of "
            "them, and fewer train.gradient_accumulation_steps"
        )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.num_steps,
        per_device_train_batch_size=config.batch_size // num_processes(),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_gradient_norm,
        bf16=config.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every parameter has a gradient, see `Learner`
        ddp_backend="gloo" if num_processes() > 1 and not torch.cuda.is_available() else None,
        seed=seed,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device per process, no replicas in threads
    return arguments


def last_complete(out: Path) -> Path | None:
    """Return the newest complete checkpoint, and remove incomplete ones."""
    complete: list[tuple[int, Path]] = []
    for folder in (out / STEPS).glob("checkpoint-*"):
        if (folder / COMPLETE).exists():
            complete.append((int(folder.name.rpartition("-")[2]), folder))
        else:
            shutil.rmtree(folder)
    return max(complete)[1] if complete else None
