"""lm-eval with routing on: the model class `anydepth`, and task scores with the fraction of the work that ran.

    python -m anydepth.measure.lm_eval --model anydepth --model_args target=my-router --tasks arc_easy

is lm-eval's own command line with that class registered; it loads its documents from the hub.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from statistics import mean, stdev
from typing import Any

import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import HFEngine
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.gating.plan import FULL_DEPTH
from anydepth.measure.results import MEANS, error_name
from anydepth.measure.shared_prefix import SharedPrefixes
from anydepth.measure.tasks import LOCAL, Spec, task_named, where_to_look
from anydepth.training.checkpoint import load_draft, load_target


@dataclass
class Work:
    """FLOPs of the layers that ran, those of the same tokens at full depth, and requests truncated to the window."""

    layers: int = 0
    full_depth: int = 0
    num_truncated: int = 0

    @property
    def share(self) -> float:
        return self.layers / self.full_depth if self.full_depth else 1.0


Base: Any = huggingface.HFLM  # Its decorator hides its type.


class AnydepthLM(Base):
    """A model for lm-eval with routing on: a TARGET of the command line, or an engine with its tokenizer."""

    def __init__(
        self,
        target: str | Engine,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: Any = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        if str(batch_size).startswith("auto"):
            raise UserError(
                "got batch_size auto, which tries sizes on text that is then counted as work; give a number"
            )
        if isinstance(target, str):
            # lm-eval's command line passes cuda:0 by default, also on machines without CUDA.
            is_default = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
            name, device = target, "cpu" if is_default else device or "cpu"
            adapted, tokenizer = load_target(name, dtype=dtype, device=device)
            target = HFEngine(adapted, load_draft(name, adapted))
        super().__init__(pretrained=target.adapted, tokenizer=tokenizer, batch_size=batch_size, **options)
        self.adapted, self.engine, self.work = target.adapted, target, Work()

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """Score in batches of one length: lm-eval pads without a mask, and padding would be routed and counted."""
        full_lengths = [len(context) + len(scored) for _, context, scored in requests]
        longest = max((len(scored) for _, _, scored in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"a continuation to score has {longest} tokens, more than {self._window_advice}")
        self.work.num_truncated += sum(length > self.max_length + 1 for length in full_lengths)
        if self.engine.shares_prefixes:
            return self._by_engine(requests, disable_tqdm)
        lengths = [min(length, self.max_length + 1) for length in full_lengths]
        answers: list[Any] = [None] * len(lengths)
        with tqdm(total=len(lengths), disable=disable_tqdm or None, desc="requests", leave=False) as bar:
            for length in sorted(set(lengths), reverse=True):
                batch = [i for i, own in enumerate(lengths) if own == length]
                scores = super()._loglikelihood_tokens([requests[i] for i in batch], True, override_bs)
                for i, score in zip(batch, scores, strict=True):
                    answers[i] = score
                bar.update(len(batch))
        return answers

    def _by_engine(self, requests: Any, disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Score requests sorted by their tokens, so that requests with a common prefix follow each other."""
        texts = [(context + scored)[-(self.max_length + 1) :] for _, context, scored in requests]
        prefixes = SharedPrefixes(self.engine, self._add)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
        order = sorted(range(len(texts)), key=texts.__getitem__)
        for i in tqdm(order, disable=disable_tqdm or None, desc="requests", leave=False):
            scored = torch.tensor(requests[i][2], device=self.adapted.device)
            logits = prefixes.score(texts[i][:-1], len(scored)).float()
            chosen = logits.log_softmax(-1).gather(1, scored[:, None])
            answers[i] = float(chosen.sum()), bool((logits.argmax(-1) == scored).all())
        return answers

    @property
    def _window_advice(self) -> str:
        return (
            f"the model's window of {self.max_length} tokens; leave out this task, or use a model with a longer window"
        )

    def check_room(self, options: dict[str, Any]) -> None:
        """Raise `UserError` where a task's generation options leave no space for a prompt in the window."""
        new_tokens = int(normalize_gen_kwargs(options, self.max_gen_toks).get("max_gen_toks", 0))
        if new_tokens >= self.max_length:
            raise UserError(f"a prompt and {new_tokens} new tokens are more than {self._window_advice}")

    def tok_batch_encode(self, strings: list[str], left_truncate_len: int | None = None, **options: Any) -> Any:
        if left_truncate_len:
            self.work.num_truncated += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, left_truncate_len=left_truncate_len, **options)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Generate as lm-eval does, but row by row with a draft: lm-eval's stop rule keeps state for a whole batch."""
        for request in requests:
            self.check_room(request.args[1])
        before = self.batch_size_per_gpu
        self.batch_size_per_gpu = 1 if self.engine.drafts else before
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = before

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad(), self.adapted.running(FULL_DEPTH) if self.engine.drafts else nullcontext():
            logits = self.adapted(input_ids=inps, use_cache=False).logits
        self._count()
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        before, self._model = self._model, self.engine  # lm-eval then calls the engine's `generate`
        try:
            ids = super()._model_generate(context, max_length, stop, **options)
        finally:
            self._model = before
        self._count()
        return ids

    def _count(self) -> None:
        if self.adapted.is_enabled:
            self._add(cost.flops(self.adapted.backbone, self.adapted.last_trace))

    def _add(self, count: cost.FlopCount) -> None:
        self.work.layers += count.layers
        self.work.full_depth += count.full_depth_layers


