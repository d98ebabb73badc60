"""Drafting for a model: its settings, the weights of a trained network, and drafters that come with the package.

With any drafter, generated tokens are those of full depth, sampled ones too. LayerSkip (Elhoushi et al. 2024), SWIFT
(Xia et al. 2024), EAGLE (Li et al. 2024), prompt lookup (Saxena 2023).
"""

# The types of torch and safetensors are not complete; a file alone can relax rules of `strict`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from anydepth.config import validate
from anydepth.decoding.engine import Engine
from anydepth.decoding.int4 import int4_blocks
from anydepth.draft_sections import DraftConfig
from anydepth.engine.model import EngineModel
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.method import Method, check_layers
from anydepth.models.backbone import Backbone, unwrap
from anydepth.models.load import base_fingerprint
from anydepth.speculation.drafters import (
    Drafter,
    EarlyExitDrafter,
    Head,
    PromptLookupDrafter,
    PrunedDrafter,
    searched_drafter,
)
from anydepth.speculation.drafting import Drafting
from anydepth.speculation.quantised_drafter import PrunedCopyDrafter, QuantisedDrafter, copy_of
from anydepth.speculation.trained_drafter import DraftNetwork, TrainedDrafter

log = logging.getLogger("anydepth")
COPY = {"quantised": "auto"}
"""Options of drafting for any model."""
WEIGHTS, MANIFEST, SCALE = "drafter.safetensors", "drafter.json", ".scale"
"""Files of a shipped drafter, and the suffix of its scales."""


class Draft(nn.Module):
    """Settings of drafting for a model, and the weights of a trained drafter: `FastEngine(adapted, draft=Draft(…))`.

    Args:
        options: a `DraftConfig`, or its options.

    Raises:
        UserError: options that do not fit the model.
    """

    network: DraftNetwork | None

    def __init__(self, adapted: AdaptedModel, options: DraftConfig | Mapping[str, Any]) -> None:
        super().__init__()
        config = options if isinstance(options, DraftConfig) else validate(DraftConfig, dict(options), where="draft")
        self.config, self.network = config, None
        check_draft(config, adapted.backbone, adapted.attached)
        if config.network is not None:
            size = min(config.network.vocabulary_size, adapted.config.vocab_size)
            generator = torch.Generator().manual_seed(config.seed)
            try:
                self.network = DraftNetwork(adapted.backbone, _taps(config, adapted.backbone), size, generator)
            except RuntimeError as error:
                raise UserError(
                    "draft.network starts from a copy of the last layer, which has to be plain; merge LoRA, and load "
                    "without nf4"
                ) from error
        self.to(adapted.device)

    def on(self, engine: Engine) -> Drafting:
        """Open the drafters on an engine.

        Raises:
            UserError: the engine supports none of the drafters.
        """
        drafters = self._drafters(engine)
        if not drafters:
            raise UserError(
                "there is no drafter for this engine: a trained one and a quantised copy run on the fast engine; use "
                "engine fast, turn lookup on, or set exit_layers"
            )
        return self._drafting(drafters)

    def _drafting(self, drafters: Sequence[Drafter]) -> Drafting:
        captures = sorted({layer for drafter in drafters for layer in drafter.captures})
        return Drafting(drafters, self.config.max_draft, self.config.adaptive, captures)

    def _drafters(self, engine: Engine) -> list[Drafter]:
        config, adapted = self.config, engine.adapted
        small: list[Drafter] = [PromptLookupDrafter()] if config.lookup else []
        if self.network is not None and engine.model is not None:
            small.append(TrainedDrafter(engine.model, self.network))
        drafters = [*small, *self._exits(engine.exit_logits, adapted.device)]
        pruning = [method for method in adapted.active_methods if not method.is_lossless()]
        if pruning:
            drafters.append(PrunedDrafter(pruning))
        copy = self._copy(engine)
        if copy is not None and pruning:
            drafters.append(PrunedCopyDrafter(copy, pruning))
        elif copy is not None:
            exits = self._exits(lambda states, vocabulary: copy.exit_head(vocabulary)(states), copy.device)
            drafters.append(QuantisedDrafter(copy, self._drafting([*small, *exits])))
        if config.search is not None:
            drafters.append(searched_drafter(config.search, adapted))
        return drafters

    def _exits(self, head: Head, device: torch.device) -> list[Drafter]:
        size = self.config.exit_vocabulary
        vocabulary = None if size is None else torch.arange(size, device=device)
        return [EarlyExitDrafter(layer, head, vocabulary) for layer in self.config.exit_layers]

    def _copy(self, engine: Engine) -> EngineModel | None:
        """Return the copy that drafts for an engine's model, or None."""
        model, weights = engine.model, self.config.quantised
        if model is None or weights is None:
            return None
        if weights == "auto":
            return copy_of(model)
        blocks = int4_blocks(engine.adapted, engine.without_draft, log.warning) if weights == "int4" else None
        return EngineModel(model.backbone, weights, native=model.why_not_native is None, blocks=blocks)


