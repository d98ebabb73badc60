// Decoding kernels: layers of a Llama-like decoder for a few tokens.
//
// Weights are read once for all tokens (`product.h`); sums are in float32, and results are rounded to the activations'
// type where the Hugging Face model rounds them. `native.py` compiles this file for the machine that it runs on, and calls
// it through a C interface; the structs in both must match.

#include "attention.h"
#include "blocks.h"
#include "confidence.h"
#include "network.h"
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
    int32_t hidden, heads, kv_heads, head_dim, window, activation, in_bf16;
    int32_t rotation;  // index into the batch's rotary embeddings, -1 for none
    float scale, softcap;
};

struct Rotation {  // (positions, size) each, in the activations' type
    const void* cos;
    const void* sin;
    int64_t size;
};

struct Batch {  // R rows of T tokens each
    int32_t rows, tokens;
    const int64_t* sequences;  // (R,) their numbers in the caches
    const int64_t* counts;     // (R,) tokens before the new ones
    const Rotation* rotations;
    int64_t capacity;  // of a sequence, in tokens
    float* workspace;
};

constexpr int MAX_TOKENS = 64;  // in one call

// OMIT: tokens that do not run the mixer leave no K/V; without it all tokens of a row leave K/V as soon as one of the row
// runs the mixer. EXIT: tokens that the layer's gate stops run no later layer either. ALONE: the layer's gate is for the
// mixer alone, and tokens that it stops run the FFN.
enum Part : int64_t { MIXER = 1, FFN = 2, OMIT = 4, EXIT = 8, ALONE = 16 };

// The head for states of any depth, and the measure of its confidence.
struct Exit {
    Matrix head;
    Norm norm;
    float softcap;  // 0 for none
    Confidence confidence;
};

// Passes the tokens whose logit is above a threshold; every token if `logits` is null.
struct Gate {
    const Network* network;  // gives the logits here; null: an earlier gate has evaluated it, or there is none
    const Exit* exit;        // or this: minus its confidence is the logit of each active token
    const void* compared;    // or this: minus the cosine of the state and of that in (R·T, hidden) is the logit
    float* logits;           // (R·T, stride), stored for the caller
    int64_t column;          // -1: the network is evaluated for later layers, and every token passes
    int64_t stride;
    const float* thresholds;  // (R·T,) one for each token; null: `threshold` is for all
    float threshold, unused;
};

struct Task {
    const Layer* layer;
    void* cache;
    int64_t parts;
    const int64_t* counts;  // (R,) K/V that the sequences had before in this layer; those of the batch if null
    void* deferred;         // (sequences, deferred_capacity, hidden) layer inputs of tokens whose K/V are deferred
    int64_t* num_deferred;  // (sequences,)
    int64_t deferred_capacity;
    const int64_t* mixed;  // indices in the batch of the tokens that run the mixer, in order; all if null
    int64_t num_mixed;
    const int64_t* fed;  // the same for the FFN
    int64_t num_fed;
    void* captured;        // (R·T, hidden), where the layer's input is stored for the caller; null: nowhere
    const Network* scale;  // r = 2·σ(logit) multiplies what the layer adds to tokens that pass its gate; null: r = 1
    float* scales;         // (R·T,) its logits, stored for the caller
    void* before;          // (R·T, hidden) workspace of a scaled layer
    Gate gate, gate_of_ffn;   // of the layer, if `mixed` and `fed` are null; and of the FFN
};

}  // extern "C"

