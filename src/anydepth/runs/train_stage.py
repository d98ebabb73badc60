"""The train stage: attach, train and calibrate; afterwards the run's folder is a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from anydepth.calibration.shares import NotTrained, settle_shares
from anydepth.draft_sections import DraftConfig, DrafterConfig
from anydepth.errors import UserError
from anydepth.gating.shared_batch import num_processes
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.methods._base.calibration import comparing
from anydepth.processes import is_parallel, rank, shards_weights
from anydepth.recipe import TrainConfig
from anydepth.runs.inputs import Inputs
from anydepth.speculation.draft import Draft
from anydepth.speculation.drafter_training import train_drafter
from anydepth.speculation.self_generated import OWN_TEXT, own_texts
from anydepth.training.checkpoint import save
from anydepth.training.data import load_windows, rows_of
from anydepth.training.diagnostics import diagnose
from anydepth.training.parallel import first_alone, is_sharded, part
from anydepth.training.phases import train_phases
from anydepth.training.train import STEPS, last_complete, load_trained, prepare, train

FITTED = "fit.safetensors"
"""The router that the fit stage leaves in the run's folder."""
TABLE_WINDOWS, HELD_OUT_WINDOWS = 2, 4
"""Windows that score quantiles are collected on after training, and that skipped fractions are measured on."""


@dataclass(frozen=True)
class Training(Inputs):
    """The train stage of one recipe, on its inputs."""

    say: Callable[[str], None]
    on_step: Callable[[dict[str, Any]], None]

    def run(self) -> dict[str, Any]:
        """Attach, train, calibrate and save; return the fields of `anydepth.train/1`.

        Several processes train together; the first one alone does what follows training.
        """
        recipe = self.recipe
        if is_parallel() and (recipe.drafter is not None or (recipe.phases and shards_weights())):
            raise UserError(
                "drafter trains in one process, and phases train without sharded weights; start fewer, or use DDP"
            )
        with first_alone():
            model, tokenizer = self.base()
        wrapped: nn.Module = model if recipe.train is None else prepare(model, recipe.train, seed=recipe.seed)
        adapted = attach(wrapped, self.methods())
        if recipe.router_fit is not None:
            adapted.methods.load_state_dict(load_file(self.out / FITTED))
        fields: dict[str, Any] = {"loss_history": [], "seconds": 0.0, "tokens_per_second": 0.0}
        if recipe.train is not None:
            adapted, trained = self._train(adapted, tokenizer, recipe.train)
            fields |= trained
        sharded = is_sharded(adapted)
        fields |= {"checkpoint": str(self.out), "num_processes": num_processes(), "sharded": sharded}
        part()
        if rank() > 0:
            return fields
        return fields | self._finish(self._gathered() if sharded else adapted, tokenizer)

    def _train(
        self, adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, settings: TrainConfig
    ) -> tuple[AdaptedModel, dict[str, Any]]:
        """Train what the recipe names, in phases if it has some; resume where training was interrupted."""
        windows = self.windows(self.recipe.data.train, tokenizer, self.recipe.data)
        shared: dict[str, Any] = {"seed": self.recipe.seed, "on_step": self.on_step}
        if self.recipe.phases:
            adapted, result = train_phases(adapted, windows, settings, self.recipe.phases, self.out, **shared)
        else:
            result = train(adapted, windows, settings, self.out, **shared)
        return adapted, asdict(result)

    def _finish(self, adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Train the drafter's network, set thresholds, diagnose the gates, and save the checkpoint."""
        recipe, fields = self.recipe, {}
        draft = None if recipe.draft is None else Draft(adapted, _seeded(recipe.draft, recipe.seed))
        if recipe.drafter is not None and draft is not None:
            fields |= self._train_drafter(recipe.drafter, adapted, draft, tokenizer)
        try:
            fields |= self._set_thresholds(adapted, tokenizer)
            if any(method.has_learned_gates for method in adapted.trained_methods):
                windows = self.windows(recipe.data.train, tokenizer, recipe.data)
                fields["gates"] = diagnose(adapted, rows_of(windows))
                self._warn([text for own in fields["gates"] for text in own["warnings"]])
        finally:  # The trained weights are kept even where measuring them fails.
            has_own_base = recipe.train is not None and recipe.train.backbone
            save(adapted, self.out, own_base=tokenizer if has_own_base else None, draft=draft)
        detach(adapted)
        return fields

    def _set_thresholds(self, adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Set thresholds if the recipe calibrates, and measure the skipped fractions on held-out text."""
        recipe, settings = self.recipe, self.recipe.calibrate
        windows = self.windows(recipe.data.train, tokenizer, recipe.data)
        if settings is None and not comparing(adapted.attached):
            return {}
        windows = windows[: TABLE_WINDOWS if settings is None else settings.num_windows]
        length = min(recipe.eval.sequence_length, windows.shape[1])
        held_out = load_windows(recipe.eval.data, tokenizer, length, max_windows=HELD_OUT_WINDOWS, text=recipe.data)
        try:
            found = settle_shares(adapted, windows, held_out, None if settings is None else settings.skip_share)
        except NotTrained:
            if settings is not None:
                raise
            return {}
        self._warn(found["warnings"])
        return found

    def _warn(self, warnings: list[str]) -> None:
        for text in warnings:
            self.say(f"warning: {text}")

    def _gathered(self) -> AdaptedModel:
        """Return the unsharded model, loaded from the last checkpoint of sharded training."""
        assert self.recipe.train is not None
        model, _ = self.base()
        adapted = attach(prepare(model, self.recipe.train, seed=self.recipe.seed), self.methods())
        folder = last_complete(self.out)
        assert folder is not None, "training ends with a checkpoint"
        load_trained(adapted, folder)
        return adapted.eval()

    def _train_drafter(
        self, settings: DrafterConfig, adapted: AdaptedModel, draft: Draft, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        network, seed = draft.network, self.recipe.seed
        assert network is not None, "the recipe was checked"
        texts, written = own_texts(
            adapted, tokenizer, network.taps, settings.own_text, self.out / OWN_TEXT, say=self.say, seed=seed
        )
        num_tokens = sum(len(text.ids) for text in texts)
        self.say(f"{num_tokens} tokens in {len(texts)} texts; training the drafter …")
        history = train_drafter(
            network, adapted.backbone, texts, settings, self.out / STEPS, resume=True, on_step=self.on_step, seed=seed
        )
        return {
            "loss_history": history,
            "writing_seconds": written,
            "seconds": history[-1]["seconds"],
            "tokens_per_second": len(history) * settings.batch_tokens / history[-1]["seconds"],
            "num_own_tokens": num_tokens,
        }


def _seeded(config: DraftConfig, seed: int) -> DraftConfig:
    """Return the options of drafting with the recipe's seed, unless they have one of their own."""
    return config if "seed" in config.model_fields_set else config.model_copy(update={"seed": seed})
