"""What guesses the next tokens, cheaply, for `speculate.py` to verify.

A drafter is asked for one token of each row at a time, so that drafting can stop where it no longer pays, and says with
each token in which of its classes of confidence it is; how often tokens of a class are right is measured meanwhile.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import NativeLinear
from anydepth.engine.backends.cpu.packing import pack_panels
from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.layer import EngineLayer
from anydepth.engine.model import EngineModel, run_to_stops
from anydepth.engine.weights import INT4_GROUP, Linear
from anydepth.gating.context import LogitsOf
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.method import Method
from anydepth.methods.self_speculation import OnlineSearchConfig, SelfSpeculation
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.models.llama_like import Weights, layer_parts, norm_of
from anydepth.search import knapsack
from anydepth.search.bayesian import Proposals, inner
from anydepth.search.skip_search import STRATEGIES, Candidate, Problem, candidates
from anydepth.speculation.draft_network import DraftNetwork
from anydepth.speculation.draft_policy import NUM_BINS
from anydepth.speculation.targets import PrunedModel, Row, Target


@dataclass(frozen=True)
class Guess:
    """A token, and the drafter's class of confidence that it is in, below `NUM_BINS`."""

    token: int
    confidence: int


CATCH_UP = 8
"""Tokens that a trained drafter reads with its next guess, at most; more are read before."""
LOOK_BACK = 128
"""Tokens that it reads of a prompt, the last ones: as many as the texts that it learned from have."""

Choose = Callable[[Sequence[Row], Tensor, Tensor | None], tuple[list[int], list[float]]]
"""The tokens that rows would take, out of (R, V') logits of all tokens or of a vocabulary (V',), and their shares."""


class Drafter(ABC):
    """Base of all. Between `start` and `stop` it holds what belongs to one generation, and nothing of it afterwards."""

    name: str
    target: Target | None = None
    is_free: bool = False
    """Whether a token costs no pass of a model."""
    exit_layer: int = 0
    """First layers of the model that a draft runs and a verification does not run again; one such drafter a round."""
    pruned: PrunedModel | None = None
    """What it drafts with, where that is the model with something left out."""

    def start(self, target: Target, num_rows: int) -> None:
        """A generation begins; the prompts' states are in `row.fresh`."""
        self.target = target

    @abstractmethod
    def guess(self, rows: Sequence[Row], choose: Choose) -> list[Guess | None]:
        """What stands behind `row.last` in each row; None: it has no idea."""

    def next_bin(self, row: Row) -> int | None:
        """Return the confidence bin of its next token, where it says that before drafting; −1: it has no token."""
        return None

    def settle(self, rows: Sequence[Row]) -> None:  # noqa: B027 (most have nothing to do)
        """Rows have taken what was verified; `row.fresh` has the states of what they took."""

    def stop(self) -> None:
        """The generation is over, or failed."""
        self.target = None


def _guesses(tokens: list[int], shares: list[float]) -> list[Guess | None]:
    """None where no token of the drafter's vocabulary is allowed: its share is no number."""
    return [
        Guess(token, min(int(share * NUM_BINS), NUM_BINS - 1)) if share >= 0 else None
        for token, share in zip(tokens, shares, strict=True)
    ]


class FirstLayers(Drafter):
    """The first layers of the model, and its norm and head on their state (LayerSkip, Elhoushi et al. 2024)."""

    def __init__(self, num_layers: int, head: Callable[[Tensor], Tensor], vocabulary: Tensor | None = None) -> None:
        self.exit_layer, self.head, self.vocabulary = num_layers, head, vocabulary
        self.name = f"first {num_layers} layers"

    def guess(self, rows: Sequence[Row], choose: Choose) -> list[Guess | None]:
        assert self.target is not None
        logits = self.head(torch.cat(self.target.first_layers(rows)))
        return _guesses(*choose(rows, logits, self.vocabulary))


class Pruned(Drafter):
    """The model as attached methods prune it: a skip set, a router, exits."""

    name = "reduced model"
    pruned: PrunedModel

    def __init__(self, methods: Sequence[Method]) -> None:
        self.pruned = PrunedModel(methods)

    def start(self, target: Target, num_rows: int) -> None:
        super().start(target, num_rows)
        self.pruned.compile()

    def guess(self, rows: Sequence[Row], choose: Choose) -> list[Guess | None]:
        assert self.target is not None
        return _guesses(*choose(rows, self.target.prune(rows, self.pruned), None))


class Searched(Pruned):
    """A skip set that is searched on the text being generated, every few tokens on the last ones."""

    name = "searched skip set"

    def __init__(self, method: SkipSet, config: OnlineSearchConfig) -> None:
        super().__init__([method])
        self.method, self.config, self.number = method, config, 0
        self.num_out = min(max(round(config.budget * method.num_layers), 1), method.num_layers - 1)

    def start(self, target: Target, num_rows: int) -> None:
        super().start(target, num_rows)
        self.looked_at: dict[int, int] = {}

    def settle(self, rows: Sequence[Row]) -> None:
        for row in rows:
            window = self.config.window
            looked_at = self.looked_at.setdefault(row.slot, row.num_seen)
            if row.num_seen < window or row.num_seen - looked_at < self.config.every:
                continue
            if self.number < self.config.num_searches:
                self.looked_at[row.slot] = row.num_seen
                self.number += 1
                self.look(row, window)

    def choose(self, layers: Iterable[int]) -> None:
        """Draft without these layers from now on."""
        self.method.choose(layers)
        self.pruned.compile()

    @abstractmethod
    def look(self, row: Row, window: int) -> None:
        """Choose the set by the last `window` tokens that were seen of a row."""