namespace {

// Tokens of a batch, in order.
struct Tokens {
    const int64_t* list;  // all if null
    int num;
    int64_t operator[](int i) const { return list ? list[i] : i; }
};

// Normalises `num` vectors of `size` values in place.
template <class A>
void normalise(const Norm& norm, float* x, int num) {
    for (int n = 0; n < num; ++n, x += norm.size) {
        const float factor = 1.0f / std::sqrt(dot(x, x, norm.size) / norm.size + norm.eps);
        for (int i = 0; i < norm.size; i += WIDTH) {
            const int count = std::min(WIDTH, norm.size - i);
            const floats scaled = rounded<A>(some(x + i, count) * factor);
            store_some(rounded<A>(scaled * some(norm.weight + i, count)), count, x + i);
        }
    }
}

// Reads a state as floats, normalised if there is a norm.
template <class A>
void read_state(const Norm& norm, const A* from, int size, float* to) {
    for (int i = 0; i < size; i += WIDTH) {
        const int count = std::min(WIDTH, size - i);
        store_some(some(from + i, count), count, to + i);
    }
    if (norm.weight) normalise<A>(norm, to, 1);
}

// Packs the normalised states `state_of` (0..num) as inputs of a linear layer. Every thread packs its own copy: that is
// cheaper than waiting for one thread.
template <class A, class StateOf>
const Packed& prepared(const Matrix& w, const Norm& norm, int num, const StateOf& state_of) {
    static thread_local std::vector<float> x;
    x.resize(size_t(num) * w.cols);
    for (int n = 0; n < num; ++n) read_state<A>(norm, state_of(n), w.cols, x.data() + size_t(n) * w.cols);
    return pack(w.kind, x.data(), num, w.cols);
}

// Packs the states of some tokens of a batch.
template <class A>
const Packed& prepared(const Matrix& w, const Norm& norm, const A* from, const Tokens& tokens) {
    return prepared<A>(w, norm, tokens.num, [&](int n) { return from + tokens[n] * w.cols; });
}

// Adds x Wᵀ + b of some tokens, normalised if there is a norm, to the residual stream. `scratch`: (tokens, rows).
template <class A>
void add_product(const Matrix& w, const Norm& out_norm, const float* x, const A* residual, A* to, float* scratch,
                 const Tokens& tokens, const Matrix* next) {
    const auto add = [&](int n, int begin, int end) {
        const int64_t start = tokens[n] * w.rows, own = int64_t(n) * w.rows;
        for (int i = begin; i < end; ++i) store(one(residual[start + i]) + scratch[own + i], to + start + i);
    };
    const Range own = product<A>(w, pack(w.kind, x, tokens.num, w.cols), tokens.num, scratch, next);
    if (!out_norm.weight) {
        for (int n = 0; n < tokens.num; ++n) add(n, own.begin, own.end);
        return;
    }
#pragma omp barrier
#pragma omp for
    for (int n = 0; n < tokens.num; ++n) {
        normalise<A>(out_norm, scratch + int64_t(n) * w.rows, 1);
        add(n, 0, w.rows);
    }
}

// --- around attention ---------------------------------------------------------------------------------------------

// Rotates the heads of a token by its position, in place.
template <class A>
void rotate(const Layer& l, const Batch& b, int64_t place, float* heads, int num) {
    if (l.rotation < 0) return;
    const Rotation& rotation = b.rotations[l.rotation];
    const A* cos = static_cast<const A*>(rotation.cos) + place * rotation.size;
    const A* sin = static_cast<const A*>(rotation.sin) + place * rotation.size;
    const int half = int(rotation.size / 2);
    for (int h = 0; h < num; ++h, heads += l.head_dim)
        for (int i = 0; i < half; ++i) {
            const float x = heads[i], y = heads[i + half];
            heads[i] = rounded<A>(rounded<A>(x * one(cos[i])) + rounded<A>(-y * one(sin[i])));
            heads[i + half] = rounded<A>(rounded<A>(y * one(cos[i + half])) + rounded<A>(x * one(sin[i + half])));
        }
}

// Where a token's K/V are stored: after `number` K/V, and at which position.
struct Entry {
    int64_t sequence, number, position;
};

// Normalises and rotates the keys of a token, and stores keys and values in the cache.
template <class A>
void leave(const Layer& l, const Batch& b, void* cache, const Entry& entry, float* keys, const float* values) {
    const int size = l.head_dim;
    if (l.key_norm.weight) normalise<A>(l.key_norm, keys, l.kv_heads * size / l.key_norm.size);
    rotate<A>(l, b, entry.position, keys, l.kv_heads);
    const int64_t head = b.capacity * size;
    A* slot = static_cast<A*>(cache) + entry.sequence * 2 * l.kv_heads * head;
    for (int h = 0; h < l.kv_heads; ++h)
        for (int i = 0; i < size; ++i) {
            store(keys[h * size + i], slot + h * head + entry.number * size + i);
            store(values[h * size + i], slot + (l.kv_heads + h) * head + entry.number * size + i);
        }
}

inline int64_t position_of(const Batch& b, int64_t token) { return b.counts[token / b.tokens] + token % b.tokens; }

// Which tokens run a mixer, row by row, which leave K/V there, and how many K/V each sees.
template <class A>
struct Mixing {
    std::vector<int64_t> first;     // (R + 1,) the first token of a row among those that run it
    std::vector<Entry> entries;     // K/V of deferred and new tokens of the rows that run it
    std::vector<const A*> writers;  // their states
    std::vector<int64_t> seen;      // K/V that each token sees that runs it
    bool alone;                     // no other token leaves K/V

