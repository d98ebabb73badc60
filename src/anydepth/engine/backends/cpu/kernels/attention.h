// Attention of a few queries over a long cache, cut into chunks for the threads: each chunk has its largest score, the sum
// of its weights and the weighted sum of its values, which are joined afterwards.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

constexpr int CHUNK = 64;  // keys that stay in the nearest cache for all queries that share them
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_SPLITS = 16;
constexpr int PARTS = 8;  // more than enough for the threads of a few cores, with several heads of keys

// The keys that some tokens of a row see, cut into parts for the threads of the team. The cuts are at fixed positions,
// whichever other rows are in the batch and however many threads there are: a token's sums have the same bits alone, on a
// busy machine, with other rows and among several tokens of its own (except for the tokens of a pass in which the size
// doubles).
struct Parts {
    int64_t start, all, size;  // first and end of the keys that are read; keys of a part
    int num;

    // `first`, `last`: keys that the first and the last of the tokens see. `window`: 0 for none.
    Parts(int64_t first, int64_t last, int64_t window) : all(last), size(CHUNK) {
        start = window ? std::max<int64_t>(0, first - window) / CHUNK * CHUNK : 0;
        const int64_t wide = window ? std::min(last, window + CHUNK) : last;
        while (wide > PARTS * size) size *= 2;
        num = int((all + size - 1) / size - start / size);
    }
    int64_t begin(int part) const { return std::max(start, (start / size + part) * size); }
    int64_t end(int part) const { return std::min(all, (start / size + part + 1) * size); }
};

struct Heads {
    int size, heads, group;  // dimension; all; those that partial keys
    int64_t window;          // the last tokens that a token sees, itself included; 0 for all
    float scale, softcap;
};

// Attention of a query over some keys, before it is divided by the total weight.
struct Partial {
    float largest, total;
    float values[MAX_HEAD_DIM];
};

// Returns a vector whose lane k is the sum of the lanes of `of`[k].
inline __attribute__((always_inline)) floats sums(floats of[WIDTH]) {
#if defined(__AVX512F__)
    // Half of the lanes that differ in `distance` come from one vector and half from the other; the rest is swapped in.
    const auto merge = [&](int distance, __mmask16 odd, auto swap) __attribute__((always_inline)) {
        for (int k = 0; k < WIDTH / 2 / distance; ++k) {
            const __m512 a = __m512(of[2 * k]), b = __m512(of[2 * k + 1]);
            of[k] = floats(_mm512_mask_blend_ps(odd, a, b)) + floats(swap(_mm512_mask_blend_ps(odd, b, a)));
        }
    };
    merge(1, 0xaaaa, [](__m512 x) { return _mm512_permute_ps(x, 0xb1); });
    merge(2, 0xcccc, [](__m512 x) { return _mm512_permute_ps(x, 0x4e); });
    merge(4, 0xf0f0, [](__m512 x) { return _mm512_shuffle_f32x4(x, x, 0xb1); });
    merge(8, 0xff00, [](__m512 x) { return _mm512_shuffle_f32x4(x, x, 0x4e); });
    return of[0];
#else
    floats result;
    for (int k = 0; k < WIDTH; ++k) result[k] = sum(of[k]);
    return result;
#endif
}

// Returns WIDTH values from index `i` on of a row of `size`, zeros after its end.
template <class A>
inline __attribute__((always_inline)) floats part_of(const A* row, int i, int size) {
    if (i + WIDTH <= size) return wide(row + i);
    floats values = {};
    for (int j = i; j < size; ++j) values[j - i] = one(row[j]);
    return values;
}

// Prefetches memory that is needed soon; in small pieces, or the processor waits for all of it.
template <class A>
inline __attribute__((always_inline)) void prefetch(const A* from, int size) {
    for (int i = 0; i < size; i += 64 / int(sizeof(A))) __builtin_prefetch(from + i);
}

