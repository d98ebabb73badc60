"""Checkpoints: the methods' weights and configs, the LoRA adapter if there is one, and the name of the base.

The base is in the checkpoint only if training changed it. A folder has `weights-<hash>/` and `anydepth.json`, the
manifest, which is replaced atomically and last, so that a crash while saving keeps the former checkpoint. Its section
`run` says how the model is to be run: type, engine, weights, drafting.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anydepth.config import refuse_training_only
from anydepth.draft_sections import DRAFT as DRAFT_SECTION
from anydepth.draft_sections import OLD_NAME, split_draft
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.json_io import write_json
from anydepth.methods._base.calibration import comparing
from anydepth.models.adapters import add_adapters
from anydepth.models.backbone import is_spread, unwrap
from anydepth.models.load import AUTO, DType, base_fingerprint, is_quantised, load_model
from anydepth.models.plain import fold_adapters, is_peft
from anydepth.models.target import ADAPTER, EMBEDDED, MANIFEST, local_folder
from anydepth.speculation.draft import Draft, default_draft

SCHEMA = "anydepth.checkpoint/1"
METHODS, DRAFT = "methods.safetensors", "draft.safetensors"
BASE = "base"  # folder of a trained base, next to the methods' weights


def save(
    adapted: AdaptedModel,
    folder: str | Path,
    *,
    base: str | None = None,
    own_base: PreTrainedTokenizerBase | None = None,
    draft: Draft | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write what anydepth added to the model into `folder`.

    Args:
        base: target to load the base model from; its `name_or_path` by default.
        own_base: the tokenizer of a trained base; both are written too, as a Hugging Face checkpoint.
        draft: the drafting of the model, its trained network included.
        run: how commands run the folder by default: `dtype`, `engine`, `weights`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = adapted.model
    staging = folder / f".staging-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for part, file in ((adapted.methods, METHODS), (draft, DRAFT)):
        if part is not None:
            save_file({name: tensor.contiguous() for name, tensor in part.state_dict().items()}, staging / file)
    adapters = model.active_adapters if is_peft(model) else []
    if is_peft(model):
        model.save_pretrained(str(staging / "adapter"), save_embedding_layers=False, selected_adapters=adapters)
    elif getattr(model, "_hf_peft_config_loaded", False):
        raise UserError("this model's adapter was added by transformers, without a wrapper; load it by peft.PeftModel")
    if own_base is not None:
        unwrap(model).save_pretrained(str(staging / BASE))
        own_base.save_pretrained(str(staging / BASE))
    files = {str(path.relative_to(staging)): _digest(path) for path in sorted(staging.rglob("*")) if path.is_file()}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    weights = folder / f"weights-{digest[:12]}"
    shutil.rmtree(weights, ignore_errors=True)
    staging.rename(weights)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "methods": [{"name": method.name, **method.config.model_dump(mode="json")} for method in adapted.attached],
        "run": {**(run or {}), "draft": None if draft is None else draft.config.model_dump(mode="json")},
        "adapters": adapters,
        "weights": weights.name,
        "files": files,
    }
    biases = not _trains_biases(folder, manifest)
    manifest["base"] = {
        "target": None if own_base is not None else _from_anywhere(base or unwrap(model).name_or_path),
        "fingerprint": None if is_quantised(model) else base_fingerprint(model, biases=biases),
        "light_fingerprint": base_fingerprint(model, light=True, biases=biases),
        "quantisation": "nf4" if is_quantised(model) else None,
    }
    write_json(folder / MANIFEST, manifest)
    for old in folder.glob("weights-*"):
        if old != weights:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def load(folder: str | Path, *, base: str | None = None, dtype: DType = AUTO, device: str = "cpu") -> AdaptedModel:
    """Load the base model with the methods of a checkpoint attached.

    Args:
        folder: a folder that `save` wrote, or the hub name of one that `push_to_hub` uploaded, also `name@revision`.
        base: target to load the base from instead of the recorded one; it must be the same model.

    Raises:
        UserError: no checkpoint in the folder, a damaged file, or another base.
    """
    return _load(local_folder(folder), base, dtype, device, merge=False)[0]


def load_target(
    target: str,
    *,
    dtype: DType = AUTO,
    device: str = "cpu",
    merge: bool = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    skip_share: float | None = None,
    native: bool = False,
) -> tuple[AdaptedModel, PreTrainedTokenizerBase]:
    """Load a `TARGET` of the command line, a checkpoint folder or a base model, and its tokenizer.

    Raise `UserError` for no such target, an override of a method that is not attached, or no score quantiles.

    Args:
        merge: fold adapters into the weights, which is faster; the base is then no longer available.
        overrides: options by method that replace those of the target; those of `draft` are for `load_draft`.
        skip_share: fraction of decisions to skip, set by the score quantiles of the target.
        native: as in `load_model`; a checkpoint needs a .gguf file as its base, and no adapter.
    """
    if is_checkpoint(target):
        adapted, tokenizer = _load(local_folder(target), None, dtype, device, merge=merge, native=native)
    else:
        model, tokenizer = load_model(target, dtype=dtype, device=device, native=native)
        adapted = attach(_merged(model) if merge else model, [])
    if own := {name: options for name, options in (overrides or {}).items() if name != DRAFT_SECTION}:
        adapted = with_options(adapted, own)
    if skip_share is not None:
        methods = comparing(adapted.attached)
        if not methods:
            raise UserError(
                f"--skip-share sets thresholds, and nothing attached ({adapted.label}) compares scores with one; give "
                "a folder with a router or exits that train wrote"
            )
        for method in methods:
            method.set_skip_share(skip_share)
    return adapted, tokenizer


def with_options(adapted: AdaptedModel, overrides: Mapping[str, Mapping[str, Any]]) -> AdaptedModel:
    """Return the same model, methods and weights with some options changed; raise `UserError` for unknown ones."""
    missing = [name for name in overrides if name not in adapted.methods]
    if missing:
        raise UserError(f"{missing[0]} is not attached; attached is {', '.join(adapted.methods) or 'nothing'}")
    weights, specs = adapted.methods.state_dict(), []
    for method in adapted.attached:
        options = overrides.get(method.name, {})
        refuse_training_only(method.name, method.config.model_copy(update=dict(options)), options)
        specs.append({"name": method.name, **method.config.model_dump(), **options})
    again = attach(detach(adapted), specs)
    try:
        missing = again.methods.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        missing = [str(error)]
    if missing:
        raise UserError(f"an option of {', '.join(overrides)} needs weights of another shape; train with it")
    return again.eval()


def load_draft(
    target: str, adapted: AdaptedModel, *, lossless: bool = False, options: Mapping[str, Any] | None = None
) -> Draft | None:
    """Return the drafting of a `TARGET`; None if it does not draft.

    Args:
        lossless: draft in any case, with the drafter of the package if there is one.
        options: options of drafting that replace those of the target.
    """
    saved, weights = run_options(target).get("draft"), dict[str, torch.Tensor]()
    if saved is not None:
        folder = local_folder(target)
        weights = _draft_weights(folder / read_manifest(folder)["weights"])
    elif lossless:
        default = default_draft(adapted)
        if options is None:
            return default
        saved, weights = default.config.model_dump(), default.state_dict()
    elif options is None:
        return None
    draft = Draft(adapted, {**(saved or {}), **(options or {})})
    try:
        draft.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError("an option of draft needs weights of another shape; train with it") from error
    return draft


def _draft_weights(weights: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a trained drafter; old checkpoints store them with the methods."""
    if (weights / DRAFT).exists():
        return load_file(weights / DRAFT)
    prefix = f"{OLD_NAME}."
    stored = load_file(weights / METHODS)
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def _load(
    folder: Path, base: str | None, dtype: DType, device: str, *, merge: bool, native: bool = False
) -> tuple[AdaptedModel, PreTrainedTokenizerBase]:
    manifest = read_manifest(folder)
    own = folder / manifest["weights"] / BASE
    target = base or (str(own) if own.exists() else _base_of(folder, manifest["base"]["target"]))
    if not target:
        raise UserError(f"{folder} was saved from a model without a name; pass base= with its folder or hub name")
    quantisation, adapters = manifest["base"].get("quantisation"), _adapters(folder, manifest)
    dtype = manifest["run"].get("dtype", AUTO) if dtype == AUTO else dtype
    if native and adapters:
        raise UserError(f"{folder} has a LoRA adapter, which native weights cannot take; use weights int4 or int8")
    model, tokenizer = load_model(target, dtype=dtype, device=device, quantisation=quantisation, native=native)
    _check_base(model, manifest, folder)
    wrapped = add_adapters(model, adapters)
    adapted = attach(_merged(wrapped) if merge else wrapped, manifest["methods"])
    path = folder / manifest["weights"] / METHODS
    try:
        stored = load_file(path)
        adapted.methods.load_state_dict(
            {name: value for name, value in stored.items() if not name.startswith(f"{OLD_NAME}.")}
        )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not fit its methods ({str(error).splitlines()[0]}); restore it") from error
    return adapted.eval(), tokenizer