    void plan(const Task& task, const Batch& b, const A* from, const Tokens& kept) {
        const int64_t *counts = task.counts ? task.counts : b.counts, hidden = task.layer->hidden;
        const bool omit = task.parts & OMIT;
        first.clear(), entries.clear(), writers.clear(), seen.clear();
        int i = 0;
        for (int row = 0; row < b.rows; ++row) {
            first.push_back(i);
            const int64_t start = int64_t(row) * b.tokens, end = start + b.tokens, slot = b.sequences[row];
            for (; i < kept.num && kept[i] < end; ++i)
                seen.push_back(counts[row] + 1 + (omit ? i - first[row] : kept[i] - start));
            if (i == first[row]) continue;
            const int64_t deferred = task.deferred ? task.num_deferred[slot] : 0;
            const A* state = static_cast<const A*>(task.deferred) + slot * task.deferred_capacity * hidden;
            for (int64_t k = -deferred; k < 0; ++k, state += hidden) {
                writers.push_back(state);
                entries.push_back({slot, counts[row] + k, b.counts[row] + k});
            }
            for (int64_t k = 0; k < (omit ? i - first[row] : b.tokens); ++k) {
                const int64_t token = omit ? kept[int(first[row] + k)] : start + k;
                writers.push_back(from + token * hidden);
                entries.push_back({slot, counts[row] + k, position_of(b, token)});
            }
        }
        first.push_back(i);
        alone = int(writers.size()) == kept.num;
    }
};

// --- branches ----------------------------------------------------------------------------------------------------
// Every thread of the team calls these, with the same arguments; states are complete when they return.

template <class A>
void mixer(const Task& task, const Batch& b, const A* from, A* to, const Tokens& kept, const Matrix* next) {
    const Layer& l = *task.layer;
    static thread_local Mixing<A> mixing;
    mixing.plan(task, b, from, kept);
    const int num = kept.num, writers = int(mixing.writers.size()), size = l.head_dim, group = l.heads / l.kv_heads;
    const int width = l.heads * size, kv_width = l.kv_heads * size;
    float* mixed = b.workspace;
    float* queries = mixed + int64_t(num) * width;
    float* keys = queries + int64_t(num) * std::max(l.hidden, width);
    float* values = keys + int64_t(writers) * kv_width;
    Partial* parts = reinterpret_cast<Partial*>(values + int64_t(writers) * kv_width);
    const int64_t head_stride = b.capacity * size, slot_stride = 2 * l.kv_heads * head_stride;
    int splits = 1;  // the most that a row needs
    for (int row = 0; row < b.rows; ++row)
        if (const int64_t first = mixing.first[row], end = mixing.first[row + 1]; end > first)
            splits = std::max(splits, Parts(mixing.seen[first], mixing.seen[end - 1], l.window, l.kv_heads).num);
    const Packed* x = &prepared<A>(l.queries, l.mixer_norm, from, kept);
    product<A>(l.queries, *x, num, queries, &l.keys);
    const auto writer = [&](int n) { return mixing.writers[n]; };
    if (!mixing.alone || !pack_alike(l.queries.kind, l.keys.kind)) x = &prepared<A>(l.keys, l.mixer_norm, writers, writer);
    product<A>(l.keys, *x, writers, keys, &l.values);
    if (!pack_alike(l.keys.kind, l.values.kind)) x = &prepared<A>(l.values, l.mixer_norm, writers, writer);
    product<A>(l.values, *x, writers, values, &l.output);
#pragma omp barrier
#pragma omp for
    for (int item = 0; item < num + writers; ++item) {
        if (item < num) {
            float* q = queries + int64_t(item) * width;
            if (l.query_norm.weight) normalise<A>(l.query_norm, q, width / l.query_norm.size);
            rotate<A>(l, b, position_of(b, kept[item]), q, l.heads);
        } else {
            const int64_t i = item - num, start = i * kv_width;
            leave<A>(l, b, task.cache, mixing.entries[i], keys + start, values + start);
        }
    }
    const Heads heads{size, l.heads, group, l.window, l.scale, l.softcap};
#pragma omp for schedule(dynamic)
    for (int item = 0; item < b.rows * l.kv_heads * splits; ++item) {
        const int split = item % splits, h = item / splits % l.kv_heads, row = item / splits / l.kv_heads;
        const int64_t own = mixing.first[row], tokens = mixing.first[row + 1] - own;
        if (!tokens) continue;
        const int64_t* seen = &mixing.seen[own];
        const Parts own_parts(seen[0], seen[tokens - 1], l.window, l.kv_heads);
        const int64_t begin = own_parts.begin(split), end = own_parts.end(split), all = own_parts.all;
        const A* slot = static_cast<const A*>(task.cache) + b.sequences[row] * slot_stride;
        const int64_t query = own * l.heads + h * tokens * group;
        attend<A>(heads, slot + h * head_stride, slot + (l.kv_heads + h) * head_stride,
                  queries + (own * l.heads + h * group) * size, int(tokens), seen, begin, end, all, parts + query * splits + split,
                  splits, nullptr);  // the partial sums of a query are neighbours
    }
#pragma omp for
    for (int item = 0; item < num * l.heads; ++item) {
        const int i = item / l.heads, head = item % l.heads;
        const int64_t row = kept[i] / b.tokens, own = mixing.first[row], tokens = mixing.first[row + 1] - own;
        const int64_t query = own * l.heads + head / group * tokens * group + (i - own) * group + head % group;
        join(parts + query * splits, splits, size,
             [&](int k, float value) { mixed[int64_t(i) * width + head * size + k] = rounded<A>(value); });
    }
    add_product<A>(l.output, l.mixer_out_norm, mixed, from, to, queries, kept, next);
#pragma omp barrier
    if (task.deferred)
#pragma omp master
        for (int row = 0; row < b.rows; ++row)
            if (mixing.first[row + 1] > mixing.first[row]) task.num_deferred[b.sequences[row]] = 0;
}

// Stores the K/V of tokens that do not run the mixer.
template <class A>
void fill(const Layer& l, const Batch& b, void* cache, const A* from) {
    const int num = b.rows * b.tokens, kv_width = l.kv_heads * l.head_dim;
    float* keys = b.workspace;
    float* values = keys + int64_t(num) * kv_width;
    const Packed* x = &prepared<A>(l.keys, l.mixer_norm, from, Tokens{nullptr, num});
    product<A>(l.keys, *x, num, keys, &l.values);
    if (!pack_alike(l.keys.kind, l.values.kind)) x = &prepared<A>(l.values, l.mixer_norm, from, Tokens{nullptr, num});
    product<A>(l.values, *x, num, values);
#pragma omp barrier
#pragma omp for
    for (int n = 0; n < num; ++n)
        leave<A>(l, b, cache, {b.sequences[n / b.tokens], position_of(b, n), position_of(b, n)}, keys + int64_t(n) * kv_width,
                 values + int64_t(n) * kv_width);
}

// Defers the K/V of rows that do not run the mixer: their states `now` are stored. The mixer materialises the deferred K/V
// of the other rows together with the new ones; where those are too many for one call, they are materialised here.
template <class A>
void defer_or_materialise(const Task& task, const Batch& b, const A* now, const Tokens& kept) {
    const int64_t hidden = task.layer->hidden, size = b.tokens * hidden;
    int64_t room = MAX_TOKENS - int64_t(b.rows) * b.tokens;
    for (int row = 0, i = 0; row < b.rows; ++row) {
        const int first = i;
        while (i < kept.num && kept[i] < int64_t(row + 1) * b.tokens) ++i;
        A* states = static_cast<A*>(task.deferred) + b.sequences[row] * task.deferred_capacity * hidden;
        int64_t& count = task.num_deferred[b.sequences[row]];
        if (i == first) {
#pragma omp master
            std::memcpy(states + count * hidden, now + row * size, size * sizeof(A)), count += b.tokens;
            continue;
        }
        const int64_t num = count;
        room -= num;
        if (room >= 0) continue;
        room += num;
        for (int64_t done = 0; done < num; done += MAX_TOKENS) {
            const int64_t seen = b.counts[row] - num + done;
            Batch before = b;
            before.rows = 1, before.tokens = int32_t(std::min<int64_t>(MAX_TOKENS, num - done));
            before.sequences = b.sequences + row, before.counts = &seen;
            fill<A>(*task.layer, before, task.cache, states + done * hidden);
        }
#pragma omp barrier
#pragma omp master
        count = 0;
#pragma omp barrier
    }
}

// Attends with many queries of one row over the K/V of its sequence: (N, heads, head_dim) in, (N, heads · head_dim) out.
template <class A>
void attend_all(const Layer& l, const A* slot, int64_t capacity, const int64_t* seen, int num, const A* queries, A* out, bool many) {
    if (!num) return;
    constexpr int TOKENS = 16;
    const int size = l.head_dim, group = l.heads / l.kv_heads, blocks = (num + TOKENS - 1) / TOKENS;
    const Heads heads{size, l.heads, group, l.window, l.scale, l.softcap};
    const int64_t head = capacity * size, all = seen[num - 1];
    const auto first_of = [&](int token) { return l.window ? std::max<int64_t>(0, seen[token] - l.window) / CHUNK * CHUNK : 0; };
    const int64_t start = first_of(0), chunks = (all - start + CHUNK - 1) / CHUNK;
    static thread_local std::vector<int32_t> packed;
    int32_t* panels = nullptr;  // of all threads of the team: (kv_heads, keys from `start` on, size / 2)
#if defined(__AVX512BF16__)
    if (std::is_same_v<A, bf16> && size % 2 == 0 && many && num >= TOKENS) {  // else packing costs more than it saves
        if (const size_t needed = l.kv_heads * chunks * CHUNK * size / 2; packed.size() < needed) packed.resize(needed);
        panels = packed.data();
    }
#endif
#pragma omp parallel
    {
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<A, bf16>)
            if (panels)
#pragma omp for
                for (int64_t item = 0; item < l.kv_heads * chunks * (CHUNK / WIDTH); ++item) {
                    const int64_t h = item / (chunks * (CHUNK / WIDTH)), key = start + item % (chunks * (CHUNK / WIDTH)) * WIDTH;
                    const int count = int(std::clamp<int64_t>(all - key, 0, WIDTH));
                    pack_keys(slot + h * head + key * size, count, size, panels + item * WIDTH * size / 2);
                }
#endif
        std::vector<Partial> partials(TOKENS * group);
#pragma omp for schedule(dynamic)
        for (int item = blocks * l.kv_heads - 1; item >= 0; --item) {  // the longest first
            const int h = item % l.kv_heads, first = item / l.kv_heads * TOKENS, tokens = std::min(TOKENS, num - first);
            const int64_t begin = first_of(first), end = seen[first + tokens - 1];
            const int64_t place = int64_t(first) * l.heads + h * group;
            const int32_t* own = panels ? panels + (h * chunks * CHUNK - start) * size / 2 : nullptr;
            attend<A>(heads, slot + h * head, slot + (l.kv_heads + h) * head, queries + place * size, tokens, seen + first, begin,
                      end, end, partials.data(), 1, own);
            for (int q = 0; q < tokens * group; ++q)
                join(&partials[q], 1, size, [&](int i, float value) {
                    store(value, out + (place + int64_t(q / group) * l.heads + q % group) * size + i);
                });
        }
    }
}

