"""A causal LM with methods attached: same forward, same `generate`, and skipped work is not computed.

`attach` replaces the forwards of layers by gated ones and changes nothing else: parameters, their names and
`save_pretrained` stay as they are. `detach` restores the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.config import StrictConfig
from anydepth.errors import UserError
from anydepth.gating.context import PassContext, SequenceState
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Decisions, Plan
from anydepth.gating.trace import PassRecord, Trace
from anydepth.hf.adaptive_cache import AdaptiveCache
from anydepth.hf.calls import Calls, join_checkpoints, leave_checkpoints
from anydepth.hf.gated_layer import GatedLayer
from anydepth.hf.partial import Run
from anydepth.methods._base.method import Method
from anydepth.methods._base.training import ExitState, Trained
from anydepth.methods.compose import MethodSpec, build_methods
from anydepth.models.backbone import Backbone
from anydepth.models.plain import is_peft


class _ModelForward:
    """The model's own forward with its signature, by which transformers' Trainer selects columns of the data.

    It is a descriptor without `__set__`, so that an instance's forward can be replaced, as accelerate does.
    """

    def __get__(self, adapted: AdaptedModel | None, owner: type) -> Any:
        return _unbound_forward if adapted is None else _BoundForward(adapted)


def _unbound_forward(adapted: AdaptedModel, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """Declare `labels`, which Trainer looks for in the signature of the class."""
    return adapted.model(*args, **({} if labels is None else {"labels": labels}), **kwargs)


class _BoundForward:
    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapted.model(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.adapted.backbone.model.forward)


class AdaptedModel(nn.Module):
    """A Hugging Face causal LM and the methods attached to it; other attributes are looked up in the model.

    Attributes:
        model: the causal LM, or a `PeftModel` around it.
        methods: the attached methods by name; their parameters are the only ones that anydepth adds.
        backbone: the structural view of the model.
    """

    def __init__(self, model: nn.Module, specs: Sequence[MethodSpec]) -> None:
        super().__init__()
        self.backbone = Backbone(model)
        _refuse_second_attachment(self.backbone)
        methods = build_methods(specs, self.backbone)
        self.backbone.verify()
        self.model = model
        self.methods = nn.ModuleDict({method.name: method for method in methods})
        self.methods.to(self.backbone.device)
        self.methods.train(model.training)
        self.training = model.training
        self.calls = Calls()
        self._install()

    def _install(self) -> None:
        decoder = self.backbone.decoder
        self._decoder_before = decoder.__dict__.get("forward")
        self._own_decoder = decoder.forward
        self._decoder_arguments = list(inspect.signature(type(decoder).forward).parameters)[1:]
        decoder.forward = self._decoder_forward
        last = self.backbone.layers[-1]
        self._gated = [GatedLayer(view, self.calls, is_last=view is last) for view in self.backbone.layers]
        self._head_hook = self.backbone.head.register_forward_pre_hook(self._count_head_rows)

    def remove(self) -> nn.Module:
        """Remove the gates and return the restored model; `detach` is the public name."""
        self._head_hook.remove()
        leave_checkpoints(self._modules_of_layers)
        for gated in self._gated:
            gated.remove()
        self._gated = []
        if self._decoder_before is None:
            del self.backbone.decoder.forward
        else:
            self.backbone.decoder.forward = self._decoder_before
        return self.model

    def _decoder_forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(self._decoder_arguments, args, strict=False)), **kwargs}
        if any(layer.training for layer in self._modules_of_layers):  # transformers too decides this layer by layer
            join_checkpoints(self._modules_of_layers, self.calls)
        run = self._begin(kwargs) if self.calls.enabled else None
        if run is not None and "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = 0  # else Gemma-4 runs its last layers for the last tokens alone
        with self.calls.setting(run=run):
            output = self._own_decoder(**kwargs)
        if isinstance(cache := kwargs.get("past_key_values"), AdaptiveCache):
            cache.num_seen += _new_tokens(kwargs).shape[1]
        return output

    @property
    def _modules_of_layers(self) -> list[nn.Module]:
        return [view.module for view in self.backbone.layers]

    def _begin(self, kwargs: dict[str, Any]) -> Run:
        """Start a `Run`, and record it as the last one."""
        cache = self._cache_for(kwargs)
        num_seen = 0 if cache is None else cache.num_seen
        token_mask, positions = _tokens(kwargs, num_seen)
        if self.backbone.family.ignores_past and num_seen and kwargs.get("position_ids") is None:
            new = torch.arange(token_mask.shape[1], device=token_mask.device)
            kwargs["position_ids"] = num_seen + new[None]
        plan = self.calls.plan
        methods = self.active_methods if plan is None else plan.methods
        record = PassRecord(token_mask, num_seen, cache is not None, len(self._gated))
        context = PassContext(
            token_mask,
            positions,
            self.training,
            evaluate=record.counting(GateNetwork.__call__),
            memory=SequenceState({} if cache is None else cache.method_memory),
            logits_of=record.counting_logits(self.backbone.logits_of),
        )
        run = self.calls.last = Run(Decisions.begin(methods, context, plan), record, cache, self.calls.sparse)
        if record.past_length == 0:
            self.calls.records = []
        self.calls.records.append(record)
        return run

    def _cache_for(self, kwargs: dict[str, Any]) -> AdaptiveCache | None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            if kwargs.get("use_cache") is None:
                kwargs["use_cache"] = self.config.use_cache and not (self.training or self.backbone.decoder.training)
            kwargs["past_key_values"] = cache = self.new_cache() if kwargs["use_cache"] else None
        if cache is not None and not isinstance(cache, AdaptiveCache):
            raise UserError(
                f"past_key_values is a {type(cache).__name__}; layers that skip tokens need anydepth's own cache: call "
                "adapted.generate(...), or pass past_key_values=adapted.new_cache()"
            )
        return cache

    def _count_head_rows(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        # Within a forward exits call the head, and the record counts those rows itself.
        if self.calls.enabled and self.calls.records and self.calls.run is None:
            self.calls.records[-1].head_rows = args[0].numel() // args[0].shape[-1]

    forward: Any = _ModelForward()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors by name; the second name of a tied weight has a copy, since files cannot share tensors."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        seen: set[int] = set()
        for name, parameter in self.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
            if not kwargs.get("keep_vars") and id(parameter) in seen and name in state:
                state[name] = state[name].clone()
            seen.add(id(parameter))
        return state

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate by transformers' own `generate`, on a cache that may hold fewer tokens than the sequence."""
        # transformers' own cache does not know the length of a sequence if no layer has attention.
        needs_own = self.calls.enabled or "attention" not in self.backbone.layer_types()
        needs_own &= kwargs.get("custom_generate") is None  # another loop has its own cache
        if needs_own and kwargs.get("past_key_values") is None and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = cache = self.new_cache()
            token_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            if token_ids is not None:
                self._read_prompt(token_ids, cache, **kwargs)
        model: Any = self.model
        return model.generate(*args, **kwargs)

    @torch.no_grad()
    def _read_prompt(self, token_ids: Tensor, cache: AdaptiveCache, **options: Any) -> None:
        """Read (B, T) prompts, all but their last column, into an empty cache, if methods have gates for prompts.

        `options` are those of `generate`.
        """
        plan, model = Plan.of(self.active_methods), self.model
        if not plan.gates_prompts or token_ids.shape[1] == 1:
            return
        mask, defaults = options.get("attention_mask"), options.get("generation_config") or self.generation_config
        mask = torch.ones_like(token_ids) if mask is None else mask
        # transformers repeats rows for beams and for several sequences.
        counts = (options.get(name, getattr(defaults, name)) for name in ("num_beams", "num_return_sequences"))
        copies = max(count or 1 for count in counts)
        token_ids, mask = token_ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
        plan = plan.of_prompt(mask.sum(1, keepdim=True))
        token_ids, mask = token_ids[:, :-1], mask[:, :-1]
        inputs = {"attention_mask": mask, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if "position_ids" in inspect.signature(self.backbone.model.forward).parameters:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        with self.running(plan):
            model(input_ids=token_ids, **inputs)

    def new_cache(self) -> AdaptiveCache:
        """Return an empty cache, for `past_key_values=` of direct forwards."""
        return AdaptiveCache(self.config)

    def disabled(self) -> AbstractContextManager[None]:
        """Run at full depth, bitwise as the model without anydepth; other threads are not affected."""
        return self.calls.setting(enabled=False, run=None)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Run the base model: at full depth, and without a LoRA adapter."""
        with self.disabled(), without_adapter(self.model):
            yield

    def masked(self) -> AbstractContextManager[None]:
        """Run every layer and blend the results: slow, but the definition of sparse execution."""
        return self.calls.setting(sparse=False)

    @property
    def is_enabled(self) -> bool:
        """Whether methods decide; False while `disabled`."""
        return self.calls.enabled

    @property
    def attached(self) -> list[Method]:
        return [method for method in self.methods.values() if isinstance(method, Method)]

    @property
    def active_methods(self) -> list[Method]:
        """The methods that decide, in order; none while `disabled`."""
        if not self.calls.enabled:
            return []
        return self.attached if self.calls.stand_ins is None else list(self.calls.stand_ins)

    def deciding(self, *stand_ins: Method) -> AbstractContextManager[None]:
        """Let other methods decide in place of the attached ones, such as a replay of an earlier forward."""
        return self.calls.setting(stand_ins=stand_ins)

    def running(self, plan: Plan) -> AbstractContextManager[None]:
        """Run an existing plan instead of a new one for each forward."""
        return self.calls.setting(plan=plan, enabled=True)

    @property
    def records(self) -> list[PassRecord]:
        """Records of the forwards of this thread's last sequence, one for each."""
        return self.calls.records

    @records.setter
    def records(self, records: list[PassRecord]) -> None:
        self.calls.records = records

    @property
    def last_trace(self) -> Trace:
        """The trace of the last sequence: one uncached forward, or all forwards that shared a cache."""
        return Trace.join(self.calls.records)

    @property
    def last_run(self) -> Run:
        assert self.calls.last is not None, "no forward has run yet"
        return self.calls.last

    @property
    def context(self) -> PassContext:
        """The context that methods read and wrote in the last forward."""
        return self.last_run.context

    @property
    def trained_methods(self) -> list[Trained]:
        """The active methods that are trained or that change training."""
        return [method for method in self.active_methods if isinstance(method, Trained)]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the methods' losses of the last forward over real tokens, by `method/term`."""
        return self._by_term(lambda method: method.auxiliary_losses(self.context))

    def outcome_losses(self, logits: Tensor) -> dict[str, Tensor]:
        """Return losses on the (B, T, V) logits of the last forward, by `method/term`."""
        return self._by_term(lambda method: method.outcome_losses(self.context, logits))

    def policy_losses(self, token_losses: Tensor) -> dict[str, Tensor]:
        """Return losses on the decisions of the last forward, given its (B, T) token losses, by `method/term`."""
        return self._by_term(lambda method: method.policy_losses(self.context, token_losses))

    def _by_term(self, losses_of: Callable[[Trained], dict[str, Tensor]]) -> dict[str, Tensor]:
        by_method = {method.name: losses_of(method) for method in self.trained_methods}
        return {f"{name}/{term}": value for name, own in by_method.items() for term, value in own.items()}

    def exit_states(self) -> dict[str, list[ExitState]]:
        """Return the states at the exits of the last forward by method, for losses over them."""
        exits = {method.name: method.exit_states(self.context) for method in self.trained_methods}
        return {name: states for name, states in exits.items() if states}

    @property
    def label(self) -> str:
        """Names of the attached methods, joined; `full depth` without any."""
        return " + ".join(self.methods) or "full depth"

    @property
    def config(self) -> Any:
        return self.backbone.model.config

    def push_to_hub(self, *_: Any, **__: Any) -> Any:
        """Refuse to upload the model without what is attached, as the model's own method would."""
        raise UserError(
            "adapted.push_to_hub would leave out what is attached; anydepth.push_to_hub(adapted, 'user/router') "
            "uploads that, adapted.model.push_to_hub('user/model') the model alone"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet, so that the look-up below would never end
                raise
            return getattr(self.model, name)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Run a model without its LoRA adapter, if it has one."""
    if not is_peft(model):
        yield
        return
    wrapped: Any = model
    learning = {part: part.requires_grad for part in model.parameters()}
    try:
        with wrapped.disable_adapter():
            yield
    finally:
        for part, requires_grad in learning.items():  # PEFT turns gradients of a frozen adapter on
            part.requires_grad_(requires_grad)


def attach(model: nn.Module, methods: MethodSpec | Sequence[MethodSpec]) -> AdaptedModel:
    """Attach one or several methods to a causal LM (plain, or wrapped by PEFT).

    Args:
        model: a transformers causal LM of a supported family.
        methods: a method's `Config`, a mapping `{"name": ..., option: ...}`, or a list of those.

    Raises:
        UserError: unsupported model, unknown method, or an option that does not fit the model.
    """
    return AdaptedModel(model, [methods] if isinstance(methods, StrictConfig | Mapping) else list(methods))


def detach(adapted: AdaptedModel) -> nn.Module:
    """Remove the methods; return the model as it was before `attach`."""
    return adapted.remove()


def _refuse_second_attachment(backbone: Backbone) -> None:
    owner = getattr(backbone.decoder.forward, "__self__", None)
    if isinstance(owner, AdaptedModel):
        raise UserError(
            f"this model already has methods attached ({', '.join(owner.methods)}); call anydepth.detach first, "
            "or attach all methods at once as a list"
        )


def _new_tokens(kwargs: dict[str, Any]) -> Tensor:
    """Return the (B, T) ids of a forward, or one number of each token's embedding."""
    return kwargs["inputs_embeds"][..., 0] if kwargs.get("input_ids") is None else kwargs["input_ids"]


def _tokens(kwargs: dict[str, Any], num_seen: int) -> tuple[Tensor, Tensor]:
    """Return the (B, T) mask of real tokens, and their positions among the real tokens of their row."""
    tokens = _new_tokens(kwargs)
    batch_size, num_tokens = tokens.shape
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):  # generate may pass one mask per layer type, none of which has a padding column
        mask = None
    if mask is None or mask.dim() != 2:
        real = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=tokens.device)
        positions = torch.arange(num_seen, num_seen + num_tokens, device=tokens.device).expand(batch_size, -1)
        return real, positions
    mask = mask.bool()
    return mask[:, -num_tokens:], (mask.long().cumsum(1) - 1)[:, -num_tokens:].clamp_min(0)
