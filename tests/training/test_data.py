"""Windows: packed, with a BOS, or of one document, against stock transformers and lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import anydepth
from anydepth import HFEngine
from anydepth.calibration.shares import skipped_shares
from anydepth.errors import UserError
from anydepth.measure.evaluate import evaluate, exit_losses
from anydepth.recipe import Recipe, TextConfig, TrainConfig
from anydepth.runs.run import Runner
from anydepth.training.data import WindowDataset, bos_of, collate, load_windows, num_tokens, pack, rows_of
from anydepth.training.train import prepare, train
from tiny import byte_tokenizer, save_base, tiny_llama
from undecided import undecided

ISOLATED = TextConfig(isolate_documents=True)
DOCUMENTS = ["the sea is wide and the night is long", "but the light comes back to the sea", "a", "the wide night"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_eos_between_documents_and_remainder_dropped() -> None:
    windows = pack(["a b", "c c c", "b"], word_tokenizer(), 3)
    assert windows.dtype == torch.int64
    assert windows[:2].tolist() == [[1, 2, 0], [3, 3, 3]]


def test_too_little_text_names_the_tokens() -> None:
    with pytest.raises(UserError, match=r"\d"):
        pack(["a b"], word_tokenizer(), 50)


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a BOS that it puts in front of every text, as those of Gemma and Llama do."""
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    front = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = front
    return tokenizer


def names_a_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One that has a BOS and never uses it, as those of GPT-2, SmolLM2 and Qwen."""
    tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def model_with_bos() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=258)


@torch.no_grad()
def stock_losses(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Cross-entropy of every token but the first."""
    row = torch.tensor([ids])
    return torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none")


def plain_ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


# --- BOS --------------------------------------------------------------------------------------------------------------


def test_every_window_begins_with_the_bos_of_the_tokenizer() -> None:
    """C9. A window of T tokens is BOS and T − 1 tokens of text; nothing of the text is left out."""
    tokenizer = with_bos(byte_tokenizer())
    windows = pack(DOCUMENTS, tokenizer, 16)
    assert (windows[:, 0] == tokenizer.bos_token_id).all() and not (windows[:, 1:] == tokenizer.bos_token_id).any()
    text = [token for document in DOCUMENTS for token in [*plain_ids(document), 0]]
    assert windows[:, 1:].flatten().tolist() == text[: windows[:, 1:].numel()]


@torch.no_grad()
def test_perplexity_is_that_of_stock_transformers_with_a_bos_before_each_window() -> None:
    """C9. The targets are all tokens of text, BOS is none of them."""
    model, tokenizer = model_with_bos(), with_bos(byte_tokenizer())
    found = evaluate(HFEngine(anydepth.attach(model_with_bos(), [])), pack(DOCUMENTS * 3, tokenizer, 24))
    stream = [token for document in DOCUMENTS * 3 for token in [*plain_ids(document), 0]]
    pieces = [stream[start : start + 23] for start in range(0, len(stream) - 23, 23)]
    losses = torch.cat([stock_losses(model, [tokenizer.bos_token_id, *piece]) for piece in pieces])
    assert found["num_tokens"] == len(losses) == 23 * len(pieces)
    assert found["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)


def test_a_document_scores_as_in_lm_eval() -> None:
    """C9. Rolling log-likelihood of a document that fits into one window."""
    tokenizer, text = with_bos(byte_tokenizer()), DOCUMENTS[0]
    theirs = HFLM(pretrained=model_with_bos(), tokenizer=tokenizer, add_bos_token=False)  # its prefix is the BOS
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    expected = theirs.loglikelihood_rolling([request], disable_tqdm=True)[0]
    windows = pack([text], tokenizer, len(plain_ids(text)) + 1)
    ours = evaluate(HFEngine(anydepth.attach(model_with_bos(), [])), windows)
    assert ours["loss"] * ours["num_tokens"] == pytest.approx(-expected, abs=1e-3)
    assert ours["num_tokens"] == len(plain_ids(text))


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), names_a_bos(byte_tokenizer())])
def test_a_tokenizer_that_adds_no_bos_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    """C9. A BOS that is only named, as GPT-2's, changes nothing."""
    assert bos_of(tokenizer) is None
    text = [token for document in DOCUMENTS for token in [*plain_ids(document), 0]]
    windows = pack(DOCUMENTS, tokenizer, 16)
    assert windows.flatten().tolist() == text[: windows.numel()]


def test_the_bos_of_documents_alone() -> None:
    tokenizer = with_bos(byte_tokenizer())
    windows = pack(DOCUMENTS[:2], tokenizer, 16, text=TextConfig(bos="per_document"))
    bos = tokenizer.bos_token_id
    text = [bos, *plain_ids(DOCUMENTS[0]), 0, bos, *plain_ids(DOCUMENTS[1])]
    assert windows.flatten().tolist() == text[: windows.numel()]


