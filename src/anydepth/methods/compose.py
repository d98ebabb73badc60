"""Methods out of what a user gives, and which of them can stand side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anydepth.config import StrictConfig, validate
from anydepth.errors import UserError
from anydepth.methods import METHODS, method_class
from anydepth.methods.method import Method
from anydepth.models.backbone import Backbone

MethodSpec = StrictConfig | Mapping[str, Any]


def build_methods(specs: Sequence[MethodSpec], backbone: Backbone) -> list[Method]:
    """The methods of a model.

    Raises:
        UserError: an unknown method, an option that does not fit the model, or two methods that contradict each other.
    """
    methods = [_build(_config(spec, f"methods[{i}]"), backbone) for i, spec in enumerate(specs)]
    _refuse_conflicts(methods)
    return methods


def _config(spec: MethodSpec, where: str) -> StrictConfig:
    if isinstance(spec, StrictConfig):
        return spec
    options = dict(spec)
    return validate(method_class(options.pop("name", None), where).Config, options, where=where)


def _build(config: StrictConfig, backbone: Backbone) -> Method:
    for name, method in METHODS.items():
        if type(config) is method.Config:
            try:
                return method(config, backbone)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
    raise UserError(f"{type(config).__name__} is not a method's Config; methods are {', '.join(METHODS)}")


def _refuse_conflicts(methods: list[Method]) -> None:
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"method {name} is given twice; one of each can be attached")
    for method in methods:
        if method.kv_rule == "recompute":
            _refuse_beside(method, [other for other in methods if other is not method])
        if method.chooses_mixers:
            _refuse_beside_choice(method, [other for other in methods if other is not method])
    by_rule = {method.kv_rule: method.name for method in methods if method.kv_rule is not None}
    if len(by_rule) > 1:
        raise UserError(
            f"tokens that {by_rule['project']} lets skip leave K/V (project), those of {by_rule['omit']} none (omit); "
            "give both methods the same kv_rule"
        )


def _refuse_beside_choice(method: Method, others: list[Method]) -> None:
    for other in others:
        if other.lossless:
            raise UserError(f"{other.name} takes tokens back, which {method.name}'s recurrent mixers cannot")
        if not other.gates_only_ffns:
            raise UserError(
                f"{method.name} has a mixer for every token, {other.name} lets some do without; attach one of them"
            )


def _refuse_beside(method: Method, others: list[Method]) -> None:
    """What `method` runs later is full depth: nobody else may decide about it."""
    for other in others:
        in_training = method.decides_in_training and other.decides_in_training
        if in_training or (method.decides_at_inference and other.decides_at_inference):
            raise UserError(
                f"{method.name} with kv_rule recompute runs missing layers later, at full depth, where {other.name} "
                "would have to decide again; attach it alone, or use kv_rule propagate"
            )
