"""Fill the generated parts of the pages while mkdocs builds them, so that code and results are the only source.

A line `<!-- generate: WHAT -->` in a page is replaced: `options NAME` (a method's Config), `method NAME` (lossless,
trained), `config NAME` (a section of the recipe), `methods`, `families`, `commands`, `results NAME` (the part of
`results.md` between marks of that name), `result-files`, `checks` (of `anydepth conform`). mkdocs loads this file as
a hook; it is not a script.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^<!-- generate: (\S+) ?(\S*) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with its markers replaced; mkdocs calls this hook."""
    return MARKER.sub(lambda found: GENERATORS[found[1]](*filter(None, [found[2]])), markdown)


def options(name: str) -> str:
    """Return the options of a method, from its Config."""
    return _fields(_methods()[name].Config)


def config(name: str) -> str:
    """Return the options of one section of a recipe, from its class."""
    homes = [importlib.import_module(home) for home in ("anydepth.recipe", "anydepth.draft_sections")]
    return _fields(next(vars(home)[name] for home in homes if name in vars(home)))


def method(name: str) -> str:
    """Return one line: lossless or lossy, trained or not."""
    cls = _methods()[name]
    output = "output is the full-depth output" if cls.is_lossless() else "lossy"
    return f"*{_sentence(cls.summary)} {output.capitalize()}; {'trained' if _is_trained(cls) else 'not trained'}.*"


def methods() -> str:
    """Return the table of all methods."""
    rows = [
        (
            f"[`{name}`](methods/{name}.md)",
            cls.summary,
            "yes" if cls.is_lossless() else "no",
            "yes" if _is_trained(cls) else "no",
        )
        for name, cls in _methods().items()
    ]
    return _table(("method", "idea", "lossless", "trained"), rows)


def families() -> str:
    """Return tables of the supported model families and of those that were looked at and do not fit."""
    table = importlib.import_module("anydepth.models.families")
    fast = importlib.import_module("anydepth.models.llama_like").FAMILIES
    rows = [
        (f"`{name}`", "hf, fast" if name in fast else "hf", *_limits(family))
        for name, family in sorted(table.FAMILIES.items())
    ]
    refused = [(f"`{name}`", why) for name, why in sorted(table.REFUSED.items())]
    head = ("family", "engines", "`kv_rule`", "what is refused, and notes")
    return f"{_table(head, rows)}\n\n{_table(('not supported', 'why'), refused)}"


def _limits(family: Any) -> tuple[str, str]:
    """Return the K/V rules of a family, and what it refuses."""
    notes = [f"`{refusal.attribute}={refusal.value}` ({refusal.why})" for refusal in family.refused]
    if family.whole_layers:
        notes.append(f"skipping mixers or FFNs alone ({family.whole_layers})")
    if family.recurrent:
        notes.append("recurrent mixers see every token under `project`")
    if not family.query_projections:
        notes.append("a skipping token pays for q too under `project`, as q, k and v are one matrix")
    rules = "project, recompute, and omit where no layers share K/V" if family.shared_kv_argument else "all"
    return rules, "; ".join(notes)


def commands() -> str:
    """Return every command of the CLI with its arguments and options, from typer."""
    typer = importlib.import_module("typer.main")
    group = typer.get_command(importlib.import_module("anydepth.cli").app)
    with group.make_context("anydepth", [], resilient_parsing=True) as context:
        names = group.list_commands(context)
        return "\n\n".join(_command(name, group.get_command(context, name)) for name in names)


def results(part: str) -> str:
    """Return the part of the page of results between its marks of that name."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {part}:start -->\n(.*?)<!-- {part}:end -->", text, re.DOTALL)
    assert found, f"docs/results.md has lost its {part}:start and {part}:end marks"
    return found[1]


def result_files() -> str:
    """Return a table of the files in benchmarks/results, and where each was measured."""
    documents = [(path, json.loads(path.read_text())) for path in sorted(ROOT.glob("benchmarks/results/*.json"))]
    if not documents:
        return "No result has been committed yet."
    return _table(("file", "schema", "commit", "seed", "processor"), [_origin(*pair) for pair in documents])


def checks() -> str:
    """Return a table of the checks of `anydepth conform`."""
    found = importlib.import_module("anydepth.conform.run").CHECKS
    return _table(("check", "what it does"), [(f"`{check.name}`", check.summary) for check in found])


GENERATORS: dict[str, Callable[..., str]] = {
    "options": options,
    "config": config,
    "method": method,
    "methods": methods,
    "families": families,
    "commands": commands,
    "results": results,
    "result-files": result_files,
    "checks": checks,
}


def _is_trained(cls: type) -> bool:
    from anydepth.methods._base.training import Trained

    return issubclass(cls, Trained)


def _methods() -> dict[str, Any]:
    return importlib.import_module("anydepth.methods").METHODS


def _fields(cls: Any) -> str:
    rows = [
        (f"`{name}`", f"`{_type(field.annotation)}`", _default(field), field.description or "")
        for name, field in cls.model_fields.items()
    ]
    return _table(("option", "type", "default", "what it does"), rows)


def _type(annotation: Any) -> str:
    """Write `Literal['a', 'b'] | None` as `a or b or null`, the words of YAML."""
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", lambda found: found[1].replace(", ", " | ").replace("'", ""), text)
    return re.sub(r"\b(?:typing|anydepth(?:\.\w+)*)\.", "", text).replace("None", "null").replace(" | ", " or ")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if hasattr(value, "model_fields"):
        return "the defaults of its section"
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def _command(name: str, command: Any) -> str:
    rows = [_parameter(parameter) for parameter in command.params]
    usage = " ".join(["anydepth", name, *_positionals(command)])
    table = _table(("option", "default", "what it does"), rows)
    return f"### {name}\n\n{command.help or ''}\n\n```console\n$ {usage} [OPTIONS]\n```\n\n{table}"


def _positionals(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield _placeholder(parameter)
        elif parameter.required:
            yield f"{parameter.opts[0]} {parameter.name.upper()}"


def _placeholder(argument: Any) -> str:
    return argument.name.upper() + (" …" if argument.nargs == -1 else "")


def _parameter(parameter: Any) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = f"`{_placeholder(parameter)}`"
    default = "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
    return names, "required" if parameter.required else default, parameter.help or ""


def _origin(path: Path, document: dict[str, Any]) -> tuple[str, ...]:
    commit = str(document.get("commit") or "–")[:10] + (" (dirty)" if document.get("dirty") else "")
    hardware = document.get("hardware") or {}
    return (
        f"`{path.name}`",
        f"`{document.get('schema')}`",
        commit,
        str(document.get("seed")),
        str(hardware.get("cpu", "–")),
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "None."
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
