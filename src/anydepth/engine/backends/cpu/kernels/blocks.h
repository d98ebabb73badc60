// Weights as a GGUF file stores them: blocks of 32 or 256 inputs of a row. They are read as they are, or repacked into panels
// (`product.h`) bit by bit; only a step that is a product of two becomes one float16.
// Source of the layouts: ggml-common.h and ggml-quants.c of github.com/ggml-org/ggml.
#pragma once

#include <cstdint>

#include "product.h"

namespace {

enum BlockType : int32_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

struct Layout {
    int inputs, bytes;  // of a block
    Kind kind;          // of its panels
};
inline Layout layout_of(int type) {
    switch (type) {
        case Q4_0: return {32, 18, INT4_CENTRED};
        case Q4_1: return {32, 20, INT4};
        case Q5_0: return {32, 22, INT5_CENTRED};
        case Q5_1: return {32, 24, INT5};
        case Q8_0: return {32, 34, INT8_GROUPS};
        case Q4_K: return {256, 144, INT4};
        case Q5_K: return {256, 176, INT5};
        default: return {256, 210, INT6};
    }
}

// 32 inputs of a row: (integer − zero) · step of its half, or integer · step + offset.
struct Group {
    uint8_t integers[GROUP];
    float steps[2], offset;
};

inline float f16_at(const uint8_t* from) { return one(load<f16>(from)); }

// Returns the step and the minimum of group `j` of a K block, in multiples of those of the block: 6 bits each.
inline void scales_of(const uint8_t* s, int j, float& step, float& minimum) {
    step = float(j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6 << 4));
    minimum = float(j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6 << 4));
}

// Reads group `number` of a row.
inline Group group_at(int type, const uint8_t* row, int number) {
    const Layout layout = layout_of(type);
    const int j = number % (layout.inputs / GROUP);  // of its block
    const uint8_t* block = row + int64_t(number / (layout.inputs / GROUP)) * layout.bytes;
    Group group = {};
    const auto halves = [&](const uint8_t* bytes) {  // the low halves of 16 bytes, then the high ones
        for (int i = 0; i < 16; ++i) group.integers[i] = bytes[i] & 15, group.integers[i + 16] = bytes[i] >> 4;
    };
    const auto fifth_bits = [&](const uint8_t* bytes) {
        const uint32_t bits = load<uint32_t>(bytes);
        for (int i = 0; i < GROUP; ++i) group.integers[i] |= (bits >> i & 1) << 4;
    };
    const bool offset = type == Q4_1 || type == Q5_1;
    float step = type == Q6_K ? f16_at(block + 208) : f16_at(block);
    if (offset) group.offset = f16_at(block + 2);
    if (type == Q8_0) {
        for (int i = 0; i < GROUP; ++i) group.integers[i] = uint8_t(int8_t(block[2 + i]) + 128);
    } else if (type == Q4_0 || type == Q4_1) {
        halves(block + (offset ? 4 : 2));
    } else if (type == Q5_0 || type == Q5_1) {
        halves(block + (offset ? 8 : 6));
        fifth_bits(block + (offset ? 4 : 2));
    } else if (type == Q4_K || type == Q5_K) {
        float factor, minimum;
        scales_of(block + 4, j, factor, minimum);
        group.offset = -f16_at(block + 2) * minimum;
        step *= factor;
        const uint8_t* bytes = block + (type == Q4_K ? 16 : 48) + j / 2 * GROUP;
        for (int i = 0; i < GROUP; ++i) {
            group.integers[i] = j % 2 ? bytes[i] >> 4 : bytes[i] & 15;
            if (type == Q5_K) group.integers[i] |= (block[16 + i] >> j & 1) << 4;
        }
    } else {  // Q6_K: two halves of 128 inputs; the four groups of a half share bytes
        const uint8_t *low = block + j / 4 * 64 + j % 2 * 32, *high = block + 128 + j / 4 * 32;
        for (int i = 0; i < GROUP; ++i)
            group.integers[i] = (j % 4 < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> 2 * (j % 4) & 3) << 4;
        for (int half = 0; half < 2; ++half) group.steps[half] = step * int8_t(block[192 + 2 * j + half]);
        return group;
    }
    group.steps[0] = group.steps[1] = step;
    return group;
}

