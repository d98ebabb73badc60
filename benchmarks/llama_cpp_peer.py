"""Run llama.cpp as a peer: the embedded model's weights as GGUF of another width, and greedy generation, timed.

Needs the benchmark extra: `pip install -e '.[benchmark]'` builds llama-cpp-python from source, some 8 minutes.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from anydepth.models.target import cache_folder, embedded_gguf

KINDS = {"bfloat16": gguf.GGMLQuantizationType.BF16, "int8": gguf.GGMLQuantizationType.Q8_0}


def gguf_of(kind: str) -> Path:
    """The embedded model with its matrices in `kind`, made once from the bfloat16 that our engine runs."""
    path = cache_folder() / f"embedded-{kind}.gguf"
    if path.exists():
        return path
    source = gguf.GGUFReader(embedded_gguf())
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        value_type = field.types[0]
        inner = field.types[-1] if value_type == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), value_type, sub_type=inner)
    for tensor in source.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
            continue
        rounded = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
        values = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.BF16)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, KINDS[kind]), raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


class LlamaCpp:
    """Greedy generation through llama.cpp's C interface, batch 1, no sampling chain: its fastest use."""

    def __init__(self, path: Path, num_threads: int, context: int) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, 512, 512
        settings.n_threads = settings.n_threads_batch = num_threads
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token and in all, and the new tokens."""
        library = self.library
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        output: list[int] = []
        started = time.perf_counter()
        first = 0.0
        tokens = prompt
        while len(output) < new_tokens:
            array = (library.llama_token * len(tokens))(*tokens)
            status = library.llama_decode(self.context, library.llama_batch_get_one(array, len(tokens)))
            assert status == 0, f"llama_decode returned {status}"
            logits = np.ctypeslib.as_array(library.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
            output.append(int(logits.argmax()))
            tokens = output[-1:]
            first = first or time.perf_counter() - started
        return first, time.perf_counter() - started, output
