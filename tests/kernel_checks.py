"""Products and branches of the compiled kernels next to the same ones in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.engine.backends.cpu.backend import KernelBackend
from anydepth.engine.backends.cpu.native import rotation_structs
from anydepth.engine.backends.cpu.packing import Memory, NativeLinear, pack_panels
from anydepth.engine.backends.cpu.tasks import FFN, MIXER, Rows, Task, Tasks
from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.kv_cache import LayerKV
from anydepth.engine.new_tokens import Rotation
from anydepth.engine.weights import WEIGHTS, Float32
from anydepth.models.llama_like import LayerParts, Norm, Weights
from reference import in_8_bits

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 72, 100, 6, 2, 20  # no multiple of a vector's width


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_products(kind: str, num_inputs: int, num_rows: int) -> None:
    """Check two linear layers with outputs that fill no panel; inputs fill no vector, and one is far larger."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    maps = [Weights(randn(size, num_inputs, seed=size).to(dtype), randn(size, seed=1).to(dtype)) for size in (45, 16)]
    x, norm = randn(num_rows, num_inputs, seed=2).to(dtype), Norm(1 + 0.3 * randn(num_inputs, seed=3), 1e-5)
    x[:, 5] *= 100
    memory = Memory()
    ours = NativeLinear([pack_panels(part, WEIGHTS[kind], memory) for part in maps], dtype, memory, norm)(x)
    # Rounded where the Hugging Face model rounds.
    normed = (x.float() * (x.float().square().mean(-1, keepdim=True) + norm.eps).rsqrt()).to(dtype).float()
    normed = (normed * norm.weight).to(dtype).float()
    if WEIGHTS[kind].is_quantised:
        normed = in_8_bits(normed)
    wanted = torch.cat(
        [F.linear(normed, WEIGHTS[kind].dense(part.weight).float(), part.bias.float()) for part in maps], dim=1
    )  # type: ignore[union-attr]
    bound = 1e-5 if kind == "float32" else 1e-2
    torch.testing.assert_close(ours.float(), wanted, rtol=bound, atol=5 * bound)


def layer_parts(**changes: object) -> LayerParts:
    def weights(rows: int, cols: int, seed: int) -> Weights:
        return Weights(0.2 * randn(rows, cols, seed=seed), 0.2 * randn(rows, seed=seed + 50))

    def norm(size: int, seed: int) -> Norm:
        return Norm(1 + 0.2 * randn(size, seed=seed), 1e-6)

    parts = {
        "queries": weights(HEADS * HEAD_DIM, HIDDEN, 1),
        "keys": weights(KV_HEADS * HEAD_DIM, HIDDEN, 2),
        "values": weights(KV_HEADS * HEAD_DIM, HIDDEN, 3),
        "output": weights(HIDDEN, HEADS * HEAD_DIM, 4),
        "gate": weights(INNER, HIDDEN, 5),
        "up": weights(INNER, HIDDEN, 6),
        "down": weights(HIDDEN, INNER, 7),
        "mixer_norm": norm(HIDDEN, 8),
        "ffn_norm": norm(HIDDEN, 9),
        **dict.fromkeys(("mixer_out_norm", "ffn_out_norm", "query_norm", "key_norm", "softcap", "window")),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "scale": HEAD_DIM**-0.5,
        "rotation_kind": "all",
        "activation": "silu",
        **changes,
    }
    return LayerParts(**parts)  # type: ignore[arg-type]