def _from_anywhere(target: str | None) -> str | None:
    """Return a target that means the same in every working folder."""
    if target and target != EMBEDDED and Path(target).exists():
        return str(Path(target).absolute())
    return target


def _base_of(folder: Path, target: str | None) -> str | None:
    """Return where the base model of a checkpoint is: where it was, or next to the folder if both were moved."""
    if target is None or target == EMBEDDED or not (Path(target).is_absolute() or target.endswith(".gguf")):
        return target
    moved = folder.resolve().parent / Path(target).name
    if not Path(target).exists() and not moved.exists():
        places = " nor ".join(dict.fromkeys([target, str(moved)]))
        raise UserError(f"the base model of {folder} is missing: there is no {places}; put it back")
    return target if Path(target).exists() else str(moved)


def _merged(model: nn.Module) -> nn.Module:
    """Fold adapters into the weights, except into 4-bit weights, which would round them, and into those on a disk."""
    folds = is_peft(model) and not is_quantised(model) and not is_spread(model)
    return fold_adapters(model) if folds else model  # type: ignore[arg-type]


def run_options(target: str) -> dict[str, Any]:
    """Return the section `run` of a folder: how it is to be run; of other targets, nothing."""
    return read_manifest(local_folder(target), with_files=False)["run"] if is_checkpoint(target) else {}


