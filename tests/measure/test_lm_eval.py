"""lm-eval through `anydepth`: its own `hf` model at full depth, routing on otherwise, local documents."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import anydepth
from anydepth.errors import UserError
from anydepth.measure.lm_eval import AnydepthLM, _whole, add_changes, check_tasks, score_tasks
from anydepth.measure.results import task_scores
from anydepth.measure.tasks import Task, task_named, where_to_look
from tiny import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

ROUTER = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.5] * 4}
REAL_DATA = os.environ.get("ANYDEPTH_DATA", "")
METRICS = ("acc", "acc_norm", "exact_match", "bits_per_byte", "byte_perplexity", "word_perplexity")
WORDS = ["sea", "night", "lights", "a long way", "to", "river bank", "fog", "the end"]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of every benchmark in the form that `ANYDEPTH_DATA` has them."""
    for name in ("arc_easy", "arc_challenge"):
        for part in ("train", "dev"):
            rows = [
                {
                    "id": f"{part}{number}",
                    "question": {
                        "stem": f"What is {WORDS[number]}?",
                        "choices": [
                            {"text": WORDS[(number + i) % 8], "label": "ABCD"[i], "para": "x"} for i in range(4)
                        ],
                    },
                    "answerKey": "ABCD"[number % 4],
                }
                for number in range(4)
            ]
            write_lines(tmp_path / name / f"{part}.jsonl", rows)
    for part in ("dev", "val"):
        for subject, count in (("anatomy", 6), ("virology", 8)):
            path = tmp_path / "mmlu" / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                rows = [
                    [f"Is it, {word}?", *WORDS[:4], "ABCD"[number % 4]] for number, word in enumerate(WORDS[:count])
                ]
                csv.writer(file).writerows(rows)
    sums = [
        {"question": f"{number} and 1?", "answer": f"So <<{number}+1>>.\n#### {number + 1}"} for number in range(1330)
    ]
    write_lines(tmp_path / "gsm8k" / "train.jsonl", sums)
    articles = "".join(
        f" \n = {word} = \n \n The {word} is {word} . \n \n = = Parts = = \n \n It has some .\n" for word in WORDS[:3]
    )
    (tmp_path / "wikitext-2").mkdir()
    for part in ("train", "valid"):
        (tmp_path / "wikitext-2" / f"{part}.txt").write_text(articles)
    monkeypatch.setenv("ANYDEPTH_DATA", str(tmp_path))
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def model() -> PreTrainedModel:
    return tiny_llama(max_position_embeddings=2048)


def answers(lm: Any, name: str, limit: int | None = None) -> list[Any]:
    """What the model said to every request of a task, in order."""
    from lm_eval import simple_evaluate

    manager = check_tasks([name])
    specs = [_whole(manager, spec) for spec in task_named(name).specs]
    results: Any = simple_evaluate(lm, tasks=specs, task_manager=manager, limit=limit, bootstrap_iters=0)
    return [
        response
        for part in sorted(results["samples"])
        for sample in results["samples"][part]
        for response in sample["resps"]
    ]


