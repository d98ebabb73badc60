// Decoding kernels: one branch of a Llama-like layer for a few tokens, in one parallel region.
//
// Weights are read once for all tokens (`product.h`); sums are in float32, and results are rounded to the activations'
// type where the Hugging Face model rounds them. `native.py` compiles this file for the machine that it runs on and calls
// it through a C interface; the structs here and there must match.

#include "product.h"

extern "C" {

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

// In place over `size` values each.
template <class A>
void normalise(const Norm& norm, float* x, int num) {
    for (int n = 0; n < num; ++n, x += norm.size) {
        const float factor = 1.0f / std::sqrt(dot(x, x, norm.size) / norm.size + norm.eps);
        for (int i = 0; i < norm.size; ++i) x[i] = rounded<A>(rounded<A>(x[i] * factor) * norm.weight[i]);
    }
}

// (num, size) states, normalised, packed for a map. Every thread makes its own: cheaper than waiting for one that does.
template <class A>
const Packed& prepared(const Matrix& w, const Norm& norm, const A* from, int num) {
    static thread_local std::vector<float> x;
    x.resize(size_t(num) * w.cols);
    for (int64_t i = 0; i < int64_t(num) * w.cols; ++i) x[i] = one(from[i]);
    if (norm.weight) normalise<A>(norm, x.data(), num);
    return pack(w.kind, x.data(), num, w.cols);
}

// x Wᵀ + b, perhaps normalised, added to the residual stream. `scratch`: (tokens, rows).
template <class A>
void add_product(const Matrix& w, const Norm& out_norm, const float* x, const A* residual, A* to, float* scratch, int num) {
    const auto add = [&](int token, int begin, int end) {
        const int64_t start = int64_t(token) * w.rows;
        for (int64_t i = start + begin; i < start + end; ++i) store(one(residual[i]) + scratch[i], to + i);
    };
    const Range own = product<A>(w, pack(w.kind, x, num, w.cols), num, scratch);
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

// Heads of token `n` of the batch, in place.
template <class A>
void rotate(const Layer& l, const Batch& b, int n, float* heads, int num) {
    if (!b.cos) return;
    const A* cos = static_cast<const A*>(b.cos) + int64_t(n) * l.rotated;
    const A* sin = static_cast<const A*>(b.sin) + int64_t(n) * l.rotated;
    const int half = l.rotated / 2;
    for (int h = 0; h < num; ++h, heads += l.head_dim)
        for (int i = 0; i < half; ++i) {
            const float x = heads[i], y = heads[i + half];
            heads[i] = rounded<A>(rounded<A>(x * one(cos[i])) + rounded<A>(-y * one(sin[i])));
            heads[i + half] = rounded<A>(rounded<A>(y * one(cos[i + half])) + rounded<A>(x * one(sin[i + half])));
        }
}

// Keys and values of token `n` of the batch into the cache, the keys normalised and rotated.
template <class A>
void leave(const Layer& l, const Batch& b, int n, float* keys, const float* values) {
    const int size = l.head_dim, row = n / b.tokens;
    if (l.key_norm.weight) normalise<A>(l.key_norm, keys, l.kv_heads * size / l.key_norm.size);
    rotate<A>(l, b, n, keys, l.kv_heads);
    const int64_t head = b.capacity * size, place = (b.counts[row] + n % b.tokens) * size;
    A* slot = static_cast<A*>(b.cache) + b.slots[row] * 2 * l.kv_heads * head;
    for (int h = 0; h < l.kv_heads; ++h)
        for (int i = 0; i < size; ++i) {
            store(keys[h * size + i], slot + h * head + place + i);
            store(values[h * size + i], slot + (l.kv_heads + h) * head + place + i);
        }
}

// --- branches ----------------------------------------------------------------------------------------------------

template <class A>
void mixer(const Layer& l, const Batch& b, const A* from, A* to) {
    const int num = b.rows * b.tokens, size = l.head_dim, group = l.heads / l.kv_heads;
    const int width = l.heads * size, kv_width = l.kv_heads * size;
    float* mixed = b.workspace;
    float* queries = mixed + int64_t(num) * width;
    float* keys = queries + int64_t(num) * std::max(l.hidden, width);
    float* values = keys + int64_t(num) * kv_width;
    Part* parts = reinterpret_cast<Part*>(values + int64_t(num) * kv_width);
    const int64_t head_stride = b.capacity * size, slot_stride = 2 * l.kv_heads * head_stride;
    int64_t longest = 0;
    for (int r = 0; r < b.rows; ++r) longest = std::max(longest, b.counts[r] + b.tokens);
    const int splits = num_splits(longest);
#pragma omp parallel
    {
        const Packed& x = prepared<A>(l.queries, l.mixer_norm, from, num);
        product<A>(l.queries, x, num, queries);
        product<A>(l.keys, x, num, keys);
        product<A>(l.values, x, num, values);
#pragma omp barrier
#pragma omp for
        for (int n = 0; n < num; ++n) {
            float* q = queries + int64_t(n) * width;
            if (l.query_norm.weight) normalise<A>(l.query_norm, q, width / l.query_norm.size);
            rotate<A>(l, b, n, q, l.heads);
            leave<A>(l, b, n, keys + int64_t(n) * kv_width, values + int64_t(n) * kv_width);
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
            float* result = mixed + (int64_t(row) * b.tokens + token) * width + (h * group + shared) * size;
            std::memset(result, 0, size * sizeof(float));
            for (int s = 0; s < splits; ++s) {
                const float weight = std::exp(own[s].largest - largest);
                total += weight * own[s].total;
                for (int i = 0; i < size; ++i) result[i] += weight * own[s].values[i];
            }
            for (int i = 0; i < size; ++i) result[i] = rounded<A>(result[i] / total);
        }
        add_product<A>(l.output, l.mixer_out_norm, mixed, from, to, queries, num);
    }
}

// K/V of tokens that do not run the mixer.
template <class A>
void fill(const Layer& l, const Batch& b, const A* from) {
    const int num = b.rows * b.tokens, kv_width = l.kv_heads * l.head_dim;
    float* keys = b.workspace;
    float* values = keys + int64_t(num) * kv_width;
#pragma omp parallel
    {
        const Packed& x = prepared<A>(l.keys, l.mixer_norm, from, num);
        product<A>(l.keys, x, num, keys);
        product<A>(l.values, x, num, values);
#pragma omp barrier
#pragma omp for
        for (int n = 0; n < num; ++n) leave<A>(l, b, n, keys + int64_t(n) * kv_width, values + int64_t(n) * kv_width);
    }
}

inline floats activated(int kind, floats x) {
    if (kind == 0) return x * sigmoid(x);                                       // SiLU
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));      // GELU (tanh)
}

