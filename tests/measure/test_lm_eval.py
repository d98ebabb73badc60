"""lm-eval through `anydepth`: its own `hf` model at full depth, routing on otherwise, local documents."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

import anydepth
from anydepth import Draft, FastEngine, HFEngine
from anydepth.cli import app
from anydepth.errors import UserError
from anydepth.measure.lm_eval import AnydepthLM, _with_defaults, add_changes, check_tasks, check_windows, score_tasks
from anydepth.measure.results import task_scores
from anydepth.measure.tasks import task_named
from anydepth.recipe import TrainConfig
from anydepth.training.train import prepare
from scoring import METHODS, ROUTER, deciding, model, write_documents
from tiny import byte_tokenizer, save_base, save_text, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

REAL_DATA = os.environ.get("ANYDEPTH_DATA", "")
METRICS = ("acc", "acc_norm", "exact_match", "bits_per_byte", "byte_perplexity", "word_perplexity")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_documents(tmp_path)
    monkeypatch.setenv("ANYDEPTH_DATA", str(tmp_path))
    return tmp_path


def answers(lm: Any, name: str, limit: int | None = None) -> list[Any]:
    """What the model said to every request of a task, in order."""
    from lm_eval import simple_evaluate

    manager = check_tasks([name])
    specs = [_with_defaults(manager, spec) for spec in task_named(name).specs]
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


@pytest.mark.parametrize("name", [pytest.param("arc_easy", marks=pytest.mark.slow), "mmlu_anatomy"])
def test_full_depth_is_lm_evals_own_model(name: str) -> None:
    theirs = answers(stock(model(), byte_tokenizer()), name)
    adapted = anydepth.attach(model(), ROUTER)
    with adapted.disabled():
        assert distance(answers(AnydepthLM(HFEngine(adapted), byte_tokenizer()), name), theirs) <= 1e-4
    assert distance(answers(AnydepthLM(HFEngine(adapted), byte_tokenizer()), name), theirs) > 1e-2  # routing on


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "wikitext"])
def test_text_and_rolling_windows_are_lm_evals_own(name: str) -> None:
    """Generated text word for word; of a window smaller than the articles, too."""
    backbone = tiny_llama(max_position_embeddings=2048 if name == "gsm8k" else 32)
    theirs = answers(stock(backbone, byte_tokenizer()), name, 2)
    adapted = anydepth.attach(backbone, ROUTER)
    with adapted.disabled():
        ours = answers(AnydepthLM(HFEngine(adapted), byte_tokenizer()), name, 2)
    assert len(ours) >= 2 and (ours == theirs if name == "gsm8k" else distance(ours, theirs) < 1e-4)
    assert answers(AnydepthLM(HFEngine(adapted), byte_tokenizer()), name, 2) != theirs


@pytest.mark.parametrize("kind", METHODS)
def test_the_engine_scores_as_the_hugging_face_model(kind: str) -> None:
    """Requests that begin alike keep what they share; their scores are those of whole runs, by the other engine."""
    adapted = deciding(METHODS[kind])
    theirs = AnydepthLM(HFEngine(adapted), byte_tokenizer())
    ours = AnydepthLM(FastEngine(adapted), byte_tokenizer())
    name = "mmlu_anatomy" if kind in ("full depth", "sequence") else "arc_easy"  # letters, or texts
    assert distance(answers(ours, name, 3), answers(theirs, name, 3)) <= 2e-4
    assert ours.work.full_depth < 0.7 * theirs.work.full_depth or kind == "full depth"
    assert 0.2 < ours.work.share <= 1 and abs(ours.work.share - theirs.work.share) < 0.25


@pytest.mark.parametrize(
    "kind",
    [
        "router",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("skip set", "sequence", "recompute", "speculation")),
    ],
)
def test_the_engine_writes_what_the_hugging_face_model_writes(kind: str) -> None:
    adapted = deciding([] if kind == "speculation" else METHODS[kind])
    draft = Draft(adapted, {}) if kind == "speculation" else None
    engines = (HFEngine(adapted, draft), FastEngine(adapted, draft=draft))
    found = [answers(AnydepthLM(engine, byte_tokenizer()), "gsm8k", 1) for engine in engines]
    assert found[0] == found[1]


def evaluated(target: Path, *options: str) -> str:
    """What `anydepth eval` prints."""
    shown = CliRunner().invoke(app, ["eval", str(target), "--sequence-length", "32", "--limit", "1", *options])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(save_text(tmp_path / "text.txt"))


@pytest.mark.parametrize("method", ["drafting", "stochastic_depth"])
def test_what_changes_no_score_is_scored_once(tmp_path: Path, text: str, method: str) -> None:
    """C31: no column equal to that of the base, and one line that says why."""
    base = save_base(tmp_path / "base")
    loaded, _ = anydepth.load_model(str(base))
    adapted = anydepth.attach(loaded, [] if method == "drafting" else {"name": method})
    draft = Draft(adapted, {}) if method == "drafting" else None
    anydepth.save(adapted, tmp_path / "own", base=str(base), draft=draft)
    asked = ["--data", text, "--tasks", "arc_easy"]
    printed = evaluated(tmp_path / "own", *asked)
    why = "drafting does not change scores" if method == "drafting" else "every token runs every layer"
    assert printed.count(why) == 1 and "change" not in printed.replace(why, "").replace("of the change", "")
    assert [line.split()[0] for line in printed.splitlines() if line[:1].isalpha()][:1] == ["base"]
    document = json.loads(evaluated(tmp_path / "own", *asked, "--json", "--quiet"))
    assert document["note"].startswith(why) or why in document["note"]
    assert document["tasks"] == document["full_depth"]["tasks"]
    assert document["perplexity"] == document["full_depth"]["perplexity"]


def test_labels_name_the_weights_and_the_adapter(tmp_path: Path, text: str) -> None:
    """C22: weights in fewer bits are no full depth; a LoRA adapter alone is none either, and is scored."""
    base = save_base(tmp_path / "base")
    asked = ["--data", text, "--dtype", "bfloat16", "--engine", "fast", "--tasks", "arc_easy", "--json", "--quiet"]
    document = json.loads(evaluated(base, *asked, "--weights", "int8"))
    assert document["label"] == "full depth, int8 weights" and "note" not in document
    assert document["tasks"]["arc_easy"].keys() >= {"changes"}
    assert json.loads(evaluated(base, *asked))["label"] == "full depth"
    loaded, _ = anydepth.load_model(str(base))
    wrapped = prepare(loaded, TrainConfig.model_validate({"lora": {"rank": 2}}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    anydepth.save(anydepth.attach(wrapped, []), tmp_path / "lora", base=str(base))
    document = json.loads(evaluated(tmp_path / "lora", "--data", text, "--tasks", "arc_easy", "--json", "--quiet"))
    assert document["label"] == "full depth + LoRA" and "changes" in document["tasks"]["arc_easy"]


@pytest.mark.parametrize("window", [256, 200])
def test_a_window_without_space_for_an_answer_is_refused(window: int) -> None:
    """C23: before anything runs, in one line."""
    adapted = anydepth.attach(tiny_llama(max_position_embeddings=window), ROUTER)
    with pytest.raises(UserError, match=f"256 new tokens are more than the model's window of {window}"):
        check_windows(HFEngine(adapted), byte_tokenizer(), ["arc_easy", "gsm8k"])
    for engine in (HFEngine(adapted), FastEngine(adapted)):
        with pytest.raises(UserError, match=f"256 new tokens are more than the model's window of {window}"):
            score_tasks(engine, byte_tokenizer(), ["gsm8k"], limit=1)
    check_windows(HFEngine(anydepth.attach(model(), ROUTER)), byte_tokenizer(), ["arc_easy", "gsm8k", "mmlu"])


def test_a_window_shorter_than_an_answer_is_refused() -> None:
    """C23: an answer that is scored does not fit either."""
    adapted = anydepth.attach(tiny_llama(max_position_embeddings=8), ROUTER)
    for engine in (HFEngine(adapted), FastEngine(adapted)):
        with pytest.raises(UserError, match=r"a continuation .* \d+ tokens, more than the model's window of 8"):
            score_tasks(engine, byte_tokenizer(), ["arc_easy"], limit=4)


def test_parts_count_by_their_items() -> None:
    adapted = anydepth.attach(model(), ROUTER)
    scores = score_tasks(HFEngine(adapted), byte_tokenizer(), ["mmlu"], num_fewshot=0)["mmlu"]
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
        HFEngine(anydepth.attach(model(), ROUTER)), byte_tokenizer(), ["arc_easy", "gsm8k"], limit=4, num_fewshot=0
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
        score_tasks(HFEngine(anydepth.attach(model(), ROUTER)), byte_tokenizer(), ["arc_easy"], limit=1)


def test_what_the_window_cuts_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And no more than that: outside a repository lm-eval has git say so on standard error."""
    monkeypatch.chdir(tmp_path)
    adapted = anydepth.attach(tiny_llama(max_position_embeddings=64), ROUTER)
    told: list[str] = []
    scores = score_tasks(HFEngine(adapted), byte_tokenizer(), ["mmlu_anatomy"], limit=1, num_fewshot=2, say=told.append)
    assert scores["mmlu_anatomy"]["num_truncated"] == 4 and "lost their start" in told[-1]
    assert "git" not in capfd.readouterr().err


