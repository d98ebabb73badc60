// x Wᵀ for a few tokens: the weights are read once, in order, for all of them, at the speed of the memory.
//
// Weights are in panels of 16 rows (`weights.py`): a vector has the same few inputs of 16 rows, so that its lanes sum up
// 16 results and the inputs are broadcast. bfloat16 weights are multiplied with bfloat16 activations, integer weights with
// activations in 8 bits, a step for every 16 of a token: 0.16% of perplexity. Integer weights are unpacked once for up to 8
// tokens.
#pragma once

#include <utility>

#include <omp.h>

#include "packed.h"

namespace {

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
    sums = multiply_add(floats(weights << 16), all(load<float>(&first)), sums);
    return multiply_add(floats(weights & int32_t(0xffff0000)), all(load<float>(&second)), sums);
#endif
}

// --- panels ------------------------------------------------------------------------------------------------------
// Panels are read one by one, as a single stream from the first byte to the last: two streams at a time are much slower
// where panels are short.

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

// Compiled once for all that results are used for.
#define SEPARATE __attribute__((noinline))

// The results of a panel for M tokens from `token` on, without bias.
template <int M>
struct Results {
    floats values[M];
};

template <int KIND, int M>
SEPARATE Results<M> float_panel(const Matrix& w, const Packed& x, int panel, int token, const Ahead& ahead) {
    Results<M> sums = {};
    const int steps = (w.cols + inputs_of_unit(KIND) - 1) / inputs_of_unit(KIND);
    const char* from = static_cast<const char*>(w.weight) + int64_t(panel) * steps * 64;
    const int32_t* units = x.units.data() + int64_t(token) * x.stride;
    for (int k = 0; k < steps; ++k, from += 64, units += M) {
        ahead.prefetch_from(from);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            if constexpr (KIND == FLOAT32)
                sums.values[m] = multiply_add(load<floats>(from), all(load<float>(units + m)), sums.values[m]);
            else
                sums.values[m] = add_pair(sums.values[m], load<ints>(from), units[m]);
        }
    }
    return sums;
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
SEPARATE Results<M> integer_panel(const Matrix& w, const Packed& x, int panel, int token, const Ahead& ahead) {
    using F = Format<KIND>;
    Results<M> results = {};
    const int groups = groups_of(w.cols);
    const char* from = static_cast<const char*>(w.weight) + int64_t(panel) * groups * F::BITS * 64;
    const f16* scales = static_cast<const f16*>(w.scales) + int64_t(panel) * groups * F::SCALES * ROWS;
    const int32_t* units = x.units.data() + int64_t(token) * x.stride;
    const float* steps = x.steps.data() + int64_t(token) * 2 * groups;
    const float* in_halves = x.sums.data() + int64_t(token) * 2 * groups;
    const float* of_groups = x.of_groups.data() + int64_t(token) * groups;
    for (int g = 0; g < groups; ++g) {
        for (int i = 0; i < F::BITS; ++i) ahead.prefetch_from(from + 64 * i);
        if (F::SCALES) __builtin_prefetch(reinterpret_cast<const char*>(scales) + AHEAD * F::SCALES / (2 * F::BITS));
        floats products[M];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half, steps += M, in_halves += M) {
            ints sums[M] = {};
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k, units += M) {
                const ints weights = four_inputs<F::BITS>(from, 4 * half + k);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) sums[m] = add_bytes(sums[m], weights, units[m]);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const floats whole = __builtin_convertvector(sums[m], floats), step = all(steps[m]);
                if constexpr (F::STEPS == OF_ROW) {
                    results.values[m] = multiply_add(whole, step, results.values[m]);
                } else if constexpr (F::STEPS == OF_HALF) {
                    const floats product = multiply_add(all(-float(F::ZERO)), all(in_halves[m]), whole * step);
                    results.values[m] = multiply_add(product, wide(scales + half * ROWS), results.values[m]);
                } else {
                    products[m] = half ? multiply_add(whole, step, products[m]) : whole * step;
                }
            }
        }
        if constexpr (F::STEPS == OF_GROUP) {
            const floats step = wide(scales), offset = F::OFFSETS ? wide(scales + ROWS) : step * -float(F::ZERO);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
                results.values[m] =
                    multiply_add(offset, all(of_groups[m]), multiply_add(products[m], step, results.values[m]));
        }
        from += F::BITS * 64, scales += F::SCALES * ROWS, of_groups += M;
    }
    if constexpr (F::STEPS == OF_ROW) {
        const floats step = wide(static_cast<const bf16*>(w.scales) + int64_t(panel) * ROWS), zero = all(-float(F::ZERO));
        for (int m = 0; m < M; ++m)
            results.values[m] = multiply_add(zero, all(x.totals[token + m]), results.values[m]) * step;
    }
    return results;
}

