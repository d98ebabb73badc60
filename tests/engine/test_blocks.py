"""Blocks of GGUF files in the kernels, next to gguf's own dequantisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from anydepth.engine.backends.cpu.packing import BLOCK_PANELS, Memory, NativeEmbedding, NativeLinear, pack_panels
from anydepth.engine.weights import Native
from anydepth.models.blocks import BlockEmbedding, Blocks
from anydepth.models.gguf import BLOCK_KINDS
from anydepth.models.llama_like import BlockWeights
from reference import in_8_bits

FLOAT16S = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 numbers of a block are; the others have one at its start."""


def random_blocks(kind: str, num_outputs: int, num_inputs: int, seed: int = 0) -> Blocks:
    """Return blocks of random bytes, with steps of the size that models have."""
    type_ = GGMLQuantizationType[kind]
    inputs, num_bytes = GGML_QUANT_SIZES[type_]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (num_outputs, num_inputs // inputs, num_bytes), dtype=np.uint8)
    for start in FLOAT16S.get(kind, (0,)):
        steps = (random.random(blocks.shape[:2]) * 0.01).astype(np.float16)
        blocks[..., start : start + 2] = steps[..., None].view(np.uint8)
    return Blocks(torch.from_numpy(blocks.reshape(num_outputs, -1)), type_)


def linear_of(blocks: Blocks, memory: Memory) -> NativeLinear:
    packed = pack_panels(BlockWeights(blocks, None, torch.float32), Native, memory)
    return NativeLinear([packed], torch.float32, memory)


def test_every_kind_of_blocks_that_is_read_has_panels() -> None:
    assert set(BLOCK_KINDS) == set(BLOCK_PANELS)


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 19, 130])
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_products_are_those_of_the_dequantised_weights(kind: str, num_tokens: int) -> None:
    memory, blocks = Memory(), random_blocks(kind, 40, 512)  # not whole panels
    linear = NativeLinear(
        [pack_panels(BlockWeights(blocks, None, torch.float32), Native, memory)], torch.float32, memory
    )
    x = torch.randn(num_tokens, 512, generator=torch.Generator().manual_seed(1))
    wanted = in_8_bits(x).double() @ blocks.dense().double().T
    error = (linear(x) - wanted).norm() / wanted.norm()
    assert error < 3e-4  # float16 steps


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_a_token_has_the_same_bits_alone_and_among_others(kind: str) -> None:
    memory, blocks = Memory(), random_blocks(kind, 48, 768)
    linear = NativeLinear(
        [pack_panels(BlockWeights(blocks, None, torch.float32), Native, memory)], torch.float32, memory
    )
    x = torch.randn(13, 768, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(x), torch.cat([linear(row) for row in x.split(1)]))


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_an_input_that_is_no_number_gives_none(kind: str) -> None:
    memory, x = Memory(), torch.ones(2, 256)
    x[1, 40] = torch.nan
    found = linear_of(random_blocks(kind, 16, 256), memory)(x)
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_rows_of_an_embedding_are_dequantised_exactly(kind: str) -> None:
    blocks = random_blocks(kind, 50, 256)
    module = BlockEmbedding(blocks, torch.float32)
    ids = torch.tensor([[3, 49], [0, 3]])
    wanted = blocks.dense()[ids]
    assert torch.equal(module(ids), wanted)
    torch.testing.assert_close(NativeEmbedding(module)(ids), wanted, rtol=1e-6, atol=1e-9)