def check_draft(config: DraftConfig, backbone: Backbone, attached: Sequence[Method]) -> None:
    """Raise `UserError` for options that do not fit a model and the methods attached to it."""
    if (why := why_no_draft(backbone, attached)) is not None:
        raise UserError(why)
    vocabulary_size = backbone.model.config.vocab_size
    if 0 in config.exit_layers:
        raise UserError("draft.exit_layers has 0; a draft needs at least one layer")
    if config.exit_vocabulary is not None and config.exit_vocabulary > vocabulary_size:
        raise UserError(
            f"draft.exit_vocabulary is {config.exit_vocabulary}; it must be at most {vocabulary_size}, the model's "
            f"{vocabulary_size} tokens"
        )
    try:
        check_layers(config.exit_layers, backbone.num_layers, "draft.exit_layers")
        taps = _taps(config, backbone)
        check_layers([tap - 1 for tap in taps], backbone.num_layers, "draft.network.taps, less one,")
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.network is not None:
        if taps[-1] != backbone.num_layers:
            raise UserError(
                f"draft.network.taps end with {taps[-1]}; the last must be {backbone.num_layers}, the layer that the "
                "head reads"
            )
        if config.exit_layers and max(config.exit_layers) > taps[0]:
            raise UserError(f"draft.network.taps start with {taps[0]}; they must come after exit_layers")


def _taps(config: DraftConfig, backbone: Backbone) -> list[int]:  # counted from 1
    taps = [] if config.network is None else config.network.taps
    return sorted(taps) or [backbone.num_layers]


def why_no_draft(backbone: Backbone, attached: Sequence[Method]) -> str | None:
    """Return why a model cannot draft, with the methods attached to it; None: it can."""
    if "recurrent" in backbone.layer_types():
        return "drafting removes rejected tokens, which a recurrent layer's state cannot undo; leave draft out"
    names = [method.name for method in attached if method.routes_mixers]
    return f"drafting removes rejected tokens, which {names[0]}'s recurrent mixers cannot undo" if names else None


# --- drafters that come with the package -----------------------------------------------------------------------------
# They are stored in 8 bits with a scale per row, as the fast engine reads them: a few MB.


def folder() -> Path:
    return Path(str(files("anydepth") / "shipped"))


def default_draft(adapted: AdaptedModel) -> Draft:
    """Return the shipped draft of a base model, else one with prompt lookup, a copy, and the attached methods."""
    known = {path: json.loads(path.read_text()) for path in folder().glob(f"*/{MANIFEST}")}
    fingerprint = base_fingerprint(unwrap(adapted.model), light=True) if known else None
    for path, manifest in known.items():
        if manifest["base"] == fingerprint:
            draft = Draft(adapted, {**COPY, **manifest["options"]})
            assert draft.network is not None
            draft.network.load_state_dict(unpack(load_file(path.with_name(WEIGHTS))))
            return draft
    return Draft(adapted, COPY)


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 weights, and int64 ids, of packed ones."""
    weights: dict[str, Tensor] = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in packed:
            weights[name] = value.float() * packed[name + SCALE].float()[:, None]
        else:
            weights[name] = value.float() if value.is_floating_point() else value.long()
    return weights