def test_all_stages_of_a_recipe_read_windows_with_a_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9. Training, search, calibration, eval, analysis and the prompts of bench."""
    model_with_bos().save_pretrained(tmp_path / "base")
    tokenizer = with_bos(byte_tokenizer())
    tokenizer.save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS * 20))
    recipe = Recipe.model_validate(
        {
            "model": {"target": str(tmp_path / "base")},
            "data": {"train": str(text), "sequence_length": 16},
            "methods": [{"name": "layer_router", "always_keep": 2}],
            "search": {"sequence_length": 16, "num_windows": 2},
            "router_fit": {"sequence_length": 16, "num_windows": 2},
            "train": {"max_steps": 1, "warmup_steps": 0},
            "calibrate": {"skip_share": 0.3, "num_windows": 2},
            "eval": {"data": str(text), "sequence_length": 16, "max_windows": 2},
            "bench": {"prompt_tokens": [16], "new_tokens": 2, "num_runs": 1, "engine": "hf"},
            "analyze": {"sequence_length": 16, "num_windows": 2, "num_permutations": 3},
        }
    )
    seen: list[Tensor] = []
    forward = LlamaForCausalLM.forward

    def watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watch)
    runner = Runner(recipe, tmp_path / "out", say=lambda line: None)
    for stage in (runner.search, runner.fit, runner.train, runner.evaluate, runner.bench, runner.analyze):
        seen.clear()
        stage()
        read = [ids for ids in seen if ids.shape[1] > 8]  # neither tokens being decoded nor the self-check's pieces
        assert read and all((ids[:, 0] == tokenizer.bos_token_id).all() for ids in read), stage


# --- documents alone --------------------------------------------------------------------------------------------------


def test_windows_of_one_document_each() -> None:
    """C29. Long documents are cut, short ones padded, and one token without a target is left out."""
    windows = pack(DOCUMENTS, byte_tokenizer(), 20, text=ISOLATED)
    first, second, *_, last = map(plain_ids, DOCUMENTS)
    expected = [first[:20], first[20:], second[:20], second[20:], last]
    assert [row[0].tolist() for row in rows_of(windows)] == expected
    assert num_tokens(windows) == sum(map(len, expected))


@torch.no_grad()
def test_the_second_document_scores_as_if_it_were_alone(tmp_path: Path) -> None:
    """C29. Packed, the second document sees the first."""
    path, model = tmp_path / "two.jsonl", tiny_llama()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:2]))
    losses = torch.cat([stock_losses(model, plain_ids(text)) for text in DOCUMENTS[:2]])
    adapted = anydepth.attach(tiny_llama(), [])
    alone = load_windows(str(path), byte_tokenizer(), 100, text=ISOLATED)
    found = evaluate(HFEngine(adapted), alone)
    assert found["loss"] == pytest.approx(losses.mean().item(), abs=1e-5) and found["num_tokens"] == len(losses)
    assert exit_losses(adapted, alone)[-1]["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    packed = evaluate(HFEngine(adapted), load_windows(str(path), byte_tokenizer(), 70))
    assert packed["loss"] != pytest.approx(losses.mean().item(), abs=1e-2)


@pytest.mark.parametrize("distillation", [None, {"weight": 0.5}])
def test_training_on_documents_alone_has_their_own_losses(tmp_path: Path, distillation: dict[str, float]) -> None:
    """C29. The first step's loss is that of stock transformers over the tokens of both documents."""
    config = TrainConfig.model_validate(
        {"max_steps": 1, "batch_size": 2, "lora": {"rank": 2}, "distillation": distillation}
    )
    adapted = anydepth.attach(prepare(tiny_llama(), config), [])
    result = train(adapted, pack(DOCUMENTS[:2], byte_tokenizer(), 100, text=ISOLATED), config, tmp_path)
    losses = torch.cat([stock_losses(tiny_llama(), plain_ids(text)) for text in DOCUMENTS[:2]])
    row = result.loss_history[0]
    assert row["lm_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert row.get("distillation", 0) == pytest.approx(0, abs=1e-6)  # its own teacher, before the first step


def test_a_batch_is_cut_to_its_longest_document() -> None:
    windows = pack(DOCUMENTS, byte_tokenizer(), 100, text=ISOLATED)
    items = WindowDataset(windows, num_items=3, seed=0)
    batch = collate([*items])
    assert batch["attention_mask"].sum(1).tolist() == [len(rows_of(windows)[i][0]) for i in items.order]
    assert batch["input_ids"].shape[1] == max(len(plain_ids(text)) for text in DOCUMENTS)
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)


def test_thresholds_are_set_on_documents_alone() -> None:
    """C29. The share that padded windows skip is the mean of what each document skips alone."""
    adapted = undecided("layer_router")
    windows = pack(DOCUMENTS[:2], byte_tokenizer(), 100, text=ISOLATED)
    alone = [skipped_shares(adapted, torch.tensor([plain_ids(text)]))["layer_router"] for text in DOCUMENTS[:2]]
    assert skipped_shares(adapted, windows)["layer_router"] == pytest.approx(sum(alone) / 2)
    assert 0.1 < sum(alone) / 2 < 0.9


def test_the_option_reaches_training_and_eval_of_a_recipe(tmp_path: Path) -> None:
    """C29. `data.isolate_documents: true`."""
    save_base(tmp_path / "base")
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:2]))
    recipe = Recipe.model_validate(
        {
            "model": {"target": str(tmp_path / "base")},
            "data": {"train": str(path), "sequence_length": 64, "isolate_documents": True},
            "train": {"max_steps": 1, "batch_size": 2, "lora": {"rank": 2}},
            "eval": {"data": str(path), "sequence_length": 64},
        }
    )
    runner = Runner(recipe, tmp_path / "out", say=lambda line: None)
    losses = torch.cat([stock_losses(tiny_llama(), plain_ids(text)) for text in DOCUMENTS[:2]])
    assert runner.train()["loss_history"][0]["lm_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert runner.evaluate()["full_depth"]["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