// Returns products of one query with a key, not yet summed across lanes.
inline __attribute__((always_inline)) floats products_of(const float* query, const float* key, int size) {
    floats products = {};
    for (int i = 0; i < size; i += WIDTH) products += part_of(query, i, size) * part_of(key, i, size);
    return products;
}
inline __attribute__((always_inline)) floats products_of(const bf16* query, const bf16* key, int size) {
    floats products = {};
    int i = 0;
#if defined(__AVX512BF16__)
    for (; i + 2 * WIDTH <= size; i += 2 * WIDTH)
        products = floats(_mm512_dpbf16_ps(__m512(products), load<__m512bh>(query + i), load<__m512bh>(key + i)));
#endif
    for (; i < size; i += WIDTH) products += part_of(query, i, size) * part_of(key, i, size);
    return products;
}

// Computes products of one query with `count` keys, at most CHUNK.
template <int SIZE, class A>
inline void multiply_keys(const Heads& h, const A* query, const A* keys, int count, float* to) {
    const int size = SIZE ? SIZE : h.size;
    for (int start = 0; start < count; start += WIDTH) {
        floats products[WIDTH];
        for (int k = 0; k < WIDTH; ++k) {
            const A* key = keys + int64_t(std::min(start + k, count - 1)) * size;
            products[k] = products_of(query, key, size);
        }
        const floats some = sums(products);
        std::memcpy(to + start, &some, sizeof some);
    }
}

#if defined(__AVX512BF16__)
// Many queries read keys in panels, in which lanes are keys and no sum crosses them: (keys / 16, size / 2, 16) pairs.
inline void pack_keys(const bf16* keys, int count, int size, int32_t* panel) {
    for (int k = 0; k < WIDTH; ++k)
        for (int i = 0; i < size / 2; ++i)
            panel[i * WIDTH + k] = k < count ? load<int32_t>(keys + int64_t(k) * size + 2 * i) : 0;
}

// Computes products of Q queries with CHUNK keys in panels, CHUNK apart.
template <int SIZE, int Q>
inline void multiply_panels(const Heads& h, const bf16* queries, const int32_t* panels, float* to) {
    const int size = SIZE ? SIZE : h.size;
    constexpr int PANELS = CHUNK / WIDTH;
    __m512 acc[Q][PANELS] = {};
    for (int i = 0; i < size / 2; ++i) {
        __m512bh keys[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) keys[p] = load<__m512bh>(panels + (int64_t(p) * size / 2 + i) * WIDTH);
#pragma GCC unroll 3
        for (int q = 0; q < Q; ++q) {
            const __m512bh pair = __m512bh(_mm512_set1_epi32(load<int32_t>(queries + q * size + 2 * i)));
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) acc[q][p] = _mm512_dpbf16_ps(acc[q][p], keys[p], pair);
        }
    }
    std::memcpy(to, acc, sizeof acc);
}
#endif

// Turns products with `count` keys into scores in place; those outside of `from`..`to` are NEVER. Returns the largest.
constexpr float NEVER = -1e30f;
inline float score(const Heads& h, int count, int from, int to, float* products) {
    floats most = floats{} + NEVER;
    ints lanes;
    for (int k = 0; k < WIDTH; ++k) lanes[k] = k;
    for (int start = 0; start < count; start += WIDTH, lanes += WIDTH) {
        floats some = wide(products + start) * h.scale;
        if (h.softcap)
            for (int k = 0; k < WIDTH; ++k) some[k] = std::tanh(some[k] / h.softcap) * h.softcap;
        some = (lanes >= from) & (lanes < to) ? some : floats{} + NEVER;
        most = some > most ? some : most;
        std::memcpy(products + start, &some, sizeof some);
    }
    return largest(most);
}

// Turns scores into weights in place, relative to the largest score so far; returns the factor for the sums so far.
inline float weigh(float* scores, int count, float largest, Partial& partial) {
    const float now = std::max(partial.largest, largest), shrink = std::exp(partial.largest - now);
    floats total = {};
    for (int k = 0; k < count; k += WIDTH) {
        const floats some = wide(scores + k);
        const floats weights = some > NEVER / 2 ? exponential(some - now) : floats{};
        std::memcpy(scores + k, &weights, sizeof weights);
        total += weights;
    }
    partial.largest = now;
    partial.total = partial.total * shrink + sum(total);
    return shrink;
}

