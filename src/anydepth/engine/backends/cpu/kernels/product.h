// x Wᵀ for a few tokens: the weights are read once, in order, for all of them, at the speed of the memory.
//
// Weights are in panels of 16 rows (`weights.py`): a vector has the same few inputs of 16 rows, so that its lanes sum up
// 16 results and the inputs are broadcast. bfloat16 weights are multiplied with bfloat16 activations, integer weights with
// activations in 8 bits, a step for every 16 of a token: 0.1% of perplexity. Integer weights are unpacked once for up to 8
// tokens.
#pragma once

#include <algorithm>
#include <vector>

#include <omp.h>

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

inline bool is_integer(int kind) { return kind >= INT8; }
inline int groups_of(int cols) { return (cols + GROUP - 1) / GROUP; }

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
    std::vector<float> floats;   // FLOAT32
    std::vector<bf16> bf16s;     // BFLOAT16
    std::vector<int8_t> bytes;   // integers, times their step
    std::vector<float> steps;    // (tokens, halves)
    std::vector<float> sums;     // (tokens, halves) of bytes · step
    std::vector<float> of_groups, totals;  // the same by group, (tokens, groups), and of a token, (tokens,)
};

// Returns the vector of inputs from `i` on, zeros after the last.
inline floats inputs_at(const float* x, int i, int cols) {
    if (i + WIDTH <= cols) return wide(x + i);
    floats some = {};
    if (i < cols) std::memcpy(&some, x + i, (cols - i) * sizeof(float));
    return some;
}

inline void pack_bytes(Packed& packed, const float* x, int token, int cols) {
    typedef int8_t bytes __attribute__((vector_size(WIDTH)));
    const int groups = packed.stride / GROUP;
    int8_t* to = packed.bytes.data() + int64_t(token) * packed.stride;
    float *steps = &packed.steps[int64_t(token) * 2 * groups], *sums = &packed.sums[int64_t(token) * 2 * groups];
    float *of_groups = &packed.of_groups[int64_t(token) * groups], total = 0;
    for (int half = 0; half < 2 * groups; ++half) {
        const floats values = inputs_at(x, half * HALF, cols);
        const float peak = largest(values < 0.0f ? -values : values), factor = peak > 1e-30f ? 127.0f / peak : 0.0f;
        // Added to a number this large, a float's last bit is 1: the sum's low bits are the rounded integer.
        const ints fixed = ints(values * factor + 12582912.0f) - 0x4b400000;
        const bytes narrow = __builtin_convertvector(fixed, bytes);
        std::memcpy(to + half * HALF, &narrow, HALF);
        steps[half] = peak / 127.0f + 0.0f * sum(values);  // no number if one of the inputs is none
        sums[half] = sum(__builtin_convertvector(fixed, floats)) * steps[half];
        of_groups[half / 2] = half % 2 ? of_groups[half / 2] + sums[half] : sums[half];
        total += sums[half];
    }
    packed.totals[token] = total;
}

// Packs (tokens, cols) for weights of this kind. The result is the calling thread's, valid until it packs again.
inline const Packed& pack(int kind, const float* x, int num_tokens, int cols) {
    static thread_local Packed packed;
    packed.stride = groups_of(cols) * GROUP;
    const size_t size = size_t(num_tokens) * packed.stride;
    if (kind == FLOAT32) {
        packed.floats.resize(size);
    } else if (kind == BFLOAT16) {
        packed.bf16s.assign(size, {});
    } else {
        packed.bytes.resize(size), packed.steps.resize(size / HALF), packed.sums.resize(size / HALF);
        packed.of_groups.resize(size / GROUP), packed.totals.resize(num_tokens);
    }
    for (int token = 0; token < num_tokens; ++token, x += cols) {
        const int64_t start = int64_t(token) * packed.stride;
        if (kind == FLOAT32) {
            std::memcpy(packed.floats.data() + start, x, cols * sizeof(float));
        } else if (kind == BFLOAT16) {
            for (int i = 0; i < cols; ++i) store(x[i], packed.bf16s.data() + start + i);
        } else {
            pack_bytes(packed, x, token, cols);
        }
    }
    return packed;
}

// Returns whether activations that are packed for one kind serve another.
inline bool pack_alike(int kind, int other) { return kind == other || (is_integer(kind) && is_integer(other)); }

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

// Returns four inputs 4k … 4k + 3 of a group, a byte each, of 16 rows. `from`: eight vectors of bytes; or four with the low
// halves of two such vectors each, then the higher bits: of all eight in a vector, or of four in each of two.
template <int BITS>
inline ints four_inputs(const char* from, int k) {
    if constexpr (BITS == 8) return load<ints>(from + 64 * k);
    const ints both = load<ints>(from + k / 2 * 64), low = (k % 2 ? both >> 4 : both) & 0x0f0f0f0f;
    if constexpr (BITS == 4) return low;
    const ints high = load<ints>(from + 64 * (BITS == 5 ? 4 : 4 + k / 4));
    const int shift = 4 - (BITS == 5 ? k : 2 * (k % 4));
    return low | ((shift > 0 ? high << shift : high >> -shift) & (BITS == 5 ? 0x10101010 : 0x30303030));
}

