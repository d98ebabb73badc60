"""Recipes: what to load, train, calibrate and measure, as strict sections of one YAML file.

This module imports neither torch nor transformers, so that a misspelt recipe is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Field, model_validator

from anydepth.config import StrictConfig, UniqueKeys, override_key, validate
from anydepth.draft_sections import DraftConfig, DrafterConfig, split_draft
from anydepth.errors import UserError

DType = Literal["auto", "float32", "bfloat16", "float16"]
TUNED = "tuned"
"""Folder of what the stage `tune` found, within that of the run."""
Count = Annotated[int, Field(ge=1)]


class TokenizerConfig(StrictConfig):
    """A tokenizer like SentencePiece's, trained on the training text."""

    kind: Literal["unigram", "bpe"] = Field(default="unigram", description="Algorithm that finds the pieces.")
    size: int = Field(default=4096, ge=512, description="Pieces, 256 for single bytes included.")


class ScratchConfig(StrictConfig):
    """A decoder with random weights, all of which are trained (`train.backbone: true`)."""

    architecture: str = Field(default="llama", description="transformers' name of the family: llama, gpt2, qwen3, …")
    hidden_size: int = Field(default=256, ge=8, description="Width of the residual stream.")
    num_layers: int = Field(default=8, ge=2, description="Depth.")
    num_heads: int = Field(default=4, ge=1, description="Heads of queries; must divide hidden_size.")
    num_kv_heads: int | None = Field(default=None, ge=1, description="Heads of keys and values; null is num_heads.")
    ffn_size: int = Field(default=688, ge=8, description="Inner width of the FFN.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Every dropout that the architecture has.")
    max_positions: int = Field(default=1024, ge=8, description="Longest sequence.")
    options: dict[str, Any] = Field(
        default={}, description="Further keys of the architecture's own configuration, such as layer_types."
    )
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="Trained on data.train first.")

    @model_validator(mode="after")
    def _fits(self) -> ScratchConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class ModelConfig(StrictConfig):
    """The base model, its precision and its device."""

    target: str = Field(default="embedded", description="`embedded`, a hub name, a folder, or a .gguf file.")
    scratch: ScratchConfig | None = Field(
        default=None, description="A new decoder and tokenizer in place of target; null is none."
    )
    dtype: DType = Field(
        default="auto",
        description="Precision of the backbone's weights; auto is the checkpoint's own type, or float32 if they learn.",
    )
    device: str = Field(default="cpu", description="Device of the model: cpu, cuda, cuda:1, …")
    quantisation: Literal["nf4"] | None = Field(
        default=None, description="nf4: linear layers of the base in 4 bits (bitsandbytes), trained with LoRA."
    )
    attention: Literal["sdpa", "eager"] | None = Field(
        default=None, description="Attention implementation; null is transformers' choice."
    )


class TextConfig(StrictConfig):
    """How text becomes windows of tokens."""

    bos: Literal["per_window", "per_document"] = Field(
        default="per_window",
        description="Whether windows or documents begin with BOS, if the tokenizer adds one to a text.",
    )
    isolate_documents: bool = Field(
        default=False,
        description="Give each document separate windows in training, calibrate and eval, without others' tokens.",
    )
    lines: bool = Field(
        default=False, description="Make each line a document; lines of WikiText keep their marks, as published."
    )
    min_chars: int = Field(default=0, ge=0, description="Keep documents of more than this many characters.")


class DataConfig(TextConfig):
    """Text to train and calibrate on; the options of windows hold for all text of the recipe."""

    train: str = Field(default="embedded:train", description="`NAME:SPLIT` or a .txt, .jsonl or .parquet file.")
    sequence_length: int = Field(default=512, ge=8, description="Tokens per training window.")
    max_documents: int | None = Field(default=None, ge=1, description="Use only the first documents.")
    max_windows: int | None = Field(default=None, ge=1, description="Use only the first windows.")


