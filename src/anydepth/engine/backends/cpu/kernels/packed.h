// Kinds of weights, and activations packed for a kind.
#pragma once

#include <algorithm>
#include <vector>

#include "numbers.h"

extern "C" {

// `kernel_id` of weights.py. Of integers: the bits, and where they have one, what the steps are for.
enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4, INT8_GROUPS, INT4_CENTRED, INT5, INT5_CENTRED, INT6 };

struct Matrix {  // (rows, cols), with a bias (rows,) or none
    const void* weight;  // panels
    const void* scales;  // INT8: bf16 (rows,); other integers: f16 (panels, groups, 1 or 2, 16), see `Format`
    const void* bias;    // in the activations' type
    int32_t rows, cols, kind, unused;
};

}  // extern "C"

namespace {

constexpr int ROWS = WIDTH;  // of a panel
constexpr int GROUP = 32;    // inputs with weights that are together in a panel
constexpr int HALF = 16;     // inputs with the same step of the activations

// A row's integers b have a step each, or one for a group, or one for each half of it. The weight is (b − ZERO) · step, or
// b · step + offset where a group has an offset.
enum Steps { OF_ROW, OF_GROUP, OF_HALF };
template <int BITS_, Steps STEPS_, bool OFFSETS_>
struct Integers {
    static constexpr int BITS = BITS_, ZERO = OFFSETS_ ? 0 : 1 << (BITS_ - 1);
    static constexpr Steps STEPS = STEPS_;
    static constexpr bool OFFSETS = OFFSETS_;
    static constexpr int SCALES = OFFSETS_ || STEPS_ == OF_HALF ? 2 : STEPS_ == OF_GROUP ? 1 : 0;  // of a group
};
template <int KIND> struct Format;
template <> struct Format<INT8> : Integers<8, OF_ROW, false> {};
template <> struct Format<INT8_GROUPS> : Integers<8, OF_GROUP, false> {};
template <> struct Format<INT6> : Integers<6, OF_HALF, false> {};
template <> struct Format<INT5> : Integers<5, OF_GROUP, true> {};
template <> struct Format<INT5_CENTRED> : Integers<5, OF_GROUP, false> {};
template <> struct Format<INT4> : Integers<4, OF_GROUP, true> {};
template <> struct Format<INT4_CENTRED> : Integers<4, OF_GROUP, false> {};

constexpr bool is_integer(int kind) { return kind >= INT8; }
inline int groups_of(int cols) { return (cols + GROUP - 1) / GROUP; }

// --- activations, packed for a kind of weights -------------------------------------------------------------------

// Tokens that a panel is multiplied with at a time: as many sums as AVX-512 has registers for.
constexpr int block_of(int kind) { return is_integer(kind) ? 8 : 16; }

// Inputs of a block of M tokens, as many as fit or the rest, in units of 4 bytes: 1 float32, 2 bfloat16 or 4 bytes. Units of the
// same inputs are together, (units, M), and so are the steps and sums of integers; a block's start is that of its first token.
struct Packed {
    int num_tokens = 0, largest_block = 0;
    int stride = 0;  // units of a token, with zeros after its last input
    std::vector<int32_t> units;
    std::vector<float> steps, sums;        // of halves: the step of the bytes, and the sum of bytes · step
    std::vector<float> of_groups, totals;  // the same sums by group, and of all

