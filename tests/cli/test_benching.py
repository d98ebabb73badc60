"""bench as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

from commands import anydepth, refused
from tiny import NUM_LAYERS


def test_bench_against_a_method_on_a_base(base: Path, text: Path) -> None:
    done = anydepth(
        "bench",
        base,
        "--against",
        "skip_set",
        "--set",
        "skip_layers=[1,2]",
        "--data",
        text,
        "--prompt-tokens",
        8,
        "--new-tokens",
        3,
        "--num-runs",
        1,
        "--batch-sizes",
        "1,2",
        "--requests",
        5,
        "--json",
        "--quiet",
    )
    document = json.loads(done.stdout)
    row = document["rows"][0]
    assert row["adapted"]["mean_depth"] == 4
    assert row["ideal_speedup"] > 1
    assert [(queue["batch_size"], queue["num_requests"]) for queue in document["queues"]] == [(1, 5), (2, 5)]
    assert all(queue["adapted"]["tokens_per_second"] > 0 for queue in document["queues"])


def test_bench_of_given_prompts(tmp_path: Path, finished: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "the sea"}, {"turns": ["the night is long", "why"]}, {"messages": [{"content": "light"}]}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    done = anydepth("bench", finished, "--prompts", prompts, "--batch-sizes", "1,3", "--new-tokens", 3, "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["rows"]
    assert [row["batch_size"] for row in measured] == [1, 3]
    assert all(least <= row["num_runs"] <= 3 * least for row, least in zip(measured, (3, 1), strict=True))
    assert measured[0]["prompt_tokens"] == len("the night is long")
    prompts.write_text('{"text": "no prompt"}')
    assert "line 1" in refused("bench", finished, "--prompts", prompts, "--quiet")


def test_bench_of_lossless_decoding(base: Path, text: Path) -> None:
    command = ("bench", base, "--data", text, "--prompt-tokens", 16, "--new-tokens", 12, "--num-runs", 2)
    done = anydepth(*command, "--against", "self_speculation", "--engine", "both", "--json")
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["rows"]:
        assert row["identical_tokens"] and row["adapted"]["mean_depth"] == NUM_LAYERS
        assert row["adapted"]["mean_acceptance_length"] >= 1 and row["ideal_speedup"] == 1
