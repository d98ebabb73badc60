// x Wᵀ for a few tokens: the weights are read once, in order, for all of them, at the speed of the memory.
//
// Weights are in panels of 16 rows (`weights.py`): a vector has the same few inputs of 16 rows, so that its lanes sum up
// 16 results and the inputs are broadcast. bfloat16 weights are multiplied with bfloat16 activations, int8 and int4 with
// activations in 16-bit fixed point, a scale for each token, as two bytes: the error is below that of rounding the result
// to bfloat16.
#pragma once

#include <algorithm>
#include <vector>

#include <omp.h>

#include "numbers.h"

extern "C" {

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };  // `kernel_id` of weights.py

struct Matrix {  // (rows, cols), with a bias (rows,) or none
    const void* weight;  // panels
    const void* scales;  // INT8: bf16 (rows,); INT4: bf16 (panels, cols / 32, 2, 16), steps and offsets
    const void* bias;    // in the activations' type
    int32_t rows, cols, kind, unused;
};

}  // extern "C"

namespace {

constexpr int ROWS = WIDTH;  // of a panel
constexpr int GROUP = 32;    // inputs of INT4 with the same step and offset

// How many bytes before their use weights are prefetched: the processor's own prefetching stops at page bounds, with which
// two cores read at two thirds of the memory's speed. Measured: 2 KiB is too little, 4 to 9 KiB are equally fast.
constexpr int AHEAD = 6144;

// --- steps: 64 bytes of weights, 16 rows × a few inputs ----------------------------------------------------------

// Returns sums of products of neighbouring 16-bit halves.
inline ints add_halves(ints a, ints b) {
#if defined(__AVX512BW__)
    return ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    ints sums;
    for (int half = 0; half < 2; ++half) {
        const char* x = reinterpret_cast<const char*>(&a) + 32 * half;
        const char* y = reinterpret_cast<const char*>(&b) + 32 * half;
        const __m256i products = _mm256_madd_epi16(load<__m256i>(x), load<__m256i>(y));
        std::memcpy(reinterpret_cast<char*>(&sums) + 32 * half, &products, 32);
    }
    return sums;
#else
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Lanes have four unsigned bytes, `x` four signed ones.
inline ints add_bytes(ints sums, ints weights, int32_t x) {
#if defined(__AVX512VNNI__)
    return ints(_mm512_dpbusd_epi32(__m512i(sums), __m512i(weights), _mm512_set1_epi32(x)));
#else
    const auto halves = [x](int first) {
        return ints{} + int32_t((int8_t(x >> 8 * first) & 0xffff) | (int8_t(x >> 8 * (first + 2)) << 16));
    };
    return sums + add_halves(weights & 0x00ff00ff, halves(0)) + add_halves((weights >> 8) & 0x00ff00ff, halves(1));
#endif
}

// Lanes have two bfloat16, `x` two more.
inline floats add_pair(floats sums, ints weights, int32_t x) {
#if defined(__AVX512BF16__)
    return floats(_mm512_dpbf16_ps(__m512(sums), __m512bh(weights), __m512bh(_mm512_set1_epi32(x))));
#else
    const int32_t first = x << 16, second = x & int32_t(0xffff0000);
    return sums + floats(weights << 16) * load<float>(&first) + floats(weights & int32_t(0xffff0000)) * load<float>(&second);
#endif
}

// --- activations, packed for a kind of weights -------------------------------------------------------------------

// (tokens, stride) each; zeros after the last input of a token.
struct Packed {
    int stride = 0;
    std::vector<float> floats;       // FLOAT32
    std::vector<bf16> bf16s;         // BFLOAT16
    std::vector<int8_t> high, low;   // INT8, INT4: 256 · high + low, times the token's scale
    std::vector<float> scales;
    std::vector<int32_t> sums_high, sums_low;  // INT8: of all inputs, (tokens,)
    std::vector<float> group_sums;             // INT4: (tokens, groups)
};

// Returns the vector of inputs from `i` on, zeros after the last.
inline floats inputs_at(const float* x, int i, int cols) {
    if (i + WIDTH <= cols) return wide(x + i);
    floats some = {};
    std::memcpy(&some, x + i, (cols - i) * sizeof(float));
    return some;
}

inline void pack_bytes(Packed& packed, const float* x, int token, int cols, int kind) {
    typedef int8_t bytes __attribute__((vector_size(WIDTH)));
    floats peaks = {};
    for (int i = 0; i < cols; i += WIDTH) {
        const floats values = inputs_at(x, i, cols), sizes = values < 0.0f ? -values : values;
        peaks = sizes > peaks ? sizes : peaks;
    }
    float largest = 1e-30f;
    for (int i = 0; i < WIDTH; ++i) largest = std::max(largest, peaks[i]);
    const float limit = 32512.0f, factor = limit / largest;  // 127 · 256: the high byte fits
    packed.scales[token] = largest / limit;
    int8_t* high = packed.high.data() + int64_t(token) * packed.stride;
    int8_t* low = packed.low.data() + int64_t(token) * packed.stride;
    ints sums_high = {}, sums_low = {};
    for (int i = 0; i < cols; i += WIDTH) {
        // Added to a number this large, a float's last bit is 1: the sum's low bits are the rounded integer.
        const ints fixed = ints(inputs_at(x, i, cols) * factor + 12582912.0f) - 0x4b400000;
        const ints lows = fixed << 24 >> 24, highs = (fixed - lows) >> 8;
        sums_high += highs, sums_low += lows;
        const bytes high_bytes = __builtin_convertvector(highs, bytes), low_bytes = __builtin_convertvector(lows, bytes);
        std::memcpy(high + i, &high_bytes, WIDTH), std::memcpy(low + i, &low_bytes, WIDTH);
        if (kind == INT4 && i % GROUP) {
            const ints whole = 256 * sums_high + sums_low;
            int32_t sum = 0;
            for (int k = 0; k < WIDTH; ++k) sum += whole[k];
            packed.group_sums[int64_t(token) * (cols / GROUP) + i / GROUP] = float(sum) * packed.scales[token];
            sums_high = sums_low = ints{};
        }
    }
    int32_t high_sum = 0, low_sum = 0;
    for (int k = 0; k < WIDTH; ++k) high_sum += sums_high[k], low_sum += sums_low[k];
    packed.sums_high[token] = high_sum, packed.sums_low[token] = low_sum;
}

// Packs (tokens, cols) for weights of this kind. The result is the calling thread's, valid until it packs again.
inline const Packed& pack(int kind, const float* x, int num_tokens, int cols) {
    static thread_local Packed packed;
    packed.stride = (cols + WIDTH - 1) / WIDTH * WIDTH;
    const size_t size = size_t(num_tokens) * packed.stride;
    if (kind == FLOAT32) {
        packed.floats.resize(size);
    } else if (kind == BFLOAT16) {
        packed.bf16s.assign(size, {});
    } else {
        packed.high.assign(size, 0), packed.low.assign(size, 0);
        packed.scales.resize(num_tokens), packed.sums_high.resize(num_tokens), packed.sums_low.resize(num_tokens);
        packed.group_sums.resize(size_t(num_tokens) * (cols / GROUP));
    }
    for (int token = 0; token < num_tokens; ++token, x += cols) {
        const int64_t start = int64_t(token) * packed.stride;
        if (kind == FLOAT32) {
            std::memcpy(packed.floats.data() + start, x, cols * sizeof(float));
        } else if (kind == BFLOAT16) {
            for (int i = 0; i < cols; ++i) store(x[i], packed.bf16s.data() + start + i);
        } else {
            pack_bytes(packed, x, token, cols, kind);
        }
    }
    return packed;
}

// --- panels ------------------------------------------------------------------------------------------------------
// Panels are read one by one, as a single stream from the first byte to the last: two streams at a time are much slower
// where panels are short. Neighbouring steps have sums of their own, or each would wait for the one before it.

// Prefetches weights while others are read: later ones of the thread's own panels and, after their end, those that it reads
// next, or memory would be idle while threads wait for each other.
struct Ahead {
    const char* end;
    int64_t jump;  // from there to what is read next
    void prefetch_from(const char* at) const {
        at += AHEAD;
        __builtin_prefetch(at < end ? at : at + jump);
    }
};

template <int CHAINS, class Step>
inline __attribute__((always_inline)) void in_chains(int steps, Step step) {
    int k = 0;
    for (; k + CHAINS <= steps; k += CHAINS)
        for (int chain = 0; chain < CHAINS; ++chain) step(k + chain, chain);  // unrolled, or sums would be in memory
    for (; k < steps; ++k) step(k, 0);
}

// The results of a panel for M tokens from `token` on, without bias.
template <int M>
struct Results {
    floats values[M];
};

template <int M>
inline Results<M> float32_panel(const Matrix& w, const Packed& x, int panel, int token, const Ahead& ahead) {
    floats sums[2][M] = {};
    const float* from = static_cast<const float*>(w.weight) + int64_t(panel) * w.cols * ROWS;
    const float* inputs = x.floats.data() + int64_t(token) * x.stride;
    in_chains<2>(w.cols, [&](int k, int chain) __attribute__((always_inline)) {
        const float* step = from + int64_t(k) * ROWS;
        ahead.prefetch_from(reinterpret_cast<const char*>(step));
        for (int m = 0; m < M; ++m) sums[chain][m] += wide(step) * inputs[int64_t(m) * x.stride + k];
    });
    Results<M> results;
    for (int m = 0; m < M; ++m) results.values[m] = sums[0][m] + sums[1][m];
    return results;
}

template <int M>
inline Results<M> bfloat16_panel(const Matrix& w, const Packed& x, int panel, int token, const Ahead& ahead) {
    floats sums[2][M] = {};
    const int steps = (w.cols + 1) / 2;
    const char* from = static_cast<const char*>(w.weight) + int64_t(panel) * steps * 64;
    const bf16* inputs = x.bf16s.data() + int64_t(token) * x.stride;
    in_chains<2>(steps, [&](int k, int chain) __attribute__((always_inline)) {
        const char* step = from + int64_t(k) * 64;
        ahead.prefetch_from(step);
        const ints weights = load<ints>(step);
        for (int m = 0; m < M; ++m)
            sums[chain][m] = add_pair(sums[chain][m], weights, load<int32_t>(inputs + int64_t(m) * x.stride + 2 * k));
    });
    Results<M> results;
    for (int m = 0; m < M; ++m) results.values[m] = sums[0][m] + sums[1][m];
    return results;
}

// A byte b is the weight (b − 128) · scale.
template <int M>
inline Results<M> int8_panel(const Matrix& w, const Packed& x, int panel, int token, const Ahead& ahead) {
    constexpr int CHAINS = M <= 4 ? 2 : 1;  // many tokens are enough chains
    ints high[CHAINS][M] = {}, low[CHAINS][M] = {};
    const int steps = (w.cols + 3) / 4;
    const char* from = static_cast<const char*>(w.weight) + int64_t(panel) * steps * 64;
    const bf16* scales = static_cast<const bf16*>(w.scales) + int64_t(panel) * ROWS;
    __builtin_prefetch(scales + 2 * ROWS);
    const int64_t start = int64_t(token) * x.stride;
    in_chains<CHAINS>(steps, [&](int k, int chain) __attribute__((always_inline)) {
        const char* step = from + int64_t(k) * 64;
        ahead.prefetch_from(step);
        const ints weights = load<ints>(step);
        for (int m = 0; m < M; ++m) {
            const int64_t input = start + int64_t(m) * x.stride + 4 * k;
            high[chain][m] = add_bytes(high[chain][m], weights, load<int32_t>(x.high.data() + input));
            low[chain][m] = add_bytes(low[chain][m], weights, load<int32_t>(x.low.data() + input));
        }
    });
    Results<M> results;
    for (int m = 0; m < M; ++m) {
        for (int chain = 1; chain < CHAINS; ++chain) high[0][m] += high[chain][m], low[0][m] += low[chain][m];
        const floats highs = __builtin_convertvector(high[0][m] - 128 * x.sums_high[token + m], floats);
        const floats lows = __builtin_convertvector(low[0][m] - 128 * x.sums_low[token + m], floats);
        results.values[m] = (highs * 256.0f + lows) * wide(scales) * x.scales[token + m];
    }
    return results;
}

// A byte of step c has input 8c + i % 4 of a group in its low half and 8c + 4 + i % 4 in its high one; a half s is the
// weight (s − 8) · step + offset.
template <int M>
inline Results<M> int4_panel(const Matrix& w, const Packed& x, int panel, int token, const Ahead& ahead) {
    Results<M> results = {};
    constexpr int STEPS = GROUP / 8, BYTES = STEPS * 64;
    const int groups = w.cols / GROUP;
    for (int g = 0; g < groups; ++g) {
        const int64_t group = int64_t(panel) * groups + g;
        const char* from = static_cast<const char*>(w.weight) + group * BYTES;
        const bf16* scales = static_cast<const bf16*>(w.scales) + group * 2 * ROWS;
        __builtin_prefetch(reinterpret_cast<const char*>(scales) + AHEAD / 4);
        ints high[M] = {}, low[M] = {};
        for (int c = 0; c < STEPS; ++c) {
            ahead.prefetch_from(from + c * 64);
            const ints both = load<ints>(from + c * 64);
            const ints halves[] = {both & 0x0f0f0f0f, (both >> 4) & 0x0f0f0f0f};
            for (int m = 0; m < M; ++m)
                for (int h = 0; h < 2; ++h) {
                    const int64_t input = int64_t(token + m) * x.stride + g * GROUP + 8 * c + 4 * h;
                    high[m] = add_bytes(high[m], halves[h], load<int32_t>(x.high.data() + input));
                    low[m] = add_bytes(low[m], halves[h], load<int32_t>(x.low.data() + input));
                }
        }
        const floats step = wide(scales), offset = wide(scales + ROWS) - 8.0f * step;
        for (int m = 0; m < M; ++m) {
            const floats sums = __builtin_convertvector(high[m] * 256 + low[m], floats) * x.scales[token + m];
            results.values[m] += sums * step + offset * x.group_sums[int64_t(token + m) * groups + g];
        }
    }
    return results;
}

// Multiplies panels with M tokens at a time: as many sums as there are registers for.
template <int KIND, int M>
void panels_of(const Matrix& w, const Packed& x, int begin, int end, int token, float* out, const Ahead& ahead) {
    for (int panel = begin; panel < end; ++panel) {
        Results<M> results;
        if constexpr (KIND == FLOAT32) results = float32_panel<M>(w, x, panel, token, ahead);
        if constexpr (KIND == BFLOAT16) results = bfloat16_panel<M>(w, x, panel, token, ahead);
        if constexpr (KIND == INT8) results = int8_panel<M>(w, x, panel, token, ahead);
        if constexpr (KIND == INT4) results = int4_panel<M>(w, x, panel, token, ahead);
        const int row = panel * ROWS, rows = std::min(ROWS, w.rows - row);
        for (int m = 0; m < M; ++m)
            std::memcpy(out + int64_t(token + m) * w.rows + row, &results.values[m], rows * sizeof(float));
    }
}

struct Range {
    int begin, end;
};

// Multiplies some panels with all tokens; a panel stays in the nearest cache while further tokens need it.
template <int KIND>
void multiply(const Matrix& w, const Packed& x, int num_tokens, float* out, Range own, const Ahead& ahead) {
    using Panels = void (*)(const Matrix&, const Packed&, int, int, int, float*, const Ahead&);
    static constexpr Panels panels[] = {panels_of<KIND, 1>, panels_of<KIND, 2>, panels_of<KIND, 3>, panels_of<KIND, 4>,
                                        panels_of<KIND, 5>, panels_of<KIND, 6>, panels_of<KIND, 7>, panels_of<KIND, 8>};
    const int some = num_tokens <= 8 ? std::max(own.end - own.begin, 1) : 1;
    for (int panel = own.begin; panel < own.end; panel += some)
        for (int token = 0; token < num_tokens; token += 8)
            panels[std::min(num_tokens - token, 8) - 1](w, x, panel, std::min(panel + some, own.end), token, out, ahead);
}

// Returns the panels of this thread.
inline Range panels_of_thread(const Matrix& w) {
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t panels = (w.rows + ROWS - 1) / ROWS;
    return {int(panels * me / threads), int(panels * (me + 1) / threads)};
}

inline const char* panel_at(const Matrix& w, int panel) {
    const int inputs = w.kind == FLOAT32 ? 1 : w.kind == BFLOAT16 ? 2 : w.kind == INT8 ? 4 : 8;  // in 64 bytes
    return static_cast<const char*>(w.weight) + int64_t(panel) * ((w.cols + inputs - 1) / inputs) * 64;
}

// Computes (tokens, rows) of x Wᵀ + b. Every thread of the team computes some rows, which it returns; no barrier.
// `next`: the linear layer that is read next, if that is known.
template <class A>
Range product(const Matrix& w, const Packed& x, int num_tokens, float* out, const Matrix* next = nullptr) {
    const Range own = panels_of_thread(w);
    const char* end = panel_at(w, own.end);
    const Ahead ahead{end, next ? panel_at(*next, panels_of_thread(*next).begin) - end : 0};
    switch (w.kind) {
        case FLOAT32: multiply<FLOAT32>(w, x, num_tokens, out, own, ahead); break;
        case BFLOAT16: multiply<BFLOAT16>(w, x, num_tokens, out, own, ahead); break;
        case INT8: multiply<INT8>(w, x, num_tokens, out, own, ahead); break;
        default: multiply<INT4>(w, x, num_tokens, out, own, ahead);
    }
    const Range rows{own.begin * ROWS, std::min(own.end * ROWS, w.rows)};
    const A* bias = static_cast<const A*>(w.bias);
    for (int token = 0; token < num_tokens; ++token) {
        float* to = out + int64_t(token) * w.rows;
        for (int row = rows.begin; row < rows.end; ++row) to[row] = rounded<A>(bias ? to[row] + one(bias[row]) : to[row]);
    }
    return rows;
}

}  // namespace
