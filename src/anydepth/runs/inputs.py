"""The model, texts and methods that the stages of a recipe read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.config import StrictConfig
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import read_document
from anydepth.methods.compose import method_configs
from anydepth.methods.layer_router import LayerRouter
from anydepth.models.load import AUTO, load_model
from anydepth.models.scratch import scratch_folder
from anydepth.recipe import AnalyzeConfig, DataConfig, DType, EvalConfig, Recipe, RouterFitConfig, TextConfig
from anydepth.speculation.draft import Draft
from anydepth.training.checkpoint import is_checkpoint, load_draft, load_target
from anydepth.training.corpora import load_texts
from anydepth.training.data import load_windows


@dataclass(frozen=True)
class Inputs:
    """The inputs of the stages of one recipe, with their results in the folder `out`."""

    recipe: Recipe
    out: Path

    def base(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """Load the recipe's base model and its tokenizer; train the tokenizer of a model from scratch first."""
        model, target = self.recipe.model, self.recipe.model.target
        if model.scratch is not None:
            folder = scratch_folder(model.scratch, self._texts, self.out / "scratch", seed=self.recipe.seed)
            target = str(folder)
        # Whole models learn in float32: small steps are lost in 16-bit weights.
        learns = self.recipe.train is not None and self.recipe.train.backbone
        return load_model(
            target,
            dtype="float32" if learns and model.dtype == AUTO else model.dtype,
            device=model.device,
            quantisation=model.quantisation,
            attention=model.attention,
        )

    def adapted(
        self, *, merge: bool, dtype: DType | None = None
    ) -> tuple[AdaptedModel, PreTrainedTokenizerBase, Draft | None]:
        """Load the checkpoint of the train stage."""
        assert is_checkpoint(self.out), "the train stage leaves a checkpoint, trained or not"
        model = self.recipe.model
        adapted, tokenizer = load_target(str(self.out), dtype=dtype or model.dtype, device=model.device, merge=merge)
        return adapted, tokenizer, load_draft(str(self.out), adapted)

    def _texts(self) -> list[str]:
        data = self.recipe.data
        return load_texts(data.train, lines=data.lines, min_chars=data.min_chars, max_documents=data.max_documents)

    def windows(self, corpus: str, tokenizer: PreTrainedTokenizerBase, size: DataConfig | EvalConfig) -> Tensor:
        """Return the windows that the recipe trains on, or is scored on."""
        limits = {"max_windows": size.max_windows, "max_documents": size.max_documents}
        return load_windows(corpus, tokenizer, size.sequence_length, **limits, text=self.recipe.data)

    def packed(self, corpus: str, tokenizer: PreTrainedTokenizerBase, size: RouterFitConfig | AnalyzeConfig) -> Tensor:
        """Return windows of one length, for stages that compare windows with each other."""
        return load_windows(corpus, tokenizer, size.sequence_length, max_windows=size.num_windows, text=self.packing)

    @property
    def packing(self) -> TextConfig:
        """The recipe's text options without isolated documents."""
        return self.recipe.data.model_copy(update={"isolate_documents": False})

    def methods(self) -> list[StrictConfig]:
        """Return the recipe's methods, with the skip set of the search stage where they leave it open."""
        path = self.out / "search.json"
        if self.recipe.search is None or not path.exists():
            return method_configs(self.recipe)
        found = read_document(path)
        methods = [dict(method) for method in self.recipe.methods]
        by_name = {method["name"]: method for method in methods}
        if "skip_set" in by_name:
            for key in ("skip_layers", "skip_mixers", "skip_ffns"):
                by_name["skip_set"].setdefault(key, found[key])
        elif "layer_router" in by_name:
            router = by_name["layer_router"]
            first = router.get("always_keep", LayerRouter.Config.model_fields["always_keep"].default)
            skipped = found["skip_layers"] + (found["skip_mixers"] if router.get("branch") == "mixer" else [])
            router.setdefault("initial_skip_layers", [i for i in skipped if i >= first])
        return method_configs(self.recipe.model_copy(update={"methods": methods}))
