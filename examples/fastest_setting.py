"""Find the fastest setting that keeps a model's text, and run it.

python examples/fastest_setting.py [TARGET] [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from anydepth.recipe import TuneConfig
from anydepth.runs.tune import Tuner
from anydepth.serve.opening import open_target

target, folder = [*sys.argv[1:], *["embedded", "fast"][len(sys.argv) - 1 :]]
tuner = Tuner(target, TuneConfig(minutes=2, prompt_tokens=[64]), say=print)
found = tuner.run()
tuner.write(Path(folder))
print(f"{found['chosen']['label']}: {found['confirmed']['tokens_per_second']:.0f} tokens/s")

engine, tokenizer = open_target(folder)  # as every command opens it
ids = engine.generate(**tokenizer("The most important thing about the sea is", return_tensors="pt"), max_new_tokens=48)
print(tokenizer.decode(ids[0]))
