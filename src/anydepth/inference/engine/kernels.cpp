// Decoding kernels: one branch of a Llama-like layer for a few tokens, in one parallel region.
//
// Weights stay as PyTorch holds them, (out, in) by rows, and are read once for all tokens; sums are in float32, and
// results are rounded to the activations' type where the Hugging Face model rounds them. `native.py` compiles this file
// for the machine that it runs on and calls it through a C interface; the structs here and there must match.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// --- numbers -----------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// WIDTH floats at once. Compilers turn plain conversion loops into far worse code than the processor can run.
#if defined(__AVX512BW__)
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));

inline floats wide(const float* from) { return load<floats>(from); }
#if defined(__AVX512BW__)
inline floats wide(const bf16* from) {
    return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16));
}
inline floats wide(const int8_t* from) { return floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)))); }
// The low and the high halves of bytes, less 8.
inline void halves(const uint8_t* from, floats& low, floats& high) {
    const __m512 steps = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m512i both = _mm512_cvtepu8_epi32(load<__m128i>(from));
    low = floats(_mm512_permutexvar_ps(both, steps));  // looks at the low four bits alone
    high = floats(_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), steps));
}
#elif defined(__AVX2__)
inline floats wide(const bf16* from) {
    return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
}
inline __m128i eight(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
inline floats wide(const int8_t* from) { return floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(from)))); }
inline void halves(const uint8_t* from, floats& low, floats& high) {
    const __m256i both = _mm256_cvtepu8_epi32(eight(from)), eights = _mm256_set1_epi32(8);
    low = floats(_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(both, _mm256_set1_epi32(15)), eights)));
    high = floats(_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(both, 4), eights)));
}
#else
template <class T, class F>
inline floats each(const T* from, F convert) {
    floats values;
    for (int i = 0; i < WIDTH; ++i) values[i] = convert(from[i]);
    return values;
}
inline floats wide(const bf16* from) {
    return each(from, [](bf16 x) {
        const uint32_t bits = uint32_t(x.bits) << 16;
        return load<float>(&bits);
    });
}
inline floats wide(const int8_t* from) {
    return each(from, [](int8_t x) { return float(x); });
}
inline void halves(const uint8_t* from, floats& low, floats& high) {
    low = each(from, [](uint8_t x) { return float(x & 15) - 8; });
    high = each(from, [](uint8_t x) { return float(x >> 4) - 8; });
}
#endif

inline float one(float value) { return value; }
inline float one(int8_t value) { return value; }
inline float one(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    return load<float>(&bits);
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, bf16* to) {
    uint32_t bits = load<uint32_t>(&value);
    bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    to->bits = uint16_t(bits >> 16);
}
template <class A>
inline float rounded(float value) {
    A kept;
    store(value, &kept);
    return one(kept);
}

inline float sum(const floats& values) {
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += values[i];
    return total;
}

inline float dot(const float* a, const float* b, int size) {
    floats acc = {};
    int i = 0;
    for (; i + WIDTH <= size; i += WIDTH) acc += wide(a + i) * wide(b + i);
    float total = sum(acc);
    for (; i < size; ++i) total += a[i] * b[i];
    return total;
}

// e^x for x <= 0, to 2 units in the last place of float32 (Cephes' polynomial).
inline floats exponential(floats x) {
    x = x < -87.0f ? floats{} - 87.0f : x;
    const ints k = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);  // truncation rounds to the nearest here
    const floats whole = __builtin_convertvector(k, floats);
    const floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints scale = (k + 127) << 23;
    return p * load<floats>(&scale);
}

// --- products ----------------------------------------------------------------------------------------------------

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

}  // namespace

extern "C" {

struct Matrix {  // (rows, cols), with a bias (rows,) or none
    const void* weight;
    const void* scales;  // INT8: bf16 (rows,); INT4: bf16 (rows, cols / 32, 2), step and offset of a group
    const void* bias;    // in the activations' type
    int32_t rows, cols, kind, unused;
};

struct Norm {  // x / rms(x) · weight, over `size` values; none if weight is null
    const float* weight;
    float eps;
    int32_t size;
};

struct Layer {
    Matrix queries, keys, values, output, gate, up, down;
    Norm mixer_norm, mixer_out_norm, ffn_norm, ffn_out_norm, query_norm, key_norm;
    int32_t hidden, heads, kv_heads, head_dim, rotated, window, activation, in_bf16;
    float scale, softcap;
};

struct Batch {  // R rows of T tokens each
    int32_t rows, tokens;
    const int64_t* slots;   // (R,)
    const int64_t* counts;  // (R,) K/V that the slot held before
    const void* cos;        // (R·T, rotated) in the activations' type, or null
    const void* sin;
    void* cache;  // (slots, 2 · kv_heads, capacity, head_dim)
    int64_t capacity;
    float* workspace;
};

}  // extern "C"

