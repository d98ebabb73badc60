"""Upload a checkpoint to the hub: its manifest, its weights (safetensors) and a model card with what was measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from anydepth import __version__
from anydepth.errors import RunError, UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import read_document
from anydepth.measure.front import front
from anydepth.models.target import EMBEDDED, MANIFEST, forget_snapshots, is_local
from anydepth.training.checkpoint import read_manifest, save

CARD = "README.md"
COLUMNS = {"label": "setting", "perplexity": "perplexity", "speedup": "speed-up"}


def push_to_hub(
    source: AdaptedModel | str | Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Upload an adapted model, or a folder that `train`, `calibrate`, `search`, `tune` or `save` wrote.

    The base model is not uploaded unless training changed it; `anydepth.load(repository)` fetches it by its name.

    Args:
        source: the model, or the folder, of which the card shows the measured Pareto front if it has one.
        repository: hub name, such as `user/router`; it is created if it does not exist.
        private, token, revision, commit_message: as in `huggingface_hub`.
        options: of a model, those of `anydepth.save`, such as `base`.

    Returns:
        The address of the commit.

    Raises:
        UserError: no such folder, a base that others cannot load, or a name or an account that the hub refuses.
    """
    with tempfile.TemporaryDirectory() as made:
        if isinstance(source, AdaptedModel):
            folder = save(source, Path(made) / "saved", **options)
        elif options:
            raise UserError(f"{', '.join(options)} is of a model that is not saved yet; {source} is a folder")
        else:
            folder = Path(source)
        manifest = read_manifest(folder)
        _check_base(manifest)
        staged = _staged(folder, manifest, Path(made) / "staged")
        (staged / CARD).write_text(str(model_card(folder, manifest, repository)), encoding="utf-8")
        message = commit_message or f"Upload a checkpoint of anydepth {__version__}"
        address = _upload(staged, repository, message, private=private, token=token, revision=revision)
    forget_snapshots()
    return address


def _check_base(manifest: dict[str, Any]) -> None:
    """Raise `UserError` for a base model by a path of this machine, which no other machine has."""
    base = manifest["base"]["target"]
    if base is not None and base != EMBEDDED and (is_local(base) or Path(base).exists() or base.endswith(".gguf")):
        raise UserError(
            f"its base model is {base} on this machine, which others cannot load; give base= with the hub name of the "
            "same model, when it is saved or pushed"
        )


def _staged(folder: Path, manifest: dict[str, Any], staged: Path) -> Path:
    """Return a folder of links to the files of a checkpoint, and to its result documents."""
    weights = manifest["weights"]
    names = [MANIFEST, *(f"{weights}/{name}" for name in manifest["files"])]
    names += [path.name for path in folder.glob("*.json") if path.name != MANIFEST]
    for name in names:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).symlink_to((folder / name).resolve())
    return staged


def _upload(
    folder: Path, repository: str, message: str, *, private: bool | None, token: str | None, revision: str | None
) -> str:
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns="weights-*/*",  # of former checkpoints
        )
    except (HFValidationError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{repository} cannot be pushed ({_first(error)}); give user/name, with the hub in reach"
        ) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError(
                f"the hub refuses this account to write {repository} ({_first(error)}); log in with: hf auth login"
            ) from error
        raise RunError(f"the upload to {repository} failed ({_first(error)}); try again") from error
    except Exception as error:  # of the HTTP library, which depends on the version of the hub's
        raise RunError(f"the hub could not be reached ({_first(error)}); try again") from error
    return str(done.commit_url)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def model_card(folder: Path, manifest: dict[str, Any], repository: str) -> ModelCard:
    """Return the card of a checkpoint: how it loads, what is attached, and what was measured."""
    methods, base = [method["name"] for method in manifest["methods"]], manifest["base"]["target"]
    data = ModelCardData(
        library_name="anydepth",
        base_model=None if base in (None, EMBEDDED) else base.partition("@")[0],
        tags=["anydepth", "adaptive-depth", *(name.replace("_", "-") for name in methods)],
        pipeline_tag="text-generation",
    )
    drafts = manifest["run"].get("draft") is not None
    attached = ", ".join([*methods, *(["drafting"] if drafts else [])]) or "nothing"
    shown = base or "the trained one in this repository"
    text = f"""# {repository}

A checkpoint of [anydepth](https://pypi.org/project/anydepth/) {__version__}: {attached}, on the base model `{shown}`.

```python
import anydepth

adapted = anydepth.load("{repository}")
```

```console
$ anydepth generate {repository} --prompt "The sea"
```
{_measured(folder)}"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _measured(folder: Path) -> str:
    """Return the section of the measured Pareto front of a folder, empty if it has none."""
    for name, rows_of in (("tune.json", _of_tune), ("calibrate.json", _of_calibrate)):
        if (folder / name).is_file():
            rows, hardware = rows_of(read_document(folder / name)), read_document(folder / name).get("hardware") or {}
            if rows:
                machine = hardware.get("cpu") or hardware.get("processor")
                where = f", measured on {machine}" if machine else ""
                return f"\n## Pareto front of perplexity and time{where}\n\n{_table(rows)}\n"
    return ""


def _of_tune(document: dict[str, Any]) -> list[dict[str, Any]]:
    by_label = {row["label"]: row for row in document["candidates"]}
    return [by_label[label] for label in document["front"]]


def _of_calibrate(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the capacities of `calibrate --sweep` that are on the Pareto front."""
    rows = [
        {**row, "label": f"capacity {row['capacity']:g}", "time_share": 1 / row["speedup"]}
        for row in document.get("sweep") or []
        if row["speedup"]
    ]
    return [row for label in front(rows, "time") for row in rows if row["label"] == label]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row[key]) for key in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)