// Packs a group of one row of a panel: the inverse of `four_inputs`.
inline void pack_group(const Group& group, int bits, int row, uint8_t* to) {
    for (int k = 0; k < 8; ++k)
        for (int i = 0; i < 4; ++i) {
            const uint8_t value = group.integers[4 * k + i];
            uint8_t* byte = to + 4 * row + i;
            if (bits == 8) {
                byte[64 * k] = value;
                continue;
            }
            byte[k / 2 * 64] |= (value & 15) << 4 * (k % 2);
            if (bits == 5) byte[64 * 4] |= value >> 4 << k;
            if (bits == 6) byte[64 * (4 + k / 4)] |= value >> 4 << 2 * (k % 4);
        }
}

template <int KIND>
void repack(int type, const uint8_t* blocks, int rows, int cols, uint8_t* weight, f16* scales) {
    using F = Format<KIND>;
    const Layout layout = layout_of(type);
    const int groups = groups_of(cols);
    const int64_t row_bytes = int64_t(cols) / layout.inputs * layout.bytes;
#pragma omp parallel for
    for (int panel = 0; panel < (rows + ROWS - 1) / ROWS; ++panel) {
        uint8_t* to = weight + int64_t(panel) * groups * F::BITS * 64;
        f16* own = scales + int64_t(panel) * groups * F::SCALES * ROWS;
        std::memset(to, 0, int64_t(groups) * F::BITS * 64);
        std::memset(own, 0, int64_t(groups) * F::SCALES * ROWS * sizeof(f16));
        for (int row = panel * ROWS; row < std::min(rows, (panel + 1) * ROWS); ++row)
            for (int g = 0; g < groups; ++g) {
                const Group group = group_at(type, blocks + row * row_bytes, g);
                pack_group(group, F::BITS, row % ROWS, to + int64_t(g) * F::BITS * 64);
                f16* step = own + int64_t(g) * F::SCALES * ROWS + row % ROWS;
                store(group.steps[0], step);
                if (F::SCALES == 2) store(F::OFFSETS ? group.offset : group.steps[1], step + ROWS);
            }
    }
}

}  // namespace

extern "C" {

// Repacks (rows, cols) blocks into panels and their scales.
void anydepth_repack(int32_t type, const uint8_t* blocks, int32_t rows, int32_t cols, uint8_t* weight, f16* scales) {
    switch (layout_of(type).kind) {
        case INT8_GROUPS: return repack<INT8_GROUPS>(type, blocks, rows, cols, weight, scales);
        case INT6: return repack<INT6>(type, blocks, rows, cols, weight, scales);
        case INT5: return repack<INT5>(type, blocks, rows, cols, weight, scales);
        case INT5_CENTRED: return repack<INT5_CENTRED>(type, blocks, rows, cols, weight, scales);
        case INT4: return repack<INT4>(type, blocks, rows, cols, weight, scales);
        default: return repack<INT4_CENTRED>(type, blocks, rows, cols, weight, scales);
    }
}

// Writes some rows as (N, cols) float32.
void anydepth_dequantise(int32_t type, const uint8_t* blocks, const int64_t* rows, int32_t num_rows, int32_t cols, float* to) {
    const Layout layout = layout_of(type);
    const int64_t row_bytes = int64_t(cols) / layout.inputs * layout.bytes;
    const bool centred = layout.kind != INT4 && layout.kind != INT5;
    const int zero = !centred ? 0 : layout.kind == INT8_GROUPS ? 128 : layout.kind == INT6 ? 32 : layout.kind == INT5_CENTRED ? 16 : 8;
#pragma omp parallel for if (num_rows > 64)
    for (int n = 0; n < num_rows; ++n)
        for (int g = 0; g < cols / GROUP; ++g) {
            const Group group = group_at(type, blocks + rows[n] * row_bytes, g);
            float* out = to + int64_t(n) * cols + g * GROUP;
            for (int i = 0; i < GROUP; ++i) out[i] = float(int(group.integers[i]) - zero) * group.steps[i / HALF] + group.offset;
        }
}

}  // extern "C"