// Adds weighted values of Q queries to their partial sums, which are multiplied with `shrinks` first. `weights` (Q, CHUNK).
template <int SIZE, int Q, class A>
inline void gather(const Heads& h, const A* values, int count, const float* weights, const float* shrinks, Partial* partials,
                   int64_t stride) {
    const int size = SIZE ? SIZE : h.size;
    constexpr int VECTORS = 4;
    for (int start = 0; start < size; start += VECTORS * WIDTH) {
        const int vectors = std::min(VECTORS, (size - start + WIDTH - 1) / WIDTH);
        floats acc[Q][VECTORS] = {};
        for (int k = 0; k < count; ++k) {
            floats some[VECTORS];
            for (int v = 0; v < VECTORS; ++v) some[v] = part_of(values + int64_t(k) * size, start + v * WIDTH, size);
            for (int q = 0; q < Q; ++q)
                for (int v = 0; v < VECTORS; ++v) acc[q][v] += weights[q * CHUNK + k] * some[v];
        }
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < vectors; ++v) {
                float* to = partials[q * stride].values + start + v * WIDTH;
                const floats value = wide(to) * shrinks[q] + acc[q][v];
                std::memcpy(to, &value, sizeof value);
            }
    }
}

#if defined(__AVX512BF16__)
// With weights rounded to bfloat16 as well, as the Hugging Face model has them: two keys at a time.
template <int SIZE, int Q, std::enable_if_t<SIZE != 0, int> = 0>
inline void gather(const Heads&, const bf16* values, int count, const float* weights, const float* shrinks, Partial* partials,
                   int64_t stride) {
    bf16 rounded[Q][CHUNK];
    for (int q = 0; q < Q; ++q)
        for (int k = 0; k < CHUNK; k += WIDTH) store_some(wide(weights + q * CHUNK + k), WIDTH, &rounded[q][k]);
    for (int start = 0; start < SIZE; start += 64) {
        __m512 low[Q][2] = {}, high[Q][2] = {};  // values 0-3 and 4-7 of every 8
        for (int k = 0; k < count; k += 2) {
            const bf16* first = values + int64_t(k) * SIZE + start;
            const bf16* second = k + 1 < count ? first + SIZE : first;  // its weight is zero
            for (int v = 0; v < 2; ++v) {
                const __m512i a = load<__m512i>(first + 32 * v), b = load<__m512i>(second + 32 * v);
                const __m512bh lows = __m512bh(_mm512_unpacklo_epi16(a, b)), highs = __m512bh(_mm512_unpackhi_epi16(a, b));
                for (int q = 0; q < Q; ++q) {
                    const __m512bh both = __m512bh(_mm512_set1_epi32(load<int32_t>(&rounded[q][k])));
                    low[q][v] = _mm512_dpbf16_ps(low[q][v], lows, both);
                    high[q][v] = _mm512_dpbf16_ps(high[q][v], highs, both);
                }
            }
        }
        const __m512i order[] = {_mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0),
                                 _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8)};
        for (int q = 0; q < Q; ++q)
            for (int part = 0; part < 4; ++part) {
                float* to = partials[q * stride].values + start + part * WIDTH;
                const __m512 sums = _mm512_permutex2var_ps(low[q][part / 2], order[part % 2], high[q][part / 2]);
                const floats value = wide(to) * shrinks[q] + floats(sums);
                std::memcpy(to, &value, sizeof value);
            }
    }
}
#endif