def rotation_table(num_places: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the first 8 dimensions of each head."""
    angles = torch.arange(num_places)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    return angles.cos(), angles.sin()


CENTRED = Norm(1 + 0.2 * randn(HIDDEN), 1e-5, 0.2 * randn(HIDDEN, seed=1), centred=True)
VARIANTS: dict[str, dict[str, object]] = {
    "llama": {},
    "window": {"window": 9},
    "gemma": {
        "softcap": 3.0,
        "activation": "gelu_tanh",
        "mixer_out_norm": Norm(1 + 0.2 * randn(HIDDEN), 1e-6),
        "ffn_out_norm": Norm(1 + 0.2 * randn(HIDDEN), 1e-6),
    },
    "norms_of_heads": {"query_norm": Norm(1 + randn(HEAD_DIM), 1e-6), "key_norm": Norm(1 + randn(HEAD_DIM), 1e-6)},
    "no_rotation": {"rotation_kind": None},
    "sinks": {"sinks": 3 * randn(HEADS, seed=30), "window": 9},
    "clip": {"clip": 0.9},
    "neighbours": {"interleaved": True, "factor": 0.6, "clip": 0.7},
    "norms_rotated": {
        "query_norm": Norm(1 + randn(HEAD_DIM), 1e-6),
        "key_norm": Norm(1 + randn(HEAD_DIM), 1e-6),
        "norms_rotated": True,
    },
    "layer_norms": {
        "mixer_norm": CENTRED,
        "ffn_norm": CENTRED,
        "query_norm": Norm(1 + randn(HEADS, HEAD_DIM), 1e-5, centred=True),
        "key_norm": Norm(1 + randn(KV_HEADS, HEAD_DIM), 1e-5, centred=True),
        "up": None,
        "activation": "gelu",
    },
    "parallel": {"parallel": True, "up": None, "activation": "relu2"},
    "one_norm": {"parallel": True, "mixer_norm": CENTRED, "ffn_norm": None, "shared_norm": CENTRED},
}


def check_branches(variant: str, num_tokens: int, past: int) -> None:
    """Check two rows of different lengths and pasts; a past of 1500 is cut into parts that several threads take."""
    parts = layer_parts(**VARIANTS[variant])
    ours = KernelBackend(torch.float32, ["all"]).layer(parts, Float32)
    plain = TorchBackend(torch.float32).layer(parts, Float32)
    kv = LayerKV(torch.zeros(3, 2 * KV_HEADS, past + 20, HEAD_DIM), HIDDEN)
    kv.states[:, :, : past + 5] = randn(3, 2 * KV_HEADS, past + 5, HEAD_DIM)
    slots, counts, lengths = [2, 0], [past, past + 5], [num_tokens, max(num_tokens - 2, 1)]
    hidden = randn(sum(lengths), HIDDEN, seed=20)
    rows = list(zip(slots, counts, lengths, strict=True))
    places = torch.tensor([count + new for _, count, length in rows for new in range(length)])
    table = rotation_table(past + 20)
    rotation = None if parts.rotation_kind is None else Rotation(table[0][places], table[1][places])
    queries, new = plain.project(hidden, rotation)
    mixed = []
    for (slot, count, length), own, query, kept in zip(
        rows, places.split(lengths), queries.split(lengths), new.split(lengths), strict=True
    ):
        kv.states[slot, :, count : count + length] = kept.transpose(0, 1)
        columns = torch.arange(count + length)
        mask = (columns <= own[:, None]) & (columns > own[:, None] - (parts.window or 10**6))
        mixed.append(plain.attend(query, kv.states[slot : slot + 1, :, : count + length], mask[None]))
    wanted, wanted_states = plain.add_mixer(torch.cat(mixed), hidden), kv.states.clone()

    def forget() -> None:  # the kernels write K/V themselves
        for slot, count, length in rows:
            kv.states[slot, :, count : count + length] = float("nan")

    forget()
    batch = Rows(slots, lengths, counts, rotation_structs([table]))
    after_mixer = Tasks([Task(ours.native, kv, MIXER)]).run(batch, hidden)
    torch.testing.assert_close(after_mixer, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kv.states, wanted_states, rtol=1e-5, atol=1e-6)
    whole = Task(ours.native, kv, MIXER | FFN, before=torch.empty_like(hidden))
    torch.testing.assert_close(Tasks([whole]).run(batch, hidden), plain.add_ffn(wanted, hidden), rtol=1e-4, atol=1e-5)
    forget()
    ours.native.fill(hidden, batch, kv)  # the same K/V, by tokens that do not attend
    torch.testing.assert_close(kv.states, wanted_states, rtol=1e-5, atol=1e-6)