// Replaces gates by activation(gates) · ups.
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
void ffn(const Layer& l, const A* from, A* to, float* workspace, const Tokens& kept, const Matrix* next) {
    const int rows = l.gate.rows, num = kept.num;
    float* inner = workspace;
    float* ups = inner + int64_t(num) * rows;
    float* scratch = ups + int64_t(num) * rows;
    const Packed* x = &prepared<A>(l.gate, l.ffn_norm, from, kept);
    product<A>(l.gate, *x, num, inner, &l.up);
    if (!pack_alike(l.gate.kind, l.up.kind)) x = &prepared<A>(l.up, l.ffn_norm, from, kept);
    const Range own = product<A>(l.up, *x, num, ups, &l.down);  // the same rows as before: no barrier needed
    for (int64_t start = own.begin; start < int64_t(num) * rows; start += rows)
        combine<A>(l.activation, inner + start, ups + start, own.end - own.begin);
#pragma omp barrier
    add_product<A>(l.down, l.ffn_out_norm, inner, from, to, scratch, kept, next);
#pragma omp barrier
}

// Computes the logits of a gate by the head's confidence; complete when the team returns.
template <class A>
void confidences(const Gate& gate, const Tokens& active, const A* states, float* workspace, const Matrix* next) {
    const Exit& exit = *gate.exit;
    const int size = exit.head.rows;
    const Range own = product<A>(exit.head, prepared<A>(exit.head, exit.norm, states, active), active.num, workspace, next);
    for (int n = 0; exit.softcap && n < active.num; ++n)
        for (int64_t i = int64_t(n) * size + own.begin; i < int64_t(n) * size + own.end; ++i)
            workspace[i] = rounded<A>(rounded<A>(std::tanh(rounded<A>(workspace[i] / exit.softcap))) * exit.softcap);
#pragma omp barrier
#pragma omp for
    for (int n = 0; n < active.num; ++n)
        gate.logits[active[n] * gate.stride + gate.column] = -confidence(exit.confidence, workspace + int64_t(n) * size, size);
}