class LoraSettings(StrictConfig):
    """Low-rank adapters on the backbone (Hu et al. 2021)."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(default=32, gt=0, description="Scale: the update is multiplied by alpha ÷ rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target: list[str] | str = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"], description="Names of the linear layers that get one."
    )


class DistillationSettings(StrictConfig):
    """Distillation from the same model with gates and adapters off."""

    weight: float = Field(default=0.7, ge=0, le=1, description="Weight of T²·KL; cross-entropy has 1 − weight.")
    temperature: float = Field(default=2.0, gt=0, description="Temperature T of both distributions.")
    warmup_steps: int = Field(default=0, ge=0, description="First steps, with cross-entropy only.")


class TrainConfig(StrictConfig):
    """Training by transformers' Trainer. The backbone is frozen unless `backbone` is true."""

    max_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps; null is 100 unless num_epochs is set."
    )
    num_epochs: float | None = Field(default=None, gt=0, description="Passes over all windows, instead of max_steps.")
    batch_size: int = Field(default=2, ge=1, description="Windows per forward.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Forwards per optimiser step.")
    learning_rate: float = Field(default=3e-4, gt=0, description="Peak rate of adapters or backbone (cosine to 0).")
    router_learning_rate: float | None = Field(default=None, gt=0, description="Peak rate of the methods' weights.")
    warmup_steps: int = Field(default=10, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay.")
    max_gradient_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    backbone: bool = Field(default=False, description="Train all weights of the backbone; the checkpoint holds them.")
    lora: LoraSettings | None = Field(default=None, description="Adapters on the backbone; null trains gates only.")
    distillation: DistillationSettings | None = Field(default=None, description="Teacher; null is cross-entropy only.")
    execution: Literal["masked", "sparse"] = Field(
        default="masked", description="masked: gates learn from skipped tokens too; sparse: kept tokens only, faster."
    )
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="bfloat16 turns autocast on.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute layers in backward to save memory.")
    save_every: int = Field(default=50, ge=1, description="Steps between checkpoints to resume from.")

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, options: Any) -> Any:
        given = _section(options)
        return options if given is None or _has_length(given) else {**given, "max_steps": 100}

    @property
    def num_steps(self) -> int:
        """Optimiser steps of a config with its length in steps, see `with_steps`."""
        assert self.max_steps is not None, "train() turns epochs into steps"
        return self.max_steps

    def with_steps(self, num_windows: int) -> TrainConfig:
        """Return these settings with epochs over `num_windows` windows converted to steps, rounded up."""
        if self.num_epochs is None:
            return self
        steps = math.ceil(self.num_epochs * num_windows / (self.batch_size * self.gradient_accumulation_steps))
        return self.model_copy(update={"max_steps": steps, "num_epochs": None})

    @model_validator(mode="after")
    def _one_way(self) -> TrainConfig:
        if self.backbone and self.lora is not None:
            raise ValueError("backbone trains all weights, lora trains adapters of frozen ones; give one of them")
        return self


class PhaseConfig(StrictConfig):
    """One of several trainings in turn; each starts from the result of the one before."""

    name: str = Field(pattern=r"^[\w-]+$", description="Name of its folder under phases/.")
    train: list[str] = Field(min_length=1, description="Methods that this phase trains.")
    frozen: list[str] = Field(default=[], description="Methods that are attached too and decide as at inference.")
    max_steps: int | None = Field(default=None, ge=1, description="Optimiser steps; or give num_epochs.")
    num_epochs: float | None = Field(default=None, gt=0, description="Passes over all windows.")
    learning_rate: float | None = Field(default=None, gt=0, description="Instead of the recipe's train.learning_rate.")
    router_learning_rate: float | None = Field(default=None, gt=0, description="Instead of the recipe's.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Instead of the recipe's.")
    train_lora: bool = Field(default=True, description="Whether a LoRA adapter is trained in this phase.")

    @model_validator(mode="after")
    def _one_length(self) -> PhaseConfig:
        if not _has_length(self.model_dump()):
            raise ValueError("a phase needs max_steps or num_epochs")
        return self


def _section(content: Any) -> dict[str, Any] | None:
    """Return a section of a recipe; None for content that is no mapping, which validation refuses."""
    return cast(dict[str, Any], content) if isinstance(content, dict) else None


def _has_length(options: dict[str, Any]) -> bool:
    """Return whether options give the length of training; raise `ValueError` if two do."""
    given = [name for name in ("max_steps", "num_epochs") if options.get(name) is not None]
    if len(given) > 1:
        raise ValueError("max_steps and num_epochs both set the length of training; give one, or null for the other")
    return bool(given)