    struct Place {
        int block, within, size;  // first token and size of a token's block
    };
    Place place(int token) const {
        const int block = token / largest_block * largest_block;
        return {block, token - block, std::min(largest_block, num_tokens - block)};
    }
};

constexpr int inputs_of_unit(int kind) { return kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 2 : 4; }

// Makes room for the inputs of some tokens, for weights of a kind; it only grows.
inline void make_room(Packed& packed, int kind, int num_tokens, int cols) {
    const auto grow = [](auto& values, size_t size) {
        if (values.size() < size) values.resize(size);
    };
    const int groups = groups_of(cols);
    packed.num_tokens = num_tokens, packed.largest_block = block_of(kind), packed.stride = groups * GROUP / inputs_of_unit(kind);
    grow(packed.units, size_t(num_tokens) * packed.stride);
    if (!is_integer(kind)) return;
    grow(packed.steps, size_t(num_tokens) * 2 * groups), grow(packed.sums, size_t(num_tokens) * 2 * groups);
    grow(packed.of_groups, size_t(num_tokens) * groups), grow(packed.totals, num_tokens);
}

// Returns the largest magnitude, no number if one of the values is none.
inline float peak_of(const floats& values) {
    const ints magnitudes = ints(values) & 0x7fffffff;  // in the order of the floats, with nan above all
#if defined(__AVX512F__)
    const int32_t most = _mm512_reduce_max_epi32(__m512i(magnitudes));
#else
    int32_t most = magnitudes[0];
    for (int i = 1; i < WIDTH; ++i) most = std::max(most, magnitudes[i]);
#endif
    return load<float>(&most);
}

inline int32_t sum_of_bytes(const int32_t* four) {
#if defined(__AVX2__)
    const __m128i raised = _mm_xor_si128(load<__m128i>(four), _mm_set1_epi8(-128));  // unsigned, 128 more each
    const __m128i sums = _mm_sad_epu8(raised, _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_cvtsi128_si32(_mm_srli_si128(sums, 8)) - HALF * 128;
#else
    const int8_t* bytes = reinterpret_cast<const int8_t*>(four);
    int32_t total = 0;
    for (int i = 0; i < HALF; ++i) total += bytes[i];
    return total;
#endif
}

inline void pack_integers(Packed& packed, const float* x, int token, int cols) {
    typedef int8_t bytes __attribute__((vector_size(WIDTH)));
    const int groups = groups_of(cols);
    const Packed::Place place = packed.place(token);
    int32_t* units = packed.units.data() + int64_t(place.block) * packed.stride + place.within;
    const int64_t first = int64_t(place.block) * 2 * groups + place.within;
    float *of_groups = &packed.of_groups[int64_t(place.block) * groups + place.within], total = 0;
    for (int half = 0; half < 2 * groups; ++half) {
        const floats values = some(x + half * HALF, std::max(cols - half * HALF, 0));
        const float peak = peak_of(values), factor = peak > 1e-30f ? 127.0f / peak : 0.0f;
        // Added to a number this large, a float's last bit is 1: the sum's low bits are the rounded integer.
        const ints fixed = ints(multiply_add(values, all(factor), all(12582912.0f))) - 0x4b400000;
        const bytes narrow = __builtin_convertvector(fixed, bytes);
        int32_t four[HALF / 4];
        std::memcpy(four, &narrow, HALF);
        for (int i = 0; i < HALF / 4; ++i) units[(half * HALF / 4 + i) * place.size] = four[i];
        const float step = peak / 127.0f, in_half = float(sum_of_bytes(four)) * step;
        packed.steps[first + half * place.size] = step, packed.sums[first + half * place.size] = in_half;
        float& of_group = of_groups[half / 2 * place.size];
        of_group = half % 2 ? of_group + in_half : in_half;
        total += in_half;
    }
    packed.totals[token] = total;
}

// Packs the (cols,) inputs of a token for weights of a kind.
inline void pack(Packed& packed, int kind, const float* x, int token, int cols) {
    if (is_integer(kind)) return pack_integers(packed, x, token, cols);
    const Packed::Place place = packed.place(token);
    int32_t* units = packed.units.data() + int64_t(place.block) * packed.stride + place.within;
    const int num = WIDTH / inputs_of_unit(kind);  // units of WIDTH inputs
    for (int i = 0; i < packed.stride / num; ++i, units += num * place.size) {
        const floats values = some(x + i * WIDTH, std::max(cols - i * WIDTH, 0));
        int32_t narrow[WIDTH];
        if (kind == FLOAT32)
            std::memcpy(narrow, &values, sizeof values);
        else
            store_some(values, WIDTH, reinterpret_cast<bf16*>(narrow));
        for (int unit = 0; unit < num; ++unit) units[unit * place.size] = narrow[unit];
    }
}

// Packs (tokens, cols). The result is the calling thread's, valid until it packs again.
inline const Packed& pack(int kind, const float* x, int num_tokens, int cols) {
    static thread_local Packed packed;
    make_room(packed, kind, num_tokens, cols);
    for (int token = 0; token < num_tokens; ++token) pack(packed, kind, x + int64_t(token) * cols, token, cols);
    return packed;
}

// Returns whether activations that are packed for one kind serve another.
inline bool pack_alike(int kind, int other) { return kind == other || (is_integer(kind) && is_integer(other)); }

}  // namespace