class Proposed(Searched):
    """By one more proposal each time, whose choices are compared with the tokens that the model took (SWIFT)."""

    def __init__(self, method: SkipSet, config: OnlineSearchConfig) -> None:
        super().__init__(method, config)
        layers = list(range(method.num_layers))
        self.proposals = Proposals(inner(layers, self.num_out), self.num_out, len(layers), config.seed)
        self.choose(self.proposals.next())

    def look(self, row: Row, window: int) -> None:
        assert self.target is not None
        proposal = self.proposals.next()
        self.choose(proposal)
        said = self.target.rehearse(row, window, self.pruned).argmax(-1).tolist()
        taken = row.ids[-window:]  # behind each of the tokens seen
        self.proposals.seen[proposal] = sum(a == b for a, b in zip(said, taken, strict=True)) / window
        self.choose(self.proposals.best or proposal)


class Found(Searched):
    """By a strategy of `search/skip_search.py`, each time anew (CLaSp, Chen et al. 2025, is `dynamic`)."""

    def __init__(self, method: SkipSet, config: OnlineSearchConfig, adapted: AdaptedModel) -> None:
        super().__init__(method, config)
        self.adapted = adapted
        self.choose(inner(list(range(method.num_layers)), self.num_out)[-self.num_out :])

    def look(self, row: Row, window: int) -> None:
        windows = torch.tensor([row.ids[-1 - window : -1]])
        everything = candidates(self.method.num_layers, branches=False)
        found = self.find(Problem(self.adapted, windows, everything, self.num_out), row)
        self.choose(layer_idx for _, layer_idx in found)

    def find(self, problem: Problem, row: Row) -> list[Candidate]:
        """Return the layers to leave out for the last tokens of a row."""
        return STRATEGIES[self.config.strategy](problem)


class Timed(Found):
    """Chooses by influence on the last tokens and by the time of each layer, measured once where drafts will run."""

    seconds: dict[Candidate, float] | None = None

    def find(self, problem: Problem, row: Row) -> list[Candidate]:
        assert self.target is not None
        if self.seconds is None:
            measured = self.target.layer_seconds(row, self.config.window)
            self.seconds = {("layer", layer_idx): seconds for layer_idx, seconds in enumerate(measured)}
        return knapsack.choose(problem, self.seconds)


SEARCHES: dict[str, type[Found]] = {"dynamic": Found, "influence": Found, "knapsack": Timed}