class SearchConfig(StrictConfig):
    """Search of a skip set before training; its result replaces the skip lists of the methods that take one."""

    strategy: Literal["influence", "greedy", "bayesian", "dynamic", "knapsack"] = Field(
        default="influence", description="Method that selects layers."
    )
    budget: float = Field(default=0.25, gt=0, lt=1, description="Fraction of layers (or branches) to leave out.")
    branches: bool = Field(default=False, description="Select mixers and FFNs instead of layers.")
    num_windows: int = Field(default=4, ge=1, description="Windows of training text to search on.")
    sequence_length: int = Field(default=256, ge=8, description="Tokens per window.")


class RouterFitConfig(StrictConfig):
    """First weights of a layer router, by regression on the benefit of each layer to each token."""

    num_windows: int = Field(default=16, ge=2, description="Windows of training text to measure on.")
    sequence_length: int = Field(default=256, ge=8, description="Tokens per window.")


class CalibrateConfig(StrictConfig):
    """Thresholds after training."""

    skip_share: float = Field(gt=0, lt=1, description="Fraction of decisions that skip at inference.")
    num_windows: int = Field(default=32, ge=1, description="Windows of training text to set thresholds on.")


class EvalConfig(StrictConfig):
    """Perplexity, with methods on and at full depth."""

    data: str = Field(default="embedded:valid", description="`NAME:SPLIT` or a file.")
    sequence_length: int = Field(default=1024, ge=8, description="Tokens per window.")
    prompt_tokens: int = Field(default=0, ge=0, description="First tokens of a window: a prompt, not scored.")
    max_documents: int | None = Field(default=None, ge=1, description="Use only the first documents.")
    max_windows: int | None = Field(default=None, ge=1, description="Use only the first windows.")


class BenchConfig(StrictConfig):
    """Paired wall-clock times: full depth and adapted in turn, in one process."""

    batch_sizes: list[Count] = Field(default=[1], min_length=1, description="Rows generated together.")
    prompt_tokens: list[Count] = Field(default=[64], min_length=1, description="Prompt lengths.")
    new_tokens: int = Field(default=64, ge=1, description="Tokens generated per row.")
    num_runs: int = Field(default=5, ge=1, description="Pairs per row; up to three times as many if they vary.")
    dtypes: list[DType] = Field(default=[], description="Precisions to measure in; none is the model's.")
    engine: Literal["auto", "hf", "fast"] = Field(default="auto", description="auto: fast where it runs the model.")
    data: str | None = Field(default=None, description="Text to take prompts from; null is the eval text.")


class AnalyzeConfig(StrictConfig):
    """Analysis of where depth goes, and whether it depends on the token."""

    data: str | None = Field(default=None, description="Text to analyse; null is the eval text.")
    sequence_length: int = Field(default=256, ge=8, description="Tokens per window.")
    num_windows: int = Field(default=8, ge=1, description="Windows of the text.")
    num_permutations: int = Field(default=199, ge=1, description="Permutations of the test of dependence.")
    num_samples: int = Field(
        default=64,
        ge=0,
        description="Documents (paragraphs, where documents are few or long) to correlate depth with length, "
        "perplexity and rarity; at most sequence_length tokens of each. 0 is no correlation.",
    )


class TuneConfig(StrictConfig):
    """Search of the fastest way to run the base model within a bound; without a bound its text stays the same."""

    max_perplexity_increase: float | None = Field(
        default=None, gt=0, description="Relative increase of perplexity that is allowed; null is no such bound."
    )
    max_risk: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Distance of texts from full depth (1 − ROUGE-L) that is allowed, shown at 95%; null is no bound.",
    )
    prompt_tokens: list[Count] = Field(default=[64, 512], min_length=1, description="Lengths of prompts to be fast on.")
    new_tokens: int = Field(default=64, ge=1, description="Tokens generated per prompt.")
    batch_sizes: list[Count] = Field(default=[1], min_length=1, description="Sizes of batches to be fast on.")
    dtype: DType = Field(default="auto", description="Type of the weights; auto is the stored type.")
    minutes: float = Field(default=10.0, gt=0, description="About the time for all of it.")
    data: str = Field(default="embedded:train", description="Text that chooses; its valid split, or its rest, scores.")
    prompts: str | None = Field(
        default=None, description="JSON lines with prompts to be fast on; null is windows of data."
    )

    @model_validator(mode="after")
    def _one_bound(self) -> TuneConfig:
        if self.max_perplexity_increase is not None and self.max_risk is not None:
            raise ValueError("max_perplexity_increase and max_risk are different bounds; give one of them")
        return self

    @property
    def is_lossless(self) -> bool:
        return self.max_perplexity_increase is None and self.max_risk is None


