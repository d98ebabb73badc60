"""The contract of a method: it decides which tokens run which branches, and nothing else.

A method never executes, copies or masks anything of the backbone: it answers with a `Gate` when execution asks it
about a layer, a mixer or an FFN. Decisions at inference are deterministic, causal and independent of padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anydepth.config import StrictConfig
from anydepth.methods.gate_network import Evaluate, GateNetwork
from anydepth.methods.memory import Memory
from anydepth.methods.shared_batch import draw_uniform
from anydepth.methods.thresholds import Thresholded
from anydepth.models.backbone import Backbone

SkipRule = Literal["project", "omit"]
"""How a token that skips a mixer leaves K/V there: its state is projected, or it leaves none."""
KVRule = Literal[SkipRule, "recompute"]
"""`recompute`: of exits alone. What tokens leave in a layer is what they would at full depth, run when it is needed."""


LogitsOf = Callable[[Tensor, Tensor | None], Tensor]
"""(..., V) logits of (..., D) states by the model's final norm and head; of the tokens (V',) of a vocabulary alone."""


@dataclass
class PassContext:
    """What a method sees of one forward over (B, T) new tokens.

    Attributes:
        token_mask: (B, T) bool, real tokens (padding is False).
        positions: (B, T) int, place of each token among the real tokens of its row, earlier forwards included.
        training: whether decisions may be sampled.
        states: what belongs to this forward alone, by method name: what their `begin` gave.
        notes: what methods keep of this forward for their losses, by method name.
        evaluate: logits of a method's network for states; an engine may have a faster way than the network's own.
        memory: what methods remember of these sequences from earlier forwards.
        logits_of: what the model would say, were this state its last.
    """

    token_mask: Tensor
    positions: Tensor
    training: bool
    states: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    evaluate: Evaluate = GateNetwork.__call__
    memory: Memory = field(default_factory=lambda: Memory())
    logits_of: LogitsOf | None = None

    def begin(self, methods: Sequence[Method]) -> None:
        """Let methods prepare what belongs to this forward."""
        for method in methods:
            self.states[method.name] = method.begin(self)


@dataclass(frozen=True)
class Gate:
    """Which tokens run a layer or branch.

    Attributes:
        keep: (B, T) bool; padding is never kept.
        kv_rule: how tokens that skip a mixer leave K/V there.
        any_kept, all_kept: the same over real tokens, known to the host.
        weight: (B, T) w of h + w·(f(h) − h), 0 where a token skips. In training the gate's gradient flows through it.
    """

    keep: Tensor
    kv_rule: KVRule
    any_kept: bool
    all_kept: bool
    weight: Tensor | None = None

    @classmethod
    def of_plan(cls, keep: Tensor, context: PassContext, kv_rule: KVRule, weights: Tensor | None = None) -> list[Gate]:
        """Gates of G branches from (G, B, T) decisions, with one host synchronisation for all of them."""
        real = context.token_mask
        if real.numel() == 1 and weights is None:  # a token of a decode, where every operator more is felt
            decided = keep.flatten().tolist()
            either: dict[bool, Gate] = {}
            if True in decided:
                either[True] = cls(real, kv_rule, any_kept=True, all_kept=True)
            if False in decided:
                either[False] = cls.closed(context, kv_rule)
            return [either[kept] for kept in decided]
        keep = keep & real
        flags = torch.stack([keep.flatten(1).any(1), (keep | ~real).flatten(1).all(1)]).tolist()
        each = [None] * len(keep) if weights is None else weights.unbind()
        return [
            cls(part, kv_rule, any_kept, all_kept, weight)
            for part, any_kept, all_kept, weight in zip(keep.unbind(), *flags, each, strict=True)
        ]

    @classmethod
    def closed(cls, context: PassContext, kv_rule: KVRule) -> Gate:
        """Nobody runs; known without looking at the device."""
        return cls(torch.zeros_like(context.token_mask), kv_rule, any_kept=False, all_kept=False)

    def without_weight(self) -> Gate:
        return Gate(self.keep, self.kv_rule, self.any_kept, self.all_kept)

    @staticmethod
    def both(first: Gate | None, second: Gate | None) -> Gate | None:
        """The tokens that both gates keep. Where nobody ever runs a mixer no K/V are needed: `omit` then wins.

        Two rules for tokens that some others see are a contradiction, refused on attach.
        """
        if first is None or second is None:
            return first or second
        for gate in (first, second):
            if not gate.any_kept and gate.kv_rule == "omit":
                return gate
        keep = first.keep & second.keep
        weight = None
        if first.weight is not None or second.weight is not None:
            weight = _or_keep(first) * _or_keep(second)
        closed = not (first.any_kept and second.any_kept)
        any_kept = False if closed else bool(keep.any())
        return Gate(keep, first.kv_rule, any_kept, first.all_kept and second.all_kept, weight)


def _or_keep(gate: Gate) -> Tensor:
    return gate.keep.float() if gate.weight is None else gate.weight


@dataclass(frozen=True, eq=False)
class Choice:
    """Which tokens take a layer's own mixer; all others take another one. Each token takes one of the two.

    Attributes:
        gate: who takes its own. Under `project` both mixers see every token and only what is read is chosen; under
            `omit` each sees its own tokens alone.
        other: (B, T, D) → (B, T, D), a recurrent mixer with a state of its own.
        weight: (B, T) of the other's output, 0 where a token takes the layer's own.
    """

    gate: Gate
    other: nn.Module
    weight: Tensor | None = None

    @property
    def others(self) -> Tensor:
        """(B, T) bool, who takes the other mixer; padding may be among them."""
        return ~self.gate.keep


def uniform_by_place(positions: Tensor, layers: Sequence[int], seed: int) -> Tensor:
    """(G, B, T) in [0, 1), pseudo-random in (layer, place of the token, seed).

    Deterministic, so that cached and uncached, padded and single runs agree, and blind to what the token is.
    """
    places = torch.tensor(layers, device=positions.device)[:, None, None]
    return _hash(positions[None] * 8191 + places * 131 + seed * 65537)


def _hash(numbers: Tensor) -> Tensor:
    """Uniform floats in [0, 1) from integers (the finaliser of MurmurHash3 on 31 bits, in int64)."""
    x = numbers & 0x7FFFFFFF
    for multiplier in (0x45D9F3B, 0x45D9F3B):
        x = ((x >> 16) ^ x) * multiplier & 0x7FFFFFFF
    return ((x >> 16) ^ x).float() / 0x80000000


@dataclass(frozen=True, eq=False)
class KnownScores:
    """Scores of tokens that no state of their forward goes into.

    Attributes:
        size: G, of them for each token.
        make: (G, B, T) for a forward; None: not for this one, whose gates must be asked layer by layer.
    """

    size: int
    make: Callable[[PassContext], Tensor | None]


@dataclass(frozen=True, eq=False)
class Doubt:
    """The score of a token that has not left: how sure the head is of its state in front of a layer, with a minus.

    Attributes:
        confidence: one of those of `early_exit` that are made of logits.
        vocabulary: (V',) the tokens that it goes over; None is all.
        flops_per_token: of the head.
    """

    confidence: str
    vocabulary: Tensor | None
    flops_per_token: int


Scores = GateNetwork | KnownScores | Doubt
"""What gates are made of."""


@dataclass(frozen=True)
class Threshold:
    """A gate at inference that is one of several scores: a token runs if it is above the threshold.

    Attributes:
        scores: known in advance, the logits of a network, or what the head says.
        reads_at: the layer in front of which that reads the residual stream; in front of its FFN for the gate of an
            FFN.
        column: which of the scores.
        leaves: whether a token that is not above runs no later layer either.
    """

    scores: Scores
    threshold: float
    reads_at: int = 0
    column: int = 0
    leaves: bool = False


@dataclass(frozen=True, eq=False)
class Rules:
    """All gates of a method at inference, where that is all they are. What stays away everybody runs.

    Tokens that a threshold stops leave K/V by `project`, closed mixers by `omit`.

    Attributes:
        layers, mixers, ffns: by layer.
        closed_layers, closed_mixers, closed_ffns: that nobody runs.
    """

    layers: Mapping[int, Threshold] = field(default_factory=dict)
    mixers: Mapping[int, Threshold] = field(default_factory=dict)
    ffns: Mapping[int, Threshold] = field(default_factory=dict)
    closed_layers: frozenset[int] = frozenset()
    closed_mixers: frozenset[int] = frozenset()
    closed_ffns: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ExitState:
    """An exit that a forward passed: (B, T, D) states of the residual stream, and the tokens' (B, T) weights there.

    Attributes:
        states: None stands for the model's own output.
    """

    states: Tensor | None
    weights: Tensor


class Method(Thresholded):
    """Base of every method. Subclasses override what differs and keep their parameters in float32.

    Class attributes:
        name: the key in `METHODS`.
        summary: one line for `anydepth methods`.
        lossless: whether the output is the full-depth output.
        scheduled: attributes that `set_progress` moves, for the history of training.
        trained: whether it has parameters to train (or changes training).
        decides_in_training, decides_at_inference: whether its gates are ever closed then.
        gates_branches: whether it gates mixers or FFNs alone.
        chooses_mixers: whether it has other mixers for tokens to take.
        gates_only_ffns: whether no token ever skips a mixer by it.
    """

    Config: ClassVar[type[StrictConfig]]
    name: ClassVar[str]
    summary: ClassVar[str]
    lossless: ClassVar[bool] = False
    scheduled: ClassVar[tuple[str, ...]] = ()
    trained: ClassVar[bool] = True
    decides_in_training: ClassVar[bool] = True
    decides_at_inference: ClassVar[bool] = True
    gates_branches: bool = False
    chooses_mixers: ClassVar[bool] = False
    gates_only_ffns: ClassVar[bool] = False
    learns_by_policy: bool = False
    """Whether training asks for `policy_losses`."""

    @property
    def kv_rule(self) -> KVRule | None:
        """How tokens that it lets skip a mixer leave K/V where others of their sequence run it; None: it has none."""
        return None

    @property
    def remembers(self) -> bool:
        """Whether later forwards of a sequence depend on what it remembered of the first ones (`Memory`)."""
        return False

    @property
    def first_gated_position(self) -> int:
        """Position in a sequence before which every token runs every layer."""
        return 0

    @property
    def has_learned_gates(self) -> bool:
        """Whether training teaches its gates to tell tokens apart: gates that never change are then a fault."""
        return self.decides_in_training and bool(self.gated_layers) and any(True for _ in self.gate_parameters())

    @property
    def draws_once(self) -> bool:
        """Whether all rows of a batch get the same noise."""
        return False

    is_frozen: bool = False
    """Attached while others are trained: it decides as at inference."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "rules" not in cls.__dict__ and {"layer_gate", "mixer_gate", "ffn_gate"} & cls.__dict__.keys():
            cls.rules = Method.rules  # gates of its own: inherited rules would not be theirs

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.num_layers = backbone.num_layers
        self.known_rules: tuple[Any, Rules] | None = None
        self.generator = torch.Generator()
        self.reseed(getattr(config, "seed", 0))

    @classmethod
    def has_weights(cls, config: Any) -> bool:
        """Return whether a method of this config has parameters to train."""
        return cls.trained

    def reseed(self, seed: int) -> None:
        """Restart this method's own randomness; training calls it every step, so that a resumed run repeats it."""
        self.generator.manual_seed(seed)

    def logistic_noise(self, logits: Tensor, context: PassContext, key: int = 0) -> Tensor:
        """The difference of two classes' Gumbel noise for (…, B, T) logits; one draw per forward and `key`.

        Kept in the context: with gradient checkpointing a layer runs again and must decide the same.
        """
        drawn = context.notes.setdefault(f"{self.name}/noise", {})
        if key not in drawn:
            uniform = draw_uniform(logits.shape, self.generator, rows=-2, only_first=self.draws_once)
            drawn[key] = torch.logit(uniform.clamp(1e-6, 1 - 1e-6)).to(logits.device)
        return drawn[key]

    def samples(self, context: PassContext) -> bool:
        """Whether decisions of this forward are sampled, for training, rather than taken as at inference."""
        return context.training and not self.is_frozen

    def set_progress(self, progress: float, step: int = 0) -> None:
        """Step the schedules of the config to `progress` in [0, 1] of training, optimiser step `step`."""

    def begin(self, context: PassContext) -> Any:
        """Return what belongs to this forward alone; hooks find it in `context.states`, by the method's name.

        Called once per forward, before the first layer. Nothing of a forward is kept on the method: other threads run
        it at the same time, and backward may run a layer again after later forwards.
        """

    def reads_state(self, layer_idx: int, context: PassContext) -> bool:
        """Whether gates of this layer depend on the states they are asked with.

        False: the answer is known before the layers in front of it have run, and the states given may be older ones;
        the fast engine then runs several layers in one call.
        """
        return True

    def layer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        """Who runs the whole layer, from its (B, T, D) input. None: everybody."""

    def mixer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        """Who runs the mixer, from the layer's (B, T, D) input. None: everybody."""

    def ffn_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        """Who runs the FFN, from the (B, T, D) residual stream in front of it. None: everybody."""

    def mixer_choice(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Choice | None:
        """Who takes which mixer, from the layer's (B, T, D) input; asked of every layer. None: everybody its own."""

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        """What learns at the rate of routers; the rest learns as the model itself."""
        return self.parameters()

    def rules(self) -> Rules | None:
        """The same gates at inference as thresholds; None: they are more than that.

        The fast engine then decides inside its kernels, and asks nothing else of the method. As long as nothing changes
        it gets the same object (`keep_rules`), and keeps what it prepared for it.
        """
        return None

    def keep_rules(self, made_of: Any, make: Callable[[], Rules]) -> Rules:
        """The rules made before, unless the config, or what else they are made of, has changed."""
        made_of = (self.config, made_of)
        if self.known_rules is None or self.known_rules[0] != made_of:
            self.known_rules = made_of, make()
        return self.known_rules[1]

    def exit_states(self, context: PassContext) -> list[ExitState]:
        """States from which a token's output could be taken as well, for a loss over exits; training only."""
        return []

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Scalar losses of the last forward over real tokens, by name, weights applied."""
        return {}

    def policy_losses(self, context: PassContext, token_losses: Tensor) -> dict[str, Tensor]:
        """Scalar losses from what decisions led to: (B, T) cross-entropy of the token behind each, without gradient."""
        return {}

    def outcome_losses(self, context: PassContext, logits: Tensor) -> dict[str, Tensor]:
        """Scalar losses of the last forward from its (B, T, V) logits, by name, weights applied."""
        return {}

    def metrics(self, context: PassContext) -> dict[str, float]:
        """Figures about the last training forward that are no losses, by name."""
        return {}


def check_layers(layers: Sequence[int], num_layers: int, option: str) -> None:
    """Raise `ValueError` unless `layers` are distinct indices of a model with `num_layers` layers."""
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"{option} has {outside}; this model has layers 0 to {num_layers - 1}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{option} names a layer twice: {sorted(layers)}")
