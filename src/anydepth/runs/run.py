"""A recipe from start to end: tune → search → fit → train → calibrate → eval → bench → analyze → generate → report.

Each stage leaves its document in the run's folder and is skipped when the document exists, so that an interrupted run
continues where it was. A folder belongs to one recipe.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from anydepth.decoding.engines import HFEngine, open_engine
from anydepth.decoding.generate import generate_text
from anydepth.errors import UserError
from anydepth.hf.adapted import attach
from anydepth.json_io import read_document, write_json, write_text
from anydepth.measure.analyze import analyze
from anydepth.measure.bench import bench, load_prompts
from anydepth.measure.evaluate import evaluate
from anydepth.measure.held_out import search_fields, split_windows
from anydepth.measure.results import document, source_commit
from anydepth.methods import method_class
from anydepth.methods.compose import load_recipe
from anydepth.processes import rank
from anydepth.recipe import TUNED, Recipe
from anydepth.runs.checks import check
from anydepth.runs.inputs import Inputs
from anydepth.runs.train_stage import FITTED, Training
from anydepth.runs.tune import Tuner
from anydepth.search.router_fit import fit_router
from anydepth.search.skip_search import search
from anydepth.speculation.self_generated import OWN_TEXT
from anydepth.training.checkpoint import MANIFEST
from anydepth.training.corpora import load_texts
from anydepth.training.parallel import first_alone
from anydepth.training.phases import PHASES
from anydepth.training.train import STEPS

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

Say = Callable[[str], None]
Document = dict[str, Any]
RECIPE, LOCK = "recipe.yaml", ".lock"
STAGES = ("tune", "search", "fit", "train", "eval", "bench", "analyze", "generate")
LEARNING = ("search", "fit", "train")
"""Stages that decide the model that the later ones measure."""
REPORT = "report.html"
LEAVES = {"tune": f"{TUNED}/{MANIFEST}", "fit": FITTED, "train": MANIFEST, "run": REPORT}
"""The file that a stage leaves next to its document, where it leaves one."""


def _stage(name: str) -> Callable[[Callable[[Runner], Document]], Callable[[Runner], Document | None]]:
    """Make a method that returns a stage's fields one that returns its document; None where the recipe lacks it."""

    def decorate(work: Callable[[Runner], Document]) -> Callable[[Runner], Document | None]:
        @functools.wraps(work)
        def stage(self: Runner) -> Document | None:
            if not self.has(name):
                return None
            with first_alone(), locked(self.out):
                return self.unless_done(name, lambda: work(self))

        return stage

    return decorate


