"""Prompts and stop strings of the checks, short enough for the windows of small models."""

from __future__ import annotations

PROMPTS = (
    "The sea is",
    "Once upon a time",
    "def add(a, b):",
    "1, 2, 3, 4,",
    "Three rules of good writing:",
    "The night was long, and",
)
"""Prompts with long answers, for either endpoint."""
LONG_PROMPT = "Count from one to one thousand: one, two, three,"
SHORT_PROMPTS = ("Answer with one word: is the sea wet?", "Say only: yes.", "2 + 2 =", "Goodbye.")
"""Prompts with answers that are likely to end by themselves."""
WIDE_PROMPTS = (
    "🌊🐚🐟🦀🐳🌊🐚🐟🦀🐳🌊🐚",
    "海は広いな、",
    "Five emoji: 😀 🎉 👩‍👧",
    "Ça, größer, жизнь,",
)
"""Prompts with answers in characters of several bytes."""
END_MARKS = (
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
)
"""Names of end tokens of the common families of models."""
STOP_LENGTHS = (1, 2, 3, 5, 8)
"""Numbers of characters of the stop strings that are cut out of an answer."""
