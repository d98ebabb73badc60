"""Checks of a recipe, its texts and the shape of its base model before the first stage runs.

A mistake that would end the last stage is reported at once. No weights are loaded: the base model is built on PyTorch's
`meta` device from its configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anydepth.calibration.shares import nothing_to_calibrate
from anydepth.decoding.generate import check_window
from anydepth.errors import UserError
from anydepth.measure.evaluate import check_prompt
from anydepth.methods import method_class
from anydepth.methods._base.calibration import Calibrated, comparing
from anydepth.methods._base.method import Method
from anydepth.methods.compose import build_methods, check_training, method_configs
from anydepth.models.backbone import Backbone
from anydepth.models.families import FAMILIES
from anydepth.models.load import source_of
from anydepth.models.scratch import build_decoder
from anydepth.recipe import ModelConfig, Recipe
from anydepth.search.router_fit import NO_ROUTER, learned_router
from anydepth.search.skip_search import num_left_out
from anydepth.speculation.draft import check_draft
from anydepth.training.corpora import check_corpus
from anydepth.training.data import load_windows
from anydepth.training.train import prepare


@dataclass(frozen=True)
class Need:
    """Text that a stage needs: at least `count` windows of `length` tokens of `corpus`; `option` names the length."""

    option: str
    corpus: str
    length: int
    count: int = 1
    max_documents: int | None = None


def check(recipe: Recipe, stages: Collection[str]) -> None:
    """Raise `UserError` for what would end one of `stages` (of `runs/run.py`), as far as it can be known."""
    check_training(recipe)
    check_prompt(recipe.eval.prompt_tokens, recipe.eval.sequence_length)
    if recipe.drafter is not None and (recipe.draft is None or recipe.draft.network is None):
        raise UserError(
            "drafter trains the network of draft, which has none; give draft a network, or leave drafter out"
        )
    _check_search(recipe)
    model, tokenizer = _base(recipe.model)
    # Without the model it is not known under which options a method compares scores.
    compares = any(issubclass(method_class(str(method["name"]), "methods"), Calibrated) for method in recipe.methods)
    if model is not None:
        methods = _check_methods(recipe, model)
        compares = bool(comparing(methods))
        if "bench" in stages:
            check_window(model, max(recipe.bench.prompt_tokens), recipe.bench.new_tokens)
        if "generate" in stages and tokenizer is not None:
            num_prompt = len(tokenizer(recipe.generate.prompt)["input_ids"])  # type: ignore[arg-type]
            check_window(model, num_prompt, recipe.generate.max_new_tokens)
    for need in _texts(recipe, stages, compares or recipe.calibrate is not None):
        _check_text(need, recipe, model, tokenizer)


def _texts(recipe: Recipe, stages: Collection[str], compares: bool) -> Iterator[Need]:
    """Yield the text that `stages` need; if a threshold decides (`compares`), training measures on that of eval."""
    data, evaluation, bench = recipe.data, recipe.eval, recipe.bench
    if "search" in stages and recipe.search is not None:
        yield Need("search.sequence_length", data.train, recipe.search.sequence_length)
    if "fit" in stages and recipe.router_fit is not None:
        yield Need("router_fit.sequence_length", data.train, recipe.router_fit.sequence_length, 2)
    if "train" in stages and (recipe.train is not None or compares):
        yield Need("data.sequence_length", data.train, data.sequence_length, 1, data.max_documents)
    if "train" in stages and compares:
        yield Need("eval.sequence_length", evaluation.data, min(evaluation.sequence_length, data.sequence_length))
    if "eval" in stages:
        yield Need("eval.sequence_length", evaluation.data, evaluation.sequence_length, 1, evaluation.max_documents)
    if "bench" in stages:
        length, count = max(bench.prompt_tokens), max(bench.batch_sizes)
        yield Need("bench.prompt_tokens", bench.data or evaluation.data, length, count)
    if "analyze" in stages:
        length = recipe.analyze.sequence_length
        yield Need("analyze.sequence_length", recipe.analyze.data or evaluation.data, length)


def _check_text(
    need: Need, recipe: Recipe, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if tokenizer is None:
        check_corpus(need.corpus)
        return
    if model is not None and need.length > (most := _most_positions(model)):
        raise UserError(f"{need.option} is {need.length}; this model has only {most} positions; give a smaller one")
    text = recipe.data.model_copy(update={"isolate_documents": False}) if need.count > 1 else recipe.data
    limits = {"max_windows": need.count, "max_documents": need.max_documents}
    windows = load_windows(need.corpus, tokenizer, need.length, text=text, **limits)
    if len(windows) < need.count:
        raise UserError(
            f"{need.option}: {need.count} windows of {need.length} tokens are needed, and {need.corpus} has "
            f"{len(windows)}; give more text or shorter windows"
        )


def _most_positions(model: PreTrainedModel) -> float:
    """Return the most positions of a text; infinite for rotary embeddings and ALiBi."""
    config = model.config
    rotates = getattr(config, "rope_parameters", None) is not None or getattr(config, "alibi", False)
    return float("inf") if rotates else getattr(config, "max_position_embeddings", float("inf"))


def _check_search(recipe: Recipe) -> None:
    takers = {"skip_set": ("skip_layers", "skip_mixers", "skip_ffns"), "layer_router": ("initial_skip_layers",)}
    takes = any(set(takers.get(str(method["name"]), ())) - method.keys() for method in recipe.methods)
    if recipe.search is not None and not takes:
        raise UserError(
            "search finds a skip set and no method takes it: name skip_set without its lists, or layer_router without "
            "initial_skip_layers, or leave search out"
        )


def _base(model: ModelConfig) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]:
    """Return the base model without weights and its tokenizer; None for each that is known only after loading."""
    if model.scratch is not None:
        with torch.device("meta"):
            return build_decoder(model.scratch, model.scratch.tokenizer.size, 0, seed=0), None
    source = source_of(model.target)
    if source.gguf is not None:
        return None, None
    try:
        config = AutoConfig.from_pretrained(source.name, revision=source.revision)
        tokenizer = AutoTokenizer.from_pretrained(source.name, revision=source.revision)
    except (OSError, ValueError):
        return None, None
    if config.model_type not in FAMILIES:
        return None, None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), tokenizer


def _check_methods(recipe: Recipe, model: PreTrainedModel) -> list[Method]:
    """Return the methods. Raise `UserError` for options that do not fit the model, or a stage without its method."""
    backbone = Backbone(model)
    methods = build_methods(method_configs(recipe), backbone)
    if recipe.draft is not None:
        check_draft(recipe.draft, backbone, methods)
    if recipe.search is not None:
        if recipe.search.branches:
            backbone.check_branches("a search of branches")
        num_left_out(backbone.num_layers, recipe.search.budget, branches=recipe.search.branches)
    if recipe.router_fit is not None and learned_router(methods) is None:
        raise UserError(NO_ROUTER)
    if recipe.calibrate is not None and not comparing(methods):
        raise UserError(nothing_to_calibrate(" + ".join(method.name for method in methods) or "full depth"))
    if recipe.train is not None:
        with warnings.catch_warnings(action="ignore"):  # PEFT repeats them when training begins.
            prepare(model, recipe.train)
    return methods