// Computes the logits of a gate that compares states; complete when the team returns.
template <class A>
void deltas(const Gate& gate, const Tokens& active, const A* states, int64_t size) {
    const A* compared = static_cast<const A*>(gate.compared);
#pragma omp for
    for (int n = 0; n < active.num; ++n) {
        const A *x = states + active[n] * size, *y = compared + active[n] * size;
        double xy = 0, xx = 0, yy = 0;
        for (int64_t i = 0; i < size; ++i) xy += one(x[i]) * one(y[i]), xx += one(x[i]) * one(x[i]), yy += one(y[i]) * one(y[i]);
        gate.logits[active[n] * gate.stride + gate.column] = float(-xy / std::max(std::sqrt(xx * yy), 1e-8));
    }
}

// Computes r·f(h) + (1 − r)·h for some tokens: `to` has f(h), `before` h. Complete when the team returns.
template <class A>
void scale(const Task& task, const Tokens& kept, A* to) {
    const int64_t size = task.layer->hidden;
    const A* before = static_cast<const A*>(task.before);
#pragma omp for
    for (int n = 0; n < kept.num; ++n) {
        const float r = rounded<A>(2.0f / (1.0f + std::exp(-task.scales[kept[n]]))), rest = rounded<A>(1.0f - r);
        A* own = to + kept[n] * size;
        const A* old = before + kept[n] * size;
        for (int64_t i = 0; i < size; ++i) store(rounded<A>(r * one(own[i])) + rounded<A>(rest * one(old[i])), own + i);
    }
}

