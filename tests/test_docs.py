"""Every command and every Python block of README and pages, page by page in their order, on a small random model.

`embedded` is that model here, recipes are cut down to a few steps of it. What runs on the real model, start to end, are
the tutorials and the README (slow).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import anydepth
import commands
from anydepth.cli import app
from anydepth.errors import UserError
from anydepth.training.corpora import load_texts
from serving import end, running, start, tiny_router
from tiny import COMMON, byte_tokenizer, save_text

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHERS = ("make ", "vllm ", "llama-server ", "pip ", "git ", "serve ", "source ", "curl ", "ray ", "python convert_hf")
"""Commands of other programs, and what a clean clone runs anyway."""
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
TIMED = ["--data", "text.txt", "--new-tokens", "4", "--num-runs", "1"]
SMALL: dict[str, list[str]] = {
    "analyze": ["--data", "text.txt", "--sequence-length", "32", "--permutations", "9"],
    "bench": [*TIMED, "--prompt-tokens", "8,16"],
    "calibrate": [*TIMED, "--prompt-tokens", "8", "--num-windows", "2", "--sequence-length", "32"],
    "eval": ["--data", "text.txt", "--sequence-length", "64"],
    "generate": ["--max-new-tokens", "8"],
    "search": ["--data", "text.txt", "--num-windows", "1", "--sequence-length", "32"],
    "tune": ["--data", "text.txt", "--prompt-tokens", "8", "--new-tokens", "4", "--minutes", "0.1"],
}
PAGES_THAT_RUN = [name for name, text in PAGES.items() if BLOCK.search(text)]
SLOW = [
    "docs/guides/check-a-server.md",
    "docs/guides/honest-benchmarks.md",
    "docs/guides/clients.md",
    "docs/coming-from.md",
    "docs/methods/early_exit.md",
    *(name for name in PAGES if name.startswith("docs/tutorials/")),
]
"""Sweeps and servers with tests of their own, commands that other pages have, programs of other extras, and what runs
on the real model too."""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    for kind, body in BLOCK.findall(text):
        if kind == "python":
            yield kind, body
        else:
            joined = body.replace("\\\n", " ")
            yield from ((kind, line[2:]) for line in joined.splitlines() if line.startswith("$ "))


def test_the_pages_are_found() -> None:
    assert len(PAGES_THAT_RUN) >= 20
    pages = [text for name, text in PAGES.items() if not name.endswith("add-a-method.md")]  # which names what is to be
    named = {name for text in pages for name in re.findall(r"`((?:recipes|benchmarks)/[\w./-]+\.\w+)`", text)}
    assert len(named) >= 8
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model as deep as the embedded one, texts, and the recipes for two steps."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "hidden_size": 32, "intermediate_size": 48}, num_hidden_layers=30)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    save_text(tmp_path / "text.txt")
    (tmp_path / "rich.txt").write_text("\n\n".join(load_texts("embedded:valid")[:20]))
    lines = ["the sea is", "the night", "the light comes", "and the sea"]
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{line}"}}\n' for line in lines))
    for path in ROOT.glob("recipes/**/*.yaml"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        recipe = yaml.safe_load(path.read_text())
        copy.write_text(yaml.safe_dump(shrunk(recipe) if "model" in recipe else recipe))
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    load = anydepth.load_model

    def load_small(target: str, **options: Any) -> Any:
        return load("base" if target == "embedded" else target, **options)

    monkeypatch.setattr(anydepth, "load_model", load_small)
    return tmp_path


def shrunk(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["model"] |= {"target": "base", "device": "cpu"}
    recipe["data"] = {"train": "text.txt", "sequence_length": 32}
    if "scratch" in recipe["model"]:
        recipe["model"]["scratch"] |= {"hidden_size": 24, "ffn_size": 48, "tokenizer": {"kind": "unigram", "size": 600}}
        recipe["data"]["train"] = "rich.txt"
    recipe["eval"] = {"data": "text.txt", "sequence_length": 32, "max_windows": 2}
    recipe["bench"] = {"prompt_tokens": [8], "new_tokens": 4, "num_runs": 1}
    recipe["analyze"] = {"data": "text.txt", "sequence_length": 32, "num_windows": 2, "num_permutations": 9}
    small = {"max_steps": 2, "warmup_steps": 1}
    if "train" in recipe:
        recipe["train"] |= {**small, "batch_size": 2, "gradient_accumulation_steps": 1}
        if recipe["train"].get("distillation"):
            recipe["train"]["distillation"]["warmup_steps"] = 0
    for phase in recipe.get("phases", []):
        phase["max_steps"] = 2
    if "drafter" in recipe:
        recipe["drafter"] |= {**small, "batch_tokens": 64, "own_text": {"num_tokens": 1000}}
    for method in recipe.get("methods", []):
        method.pop("initial_skip_layers", None)  # of bases that are deeper
    for section in ("router_fit", "calibrate", "search"):
        if section in recipe:
            recipe[section] |= {"num_windows": 2}
            recipe[section] |= {} if section == "calibrate" else {"sequence_length": 32}
    return recipe


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PAGES_THAT_RUN]
)
def test_the_page_works(name: str, workplace: Path) -> None:
    page: dict[str, Any] = {"anydepth": anydepth}
    for kind, body in blocks(PAGES[name]):
        if kind == "python":
            run_python(body, page, workplace)
        elif body.startswith("anydepth "):
            run_command(body, workplace)
        elif body.startswith("python benchmarks/"):
            done = commands.script(ROOT / shlex.split(body)[1], "--help", folder=ROOT)
            assert done.returncode == 0, done.stderr
        elif body.startswith(("accelerate launch ", "ACCELERATE_USE_CPU=true accelerate launch ")):
            words = shlex.split(body)
            assert (ROOT / words[words.index("--config-file") + 1]).exists(), body
            run_command(body[body.index("anydepth.cli ") :].replace("anydepth.cli", "anydepth", 1), workplace)
        elif body.startswith("llm "):
            run_llm(body, PAGES[name], workplace)
        else:
            assert body.startswith(OTHERS), f"nobody runs: {body}"


def run_command(line: str, workplace: Path) -> None:
    words = ["base" if word == "embedded" else word for word in shlex.split(line)[1:]]
    words = [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    words = ["text.txt" if word.startswith(("wikitext-2:", "embedded:")) else word for word in words]
    command, given = words[0], set(words)
    if ">" in words:  # of the shell
        words = words[: words.index(">")]
    if command in ("serve", "chat"):
        talk_to(words)
        return
    if command == "conform":
        with running(tiny_router(workplace / "served")) as address:
            words = [address if word.startswith("http://127.0.0.1:") else word for word in words]
            done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
        return
    if command == "sweep":  # one point of each
        words = [re.sub(r"(=|^)([^=,]+),.*", r"\1\2", word) if "," in word else word for word in words]
    small = SMALL.get(command, [])
    for flag, value in zip(small[::2], small[1::2], strict=True):
        brought = "--prompts" in given and flag in ("--prompt-tokens", "--num-runs")  # by the prompts
        if not brought and (flag not in given or flag in ("--prompt-tokens", "--new-tokens", "--data", "--minutes")):
            words += [flag, value.split(",")[0] if "--compare" in given else value]
    done = CliRunner().invoke(app, words)
    if command == "calibrate" and done.exit_code:
        # The clock of a model this small refuses any speed, and a random one any quality: said, and handed on.
        assert "reach" in str(done.output) + str(done.exception), f"{line}\n{done.output}\n{done.exception!r}"
        shutil.copytree(words[1], words[words.index("--out") + 1])
    elif done.exit_code:
        pytest.fail(f"{line}\n{done.output}\n{done.exception!r}")


def talk_to(words: list[str]) -> None:
    """Commands that wait for somebody: started for real, asked once, ended."""
    line = [sys.executable, "-m", "anydepth.cli", *words, "--dtype", "float32"]
    if words[0] == "chat":
        done = commands.anydepth(*words, "--dtype", "float32", "--max-new-tokens", "4", input="hi\n\n")
        assert done.returncode == 0, done.stderr
        return
    process = subprocess.Popen([*line, "--port", "0", "--data", "text.txt"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(" at http://" in told for told in process.stderr)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    process.stderr.close()


@contextmanager
def served(text: str, workplace: Path) -> Iterator[str]:
    """Yield a text with the address of a server, if it has one."""
    if ":8000" not in text:
        yield text
        return
    target = tiny_router(workplace / "served")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target / "base")
    process, address = start(target, "--name", "embedded")
    try:
        yield text.replace("http://127.0.0.1:8000", address)
    finally:
        end(process)


def run_llm(line: str, page: str, workplace: Path) -> None:
    """Run a command of llm, with the models that its page lists in YAML."""
    (models,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    folder = workplace / "llm"
    folder.mkdir()
    with served(models, workplace) as listed:
        (folder / "extra-openai-models.yaml").write_text(listed)
        words = [sys.executable, "-m", *shlex.split(line)]
        environment = {**os.environ, "LLM_USER_PATH": str(folder)}
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def run_python(body: str, page: dict[str, Any], workplace: Path) -> None:
    """A block may go on from those above it, and has a model, its tokenizer and some inputs at hand."""
    model, tokenizer = anydepth.load_model("embedded")
    inputs = tokenizer("the sea", return_tensors="pt")
    known: dict[str, Any] = {"tokenizer": tokenizer, "inputs": inputs, **page, "model": model}
    with served(body, workplace) as text:
        exec(compile(text, "page", "exec"), known)
    page |= known


# --- the real model --------------------------------------------------------------------------------------------------

REAL = ["README.md", *(name for name in PAGES if name.startswith("docs/tutorials/"))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", REAL)
def test_tutorials_run_start_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, in processes of their own, on the embedded model; only training is cut to a few steps."""
    for folder in ("recipes", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    lines = ["The sea", "Once upon a time", "The night was", "In the morning"]
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{line}"}}\n' for line in lines))
    monkeypatch.chdir(tmp_path)
    for kind, body in blocks(PAGES[name]):
        if kind == "python":
            if ":8000" in body:
                continue  # needs the server of the command above it, which has ended
            words = [sys.executable, "-c", body]
        elif body.startswith("anydepth "):
            words = [sys.executable, "-m", "anydepth.cli", *shlex.split(body)[1:]]
            if words[3] in ("train", "run", "sweep"):
                words += ["--set", "train.max_steps=3", "--set", "train.warmup_steps=1"]
                if "recipes/layer_router.yaml" in words:
                    words += ["--set", "router_fit.num_windows=2"]
            if words[3] in ("serve", "chat"):
                talk_to(shlex.split(body)[1:]) if words[3] == "chat" else None
                continue
        else:
            continue
        done = subprocess.run(words, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
        refused = words[3:4] == ["calibrate"] and done.returncode == 1 and "reach" in done.stderr
        if refused:  # after three steps there may be nothing to gain
            shutil.copytree(tmp_path / words[4], tmp_path / words[words.index("--out") + 1])
        else:
            assert done.returncode == 0, f"{body}\n{done.stderr[-2000:]}"


def test_a_command_that_does_not_exist_is_found(workplace: Path) -> None:
    with pytest.raises((pytest.fail.Exception, UserError)):
        run_command("anydepth eval base --no-such-option", workplace)