def test_batches_hold_no_padding() -> None:
    adapted, shares, found = anydepth.attach(model(), ROUTER), [], []
    for size in (1, 4):
        lm = AnydepthLM(HFEngine(adapted), byte_tokenizer(), batch_size=size)
        found.append(answers(lm, "arc_easy"))
        shares.append((lm.work.layers, lm.work.full_depth))
    assert distance(found[1], found[0]) <= 1e-3
    assert shares[0] == shares[1]


@pytest.mark.slow
def test_every_local_task_is_scored_with_what_ran() -> None:
    adapted = anydepth.attach(model(), ROUTER)
    names = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "wikitext"]
    scores = score_tasks(HFEngine(adapted), byte_tokenizer(), names, limit=2, num_fewshot=1)
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
        assert (
            score_tasks(HFEngine(adapted), byte_tokenizer(), ["arc_easy"], limit=2)["arc_easy"]["layer_token_share"]
            == 1.0
        )


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
        assert distance(answers(AnydepthLM(HFEngine(adapted), tokenizer), name, limit), theirs) <= 1e-4
    lm = AnydepthLM(HFEngine(adapted), tokenizer)
    assert distance(answers(lm, name, limit), theirs) > 1e-2
    assert lm.work.share == pytest.approx(28 / 30, abs=0.01)