// Puts the active tokens that pass a gate into `kept`. `next`: the linear layer that is read after it.
template <class A>
Tokens through(const Gate& gate, const Tokens& active, const A* states, int num, int64_t size, float* workspace,
               std::vector<int64_t>& kept, const Matrix* next) {
    if (gate.compared) deltas(gate, active, states, size);
    if (gate.network) logits_of(*gate.network, states, num, gate.logits, workspace);
    if (gate.exit) confidences(gate, active, states, workspace, next);
    if (gate.column < 0) return active;
    std::vector<int64_t> open;
    for (int i = 0; i < active.num; ++i)
        if (gate.logits[active[i] * gate.stride + gate.column] > (gate.thresholds ? gate.thresholds[active[i]] : gate.threshold))
            open.push_back(active[i]);
    kept.swap(open);  // `active` may point to `kept`
    return {kept.data(), int(kept.size())};
}

// The linear layers that a task reads first, after its gate and with it.
inline const Matrix* after_gate(const Task& task) { return task.parts & MIXER ? &task.layer->queries : &task.layer->gate; }
inline const Matrix* first_read(const Task& task) { return task.gate.exit ? &task.gate.exit->head : after_gate(task); }

// Runs tasks one after the other on (R·T, hidden) states.
template <class A>
void run(const Task* tasks, int n, const Batch& b, const A* from, A* to) {
    const int num = b.rows * b.tokens;
    const size_t size = size_t(num) * tasks[0].layer->hidden;
    const auto is_partial = [](const Task& t) { return t.mixed || t.fed || t.gate.logits || t.gate_of_ffn.logits; };
    if (std::any_of(tasks, tasks + n, is_partial)) {
        std::memcpy(to, from, size * sizeof(A));  // for the tokens that a branch does not change
        from = to;
    }
#pragma omp parallel
    {
        static thread_local std::vector<int64_t> not_exited, layer_kept, ffn_kept;
        const A* now = from;
        Tokens all{nullptr, num};  // that have not exited
        for (const Task* task = tasks; task < tasks + n; ++task) {
            const Matrix* next = task + 1 < tasks + n ? first_read(task[1]) : nullptr;
            if (task->captured) {  // no thread writes states before the next barrier
#pragma omp master
                std::memcpy(task->captured, now, size * sizeof(A));
            }
            Tokens mixed = task->mixed ? Tokens{task->mixed, int(task->num_mixed)} : all;
            Tokens fed = task->fed ? Tokens{task->fed, int(task->num_fed)} : all;
            if (task->gate.logits && all.num) {
                auto& kept = task->parts & EXIT ? not_exited : layer_kept;
                mixed = through(task->gate, all, now, num, task->layer->hidden, b.workspace, kept, after_gate(*task));
                if (!(task->parts & ALONE)) fed = mixed;
                if (task->parts & EXIT) all = mixed;
            }
            const Tokens scaled{mixed.list, task->scale ? mixed.num : 0};
            if (scaled.num) {
                logits_of(*task->scale, now, num, task->scales, b.workspace);
#pragma omp master
                std::memcpy(task->before, now, size * sizeof(A));
            }
            if (!(task->parts & MIXER)) mixed.num = 0;
            if (task->deferred) defer_or_materialise(*task, b, now, mixed);
            if (mixed.num) {
                mixer<A>(*task, b, now, to, mixed, task->parts & FFN ? &task->layer->gate : next);
                now = to;
            }
            if (task->parts & FFN && fed.num) {
                if (task->gate_of_ffn.logits)
                    fed = through(task->gate_of_ffn, fed, now, num, task->layer->hidden, b.workspace, ffn_kept, &task->layer->gate);
                if (fed.num) ffn<A>(*task->layer, now, to, b.workspace, fed, next);
                if (fed.num) now = to;
            }
            if (scaled.num) scale(*task, scaled, to);
        }
#pragma omp master
        if (now != to) std::memcpy(to, now, size * sizeof(A));
    }
}

