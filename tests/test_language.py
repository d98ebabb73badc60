"""Plain English: words that prose does not use here, and what to write in their place.

Prose is what a person reads: docstrings, comments and messages of the package, pages, comments of recipes, names of
tests. Code (backticks, code blocks, identifiers, paths) is not prose: JSON fields and options keep their names.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "anydepth"

WORDS = {  # a pattern, and what to write
    # Tokens, rows and threads are things.
    r"who|whom|whose": "which, that, of which",
    r"nobody|somebody|everybody|anybody": "no token, a user, every row",
    # Positions in space, where time or order is meant.
    r"behind": "after",
    r"in front of": "before",
    r"beside": "next to, with",
    r"besides": "also, apart from",
    r"stands?|standing": "is",
    r"lies?|lying": "is stored, is",
    r"be had|are had|is had": "is available",
    r"told": "is given, is printed, is refused",
    r"(?:go|goes|going|went|gone) on": "continue",
    # One word for each idea.
    r"(?:in|into) economy|economy": "draft policy",
    r"kept pass(?:es)?": "plan",
    r"late layers?": "deferred layers",
    r"settles?|settled|settling": "materialise, commit",
    r"doubts?": "exit score",
    r"second mixers?|other mixers?": "alternate mixer",
    r"holes?": "gap",
    r"rooms?": "capacity, space",
    r"places": "positions",
    r"(?:at|of|in|by) (?:a|the|each|every|this|that) place": "position",
    r"slots?": "sequence, K/V position",
    r"linear maps?|maps of": "linear layer",
    r"shares? of|(?:a|the|its|their|this|same|wanted|own|target) share": "fraction, probability",
    r"guess(?:es|ed|ing)?": "draft token",
    r"reduced models?": "pruned model",
    r"rehearse[sd]?": "score recent tokens",
    r"signs of life": "spinner",
    r"untouched": "base model",
    r"realised": "efficiency",
    r"(?<!pareto )fronts?(?! of)": "Pareto front",
    r"rough|roughly|rougher": "numerically sensitive, about",
    r"figures": "metrics, numbers, plots",
}
PATTERNS = [(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), instead) for pattern, instead in WORDS.items()]
FRAGMENT = re.compile(r"(?:Of|What|Who|Whose|Why|How|Where|When|Which|Whether)\b|\(")
"""Beginnings of the docstring of a function that is no sentence. A property may say `Whether …`."""


def words_in(prose: str) -> Iterator[str]:
    """Yield what to change in a piece of prose."""
    prose = re.sub(r"``?[^`]+``?|https?://\S+|[\w.-]+/[\w./-]+|--[\w-]+|\w+_\w+", "§", prose)
    for pattern, instead in PATTERNS:
        yield from (f"'{found[0]}': write {instead}" for found in pattern.finditer(prose))


def problems(pieces: Iterator[tuple[int, str]], where: str) -> list[str]:
    return [f"{where}:{line}: {problem}" for line, prose in pieces for problem in words_in(prose)]


# --- Python ----------------------------------------------------------------------------------------------------------


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield docstrings, messages and help: every string of four words and more, of f-strings the fixed parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "§" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 3:
            yield node.lineno, node.value


def fragments(tree: ast.AST, where: str) -> Iterator[str]:
    """Yield functions whose docstring begins as a fragment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            is_property = any("property" in decorator for decorator in decorators)
            found = FRAGMENT.match(docstring)
            if found and not (is_property and found[0] == "Whether"):
                yield f"{where}:{node.lineno}: '{docstring.splitlines()[0][:60]}' is no sentence: begin with a verb"


def problems_of(path: Path) -> list[str]:
    text, where = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    tree = ast.parse(text)
    return [*problems(comments(text), where), *problems(strings(tree), where), *fragments(tree, where)]


@pytest.mark.parametrize("room", sorted({path.relative_to(SOURCE).parts[0] for path in SOURCE.rglob("*.py")}))
def test_source_is_plain_english(room: str) -> None:
    paths = [SOURCE / room] if room.endswith(".py") else sorted((SOURCE / room).rglob("*.py"))
    found = [problem for path in paths for problem in problems_of(path)]
    assert not found, f"{len(found)} in {room}:\n" + "\n".join(found)


def test_names_of_tests_are_plain_english() -> None:
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names = re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in names:
            found += [f"{path.name}: {name}: {problem}" for problem in words_in(name.replace("_", " "))]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


# --- pages and recipes -----------------------------------------------------------------------------------------------

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def prose_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a page without code blocks, and without the tables that benchmarks print."""
    is_code = is_measured = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("<!-- ") and (found := re.search(r":(start|end) -->$", line)):
            is_measured = found[1] == "start"
        is_code ^= line.lstrip().startswith("```")
        if not is_code and not (is_measured and line.startswith("|")):
            yield number, line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_plain_english(path: Path) -> None:
    found = problems(prose_of(path.read_text(encoding="utf-8")), path.name)
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_comments_of_recipes_and_benchmarks_are_plain_english() -> None:
    found = []
    for path in sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("benchmarks/**/*.yaml")]):
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        found += problems(((number, line.partition("#")[2]) for number, line in lines), path.name)
    for path in sorted([*ROOT.glob("recipes/*.py"), *ROOT.glob("benchmarks/*.py")]):
        text = path.read_text(encoding="utf-8")
        docstrings = ((0, ast.get_docstring(ast.parse(text)) or ""),)
        found += problems(iter(docstrings), path.name) + problems(comments(text), path.name)
    assert not found, f"{len(found)}:\n" + "\n".join(found)