namespace {

// How far in front of the sums memory is asked for: processors' own prefetching stops at page bounds, and with it two
// cores read at two thirds of what memory gives. Measured: 2 KiB is too near, from 4 to 9 it is the same.
constexpr int AHEAD = 6144;

// Rows `row`..`row` + R of W x for tokens `token`..`token` + M, raw sums: (tokens, rows) in `out`.
template <int R, int M, class W>
inline void block(const Matrix& w, const float* x, int row, int token, float* out) {
    const int size = w.cols;
    const W* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = static_cast<const W*>(w.weight) + int64_t(row + r) * size;
    floats acc[R][M] = {};
    const auto add = [&](int i) {
        floats values[M];
        for (int m = 0; m < M; ++m) values[m] = wide(x + int64_t(token + m) * size + i);
        for (int r = 0; r < R; ++r) {
            const floats weights = wide(rows[r] + i);
            for (int m = 0; m < M; ++m) acc[r][m] += weights * values[m];
        }
    };
    constexpr int LINE = 64 / sizeof(W);
    int i = 0;
    for (; i + LINE <= size; i += LINE) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(rows[r] + i + AHEAD / sizeof(W));
        for (int k = 0; k < LINE; k += WIDTH) add(i + k);
    }
    for (; i + WIDTH <= size; i += WIDTH) add(i);
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
            float total = sum(acc[r][m]);
            for (int j = i; j < size; ++j) total += one(rows[r][j]) * x[int64_t(token + m) * size + j];
            if (w.kind == INT8) total *= one(static_cast<const bf16*>(w.scales)[row + r]);
            out[int64_t(token + m) * w.rows + row + r] = total;
        }
}

// INT4: byte i of a group holds its inputs i (low half) and i + 16 (high half); a step s means (s − 8) · scale + offset.
constexpr int GROUP = 32;
struct int4;