// Computes products of the same inputs for many tokens, their outputs side by side.
template <class A>
void linear(const Matrix* parts, int num_parts, const Norm& norm, const A* from, A* to, int num, Then then, const A* other) {
    static thread_local Packed own;
    Packed& x = own;  // of all threads of the team
    int64_t stride = 0;
    for (int part = 0; part < num_parts; ++part) stride += parts[part].rows;
#pragma omp parallel
    {
        static thread_local std::vector<float> state;
        int64_t column = 0;
        for (const Matrix* w = parts; w < parts + num_parts; column += w++->rows) {
            if (w == parts || !pack_alike(w[-1].kind, w->kind)) {
#pragma omp barrier
#pragma omp single
                make_room(x, w->kind, num, w->cols);
                state.resize(w->cols);
#pragma omp for
                for (int n = 0; n < num; ++n) {
                    read_state<A>(norm, from + int64_t(n) * w->cols, w->cols, state.data());
                    pack(x, w->kind, state.data(), n, w->cols);
                }
            }
            multiply(*w, x, num, Output<A, A>{to + column, stride, then, other ? other + column : nullptr});
        }
    }
}

}  // namespace

// --- C interface -------------------------------------------------------------------------------------------------

extern "C" {

// Returns how many floats of workspace a call may need.
int64_t anydepth_workspace(const Layer* l) {
    const int64_t num_tokens = MAX_TOKENS, width = int64_t(l->heads) * l->head_dim, kv_width = int64_t(l->kv_heads) * l->head_dim;
    const int64_t parts = num_tokens * l->heads * MAX_SPLITS * (sizeof(Partial) / sizeof(float));
    const int64_t mixed = num_tokens * (width + std::max<int64_t>(l->hidden, width) + 2 * kv_width);
    return std::max(mixed + parts, num_tokens * (l->hidden + 2 * l->gate.rows));
}

void anydepth_run(const Task* tasks, int32_t n, const Batch* b, const void* from, void* to) {
    if (tasks[0].layer->in_bf16)
        run<bf16>(tasks, n, *b, static_cast<const bf16*>(from), static_cast<bf16*>(to));
    else
        run<float>(tasks, n, *b, static_cast<const float*>(from), static_cast<float*>(to));
}

void anydepth_fill(const Layer* l, void* cache, const Batch* b, const void* from) {
#pragma omp parallel
    if (l->in_bf16)
        fill<bf16>(*l, *b, cache, static_cast<const bf16*>(from));
    else
        fill<float>(*l, *b, cache, static_cast<const float*>(from));
}

// `many`: of a pass of many tokens, in which a token's bits may depend on the others.
void anydepth_attend(const Layer* l, const void* slot, int64_t capacity, const int64_t* seen, int32_t num, const void* queries,
                     void* out, int32_t many) {
    if (l->in_bf16)
        attend_all<bf16>(*l, static_cast<const bf16*>(slot), capacity, seen, num, static_cast<const bf16*>(queries),
                         static_cast<bf16*>(out), many);
    else
        attend_all<float>(*l, static_cast<const float*>(slot), capacity, seen, num, static_cast<const float*>(queries),
                          static_cast<float*>(out), many);
}

void anydepth_linear(const Matrix* parts, int32_t num_parts, const Norm* norm, const void* from, void* to, int32_t num_tokens,
                     int32_t in_bf16, int32_t then, const void* other) {
    if (in_bf16)
        linear(parts, num_parts, *norm, static_cast<const bf16*>(from), static_cast<bf16*>(to), num_tokens, Then(then),
               static_cast<const bf16*>(other));
    else
        linear(parts, num_parts, *norm, static_cast<const float*>(from), static_cast<float*>(to), num_tokens, Then(then),
               static_cast<const float*>(other));
}

// Computes (tokens, G) logits of (tokens, D) states.
void anydepth_evaluate(const Network* net, const void* from, float* logits, float* workspace, int32_t num_tokens,
                       int32_t in_bf16) {
#pragma omp parallel
    if (in_bf16)
        logits_of(*net, static_cast<const bf16*>(from), num_tokens, logits, workspace);
    else
        logits_of(*net, static_cast<const float*>(from), num_tokens, logits, workspace);
}

// Reads memory at full speed: the bound that the kernels are measured against.
int64_t anydepth_read(const void* memory, int64_t num_bytes) {
    int64_t total = 0;
    const char* start = static_cast<const char*>(memory);
#pragma omp parallel for reduction(+ : total) schedule(static)
    for (int64_t page = 0; page < num_bytes / 4096; ++page) {
        ints sum = {};
        for (const char* at = start + page * 4096; at < start + (page + 1) * 4096; at += 64) {
            __builtin_prefetch(at + AHEAD);
            sum += load<ints>(at);
        }
        for (int k = 0; k < WIDTH; ++k) total += sum[k];
    }
    return total;
}

int32_t anydepth_sizes(int32_t which) {  // for the check that both sides have the same structs and bounds
    const int32_t sizes[] = {sizeof(Matrix), sizeof(Norm), sizeof(Layer), sizeof(Rotation), sizeof(Batch), sizeof(Task),
                             sizeof(Dense), sizeof(Network), MAX_TOKENS, MAX_HEAD_DIM, int32_t(MAX_WIDTH),
                             CHUNK, MAX_SPLITS, sizeof(Exit)};
    return sizes[which];
}

}  // extern "C"