@dataclass
class Runner:
    """One recipe in one folder."""

    recipe: Recipe
    out: Path
    say: Say
    on_step: Callable[[Document], None] = lambda row: None

    def __post_init__(self) -> None:
        source_commit()  # Cached now, because the source can change before a stage ends.
        self.inputs, path = Inputs(self.recipe, self.out), self.out / RECIPE
        with first_alone():
            # Recipes are compared after loading, so that an option added since then has its default.
            if path.exists() and load_recipe(path) != self.recipe:
                raise UserError(f"{self.out} holds a run of another recipe; give another --out, or remove it first")
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(path, yaml.safe_dump(self.recipe.model_dump(), sort_keys=False))

    def check(self, stages: Collection[str] = STAGES) -> None:
        """Raise `UserError` for what would end one of `stages` that is not done yet, before the first one runs."""
        left = {stage for stage in stages if self.has(stage) and not (self.out / f"{stage}.json").exists()}
        if left:
            check(self.recipe, left)

    def run(self) -> Document:
        """Run every stage; return the `anydepth.run/1` document."""
        self.check()
        work = (self.tune, self.search, self.fit, self.train, self.evaluate, self.bench, self.analyze, self.generate)
        stages = [document for stage in work if (document := stage()) is not None]
        result = self._document("run", stages=stages, summary=summary_of(stages))
        from anydepth.report.page import write_report  # Imports matplotlib, which takes a second.

        self.say(f"report: {self.out / REPORT}")
        write_report([result], self.out / REPORT)
        write_json(self.out / "run.json", result)
        return result

    @property
    def missing(self) -> list[str]:
        """Stages of this recipe that have not ended, `run` (the report and its document) last."""
        return [stage for stage in (*STAGES, "run") if self.has(stage) and not self._is_done(stage)]

    def has(self, stage: str) -> bool:
        """Return whether the recipe has a stage; nothing is analyzed where all tokens run the same layers."""
        recipe = self.recipe
        lossless = [method_class(str(spec["name"]), "methods").is_lossless() for spec in recipe.methods]
        decides = not all(lossless) and recipe.draft is None
        sections = {"tune": recipe.tune, "search": recipe.search, "fit": recipe.router_fit}
        return decides if stage == "analyze" else sections.get(stage, True) is not None

    def _is_done(self, stage: str) -> bool:
        files = [f"{stage}.json", *([LEAVES[stage]] if stage in LEAVES else [])]
        return all((self.out / name).exists() for name in files)

    def forget(self) -> None:
        """Remove the documents and the training state of every stage, so that all run again."""
        self._forget(*STAGES, "run")
        for folder in (STEPS, PHASES, OWN_TEXT):
            shutil.rmtree(self.out / folder, ignore_errors=True)

    def _forget(self, *stages: str) -> None:
        for stage in stages:
            (self.out / f"{stage}.json").unlink(missing_ok=True)

    @_stage("tune")
    def tune(self) -> Document:
        model, config = self.recipe.model, self.recipe.tune
        assert config is not None
        tuner = Tuner(model.target, config, device=model.device, say=self.say)
        fields = tuner.run()
        tuner.write(self.out / TUNED)
        return fields

    @_stage("search")
    def search(self) -> Document:
        settings = self.recipe.search
        assert settings is not None
        model, tokenizer = self.inputs.base()
        size = settings.sequence_length, settings.num_windows
        windows, unseen = split_windows(self.recipe.data.train, tokenizer, *size, text=self.inputs.packing)
        options = {"strategy": settings.strategy, "budget": settings.budget, "branches": settings.branches}
        fields = search_fields(model, search(model, windows, **options, seed=self.recipe.seed), unseen)
        if warning := fields["held_out"]["warning"]:
            self.say(f"warning: {warning}")
        return fields

    @_stage("fit")
    def fit(self) -> Document:
        settings = self.recipe.router_fit
        assert settings is not None
        model, tokenizer = self.inputs.base()
        windows = self.inputs.packed(self.recipe.data.train, tokenizer, settings)
        adapted = attach(model, self.inputs.methods())
        found = fit_router(adapted, windows)
        save_file(adapted.methods.state_dict(), self.out / FITTED)
        return asdict(found)

    def train(self) -> Document:
        """Attach, train and calibrate; afterwards the folder is a checkpoint. Resume interrupted training."""
        training = Training(self.recipe, self.out, self.say, self.on_step)
        with ExitStack() as stack:
            with first_alone():
                stack.enter_context(locked(self.out))
            return self.unless_done("train", training.run)

    @_stage("eval")
    def evaluate(self) -> Document:
        adapted, tokenizer, draft = self.inputs.adapted(merge=False)
        settings = self.recipe.eval
        windows = self.inputs.windows(settings.data, tokenizer, settings)
        return evaluate(HFEngine(adapted, draft), windows, prompt_tokens=settings.prompt_tokens)

    @_stage("bench")
    def bench(self) -> Document:
        settings, rows = self.recipe.bench, []
        sizes = {"prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens}
        for dtype in settings.dtypes or [self.recipe.model.dtype]:
            adapted, tokenizer, draft = self.inputs.adapted(merge=True, dtype=dtype)
            engine = open_engine(adapted, settings.engine, say=self.say, draft=draft)
            data = settings.data or self.recipe.eval.data
            windows = load_prompts(adapted, tokenizer, data, **sizes, text=self.inputs.packing)
            limits = {"batch_sizes": settings.batch_sizes, "num_runs": settings.num_runs}
            rows += bench([engine], windows, **sizes, **limits, say=self.say)
        return {"rows": rows}

    @_stage("analyze")
    def analyze(self) -> Document:
        adapted, tokenizer, _ = self.inputs.adapted(merge=False)
        settings = self.recipe.analyze
        data = settings.data or self.recipe.eval.data
        return analyze(
            adapted,
            tokenizer,
            self.inputs.packed(data, tokenizer, settings),
            texts=load_texts(data),
            num_samples=settings.num_samples,
            num_permutations=settings.num_permutations,
            seed=self.recipe.seed,
        )

    @_stage("generate")
    def generate(self) -> Document:
        adapted, tokenizer, draft = self.inputs.adapted(merge=True)
        settings, engine = self.recipe.generate, open_engine(adapted, say=self.say, draft=draft)
        return generate_text(engine, tokenizer, settings.prompt, max_new_tokens=settings.max_new_tokens)

    def unless_done(self, name: str, work: Callable[[], Document]) -> Document:
        """Return the document of a stage, made by `work` unless the stage has ended before."""
        path = self.out / f"{name}.json"
        if self._is_done(name):
            self.say(f"{name}: done already, kept ({path})")
            return read_document(path)
        self.say(f"{name} …")
        if name in LEARNING and rank() == 0:  # The documents of later stages are about the former model.
            self._forget(*STAGES[STAGES.index(name) :], "run")
        result = self._document(name, **work())
        if rank() == 0:
            write_json(path, result)
        return result

    def _document(self, name: str, **fields: Any) -> Document:
        return document(f"anydepth.{name}/1", seed=self.recipe.seed, config=self.recipe, label=self.label, **fields)

    @property
    def label(self) -> str:
        """Name of this run in reports: its methods, LoRA, drafting and quantised weights."""
        names = [str(method["name"]) for method in self.recipe.methods] or ["full depth"]
        lora = self.recipe.train is not None and self.recipe.train.lora is not None
        label = " + ".join([*names, *(["LoRA"] if lora else []), *(["drafting"] if self.recipe.draft else [])])
        return f"{label}, {kind} weights" if (kind := self.recipe.model.quantisation) else label


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder within the block, in the first of several processes. Raise `UserError` if it is locked already."""
    if fcntl is None or rank() > 0:
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process works in {folder}; wait for it, or give another --out") from error
        yield


QUALITIES = ("perplexity", "mean_depth", "layer_token_share", "gflops_per_token", "agreement")
SPEEDS = ("speedup", "speedup_interval", "is_noise", "ideal_speedup", "realised")


def summary_of(stages: list[Document]) -> list[Document]:
    """Return the summary rows of the eval and bench documents: the base model first, the adapted one last.

    With a LoRA adapter the same model at full depth is between them: its distance to the last is the loss of skipping.
    """
    by_schema = {stage["schema"]: stage for stage in stages}
    quality, speed = by_schema.get("anydepth.eval/1"), by_schema.get("anydepth.bench/1")
    if quality is None:
        return []
    sides = {"base model": quality["full_depth"], "full depth, LoRA on": quality.get("full_depth_adapted")}
    rows = [
        {"label": label, **{key: side[key] for key in QUALITIES}, "speedup": 1.0}
        for label, side in sides.items()
        if side
    ]
    ours = {"label": quality["label"], **{key: quality[key] for key in QUALITIES}}
    if speed is not None:
        first = speed["rows"][0]
        for row in rows:  # LoRA is merged where it is timed: both are as fast.
            row["tokens_per_second"] = first["full_depth"]["tokens_per_second"]
        ours |= {key: first.get(key) for key in SPEEDS} | {"tokens_per_second": first["adapted"]["tokens_per_second"]}
    return [*rows, ours]