template <int R, int M>
inline void block4(const Matrix& w, const float* x, int row, int token, float* out) {
    const int size = w.cols, groups = size / GROUP;
    floats acc[R][M] = {}, offsets[R][M] = {};
    for (int g = 0; g < groups; ++g) {
        floats lows[M][GROUP / 2 / WIDTH], highs[M][GROUP / 2 / WIDTH], all[M] = {};
        for (int m = 0; m < M; ++m)
            for (int k = 0; k < GROUP / 2 / WIDTH; ++k) {
                const float* values = x + int64_t(token + m) * size + g * GROUP + k * WIDTH;
                lows[m][k] = wide(values), highs[m][k] = wide(values + GROUP / 2);
                all[m] += lows[m][k] + highs[m][k];
            }
        for (int r = 0; r < R; ++r) {
            const int64_t place = int64_t(row + r) * groups + g;
            const uint8_t* packed = static_cast<const uint8_t*>(w.weight) + place * (GROUP / 2);
            const bf16* scales = static_cast<const bf16*>(w.scales) + 2 * place;
            __builtin_prefetch(packed + AHEAD);
            __builtin_prefetch(scales + AHEAD / 8);
            const ints both = ints{} + load<int32_t>(scales);  // two bf16, the step in the low half
            const floats scale = floats(both << 16), offset = floats(both & int32_t(0xffff0000));
            floats sums[M] = {};
            for (int k = 0; k < GROUP / 2 / WIDTH; ++k) {
                floats a, b;
                halves(packed + k * WIDTH, a, b);
                for (int m = 0; m < M; ++m) sums[m] += a * lows[m][k] + b * highs[m][k];
            }
            for (int m = 0; m < M; ++m) acc[r][m] += sums[m] * scale;
            for (int m = 0; m < M; ++m) offsets[r][m] += all[m] * offset;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[int64_t(token + m) * w.rows + row + r] = sum(acc[r][m] + offsets[r][m]);
}

template <int R, int M, class W>
inline void block_of(const Matrix& w, const float* x, int row, int token, float* out) {
    if constexpr (std::is_same<W, int4>::value)
        block4<R, M>(w, x, row, token, out);
    else
        block<R, M, W>(w, x, row, token, out);
}

// M tokens at a time: as many sums as registers hold; several rows: as many streams from memory.
template <int M, class W>
void rows_of(const Matrix& w, const float* x, int begin, int end, int token, float* out) {
    constexpr int R = M <= 2 ? 4 : M <= 5 ? 2 : 1;
    int row = begin;
    for (; row + R <= end; row += R) block_of<R, M, W>(w, x, row, token, out);
    for (; row < end; ++row) block_of<1, M, W>(w, x, row, token, out);
}

struct Range {
    int begin, end;
};

template <class W>
Range product_of(const Matrix& w, const float* x, int num_tokens, float* out) {
    constexpr int BLOCK = 8;  // rows that stay in the nearest cache while further tokens need them
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t blocks = (w.rows + BLOCK - 1) / BLOCK;
    const Range own{int(blocks * me / threads) * BLOCK, std::min<int>(int(blocks * (me + 1) / threads) * BLOCK, w.rows)};
    if (num_tokens <= 8) {
        using Rows = void (*)(const Matrix&, const float*, int, int, int, float*);
        static constexpr Rows rows[] = {rows_of<1, W>, rows_of<2, W>, rows_of<3, W>, rows_of<4, W>,
                                        rows_of<5, W>, rows_of<6, W>, rows_of<7, W>, rows_of<8, W>};
        rows[num_tokens - 1](w, x, own.begin, own.end, 0, out);
        return own;
    }
    for (int row = own.begin; row < own.end; row += BLOCK) {
        const int end = std::min(row + BLOCK, own.end);
        int token = 0;
        for (; token + 8 <= num_tokens; token += 8) rows_of<8, W>(w, x, row, end, token, out);
        for (; token < num_tokens; ++token) rows_of<1, W>(w, x, row, end, token, out);
    }
    return own;
}

// (tokens, rows) of x Wᵀ + b. Every thread of the team does its share of the rows, which it returns; no barrier.
template <class A>
Range product(const Matrix& w, const float* x, int num_tokens, float* out) {
    Range own;
    switch (w.kind) {
        case FLOAT32: own = product_of<float>(w, x, num_tokens, out); break;
        case BFLOAT16: own = product_of<bf16>(w, x, num_tokens, out); break;
        case INT8: own = product_of<int8_t>(w, x, num_tokens, out); break;
        default: own = product_of<int4>(w, x, num_tokens, out);
    }
    const A* bias = static_cast<const A*>(w.bias);
    for (int token = 0; token < num_tokens; ++token) {
        float* to = out + int64_t(token) * w.rows;
        for (int row = own.begin; row < own.end; ++row) to[row] = rounded<A>(bias ? to[row] + one(bias[row]) : to[row]);
    }
    return own;
}

// In place over `size` values each.
template <class A>
void normalise(const Norm& norm, float* x, int num) {
    for (int n = 0; n < num; ++n, x += norm.size) {
        const float factor = 1.0f / std::sqrt(dot(x, x, norm.size) / norm.size + norm.eps);
        for (int i = 0; i < norm.size; ++i) x[i] = rounded<A>(rounded<A>(x[i] * factor) * norm.weight[i]);
    }
}

// (n, size) states as floats, normalised; by all threads, with a barrier behind it.
template <class A>
void prepare(const Norm& norm, const A* from, float* to, int num, int size) {
#pragma omp for
    for (int n = 0; n < num; ++n) {
        for (int i = 0; i < size; ++i) to[int64_t(n) * size + i] = one(from[int64_t(n) * size + i]);
        if (norm.weight) normalise<A>(norm, to + int64_t(n) * size, 1);
    }
}

// x Wᵀ + b, perhaps normalised, added to the residual stream. `scratch`: (tokens, rows).
template <class A>
void add_product(const Matrix& w, const Norm& out_norm, const float* x, const A* residual, A* to, float* scratch, int num) {
    const auto add = [&](int token, int begin, int end) {
        const int64_t start = int64_t(token) * w.rows;
        for (int64_t i = start + begin; i < start + end; ++i) store(one(residual[i]) + scratch[i], to + i);
    };
    const Range own = product<A>(w, x, num, scratch);
    if (!out_norm.weight) {
        for (int token = 0; token < num; ++token) add(token, own.begin, own.end);
        return;
    }
#pragma omp barrier
#pragma omp for
    for (int token = 0; token < num; ++token) {
        normalise<A>(out_norm, scratch + int64_t(token) * w.rows, 1);
        add(token, 0, w.rows);
    }
}

// --- attention ---------------------------------------------------------------------------------------------------

constexpr int CHUNK = 64;
constexpr int MAX_HEAD_DIM = 256;
constexpr int KEYS_PER_SPLIT = 256;
constexpr int MAX_SPLITS = 16;

inline int num_splits(int64_t keys) {
    return int(std::min<int64_t>(MAX_SPLITS, std::max<int64_t>(1, keys / KEYS_PER_SPLIT)));
}

// Softmax-weighted values of one query over one part of the keys: largest score, sum of weights, weighted sum.
struct Part {
    float largest, total;
    float values[MAX_HEAD_DIM];
};

// The queries of one row that share a key head, over keys begin..end. `queries` (T, heads, head_dim) of the row.
template <class A>
void attend(const Layer& l, const A* keys, const A* values, const float* queries, int tokens, int64_t before,
            int64_t begin, int64_t end, Part* parts, int64_t stride) {
    const int size = l.head_dim, group = l.heads / l.kv_heads, num = tokens * group;
    float states[CHUNK * MAX_HEAD_DIM], scores[CHUNK];
    for (int q = 0; q < num; ++q) {
        Part& part = parts[q * stride];
        part.largest = -1e30f, part.total = 0;
        std::memset(part.values, 0, size * sizeof(float));
    }
    const auto widen = [&](const A* from, int64_t count) {
        const int64_t all = count * size;
        int64_t i = 0;
        for (; i + WIDTH <= all; i += WIDTH) {
            const floats value = wide(from + i);
            std::memcpy(states + i, &value, sizeof value);
        }
        for (; i < all; ++i) states[i] = one(from[i]);
    };
    static thread_local std::vector<float> weights;
    weights.resize(std::max<size_t>(weights.size(), size_t(num) * CHUNK));
    for (int64_t start = begin; start < end; start += CHUNK) {
        const int count = int(std::min<int64_t>(CHUNK, end - start));
        widen(keys + start * size, count);
        for (int q = 0; q < num; ++q) {
            const int token = q / group;
            const float* query = queries + (int64_t(token) * l.heads + q % group) * size;
            const int64_t last = before + token, first = l.window ? last - l.window + 1 : 0;
            float largest = -1e30f;
            for (int k = 0; k < CHUNK; ++k) {
                scores[k] = -1e30f;
                if (k >= count || start + k > last || start + k < first) continue;
                float score = dot(query, states + k * size, size) * l.scale;
                if (l.softcap) score = std::tanh(score / l.softcap) * l.softcap;
                scores[k] = score;
                largest = std::max(largest, score);
            }
            Part& part = parts[q * stride];
            const float now = std::max(part.largest, largest);
            const float shrink = std::exp(part.largest - now);
            floats total = {};
            for (int k = 0; k < CHUNK; k += WIDTH) {
                const floats score = wide(scores + k);
                floats weight = exponential(score - now);
                weight = score > -1e29f ? weight : floats{};
                std::memcpy(&weights[q * CHUNK + k], &weight, sizeof weight);
                total += weight;
            }
            part.largest = now;
            part.total = part.total * shrink + sum(total);
            for (int i = 0; i < size; ++i) part.values[i] *= shrink;
        }
        widen(values + start * size, count);
        for (int q = 0; q < num; ++q) {
            float* to = parts[q * stride].values;
            for (int k = 0; k < count; ++k) {
                const float weight = weights[q * CHUNK + k];
                const float* from = states + k * size;
                for (int i = 0; i < size; ++i) to[i] += weight * from[i];
            }
        }
    }
}

template <class A>
void rotate(const Layer& l, float* heads, int num, const A* cos, const A* sin) {
    const int half = l.rotated / 2;
    for (int h = 0; h < num; ++h, heads += l.head_dim)
        for (int i = 0; i < half; ++i) {
            const float a = heads[i], b = heads[i + half];
            heads[i] = rounded<A>(rounded<A>(a * one(cos[i])) + rounded<A>(-b * one(sin[i])));
            heads[i + half] = rounded<A>(rounded<A>(b * one(cos[i + half])) + rounded<A>(a * one(sin[i + half])));
        }
}

// --- branches ----------------------------------------------------------------------------------------------------

template <class A>
void mixer(const Layer& l, const Batch& b, const A* from, A* to) {
    const int num = b.rows * b.tokens, size = l.head_dim, group = l.heads / l.kv_heads;
    const int width = l.heads * size, kv_width = l.kv_heads * size;
    float* x = b.workspace;
    float* queries = x + int64_t(num) * std::max(l.hidden, width);
    float* keys = queries + int64_t(num) * std::max(l.hidden, width);
    float* values = keys + int64_t(num) * kv_width;
    Part* parts = reinterpret_cast<Part*>(values + int64_t(num) * kv_width);
    const int64_t head_stride = b.capacity * size, slot_stride = 2 * l.kv_heads * head_stride;
    int64_t longest = 0;
    for (int r = 0; r < b.rows; ++r) longest = std::max(longest, b.counts[r] + b.tokens);
    const int splits = num_splits(longest);
#pragma omp parallel
    {
        prepare<A>(l.mixer_norm, from, x, num, l.hidden);
        product<A>(l.queries, x, num, queries);
        product<A>(l.keys, x, num, keys);
        product<A>(l.values, x, num, values);
#pragma omp barrier
#pragma omp for
        for (int n = 0; n < num; ++n) {
            float *q = queries + int64_t(n) * width, *k = keys + int64_t(n) * kv_width;
            if (l.query_norm.weight) normalise<A>(l.query_norm, q, width / l.query_norm.size);
            if (l.key_norm.weight) normalise<A>(l.key_norm, k, kv_width / l.key_norm.size);
            if (b.cos) {
                const A* cos = static_cast<const A*>(b.cos) + int64_t(n) * l.rotated;
                const A* sin = static_cast<const A*>(b.sin) + int64_t(n) * l.rotated;
                rotate<A>(l, q, l.heads, cos, sin);
                rotate<A>(l, k, l.kv_heads, cos, sin);
            }
            const int row = n / b.tokens;
            A* slot = static_cast<A*>(b.cache) + b.slots[row] * slot_stride;
            const int64_t place = (b.counts[row] + n % b.tokens) * size;
            for (int h = 0; h < l.kv_heads; ++h)
                for (int i = 0; i < size; ++i) {
                    store(k[h * size + i], slot + h * head_stride + place + i);
                    store(values[int64_t(n) * kv_width + h * size + i], slot + (l.kv_heads + h) * head_stride + place + i);
                }
        }
        const int64_t stride = splits;  // parts of a query stand together
#pragma omp for schedule(dynamic)
        for (int item = 0; item < b.rows * l.kv_heads * splits; ++item) {
            const int split = item % splits, h = item / splits % l.kv_heads, row = item / splits / l.kv_heads;
            const int64_t all = b.counts[row] + b.tokens;
            const int64_t first = l.window ? std::max<int64_t>(0, b.counts[row] - l.window + 1) : 0;
            const int64_t begin = first + (all - first) * split / splits, end = first + (all - first) * (split + 1) / splits;
            const A* slot = static_cast<const A*>(b.cache) + b.slots[row] * slot_stride;
            const int64_t query = (int64_t(row) * l.kv_heads + h) * b.tokens * group;
            attend<A>(l, slot + h * head_stride, slot + (l.kv_heads + h) * head_stride,
                      queries + (int64_t(row) * b.tokens * l.heads + h * group) * size, b.tokens, b.counts[row], begin, end,
                      parts + query * splits + split, stride);
        }
#pragma omp for
        for (int query = 0; query < num * l.heads; ++query) {
            const int shared = query % group, token = query / group % b.tokens;
            const int h = query / group / b.tokens % l.kv_heads, row = query / group / b.tokens / l.kv_heads;
            const Part* own = parts + int64_t(query) * splits;
            float largest = own[0].largest, total = 0;
            for (int s = 1; s < splits; ++s) largest = std::max(largest, own[s].largest);
            float* result = x + (int64_t(row) * b.tokens + token) * width + (h * group + shared) * size;
            std::memset(result, 0, size * sizeof(float));
            for (int s = 0; s < splits; ++s) {
                const float weight = std::exp(own[s].largest - largest);
                total += weight * own[s].total;
                for (int i = 0; i < size; ++i) result[i] += weight * own[s].values[i];
            }
            for (int i = 0; i < size; ++i) result[i] = rounded<A>(result[i] / total);
        }
        add_product<A>(l.output, l.mixer_out_norm, x, from, to, queries, num);
    }
}

inline float activated(int kind, float x) {
    if (kind == 0) return x / (1.0f + std::exp(-x));                                                        // SiLU
    return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));                // GELU (tanh)
}