// Attends with the queries of one row that use the same key head, over keys begin..end of `all`: a partial result each,
// `stride` apart. `queries` (tokens, heads, size); `seen` (tokens,) keys that each token sees, not counting a window.
// `panels`: the keys in panels as well, for which `begin` is at the start of one; or null.
template <int SIZE, class A, class Q>
void attend_to(const Heads& h, const A* keys, const A* values, const Q* queries, int tokens, const int64_t* seen, int64_t begin,
               int64_t end, int64_t all, Partial* partials, int64_t stride, const int32_t* panels) {
    const int num = tokens * h.group, size = SIZE ? SIZE : h.size;
    static thread_local std::vector<A> own;          // (num, size) queries of one key head
    static thread_local std::vector<float> weights;  // (num, CHUNK)
    static thread_local std::vector<float> shrinks;  // (num,)
    own.resize(size_t(num) * size), weights.resize(size_t(num) * CHUNK), shrinks.resize(num);
    for (int q = 0; q < num; ++q) {
        partials[q * stride].largest = NEVER, partials[q * stride].total = 0;
        std::memset(partials[q * stride].values, 0, size * sizeof(float));
        const Q* query = queries + (int64_t(q / h.group) * h.heads + q % h.group) * size;
        if constexpr (std::is_same_v<A, Q>)
            std::memcpy(&own[q * size], query, size * sizeof(A));
        else
            for (int i = 0; i < size; ++i) store(one(query[i]), &own[q * size + i]);
    }
    const auto by_threes = [num](auto run) {
        int q = 0;
        for (; q + 3 <= num; q += 3) run(std::integral_constant<int, 3>{}, q);
        for (; q < num; ++q) run(std::integral_constant<int, 1>{}, q);
    };
    for (int64_t start = begin; start < end; start += CHUNK) {
        const int count = int(std::min<int64_t>(CHUNK, end - start));
        const int next = int(std::min<int64_t>(CHUNK, all - start - count));  // perhaps in this thread's next part
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<A, bf16>)
            if (panels)
                by_threes([&](auto some, int q) {
                    multiply_panels<SIZE, decltype(some)::value>(h, &own[q * size], panels + start * size / 2, &weights[q * CHUNK]);
                });
#endif
        for (int q = 0; q < num; ++q) {
            prefetch(values + (start + count * q / num) * size, (count * (q + 1) / num - count * q / num) * size);
            const int64_t last = seen[q / h.group], first = h.window ? last - h.window : 0;
            float* scores = &weights[q * CHUNK];
            if (!panels) multiply_keys<SIZE>(h, &own[q * size], keys + start * size, count, scores);
            const float most = score(h, count, int(std::max<int64_t>(first - start, 0)),
                                     int(std::min<int64_t>(last - start, count)), scores);
            shrinks[q] = weigh(scores, count, most, partials[q * stride]);
        }
        by_threes([&](auto some, int q) {
            constexpr int n = decltype(some)::value;
            if (!panels)
                prefetch(keys + (start + CHUNK + next * q / num) * size, (next * (q + n) / num - next * q / num) * size);
            gather<SIZE, n>(h, values + start * size, count, &weights[q * CHUNK], &shrinks[q], partials + q * stride, stride);
        });
    }
}

template <class A, class... Arguments>
void attend(const Heads& h, const A* keys, const A* values, Arguments... rest) {
    if (h.size == 64) attend_to<64>(h, keys, values, rest...);
    else if (h.size == 128) attend_to<128>(h, keys, values, rest...);
    else attend_to<0>(h, keys, values, rest...);
}

// Joins the partial results of one query: `put` (i, value i). `sink`: a score that has no value, or null.
template <class Put>
inline void join(const Partial* own, int num, int size, const float* sink, const Put& put) {
    float largest = own[0].largest, total = 0, values[MAX_HEAD_DIM] = {};
    for (int s = 1; s < num; ++s) largest = std::max(largest, own[s].largest);
    if (sink) {
        largest = std::max(largest, *sink);
        total = std::exp(*sink - largest);
    }
    for (int s = 0; s < num; ++s) {
        const float weight = std::exp(own[s].largest - largest);
        total += weight * own[s].total;
        for (int i = 0; i < size; ++i) values[i] += weight * own[s].values[i];
    }
    for (int i = 0; i < size; ++i) put(i, values[i] / total);
}

}  // namespace
