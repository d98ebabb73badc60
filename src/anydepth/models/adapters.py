"""PEFT adapters as targets: the base that a folder names, and adapters loaded onto their base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from anydepth.errors import UserError
from anydepth.models.reading import reading
from anydepth.models.target import ADAPTER, is_local

if TYPE_CHECKING:
    from peft import PeftModel


def adapter_base(folder: Path) -> str:
    """Return the target that a PEFT adapter was trained on."""
    try:
        config = json.loads((folder / ADAPTER).read_text())
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / ADAPTER} is damaged or no PEFT configuration ({error}); copy it again") from error
    if not base or not isinstance(base, str):
        raise UserError(f"the PEFT adapter {folder} names no base model; set base_model_name_or_path in its {ADAPTER}")
    if (Path(base) / ADAPTER).exists():
        raise UserError(f"the PEFT adapter {folder} has another adapter as its base, {base}; merge that one first")
    if is_local(base) and not Path(base).exists():
        raise UserError(f"the base model of the PEFT adapter {folder} is missing: there is no {base}; restore it there")
    is_revised = revision not in (None, "main") and "@" not in base and not Path(base).exists()
    return f"{base}@{revision}" if is_revised else base


def add_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> PreTrainedModel | PeftModel:
    """Load PEFT adapters from folders by name onto their base model; all are active and frozen."""
    wrapped: Any = model
    if folders:
        from peft import PeftModel
    for number, (name, folder) in enumerate(folders.items()):
        with reading(f"the PEFT adapter {folder}"), warnings.catch_warnings():
            # PEFT cannot merge into tied weights; `fold_adapters` unties them.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            if number:
                wrapped.load_adapter(str(folder), name)
            else:
                wrapped = PeftModel.from_pretrained(model, str(folder), name)
    if len(folders) > 1:
        wrapped.base_model.set_adapter(list(folders), inference_mode=True)
    return wrapped