template <int KIND, int M>
inline Results<M> integer_panel(const Matrix& w, const Packed& x, int panel, int token, const Ahead& ahead) {
    using F = Format<KIND>;
    Results<M> results = {};
    const int groups = groups_of(w.cols);
    const char* from = static_cast<const char*>(w.weight) + int64_t(panel) * groups * F::BITS * 64;
    const f16* scales = static_cast<const f16*>(w.scales) + int64_t(panel) * groups * F::SCALES * ROWS;
    const int8_t* inputs = x.bytes.data() + int64_t(token) * x.stride;
    const float* steps = x.steps.data() + int64_t(token) * 2 * groups;
    const float* in_halves = x.sums.data() + int64_t(token) * 2 * groups;
    for (int g = 0; g < groups; ++g, from += F::BITS * 64, scales += F::SCALES * ROWS) {
        for (int i = 0; i < F::BITS; ++i) ahead.prefetch_from(from + 64 * i);
        if (F::SCALES) __builtin_prefetch(reinterpret_cast<const char*>(scales) + AHEAD * F::SCALES / (2 * F::BITS));
        floats products[M];
        for (int half = 0; half < 2; ++half) {
            ints sums[M] = {};
            for (int k = 4 * half; k < 4 * half + 4; ++k) {
                const ints weights = four_inputs<F::BITS>(from, k);
                for (int m = 0; m < M; ++m)
                    sums[m] = add_bytes(sums[m], weights, load<int32_t>(inputs + int64_t(m) * x.stride + g * GROUP + 4 * k));
            }
            for (int m = 0; m < M; ++m) {
                const int64_t place = int64_t(m) * 2 * groups + 2 * g + half;
                const floats whole = __builtin_convertvector(sums[m], floats), step = floats{} + steps[place];
                if constexpr (F::STEPS == OF_ROW) {
                    results.values[m] = multiply_add(whole, step, results.values[m]);
                } else if constexpr (F::STEPS == OF_HALF) {
                    const floats product = multiply_add(floats{} - float(F::ZERO), floats{} + in_halves[place], whole * step);
                    results.values[m] = multiply_add(product, wide(scales + half * ROWS), results.values[m]);
                } else {
                    products[m] = half ? multiply_add(whole, step, products[m]) : whole * step;
                }
            }
        }
        if constexpr (F::STEPS == OF_GROUP) {
            const floats step = wide(scales), offset = F::OFFSETS ? wide(scales + ROWS) : step * -float(F::ZERO);
            for (int m = 0; m < M; ++m) {
                const floats sum = floats{} + x.of_groups[int64_t(token + m) * groups + g];
                results.values[m] = multiply_add(offset, sum, multiply_add(products[m], step, results.values[m]));
            }
        }
    }
    if constexpr (F::STEPS == OF_ROW) {
        const floats step = wide(static_cast<const bf16*>(w.scales) + int64_t(panel) * ROWS), zero = floats{} - float(F::ZERO);
        for (int m = 0; m < M; ++m)
            results.values[m] = multiply_add(zero, floats{} + x.totals[token + m], results.values[m]) * step;
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
        if constexpr (KIND >= INT8) results = integer_panel<KIND, M>(w, x, panel, token, ahead);
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
    static constexpr int vectors[] = {32, 16, 8, 4, 8, 4, 5, 5, 6};  // of a group, by kind
    const int64_t size = is_integer(w.kind) ? groups_of(w.cols) * vectors[w.kind] : w.kind == FLOAT32 ? w.cols : (w.cols + 1) / 2;
    return static_cast<const char*>(w.weight) + panel * size * 64;
}

// Computes (tokens, rows) of x Wᵀ + b. Every thread of the team computes some rows, which it returns; no barrier.
// `next`: the linear layer that is read next, if that is known.
template <class A>
Range product(const Matrix& w, const Packed& x, int num_tokens, float* out, const Matrix* next = nullptr) {
    const Range own = panels_of_thread(w);
    const char* end = panel_at(w, own.end);
    const Ahead ahead{end, next ? panel_at(*next, panels_of_thread(*next).begin) - end : 0};
    using Multiply = void (*)(const Matrix&, const Packed&, int, float*, Range, const Ahead&);
    static constexpr Multiply by_kind[] = {multiply<FLOAT32>, multiply<BFLOAT16>, multiply<INT8>, multiply<INT4>,
                                           multiply<INT8_GROUPS>, multiply<INT4_CENTRED>, multiply<INT5>,
                                           multiply<INT5_CENTRED>, multiply<INT6>};
    by_kind[w.kind](w, x, num_tokens, out, own, ahead);
    const Range rows{own.begin * ROWS, std::min(own.end * ROWS, w.rows)};
    const A* bias = static_cast<const A*>(w.bias);
    for (int token = 0; token < num_tokens; ++token) {
        float* to = out + int64_t(token) * w.rows;
        for (int row = rows.begin; row < rows.end; ++row) to[row] = rounded<A>(bias ? to[row] + one(bias[row]) : to[row]);
    }
    return rows;
}

}  // namespace