template <class A>
void ffn(const Layer& l, const A* from, A* to, float* workspace, int num) {
    const int rows = l.gate.rows;
    float* x = workspace;
    float* inner = x + int64_t(num) * l.hidden;
    float* ups = inner + int64_t(num) * rows;
#pragma omp parallel
    {
        prepare<A>(l.ffn_norm, from, x, num, l.hidden);
        product<A>(l.gate, x, num, inner);
        const Range own = product<A>(l.up, x, num, ups);  // the same rows: nothing to wait for
        for (int token = 0; token < num; ++token)
            for (int64_t i = int64_t(token) * rows + own.begin; i < int64_t(token) * rows + own.end; ++i)
                inner[i] = rounded<A>(rounded<A>(activated(l.activation, inner[i])) * ups[i]);
#pragma omp barrier
        add_product<A>(l.down, l.ffn_out_norm, inner, from, to, x, num);
    }
}

template <class A>
void linear(const Matrix& w, const Norm& norm, const A* from, A* to, float* workspace, int num) {
    float* sums = workspace + int64_t(num) * w.cols;
#pragma omp parallel
    {
        prepare<A>(norm, from, workspace, num, w.cols);
        const Range own = product<A>(w, workspace, num, sums);
        for (int token = 0; token < num; ++token)
            for (int64_t i = int64_t(token) * w.rows + own.begin; i < int64_t(token) * w.rows + own.end; ++i)
                store(sums[i], to + i);
    }
}

}  // namespace

