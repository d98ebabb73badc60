"""lm-eval with routing on: the model class `anydepth`, and scores of tasks with the share of work that ran.

    python -m anydepth.measure.lm_eval --model anydepth --model_args target=my-router --tasks arc_easy

is lm-eval's own command line with that class registered.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.errors import UserError
from anydepth.execution import cost
from anydepth.execution.adapted import AdaptedModel
from anydepth.measure.tasks import LOCAL, Spec, Task, task_named
from anydepth.training.checkpoint import load_target

WHOLE = "none"
"""How lm-eval names a metric that no filter stands before."""


@dataclass
class Work:
    """FLOPs of layers that ran, and what the same tokens take at full depth."""

    layers: int = 0
    full_depth: int = 0

    @property
    def share(self) -> float:
        return self.layers / self.full_depth if self.full_depth else 1.0


Base: Any = huggingface.HFLM  # its decorator hides what it is


class AnydepthLM(Base):
    """An adapted model under lm-eval's requests, its decisions on in scoring and in generation.

    Args:
        target: what the command line takes as TARGET, or a model with methods attached (its tokenizer beside it).
    """

    def __init__(
        self,
        target: str | AdaptedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: Any = "float32",
        device: str | None = "cpu",
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        if isinstance(target, str):
            target, tokenizer = load_target(target, dtype=dtype, device=device or "cpu")
        super().__init__(pretrained=target, tokenizer=tokenizer, batch_size=batch_size, **options)
        self.adapted, self.work = target, Work()

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """In batches of one length: lm-eval pads without a mask, and padding would be routed and counted."""
        lengths = [min(len(context) + len(scored), self.max_length + 1) for _, context, scored in requests]
        answers: list[Any] = [None] * len(lengths)
        for length in sorted(set(lengths), reverse=True):
            places = [place for place, own in enumerate(lengths) if own == length]
            part = super()._loglikelihood_tokens([requests[place] for place in places], True, override_bs)
            for place, answer in zip(places, part, strict=True):
                answers[place] = answer
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            logits = self.adapted(input_ids=inps, use_cache=False).logits
        self._count()
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        ids = super()._model_generate(context, max_length, stop, **options)
        self._count()
        return ids

    def _count(self) -> None:
        if self.adapted.is_enabled:
            count = cost.flops(self.adapted.backbone, self.adapted.last_trace)
            self.work.layers += count.layers
            self.work.full_depth += count.full_depth_layers


register_model("anydepth")(AnydepthLM)


@functools.cache
def _manager() -> TaskManager:
    return TaskManager()  # reads some ten thousand files


def check_tasks(names: Sequence[str]) -> TaskManager:
    """lm-eval's index of tasks. Raises `UserError` for a name that is not in it."""
    manager = _manager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, list(manager.task_index), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"with local documents it has {', '.join(LOCAL)}"
            raise UserError(f"lm-eval has no task '{name}'; {hint}")
    return manager


def score_tasks(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The `tasks` of `anydepth.eval/1`: by name lm-eval's metrics, `num_items`, and `layer_token_share`, how much of
    the layers' work ran.

    Args:
        names: lm-eval's, those of `measure/tasks.py` on local files.
        num_fewshot: examples in the prompt; None is what each benchmark was published with.
        limit: score only the first items (of each part of a benchmark in parts).
        say: told of each task, lm-eval's progress bars on standard error below it; None is silent.

    Raises:
        UserError: lm-eval has no such task, or its documents cannot be had.
    """
    manager = check_tasks(names)
    adapted.eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # every default that it fills in is a warning to it
    lm = AnydepthLM(adapted, tokenizer)
    scores = {}
    for name in names:
        task = task_named(name)
        if say:
            say(f"task {name} ({task.source}) …")
        lm.work = Work()
        with nullcontext() if say else redirect_stderr(StringIO()):
            results = _results(lm, manager, name, task, num_fewshot, limit, seed)
        scores[name] = {**_joined(results), "layer_token_share": lm.work.share, "source": task.source}
    return scores


def _results(
    lm: AnydepthLM, manager: TaskManager, name: str, task: Task, num_fewshot: int | None, limit: int | None, seed: int
) -> dict[str, Any]:
    evaluate: Any = simple_evaluate  # its decorator hides what it takes
    try:
        results = evaluate(
            lm,
            tasks=[_whole(manager, spec) for spec in task.specs],
            num_fewshot=task.num_fewshot if num_fewshot is None else num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"the documents of '{name}' did not come from the hub ({str(error).splitlines()[0][:160]}); set "
            "ANYDEPTH_DATA to a folder that has them"
        ) from error
    assert results is not None, "lm-eval returns results to the first process"
    return dict(results)


def _whole(manager: TaskManager, spec: Spec) -> Spec:
    """A task with overrides on top of what lm-eval's own file says."""
    if isinstance(spec, str):
        return spec
    path = manager.task_index[spec["task"]].yaml_path
    assert path is not None, "lm-eval describes these tasks in files"
    own = load_yaml(path, resolve_func=True)
    return {**{key: value for key, value in own.items() if key not in ("tag", "dataset_path", "dataset_name")}, **spec}


def _joined(results: dict[str, Any]) -> dict[str, Any]:
    """Metrics of one benchmark: those of its parts, weighted by their items."""
    counts = {part: row["effective"] for part, row in results["n-samples"].items()}
    total = sum(counts.values())
    metrics: dict[str, float] = {}
    for part, count in counts.items():
        for key, value in results["results"][part].items():
            metric, _, kind = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                label = metric if kind in ("", WHOLE) else f"{metric},{kind}"
                metrics[label] = metrics.get(label, 0.0) + float(value) * count / total
    return {**metrics, "num_items": total}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