// activation(gates) · ups, in place of the gates.
template <class A>
void combine(int kind, float* gates, const float* ups, int size) {
    for (int i = 0; i < size; i += WIDTH) {
        float some[WIDTH] = {};
        const int count = std::min(WIDTH, size - i);
        std::memcpy(some, gates + i, count * sizeof(float));
        const floats values = activated(kind, wide(some));
        for (int k = 0; k < count; ++k) gates[i + k] = rounded<A>(rounded<A>(values[k]) * ups[i + k]);
    }
}

template <class A>
void ffn(const Layer& l, const A* from, A* to, float* workspace, int num) {
    const int rows = l.gate.rows;
    float* inner = workspace;
    float* ups = inner + int64_t(num) * rows;
    float* scratch = ups + int64_t(num) * rows;
#pragma omp parallel
    {
        const Packed& x = prepared<A>(l.gate, l.ffn_norm, from, num);
        product<A>(l.gate, x, num, inner);
        const Range own = product<A>(l.up, x, num, ups);  // the same rows: nothing to wait for
        for (int64_t start = own.begin; start < int64_t(num) * rows; start += rows)
            combine<A>(l.activation, inner + start, ups + start, own.end - own.begin);
#pragma omp barrier
        add_product<A>(l.down, l.ffn_out_norm, inner, from, to, scratch, num);
    }
}

template <class A>
void linear(const Matrix& w, const Norm& norm, const A* from, A* to, float* sums, int num) {
#pragma omp parallel
    {
        const Packed& x = prepared<A>(w, norm, from, num);
        const Range own = product<A>(w, x, num, sums);
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
    const int64_t mixed = num_tokens * (width + std::max<int64_t>(l->hidden, width) + 2 * kv_width);
    return std::max(mixed + parts, int64_t(num_tokens) * (l->hidden + 2 * l->gate.rows));
}

void anydepth_mixer(const Layer* l, const Batch* b, const void* from, void* to) {
    if (l->in_bf16)
        mixer<bf16>(*l, *b, static_cast<const bf16*>(from), static_cast<bf16*>(to));
    else
        mixer<float>(*l, *b, static_cast<const float*>(from), static_cast<float*>(to));
}

void anydepth_fill(const Layer* l, const Batch* b, const void* from) {
    if (l->in_bf16)
        fill<bf16>(*l, *b, static_cast<const bf16*>(from));
    else
        fill<float>(*l, *b, static_cast<const float*>(from));
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