// What is done to results at once: an activation, or a product or sum with others of the same shape.
enum Then : int32_t { NOTHING = -1, THEN_LAST_ACTIVATION = RELU2, TIMES, PLUS };

// Where results go, rounded to the activations' type A: `to` has `stride` values of type T a token.
template <class A, class T>
struct Output {
    T* to;
    int64_t stride;
    Then then = NOTHING;
    const A* other = nullptr;

    void put(floats values, const Matrix& w, int token, int row) const {
        const int num = std::min(ROWS, w.rows - row);
        const int64_t at = token * stride + row;
        if (w.bias) values += some(static_cast<const A*>(w.bias) + row, num);
        values = rounded<A>(values);
        if (then == TIMES) values *= some(other + at, num);
        if (then == PLUS) values += some(other + at, num);
        if (then >= 0 && then <= THEN_LAST_ACTIVATION) values = activated(then, values);
        if (then != NOTHING) values = rounded<A>(values);
        store_some(values, num, to + at);
    }
};

// Multiplies panels with a block of M tokens.
template <int KIND, int M, class Out>
void panels_of(const Matrix& w, const Packed& x, int begin, int end, int token, const Out& out, const Ahead& ahead) {
    for (int panel = begin; panel < end; ++panel) {
        Results<M> results;
        if constexpr (KIND >= INT8)
            results = integer_panel<KIND, M>(w, x, panel, token, ahead);
        else
            results = float_panel<KIND, M>(w, x, panel, token, ahead);
        for (int m = 0; m < M; ++m) out.put(results.values[m], w, token + m, panel * ROWS);
    }
}

// Returns `panels_of` for a number of tokens.
template <int KIND, class Out, int... LESS>
auto panels_of_block(int num, std::integer_sequence<int, LESS...>) {
    using Panels = void (*)(const Matrix&, const Packed&, int, int, int, const Out&, const Ahead&);
    static constexpr Panels by_number[] = {panels_of<KIND, LESS + 1, Out>...};
    return by_number[num - 1];
}

struct Range {
    int begin, end;
};

// Multiplies some panels with all tokens; a panel stays in the nearest cache while further tokens need it.
template <int KIND, class Out>
void multiply(const Matrix& w, const Packed& x, int num_tokens, const Out& out, Range own, const Ahead& ahead) {
    constexpr int most = block_of(KIND);
    const int many = num_tokens <= most ? std::max(own.end - own.begin, 1) : 1;
    for (int panel = own.begin; panel < own.end; panel += many)
        for (int token = 0; token < num_tokens; token += most)
            panels_of_block<KIND, Out>(std::min(num_tokens - token, most), std::make_integer_sequence<int, most>())(
                w, x, panel, std::min(panel + many, own.end), token, out, ahead);
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

// Computes x Wᵀ + b. Every thread of the team computes some rows, which it returns; no barrier.
// `next`: the linear layer that is read next, if that is known.
template <class Out>
Range multiply(const Matrix& w, const Packed& x, int num_tokens, const Out& out, const Matrix* next = nullptr) {
    const Range own = panels_of_thread(w);
    const char* end = panel_at(w, own.end);
    const Ahead ahead{end, next ? panel_at(*next, panels_of_thread(*next).begin) - end : 0};
    using Multiply = void (*)(const Matrix&, const Packed&, int, const Out&, Range, const Ahead&);
    static constexpr Multiply by_kind[] = {multiply<FLOAT32, Out>, multiply<BFLOAT16, Out>, multiply<INT8, Out>,
                                           multiply<INT4, Out>, multiply<INT8_GROUPS, Out>, multiply<INT4_CENTRED, Out>,
                                           multiply<INT5, Out>, multiply<INT5_CENTRED, Out>, multiply<INT6, Out>};
    by_kind[w.kind](w, x, num_tokens, out, own, ahead);
    return {own.begin * ROWS, std::min(own.end * ROWS, w.rows)};
}

// The same as (tokens, rows) floats, rounded to A.
template <class A>
Range product(const Matrix& w, const Packed& x, int num_tokens, float* out, const Matrix* next = nullptr) {
    return multiply(w, x, num_tokens, Output<A, float>{out, w.rows}, next);
}

}  // namespace
