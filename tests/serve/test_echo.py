"""Prompts that are returned and scored, as evaluation over HTTP needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import anydepth
from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.decoding.request import Request
from anydepth.decoding.scheduler import PROMPT_CHUNK, Scheduler
from serving import running, tiny_router
from serving_here import complete, refusal, serving
from tiny import byte_tokenizer, tiny_llama

TEXT = "the sea is wide and the night is long"


def log_probabilities(ids: list[int]) -> torch.Tensor:
    """Return (T − 1, V) of stock transformers: those of each token after the first."""
    with torch.no_grad():
        return tiny_llama()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def test_a_prompt_is_scored_token_by_token() -> None:
    ids = byte_tokenizer()(TEXT)["input_ids"]
    wanted = log_probabilities(ids)
    with serving() as client:
        choice = complete(client, TEXT, echo=True, logprobs=2, max_tokens=3, temperature=0)["choices"][0]
        alone = complete(client, TEXT, logprobs=2, max_tokens=3, temperature=0)["choices"][0]
    scores = choice["logprobs"]
    assert choice["text"] == TEXT + alone["text"]
    assert scores["tokens"] == [*TEXT, *alone["logprobs"]["tokens"]]
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    own = torch.tensor(scores["token_logprobs"][1 : len(ids)])
    torch.testing.assert_close(own, wanted.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    best = [max(top.values()) for top in scores["top_logprobs"][1 : len(ids)]]
    torch.testing.assert_close(torch.tensor(best), wanted.amax(1), rtol=1e-4, atol=1e-4)
    assert scores["token_logprobs"][len(ids) :] == alone["logprobs"]["token_logprobs"]
    assert scores["text_offset"] == list(range(len(ids) + 3))


def test_the_prompt_alone() -> None:
    """`max_tokens` 0 gives no token and no usage of any; for several prompts, texts and token ids alike."""
    ids = byte_tokenizer()(TEXT)["input_ids"]
    with serving() as client:
        answer = complete(client, [ids, ids[:5]], echo=True, logprobs=1, max_tokens=0)
        texts = complete(client, [TEXT, TEXT[:5]], echo=True, logprobs=1, max_tokens=0)
        assert [choice["text"] for choice in answer["choices"]] == [TEXT, TEXT[:5]]
        assert answer["choices"] == texts["choices"] and answer["usage"]["completion_tokens"] == 0
        assert len(answer["choices"][1]["logprobs"]["token_logprobs"]) == 5
        assert "echo: true" in refusal(client, max_tokens=0)["message"]
        plain = complete(client, TEXT, echo=True, max_tokens=0)["choices"][0]
        assert plain["text"] == TEXT and plain["logprobs"] is None


def test_a_stream_begins_with_the_prompt() -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": TEXT, "max_tokens": 4, "temperature": 0, "echo": True}
    with serving() as client:
        whole = complete(client, TEXT, echo=True, max_tokens=4, temperature=0)["choices"][0]["text"]
        lines = client.post("/v1/completions", json={**body, "stream": True}).text.splitlines()
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    assert "".join(texts) == whole and texts[0].startswith(TEXT)


@pytest.mark.parametrize("engine", [FastEngine, HFEngine])
def test_long_prompts_are_scored_in_chunks(engine: Any) -> None:
    """As one forward scores them; logits of all tokens at once are never in memory."""
    ids = torch.randint(1, 257, (3 * PROMPT_CHUNK + 7,), generator=torch.Generator().manual_seed(0)).tolist()
    model = tiny_llama(max_position_embeddings=2048)
    request = Request.greedy(ids, 1, num_logprobs=0, scores_prompt=True)
    Scheduler(engine(anydepth.attach(model, [])), 1).run([request])
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    found = torch.tensor([one.own for one in request.prompt_logprobs])
    torch.testing.assert_close(found, wanted[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_lm_eval_over_http_gives_the_scores_of_this_process(tmp_path: Path) -> None:
    """S19: lm-eval's own client, unchanged."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from anydepth.measure.lm_eval import AnydepthLM

    target = tiny_router(tmp_path)
    adapted = anydepth.load(target / "router")
    requests = [
        Instance("loglikelihood", {}, (context, continuation), number)
        for number, (context, continuation) in enumerate(
            [("the sea", " is wide"), ("the night", " is long"), ("a", " b")]
        )
    ]
    here = AnydepthLM(FastEngine(adapted), byte_tokenizer()).loglikelihood(requests)
    with running(target) as address:
        there = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model="tiny",
            tokenizer_backend="huggingface",
            tokenizer=str(target / "base"),
        ).loglikelihood(requests)
    for (score, is_greedy), (other, other_greedy) in zip(here, there, strict=True):
        assert score == pytest.approx(other, abs=1e-3) and bool(is_greedy) == bool(other_greedy)