@dataclass
class _Index:
    """Where n-grams of a row's tokens ended last."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_tokens: int = 0


class Lookup(Drafter):
    """What followed the last tokens where they stood before in the text (prompt lookup, Saxena 2023)."""

    name = "lookup"
    is_free = True

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)

        self.indices: dict[int, _Index] = {}
        self.following: dict[int, tuple[int, int]] = {}  # by slot: place of the next guess, and how sure

    def stop(self) -> None:
        super().stop()
        self.indices, self.following = {}, {}

    def next_bin(self, row: Row) -> int:
        if not row.draft:
            self._find(row)
        place, confidence = self.following.get(row.slot, (len(row.ids), 0))
        return confidence if place < len(row.ids) else -1

    def guess(self, rows: Sequence[Row], choose: Choose) -> list[Guess | None]:
        return [self._guess(row) for row in rows]

    def _guess(self, row: Row) -> Guess | None:
        confidence = self.next_bin(row)
        if confidence < 0:
            return None
        place = self.following[row.slot][0]
        self.following[row.slot] = place + 1, min(confidence + 1, NUM_BINS - 1)
        return Guess(row.ids[place], confidence)

    def _find(self, row: Row) -> None:
        index = self.indices.setdefault(row.slot, _Index(num_tokens=row.num_padding))
        ids = row.ids
        for end in range(index.num_tokens + 1, len(ids)):  # what ends before the last token
            for size in self.sizes:
                if end - size >= row.num_padding:
                    index.ends[tuple(ids[end - size : end])] = end
        index.num_tokens = max(len(ids) - 1, index.num_tokens)
        self.following.pop(row.slot, None)
        for size in self.sizes:
            end = index.ends.get(tuple(ids[-size:])) if len(ids) - size >= row.num_padding else None
            if end is not None:
                self.following[row.slot] = end, size
                return


@dataclass
class _Reading:
    """What the trained drafter holds of a row."""

    feature: Tensor | None = None
    unread: list[Tensor] = field(default_factory=list)  # (N, taps · D), of verified tokens whose successors are known
    num_read: int = 0


class Trained(Drafter):
    """A `DraftNetwork` on the fast engine, in 4 and 8 bits where kernels run: a wrong guess costs only time."""

    name = "trained"

    def __init__(self, model: EngineModel, network: DraftNetwork) -> None:
        self.model, self.vocabulary = model, network.vocabulary
        reads, joins = network.read.weight.detach(), network.join.weight.detach()
        both = torch.cat([joins[:, : len(reads)] @ reads, joins[:, len(reads) :]], dim=1)  # one map of the two
        network = copy.deepcopy(network).to(model.dtype)
        few_bits = model.memory is not None and model.dtype == torch.bfloat16
        kind = "int8" if few_bits else model.weights
        parts = layer_parts(network.view(model.backbone))
        widths = [part.shape[1] for part in network.layer.parameters() if part.dim() == 2]
        # Reads half as much, and guesses as well.
        layer_kind = "int4" if few_bits and not any(width % INT4_GROUP for width in widths) else kind
        self.layer = EngineLayer(parts, layer_kind, model.dtype, model.rotations.kinds, model.memory)
        self.read, self.join = (self._linear(part.to(model.dtype), kind) for part in (both, joins))
        self.head = model.head_of(norm_of(network.norm), kind, network.vocabulary)
        self.cache: EngineCache | None = None
        self.rows: dict[int, _Reading] = {}

    def start(self, target: Target, num_rows: int) -> None:
        super().start(target, num_rows)
        self.cache = self.model.new_cache(num_rows, num_layers=1)

    def stop(self) -> None:
        super().stop()
        self.cache, self.rows = None, {}

    def _linear(self, weight: Tensor, kind: str) -> Linear:
        dense = Weights(weight.detach(), None)
        if self.model.memory is None:
            return Linear([dense])
        return NativeLinear([pack_panels(dense, kind, self.model.memory)], self.model.dtype, self.model.memory)

    def guess(self, rows: Sequence[Row], choose: Choose) -> list[Guess | None]:
        self._run([row for row in rows if row.draft or self.rows[row.slot].unread])
        features = [self.rows[row.slot].feature for row in rows]
        last = torch.cat([part for part in features if part is not None])
        return _guesses(*choose(rows, self.head(last), self.vocabulary))

    def _run(self, rows: Sequence[Row]) -> None:
        """The layer over what rows have not read yet, or over their last guesses: all have drafted as far."""
        if not rows:
            return
        assert self.cache is not None, "started"
        inputs = [self._inputs(row, self.cache) for row in rows]
        whole = inputs[0] if len(rows) == 1 else torch.cat(inputs)
        joined = (self.join if rows[0].draft else self.read)(whole)
        parts = list(joined.split([len(part) for part in inputs]))
        slots = [row.slot for row in rows]
        (parts,) = run_to_stops([self.layer], parts, slots, self.cache, 0, [1], self.model.rotations)
        for row, part in zip(rows, parts, strict=True):
            reading = self.rows[row.slot]
            reading.feature = part[-1:]
            if not row.draft:
                reading.num_read += len(part)

    def _inputs(self, row: Row, cache: EngineCache) -> Tensor:
        """(N, …) what stands for each token, states of the model or its own output, and the embedding behind."""
        reading = self.rows[row.slot]
        if row.draft:
            assert reading.feature is not None
            states, ids = reading.feature, row.draft[-1:]
        else:
            cache.rewind(row.slot, reading.num_read)
            states = reading.unread[0] if len(reading.unread) == 1 else torch.cat(reading.unread)
            reading.unread = []
            ids = row.ids[-len(states) :]
        embedded = self.model.embedding(torch.tensor(ids, device=states.device))
        return torch.cat([states, embedded], dim=1)

    def settle(self, rows: Sequence[Row]) -> None:
        for row in rows:
            states = torch.cat([part[-LOOK_BACK:] for part in row.fresh], dim=1)
            self.rows.setdefault(row.slot, _Reading()).unread.append(states)
        # Prompts, and what others have drafted for long, are not part of what a guess costs.
        self._run([row for row in rows if sum(map(len, self.rows[row.slot].unread)) > CATCH_UP])


def drafters_of(
    method: SelfSpeculation,
    others: Sequence[Method],
    adapted: AdaptedModel,
    logits_of: LogitsOf,
    trained: Drafter | None,
) -> list[Drafter]:
    """All that a method drafts with.

    Args:
        others: attached beside it. logits_of: of states of any depth. trained: with its network.
    """
    config, vocabulary = method.config, None
    if config.exit_vocabulary is not None:
        vocabulary = torch.arange(config.exit_vocabulary, device=adapted.device)

    def head(states: Tensor) -> Tensor:
        return logits_of(states, vocabulary)

    drafters: list[Drafter] = [Lookup()] if config.lookup else []
    drafters += [] if trained is None else [trained]
    drafters += [FirstLayers(layer, head, vocabulary) for layer in config.exit_layers]
    drafters += [Pruned(others)] if others else []
    if config.search is not None:
        skip_set = SkipSet(SkipSetConfig(), adapted.backbone)
        search = SEARCHES.get(config.search.strategy)
        drafters.append(
            Proposed(skip_set, config.search) if search is None else search(skip_set, config.search, adapted)
        )
    return drafters
