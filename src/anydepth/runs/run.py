"""A recipe from start to end: search → fit → train → calibrate → eval → bench → analyze → generate → report.

Each stage leaves its document in the run's folder and is skipped when it is there already, so that a run that was
interrupted goes on where it was. A folder belongs to one recipe.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from anydepth.calibration.shares import NotTrained, compares_scores, settle_shares
from anydepth.config import StrictConfig
from anydepth.decoding.engines import HFEngine, open_engine
from anydepth.decoding.text import generate_text
from anydepth.draft_sections import DraftConfig, DrafterConfig
from anydepth.errors import UserError
from anydepth.gating.shared_batch import num_processes
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.json_io import read_document, write_json, write_text
from anydepth.measure.analyze import analyze
from anydepth.measure.bench import bench, load_prompts
from anydepth.measure.evaluate import evaluate
from anydepth.measure.held_out import held_out, split_windows
from anydepth.measure.results import document, source_commit
from anydepth.methods import method_class
from anydepth.methods.of_recipe import load_recipe, method_configs
from anydepth.models.load import AUTO, load_model
from anydepth.models.scratch import scratch_folder
from anydepth.processes import is_parallel, rank, shards_weights
from anydepth.recipe import (
    AnalyzeConfig,
    DataConfig,
    DType,
    EvalConfig,
    Recipe,
    RouterFitConfig,
    SearchConfig,
    TextConfig,
)
from anydepth.runs.checks import check
from anydepth.search.router_fit import fit_router
from anydepth.search.skip_search import search
from anydepth.speculation.draft import Draft
from anydepth.speculation.drafter_training import train_drafter
from anydepth.speculation.self_generated import OWN_TEXT, own_texts
from anydepth.training.checkpoint import MANIFEST, is_checkpoint, load_draft, load_target, save
from anydepth.training.corpora import load_texts
from anydepth.training.data import load_windows, rows_of
from anydepth.training.diagnostics import diagnose, warnings_of
from anydepth.training.parallel import first_alone, is_sharded, part
from anydepth.training.phases import PHASES, train_phases
from anydepth.training.train import STEPS, last_complete, load_trained, prepare, train

Say = Callable[[str], None]
RECIPE, LOCK = "recipe.yaml", ".lock"
STAGES = ("search", "fit", "train", "eval", "bench", "analyze", "generate")
LEARNING = ("search", "fit", "train")
"""Stages that decide what the later ones measure."""
FITTED, REPORT = "fit.safetensors", "report.html"
LEAVES = {"fit": FITTED, "train": MANIFEST, "run": REPORT}
"""The file that a stage leaves next to its document, where it leaves one."""
TABLE_WINDOWS, HELD_OUT_WINDOWS = 2, 4
"""Windows that thresholds of a share are measured on after training, and that the share is looked at on."""


@dataclass
class Runner:
    """One recipe in one folder."""

    recipe: Recipe
    out: Path
    say: Say
    on_step: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        source_commit()  # of the code as it is now, not as it may be when a stage ends
        path = self.out / RECIPE
        with first_alone():
            self._claim(path)

    def _claim(self, path: Path) -> None:
        # Compared as recipes: one that was written before an option existed has its default.
        if path.exists() and load_recipe(path) != self.recipe:
            raise UserError(f"{self.out} holds a run of another recipe; give another --out, or remove it first")
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(self.recipe.model_dump(), sort_keys=False))

    def check(self, stages: Collection[str] = STAGES) -> None:
        """Raise `UserError` for what would end one of `stages` that is not done yet, before the first one runs."""
        left = {stage for stage in stages if not (self.out / f"{stage}.json").exists()}
        if not self._decides():
            left.discard("analyze")
        if left:
            check(self.recipe, left)

    def run(self) -> dict[str, Any]:
        """Run every stage; return the `anydepth.run/1` document."""
        self.check()
        work = (self.search, self.fit, self.train, self.evaluate, self.bench, self.analyze, self.generate)
        stages = [document for stage in work if (document := stage()) is not None]
        result = self._document("run", stages=stages, summary=summary_of(stages))
        from anydepth.report.page import write_report  # matplotlib: only where pictures are made

        self.say(f"report: {self.out / REPORT}")
        write_report([result], self.out / REPORT)
        write_json(self.out / "run.json", result)
        return result

    @property
    def missing(self) -> list[str]:
        """Stages of this recipe that have not ended, `run` (the report and its document) last."""
        recipe = self.recipe
        absent = {"search": recipe.search is None, "fit": recipe.router_fit is None, "analyze": not self._decides()}
        return [stage for stage in (*STAGES, "run") if not absent.get(stage) and not self._is_done(stage)]

    def _is_done(self, stage: str) -> bool:
        """Return whether everything that a stage leaves is in the folder."""
        files = [f"{stage}.json", *([LEAVES[stage]] if stage in LEAVES else [])]
        return all((self.out / name).exists() for name in files)

    # --- stages --------------------------------------------------------------------------------------------------

    def search(self) -> dict[str, Any] | None:
        settings = self.recipe.search
        return None if settings is None else self._stage("search", lambda: self._search(settings))

    def _search(self, settings: SearchConfig) -> dict[str, Any]:
        model, tokenizer = self._base()
        data = self.recipe.data.train
        size = settings.sequence_length, settings.num_windows
        windows, unseen = split_windows(data, tokenizer, *size, text=self._packing)
        found = search(
            model,
            windows,
            strategy=settings.strategy,
            budget=settings.budget,
            branches=settings.branches,
            seed=self.recipe.seed,
        )
        unseen_loss = held_out(model, found.config, unseen)
        if unseen_loss["warning"]:
            self.say(f"warning: {unseen_loss['warning']}")
        return {
            **found.config.model_dump(),
            "agreement": found.agreement,
            "seconds": found.seconds,
            "trajectory": found.trajectory,
            "held_out": unseen_loss,
        }

    def fit(self) -> dict[str, Any] | None:
        settings = self.recipe.router_fit
        return None if settings is None else self._stage("fit", lambda: self._fit(settings))

    def _fit(self, settings: RouterFitConfig) -> dict[str, Any]:
        model, tokenizer = self._base()
        windows = self._packed(self.recipe.data.train, tokenizer, settings)
        adapted = attach(model, self._methods())
        found = fit_router(adapted, windows)
        save_file(adapted.methods.state_dict(), self.out / FITTED)
        return found.to_json()

    def forget(self) -> None:
        """Do every stage anew."""
        self._forget(*STAGES, "run")
        for folder in (STEPS, PHASES, OWN_TEXT):
            shutil.rmtree(self.out / folder, ignore_errors=True)

    def _forget(self, *stages: str) -> None:
        for stage in stages:
            (self.out / f"{stage}.json").unlink(missing_ok=True)

    def train(self) -> dict[str, Any]:
        """Attach, train and calibrate; afterwards the folder is a checkpoint. Goes on where it was interrupted.

        Several processes may train together; what is behind training the first one does alone.
        """
        with ExitStack() as stack:
            with first_alone():
                stack.enter_context(only_here(self.out) if rank() == 0 else nullcontext())
            return self._unless_done("train", self._train)

    def _train(self) -> dict[str, Any]:
        recipe = self.recipe
        if is_parallel() and (recipe.drafter is not None or (recipe.phases and shards_weights())):
            raise UserError(
                "drafter trains in one process, and phases train without sharded weights; start fewer, or use DDP"
            )
        with first_alone():
            model, tokenizer = self._base()
        fields: dict[str, Any] = {"loss_history": [], "seconds": 0.0, "tokens_per_second": 0.0}
        wrapped: nn.Module = model if recipe.train is None else prepare(model, recipe.train, seed=recipe.seed)
        adapted = attach(wrapped, self._methods())
        if recipe.router_fit is not None:
            adapted.methods.load_state_dict(load_file(self.out / FITTED))
        if recipe.train is not None:
            windows = self._windows(recipe.data.train, tokenizer, recipe.data)
            shared: dict[str, Any] = {"seed": recipe.seed, "resume": True, "on_step": self.on_step}
            if recipe.phases:
                adapted, result = train_phases(adapted, windows, recipe.train, recipe.phases, self.out, **shared)
            else:
                result = train(adapted, windows, recipe.train, self.out, **shared)
            fields |= {
                "loss_history": result.loss_history,
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
            }
        fields["checkpoint"] = str(self.out)
        sharded = is_sharded(adapted)
        fields |= {"num_processes": num_processes(), "sharded": sharded}
        part()
        if rank() > 0:
            return fields
        adapted = self._gathered() if sharded else adapted
        draft = None if recipe.draft is None else Draft(adapted, seeded(recipe.draft, recipe.seed))
        if recipe.drafter is not None and draft is not None:
            fields |= self._train_drafter(recipe.drafter, adapted, draft, tokenizer)
        trained = recipe.train is not None and recipe.train.backbone
        try:
            fields |= self._settle(adapted, tokenizer)
            if any(method.has_learned_gates for method in adapted.trained_methods):
                fields["gates"] = diagnose(adapted, rows_of(self._windows(recipe.data.train, tokenizer, recipe.data)))
                for text in warnings_of(fields["gates"]):
                    self.say(f"warning: {text}")
        finally:  # what was trained is kept where measuring it fails
            save(adapted, self.out, own_base=tokenizer if trained else None, draft=draft)
        detach(adapted)
        return fields

    def _settle(self, adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Set thresholds if the recipe asks for it, and look at what is skipped on text that nothing was set on."""
        settings, windows = self.recipe.calibrate, self._windows(self.recipe.data.train, tokenizer, self.recipe.data)
        if settings is None and not compares_scores(adapted):
            return {}
        windows = windows[: TABLE_WINDOWS if settings is None else settings.num_windows]
        length = min(self.recipe.eval.sequence_length, windows.shape[1])
        held_out = load_windows(
            self.recipe.eval.data, tokenizer, length, max_windows=HELD_OUT_WINDOWS, text=self.recipe.data
        )
        try:
            found = settle_shares(adapted, windows, held_out, None if settings is None else settings.skip_share)
        except NotTrained:
            if settings is not None:
                raise
            return {}
        for line in found["warnings"]:
            self.say(f"warning: {line}")
        return found

    def _gathered(self) -> AdaptedModel:
        """What sharded training left, in one piece."""
        assert self.recipe.train is not None
        adapted = attach(prepare(self._base()[0], self.recipe.train, seed=self.recipe.seed), self._methods())
        folder = last_complete(self.out)
        assert folder is not None, "training ends with a checkpoint"
        load_trained(adapted, folder)
        return adapted.eval()

    def _train_drafter(
        self, settings: DrafterConfig, adapted: AdaptedModel, draft: Draft, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """Let the model write, then train the network of its draft on that."""
        network = draft.network
        assert network is not None, "the recipe was checked"
        shared = {"seed": self.recipe.seed}
        texts, written = own_texts(
            adapted, tokenizer, network.taps, settings.own_text, self.out / OWN_TEXT, say=self.say, **shared
        )
        self.say(f"{sum(len(text.ids) for text in texts)} tokens in {len(texts)} texts; training the drafter …")
        history = train_drafter(
            network,
            adapted.backbone,
            texts,
            settings,
            self.out / STEPS,
            resume=True,
            on_step=self.on_step or (lambda row: None),
            **shared,
        )
        return {
            "loss_history": history,
            "writing_seconds": written,
            "seconds": history[-1]["seconds"],
            "tokens_per_second": len(history) * settings.batch_tokens / history[-1]["seconds"],
            "num_own_tokens": sum(len(text.ids) for text in texts),
        }

    def evaluate(self) -> dict[str, Any]:
        return self._stage("eval", self._evaluate)

    def _evaluate(self) -> dict[str, Any]:
        adapted, tokenizer, draft = self._adapted(merge=False)
        settings = self.recipe.eval
        return evaluate(HFEngine(adapted, draft), self._windows(settings.data, tokenizer, settings))

    def bench(self) -> dict[str, Any]:
        return self._stage("bench", self._bench)

    def _bench(self) -> dict[str, Any]:
        settings = self.recipe.bench
        data = settings.data or self.recipe.eval.data
        rows = []
        for dtype in settings.dtypes or [self.recipe.model.dtype]:
            adapted, tokenizer, draft = self._adapted(merge=True, dtype=dtype)
            engine = open_engine(adapted, settings.engine, say=self.say, draft=draft)
            windows = load_prompts(
                adapted, tokenizer, data, settings.prompt_tokens, settings.new_tokens, text=self._packing
            )
            rows += bench(
                [engine],
                windows,
                batch_sizes=settings.batch_sizes,
                prompt_tokens=settings.prompt_tokens,
                new_tokens=settings.new_tokens,
                num_runs=settings.num_runs,
                say=self.say,
            )
        return {"rows": rows}

    def analyze(self) -> dict[str, Any] | None:
        """Where depth goes; None: nothing is skipped."""
        return self._stage("analyze", self._analyze) if self._decides() else None

    def _decides(self) -> bool:
        """Whether tokens differ in depth: not where all that is attached is lossless, nor where it only drafts."""
        lossless = [method_class(str(spec["name"]), "methods").is_lossless() for spec in self.recipe.methods]
        return not all(lossless) and self.recipe.draft is None

    def _analyze(self) -> dict[str, Any]:
        adapted, tokenizer, _ = self._adapted(merge=False)
        settings = self.recipe.analyze
        data = settings.data or self.recipe.eval.data
        return analyze(
            adapted,
            tokenizer,
            self._packed(data, tokenizer, settings),
            texts=load_texts(data),
            num_samples=settings.num_samples,
            num_permutations=settings.num_permutations,
            seed=self.recipe.seed,
        )

    def generate(self) -> dict[str, Any]:
        return self._stage("generate", self._generate)

    def _generate(self) -> dict[str, Any]:
        adapted, tokenizer, draft = self._adapted(merge=True)
        settings, engine = self.recipe.generate, open_engine(adapted, say=self.say, draft=draft)
        return generate_text(engine, tokenizer, settings.prompt, max_new_tokens=settings.max_new_tokens)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with first_alone(), only_here(self.out) if rank() == 0 else nullcontext():
            return self._unless_done(name, work)

    def _unless_done(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.out / f"{name}.json"
        if self._is_done(name):
            self.say(f"{name}: done already, kept ({path})")
            return read_document(path)
        self.say(f"{name} …")
        if name in LEARNING and rank() == 0:  # what was measured of another model is not a result of this one
            self._forget(*STAGES[STAGES.index(name) :], "run")
        result = self._document(name, **work())
        if rank() == 0:
            write_json(path, result)
        return result

    def _document(self, name: str, **fields: Any) -> dict[str, Any]:
        return document(f"anydepth.{name}/1", seed=self.recipe.seed, config=self.recipe, label=self.label, **fields)

    @property
    def label(self) -> str:
        """How reports call this run."""
        names = [str(method["name"]) for method in self.recipe.methods] or ["full depth"]
        lora = self.recipe.train is not None and self.recipe.train.lora is not None
        label = " + ".join([*names, *(["LoRA"] if lora else []), *(["drafting"] if self.recipe.draft else [])])
        return f"{label}, {kind} weights" if (kind := self.recipe.model.quantisation) else label

    def _base(self) -> Any:
        model, target = self.recipe.model, self.recipe.model.target
        if model.scratch is not None:
            folder = scratch_folder(model.scratch, self._texts, self.out / "scratch", seed=self.recipe.seed)
            target = str(folder)
        # Whole models learn in float32: steps are lost in weights of 16 bits.
        learns = self.recipe.train is not None and self.recipe.train.backbone
        return load_model(
            target,
            dtype="float32" if learns and model.dtype == AUTO else model.dtype,
            device=model.device,
            quantisation=model.quantisation,
            attention=model.attention,
        )

    def _adapted(
        self, *, merge: bool, dtype: DType | None = None
    ) -> tuple[AdaptedModel, PreTrainedTokenizerBase, Draft | None]:
        assert is_checkpoint(self.out), "the train stage leaves a checkpoint, trained or not"
        model = self.recipe.model
        adapted, tokenizer = load_target(str(self.out), dtype=dtype or model.dtype, device=model.device, merge=merge)
        return adapted, tokenizer, load_draft(str(self.out), adapted)

    def _texts(self) -> list[str]:
        data = self.recipe.data
        return load_texts(data.train, lines=data.lines, min_chars=data.min_chars, max_documents=data.max_documents)

    def _windows(self, corpus: str, tokenizer: PreTrainedTokenizerBase, size: DataConfig | EvalConfig) -> Tensor:
        """Return the windows that the recipe trains on, or is scored on."""
        return load_windows(
            corpus,
            tokenizer,
            size.sequence_length,
            max_windows=size.max_windows,
            max_documents=size.max_documents,
            text=self.recipe.data,
        )

    def _packed(
        self, corpus: str, tokenizer: PreTrainedTokenizerBase, size: SearchConfig | RouterFitConfig | AnalyzeConfig
    ) -> Tensor:
        """Return windows of one length, for what compares windows with each other."""
        return load_windows(corpus, tokenizer, size.sequence_length, max_windows=size.num_windows, text=self._packing)

    @property
    def _packing(self) -> TextConfig:
        return self.recipe.data.model_copy(update={"isolate_documents": False})

    def _methods(self) -> list[StrictConfig]:
        """The recipe's methods; a searched skip set fills what they leave open."""
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
            first = router.get("always_keep", 4)
            out = found["skip_layers"] + (found["skip_mixers"] if router.get("branch") == "mixer" else [])
            router.setdefault("initial_skip_layers", [i for i in out if i >= first])
        return method_configs(self.recipe.model_copy(update={"methods": methods}))


def seeded(config: DraftConfig, seed: int) -> DraftConfig:
    """Return the options of drafting with the recipe's seed, unless they have one of their own."""
    return config if "seed" in config.model_fields_set else config.model_copy(update={"seed": seed})


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Work in a folder that no other process works in. Raises `UserError` if one does."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process works in {folder}; wait for it, or give another --out") from error
        yield


SPEEDS = ("speedup", "speedup_interval", "is_noise")


def summary_of(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the summary rows out of the eval and bench documents: the untouched model first, the adapted last.

    With a LoRA adapter the same model at full depth stands between them: what skipping alone costs.
    """
    by_schema = {stage["schema"]: stage for stage in stages}
    quality, speed = by_schema.get("anydepth.eval/1"), by_schema.get("anydepth.bench/1")
    if quality is None:
        return []
    keys = ("perplexity", "mean_depth", "layer_token_share", "gflops_per_token", "agreement")
    rows = [
        {"label": "untouched", **{key: quality["full_depth"][key] for key in keys}, "speedup": 1.0},
        {"label": quality["label"], **{key: quality[key] for key in keys}},
    ]
    if "full_depth_adapted" in quality:
        same = {key: quality["full_depth_adapted"][key] for key in keys}
        rows.insert(1, {"label": "full depth, LoRA on", **same, "speedup": 1.0})
    if speed is not None:
        first = speed["rows"][0]
        rows[-1] |= {key: first.get(key) for key in (*SPEEDS, "ideal_speedup", "realised")}
        for row in rows[:-1]:  # LoRA is merged where it is timed: both are as fast
            row["tokens_per_second"] = first["full_depth"]["tokens_per_second"]
        rows[-1]["tokens_per_second"] = first["adapted"]["tokens_per_second"]
    return rows