// --- C interface -------------------------------------------------------------------------------------------------

extern "C" {

// Floats of workspace that a call may need.
int64_t anydepth_workspace(const Layer* l, int32_t num_tokens) {
    const int64_t width = int64_t(l->heads) * l->head_dim, kv_width = int64_t(l->kv_heads) * l->head_dim;
    const int64_t parts = int64_t(num_tokens) * l->heads * MAX_SPLITS * (sizeof(Part) / sizeof(float));
    const int64_t mixed = num_tokens * (std::max<int64_t>(l->hidden, width) + std::max<int64_t>(l->hidden, width) + 2 * kv_width);
    return std::max(mixed + parts, int64_t(num_tokens) * (l->hidden + 2 * l->gate.rows));
}

void anydepth_mixer(const Layer* l, const Batch* b, const void* from, void* to) {
    if (l->in_bf16)
        mixer<bf16>(*l, *b, static_cast<const bf16*>(from), static_cast<bf16*>(to));
    else
        mixer<float>(*l, *b, static_cast<const float*>(from), static_cast<float*>(to));
}

void anydepth_ffn(const Layer* l, const void* from, void* to, float* workspace, int32_t num_tokens) {
    if (l->in_bf16)
        ffn<bf16>(*l, static_cast<const bf16*>(from), static_cast<bf16*>(to), workspace, num_tokens);
    else
        ffn<float>(*l, static_cast<const float*>(from), static_cast<float*>(to), workspace, num_tokens);
}

void anydepth_linear(const Matrix* w, const Norm* norm, const void* from, void* to, float* workspace, int32_t num_tokens,
                     int32_t in_bf16) {
    if (in_bf16)
        linear<bf16>(*w, *norm, static_cast<const bf16*>(from), static_cast<bf16*>(to), workspace, num_tokens);
    else
        linear<float>(*w, *norm, static_cast<const float*>(from), static_cast<float*>(to), workspace, num_tokens);
}

int32_t anydepth_sizes(int32_t which) {  // for the check that both sides mean the same structs
    const int32_t sizes[] = {sizeof(Matrix), sizeof(Norm), sizeof(Layer), sizeof(Batch)};
    return sizes[which];
}

}  // extern "C"