register_model("anydepth")(AnydepthLM)


@functools.cache
def _manager() -> TaskManager:
    return TaskManager()  # It reads about ten thousand files.


def check_tasks(names: Sequence[str]) -> TaskManager:
    """Return lm-eval's index of tasks. Raise `UserError` for a name that is not in it."""
    manager = _manager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, list(manager.task_index), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"tasks with local documents are {', '.join(LOCAL)}"
            raise UserError(f"lm-eval has no task '{name}'; {hint}")
    return manager


def check_windows(engine: Engine, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
    """Raise `UserError` for a task that generates more tokens than fit the model's window.

    Options are read from lm-eval's task files; the tasks of a group are checked when they are scored.
    """
    manager = check_tasks(names)
    with _quiet():
        lm = AnydepthLM(engine, tokenizer)
    for name in names:
        for spec in task_named(name).specs:
            own = _own_options(manager, spec if isinstance(spec, str) else spec["task"], resolve_func=False)
            if own.get("output_type") == "generate_until":
                lm.check_room(own.get("generation_kwargs") or {})


def score_tasks(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    who: str = "",
) -> dict[str, dict[str, Any]]:
    """Return the `tasks` of `anydepth.eval/1`, by name.

    Each has lm-eval's metrics and their standard errors, `num_items`, `num_fewshot` and `version`, and the `parts` of a
    benchmark that has parts; `layer_token_share`, the fraction of the layers' work that ran; `num_truncated`, requests
    cut at the start to fit the window; the `source` of the documents; and `items`, metrics by item for `add_changes`.
    Raise `UserError` for an unknown task, documents that are not available, or continuations that exceed the window.

    Args:
        num_fewshot: examples in the prompt; None is the number that each benchmark was published with.
        limit: score only the first items (of each part of a benchmark in parts).
        say: is called with each task and `who`, the name of the model; None hides lm-eval's progress bars too.
    """
    manager = check_tasks(names)
    engine.adapted.eval()
    scores = {}
    with _quiet(), nullcontext() if say else redirect_stderr(StringIO()):
        lm = AnydepthLM(engine, tokenizer)
        for name in names:
            task = task_named(name)
            shots = task.num_fewshot if num_fewshot is None else num_fewshot
            if say:
                say(f"task {name}{who and f', {who}'} ({task.source}) …")
            lm.work = Work()
            results = _results(lm, manager, name, task.specs, num_fewshot=shots, limit=limit, seed=seed)
            if say and lm.work.num_truncated:
                say(f"{lm.work.num_truncated} requests, longer than the window of {lm.max_length}, lost their start")
            scores[name] = {
                **_joined(results),
                "layer_token_share": lm.work.share,
                "num_truncated": lm.work.num_truncated,
                "source": task.source,
            }
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's warnings of every default that it fills in, and git's outside a repository."""
    logger = logging.getLogger("lm_eval")
    before, look_up = logger.level, evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # Documents record our own commit.
    try:
        yield
    finally:
        logger.setLevel(before)
        evaluator.get_git_commit_hash = look_up


def _results(lm: Any, manager: TaskManager, name: str, specs: Sequence[Spec], *, seed: int, **options: Any) -> Any:
    evaluate: Any = simple_evaluate  # Its decorator hides its parameters.
    try:
        return evaluate(
            lm,
            tasks=[_with_defaults(manager, spec) for spec in specs],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,  # Errors are computed from the items; lm-eval's bootstrap prints and starts processes.
            **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed),
            **options,
        )
    except (ConnectionError, FileNotFoundError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the documents of '{name}' are not available ({reason[:160]}); {where_to_look(name)}"
        ) from error


def _with_defaults(manager: TaskManager, spec: Spec) -> Spec:
    """Return a task with our overrides over lm-eval's own configuration."""
    if isinstance(spec, str):
        return spec
    own = _own_options(manager, spec["task"], resolve_func=True)
    return {**{key: value for key, value in own.items() if key not in ("tag", "dataset_path", "dataset_name")}, **spec}


def _own_options(manager: TaskManager, task: str, *, resolve_func: bool) -> dict[str, Any]:
    path = manager.task_index[task].yaml_path
    return {} if path is None else load_yaml(path, resolve_func=resolve_func)


def _joined(results: Any) -> dict[str, Any]:
    """Return the metrics of one benchmark; with several parts means over all items, and those of each under `parts`."""
    counts = {part: row["effective"] for part, row in results["n-samples"].items()}
    parts = {
        part: {_metric_name(key): value for key, value in results["results"][part].items() if isinstance(value, float)}
        for part in counts
    }
    items = _items(results)
    shared = {
        "items": items,
        "num_items": sum(counts.values()),
        "num_fewshot": max(results["n-shot"][part] for part in counts),
        "version": str(next(iter(results["versions"].values()), "")),
    }
    errors = {error_name(name): _standard_error(values) for name, values in items.items() if len(values) > 1}
    if len(parts) == 1:
        return {**next(iter(parts.values())), **errors, **shared}
    joined = {name: mean(values) for name, values in items.items()} | errors
    return {**joined, **shared, "parts": {part: {**parts[part], "num_items": counts[part]} for part in counts}}


def _items(results: Any) -> dict[str, list[float]]:
    """Return for each metric that is a mean its values by item, part after part."""
    items: dict[str, list[float]] = {}
    for rows in results["samples"].values():
        for row in rows:
            for metric in MEANS:
                if metric in row:
                    items.setdefault(_metric_name(f"{metric},{row['filter']}"), []).append(float(row[metric]))
    return items


def _standard_error(values: Sequence[float]) -> float:
    return float(stdev(values)) / len(values) ** 0.5


def add_changes(tasks: dict[str, dict[str, Any]], full: dict[str, dict[str, Any]]) -> None:
    """Replace `items` by `changes`: [mean difference from full depth, its standard error] over the same items."""
    for name, task in tasks.items():
        theirs = full[name].get("items", {})
        ours = task.pop("items", {})
        if task is not full[name]:
            differences = {key: [a - b for a, b in zip(ours[key], theirs[key], strict=True)] for key in ours}
            task["changes"] = {
                key: [mean(values), _standard_error(values)] for key, values in differences.items() if len(values) > 1
            }
    for task in full.values():
        task.pop("items", None)


def _metric_name(key: str) -> str:
    """Return lm-eval's name of a metric, without the suffix that means no filter."""
    return key.removesuffix(",none")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