def distance(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference of log-likelihoods, item by item."""
    flat = [torch.tensor([[_number(part) for part in row] for row in side]) for side in (ours, theirs)]
    assert flat[0].shape == flat[1].shape and len(flat[0]) > 0
    return float((flat[0] - flat[1]).abs().max())


def _number(answer: Any) -> float:
    """The log-likelihood; beside it stands whether it is the greedy answer."""
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


def stock(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=backbone, tokenizer=tokenizer)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["arc_easy", "mmlu_anatomy"])
def test_full_depth_is_lm_evals_own_model(name: str) -> None:
    theirs = answers(stock(model(), byte_tokenizer()), name)
    adapted = anydepth.attach(model(), ROUTER)
    with adapted.disabled():
        assert distance(answers(AnydepthLM(adapted, byte_tokenizer()), name), theirs) <= 1e-4
    assert distance(answers(AnydepthLM(adapted, byte_tokenizer()), name), theirs) > 1e-2  # routing on


@pytest.mark.parametrize("name", ["gsm8k", "wikitext"])
def test_text_and_rolling_windows_are_lm_evals_own(name: str) -> None:
    """Generated text word for word; of a window smaller than the articles, too."""
    backbone = tiny_llama(max_position_embeddings=2048 if name == "gsm8k" else 32)
    theirs = answers(stock(backbone, byte_tokenizer()), name, 2)
    adapted = anydepth.attach(backbone, ROUTER)
    with adapted.disabled():
        ours = answers(AnydepthLM(adapted, byte_tokenizer()), name, 2)
    assert len(ours) >= 2 and (ours == theirs if name == "gsm8k" else distance(ours, theirs) < 1e-4)
    assert answers(AnydepthLM(adapted, byte_tokenizer()), name, 2) != theirs


def test_parts_count_by_their_items() -> None:
    adapted = anydepth.attach(model(), ROUTER)
    scores = score_tasks(adapted, byte_tokenizer(), ["mmlu"], num_fewshot=0)["mmlu"]
    parts = scores["parts"]
    assert [parts[name]["num_items"] for name in ("mmlu_anatomy", "mmlu_virology")] == [6, 8]
    joined = (6 * parts["mmlu_anatomy"]["acc"] + 8 * parts["mmlu_virology"]["acc"]) / 14
    assert scores["acc"] == pytest.approx(joined) and scores["num_items"] == 14
    assert scores["acc_stderr"] == pytest.approx((joined * (1 - joined) / 13) ** 0.5)  # of a share over 14


def test_changes_are_of_the_same_items() -> None:
    full = {"a": {"acc": 0.5, "items": {"acc": [1.0, 0.0, 1.0, 0.0]}}}
    tasks = {"a": {"acc": 0.5, "items": {"acc": [1.0, 1.0, 0.0, 0.0]}}}
    add_changes(tasks, full)
    assert tasks == {"a": {"acc": 0.5, "changes": {"acc": [0.0, pytest.approx((2 / 3) ** 0.5 / 2)]}}}
    assert full == {"a": {"acc": 0.5}}
    full["a"]["items"] = {"acc": [1.0, 0.0]}
    add_changes(full, full)  # the untouched model alone has none
    assert full == {"a": {"acc": 0.5}}


def test_errors_are_lm_evals_own() -> None:
    scores = score_tasks(
        anydepth.attach(model(), ROUTER), byte_tokenizer(), ["arc_easy", "gsm8k"], limit=4, num_fewshot=0
    )
    for name, metric in (("arc_easy", "acc"), ("gsm8k", "exact_match,strict-match")):
        items, (score, error) = scores[name]["items"][metric], task_scores(scores[name])[metric]
        assert len(items) == 4 and score == pytest.approx(mean(items)) and error == pytest.approx(stdev(items) / 2)


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "is not JSON"), ('{"id": 1, "answerKey": "A"}', "has no `question`"), ("3", "has no `id`")],
)
def test_broken_documents_are_named(data: Path, line: str, words: str) -> None:
    path = data / "arc_easy" / "dev.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=f"{path}, line 5 {words}"):
        score_tasks(anydepth.attach(model(), ROUTER), byte_tokenizer(), ["arc_easy"], limit=1)


def test_where_documents_would_be(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "arc_easy" / "dev.jsonl").unlink()
    assert str(data / "arc_easy" / "dev.jsonl") in where_to_look("arc_easy")
    monkeypatch.delenv("ANYDEPTH_DATA")
    assert where_to_look("arc_easy") == "set ANYDEPTH_DATA to a folder with arc_easy/dev.jsonl"
    assert where_to_look("hellaswag") == "it needs a network"


def test_what_the_window_cuts_is_told() -> None:
    adapted = anydepth.attach(tiny_llama(max_position_embeddings=64), ROUTER)
    told: list[str] = []
    scores = score_tasks(adapted, byte_tokenizer(), ["mmlu_anatomy"], limit=1, num_fewshot=2, say=told.append)
    assert scores["mmlu_anatomy"]["num_truncated"] == 4 and "lost their start" in told[-1]


def test_batches_hold_no_padding() -> None:
    adapted, shares, found = anydepth.attach(model(), ROUTER), [], []
    for size in (1, 4):
        lm = AnydepthLM(adapted, byte_tokenizer(), batch_size=size)
        found.append(answers(lm, "arc_easy"))
        shares.append((lm.work.layers, lm.work.full_depth))
    assert distance(found[1], found[0]) <= 1e-3
    assert shares[0] == shares[1]


def test_every_local_task_is_scored_with_its_share() -> None:
    adapted = anydepth.attach(model(), ROUTER)
    names = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "wikitext"]
    scores = score_tasks(adapted, byte_tokenizer(), names, limit=2, num_fewshot=1)
    metrics = {name: sorted(key for key in row if key.partition(",")[0] in METRICS) for name, row in scores.items()}
    assert metrics == {
        "arc_easy": ["acc", "acc_norm"],
        "arc_challenge": ["acc", "acc_norm"],
        "mmlu": ["acc"],
        "gsm8k": ["exact_match,flexible-extract", "exact_match,strict-match"],
        "wikitext": ["bits_per_byte", "byte_perplexity", "word_perplexity"],
    }
    assert [scores[name]["num_items"] for name in names] == [2, 2, 4, 2, 2]
    assert all(0.3 < row["layer_token_share"] < 0.95 for row in scores.values())
    assert all(row["num_fewshot"] == 1 and row["num_truncated"] == 0 for row in scores.values())
    with adapted.disabled():
        assert score_tasks(adapted, byte_tokenizer(), ["arc_easy"], limit=2)["arc_easy"]["layer_token_share"] == 1.0


def test_documents_are_where_and_as_many_as_they_say(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_named("mmlu").source == f"{data / 'mmlu'}, val"
    assert [spec["task"] for spec in task_named("mmlu").specs] == ["mmlu_anatomy", "mmlu_virology"]  # type: ignore[index]
    assert task_named("mmlu").num_fewshot == 5
    documents = task_named("gsm8k").specs[0]["custom_dataset"]()  # type: ignore[index]
    assert {split: len(rows) for split, rows in documents.items()} == {"train": 11, "test": 1319}
    assert len(task_named("wikitext").specs[0]["custom_dataset"]()["validation"]) == 3  # type: ignore[index]
    assert task_named("mmlu_stem").source == task_named("hellaswag").source == "hub"
    monkeypatch.delenv("ANYDEPTH_DATA")
    assert task_named("arc_easy").specs == ["arc_easy"]
    assert task_named("mmlu") == Task(["mmlu"], 5, "hub")  # as many examples, wherever the documents are


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match=r"no task 'arc_eazy'; did you mean 'arc_easy'\?"):
        check_tasks(["arc_eazy"])


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA, reason="ANYDEPTH_DATA is not set")
@pytest.mark.parametrize(
    ("name", "limit"), [("arc_easy", 10), ("arc_challenge", 10), ("mmlu_anatomy", 3), ("wikitext", 1)]
)
def test_the_real_model_on_real_documents(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYDEPTH_DATA", REAL_DATA)
    backbone, tokenizer = anydepth.load_model("embedded", dtype="float32")
    theirs = answers(stock(backbone, tokenizer), name, limit)
    adapted = anydepth.attach(backbone, {"name": "skip_set", "skip_layers": [11, 13]})
    with adapted.disabled():
        assert distance(answers(AnydepthLM(adapted, tokenizer), name, limit), theirs) <= 1e-4
    lm = AnydepthLM(adapted, tokenizer)
    assert distance(answers(lm, name, limit), theirs) > 1e-2
    assert lm.work.share == pytest.approx(28 / 30, abs=0.01)