class GenerateConfig(StrictConfig):
    """A sample text of the run."""

    prompt: str = Field(default="The most important thing about the sea is", description="Prompt of the sample.")
    max_new_tokens: int = Field(default=64, ge=1, description="Tokens to generate.")


class Recipe(StrictConfig):
    """One experiment from start to end."""

    model: ModelConfig = Field(default=ModelConfig(), description="The base model.")
    methods: list[dict[str, Any]] = Field(default=[], description="Methods with their options; none is full depth.")
    data: DataConfig = Field(default=DataConfig(), description="Training text.")
    tune: TuneConfig | None = Field(default=None, description="Tune the base model first, to tuned/; null does not.")
    search: SearchConfig | None = Field(default=None, description="Search a skip set first; null is none.")
    router_fit: RouterFitConfig | None = Field(
        default=None, description="Fit the router first; null starts from initial_bias and initial_skip_layers."
    )
    train: TrainConfig | None = Field(default=None, description="Training; null trains nothing.")
    phases: list[PhaseConfig] = Field(
        default=[], description="Trainings in turn, with the settings of train; none is one training of all methods."
    )
    draft: DraftConfig | None = Field(
        default=None,
        description="Draft with the methods and verify at full depth, which gives the text; null is no drafting.",
    )
    drafter: DrafterConfig | None = Field(default=None, description="Training of the draft network; null trains none.")
    calibrate: CalibrateConfig | None = Field(default=None, description="Set thresholds; null keeps them.")
    eval: EvalConfig = Field(default=EvalConfig(), description="Perplexity.")
    bench: BenchConfig = Field(default=BenchConfig(), description="Speed.")
    analyze: AnalyzeConfig = Field(default=AnalyzeConfig(), description="Analysis of depth.")
    generate: GenerateConfig = Field(default=GenerateConfig(), description="A sample of text.")
    seed: int = Field(default=0, description="Seed of all random draws; a method can set another.")

    @model_validator(mode="before")
    @classmethod
    def _spelt_out(cls, content: Any) -> Any:
        """Replace a name by the method with its defaults, and the method that drafting was by its section."""
        given = _section(content)
        if given is None or not isinstance(given.get("methods"), list):
            return content
        methods, draft = split_draft(given["methods"])
        named = [{"name": method} if isinstance(method, str) else method for method in methods]
        return {**given, "methods": named} | ({} if draft is None else {"draft": draft})

    @model_validator(mode="after")
    def _backbone_learns(self) -> Recipe:
        learns = self.train is not None and self.train.backbone
        if self.model.scratch is not None and not learns:
            raise ValueError("model.scratch starts from random weights, which train.backbone: true must train")
        if learns and self.model.quantisation is not None:
            raise ValueError("weights in 4 bits cannot be trained; give train.lora instead of train.backbone")
        if self.drafter is not None and self.train is not None:
            raise ValueError("a drafter needs a base that does not change; train the base first, in another recipe")
        if learns and self.phases:
            raise ValueError("phases train methods and LoRA, train.backbone everything at once; give one of them")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> Recipe:
        names = [str(method.get("name")) for method in self.methods]
        if self.phases and self.train is None:
            raise ValueError("phases need a train section with their shared settings")
        for phase in self.phases:
            unknown = [name for name in (*phase.train, *phase.frozen) if name not in names]
            if unknown:
                raise ValueError(
                    f"phase {phase.name} names {unknown[0]}, which is not in methods; these are {', '.join(names)}"
                )
            both = sorted(set(phase.train) & set(phase.frozen))
            if both:
                raise ValueError(f"phase {phase.name} both trains and freezes {both[0]}")
        labels = [phase.name for phase in self.phases]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two phases have the same name; names are {', '.join(labels)}")
        return self


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides (values are YAML); its methods are not checked.

    Raise `UserError` for no such file, not YAML, not a mapping, an unknown key or a wrong value; in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no recipe at {path}; give a YAML file (recipes/ has one per method)")
    try:
        content = yaml.load(path.read_text(), UniqueKeys)  # a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    sections = _section(content)
    if sections is None:
        keys = ", ".join(Recipe.model_fields)
        raise UserError(f"{path} holds a {type(content).__name__}; a recipe is a mapping of {keys}")
    for override in overrides:
        override_key(sections, override)
    return validate(Recipe, sections, where=str(path))