def own_base(target: str | Path) -> Path | None:
    """Return the folder of a checkpoint's trained base, a Hugging Face checkpoint; None if the base was not trained."""
    folder = local_folder(target)
    own = folder / read_manifest(folder)["weights"] / BASE
    return own if own.exists() else None


def is_checkpoint(target: str | Path) -> bool:
    """Return whether `target` is a folder that anydepth wrote, or the hub name of one."""
    return (local_folder(target) / MANIFEST).exists()


def has_adapter(adapted: AdaptedModel) -> bool:
    """Return whether a model has a LoRA adapter that is not folded into the weights."""
    return is_peft(adapted.model)


def read_manifest(folder: Path, *, with_files: bool = True) -> dict[str, Any]:
    """Read the manifest of a checkpoint folder, and check its files against it."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(
            f"{folder} has no anydepth checkpoint ({MANIFEST} is missing); give a folder that train or search wrote, "
            "or the hub name of one"
        )
    try:
        manifest = json.loads(path.read_text())
        manifest["methods"], draft = split_draft(manifest["methods"])
        # Up to version 0.1 drafting was outside of `run`, or a method.
        manifest["run"] = {"draft": manifest.get("draft") if draft is None else draft, **manifest.get("run", {})}
        weights = folder / manifest["weights"]
        files, _ = dict(manifest["files"]), [dict(method) for method in manifest["methods"]]
        _, _ = manifest["base"]["fingerprint"], [str(name) for name in manifest.get("adapters", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); train again or restore the folder from a copy") from error
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {manifest.get('schema')!r}; this anydepth reads {SCHEMA}")
    for name, digest in files.items() if with_files else ():
        if not (weights / name).is_file() or _digest(weights / name) != digest:
            raise UserError(f"{weights / name} is damaged or missing; train again or restore the folder from a copy")
    return manifest


def _check_base(model: PreTrainedModel, manifest: dict[str, Any], folder: Path) -> None:
    """Raise `UserError` unless `model` is the base that the checkpoint was made for."""
    light = is_quantised(model) or manifest["base"]["fingerprint"] is None
    biases = not _trains_biases(folder, manifest)
    recorded = manifest["base"]["light_fingerprint" if light else "fingerprint"]
    if base_fingerprint(model, light=light, biases=biases) != recorded:
        raise UserError(
            f"{folder} was made for the base model '{manifest['base']['target'] or BASE}', but its weights differ "
            f"from '{model.name_or_path}'; load it with the base it was trained on"
        )


def _adapters(folder: Path, manifest: dict[str, Any]) -> dict[str, Path]:
    """Return the folders of a checkpoint's active PEFT adapters by name."""
    root = folder / manifest["weights"] / "adapter"
    names = manifest.get("adapters", ["default"] if root.exists() else [])
    return {name: root if name == "default" else root / name for name in names}


def _trains_biases(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether a PEFT adapter of a checkpoint trains biases of its base model in place."""
    configs = [json.loads((adapter / ADAPTER).read_text()) for adapter in _adapters(folder, manifest).values()]
    return any(config.get("bias", "none") != "none" for config in configs)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
