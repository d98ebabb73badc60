// Mixers: which tokens run them, the K/V that tokens leave or defer, and attention for the few tokens of a pass.
#pragma once

#include "attention.h"
#include "states.h"

namespace {

// Rotates the heads of a token by its position, in place: halves, or neighbours.
template <class A>
void rotate(const Layer& l, const Batch& b, int64_t place, float* heads, int num) {
    if (l.rotation < 0) return;
    const Rotation& rotation = b.rotations[l.rotation];
    const A* cos = static_cast<const A*>(rotation.cos) + place * rotation.size;
    const A* sin = static_cast<const A*>(rotation.sin) + place * rotation.size;
    const int half = int(rotation.size / 2), step = l.interleaved ? 2 : 1, partner = l.interleaved ? 1 : half;
    for (int h = 0; h < num; ++h, heads += l.head_dim)
        for (int i = 0; i < half; ++i) {
            float &first = heads[i * step], &second = heads[i * step + partner];
            const float x = first, y = second;
            first = rounded<A>(rounded<A>(x * one(cos[i])) + rounded<A>(-y * one(sin[i])));
            second = rounded<A>(rounded<A>(y * one(cos[i + half])) + rounded<A>(x * one(sin[i + half])));
        }
}

// Clips queries, keys or values of a token, in place.
template <class A>
void clip(const Layer& l, float* heads, int num) {
    if (!l.clip) return;
    const float most = rounded<A>(l.clip);
    for (int i = 0; i < num * l.head_dim; ++i) heads[i] = std::clamp(heads[i], -most, most);
}

// Normalises, clips and rotates queries or keys of a token, in place.
template <class A>
void place(const Layer& l, const Batch& b, const Norm& norm, int64_t position, float* heads, int num) {
    const auto normalised = [&] {
        if (norm.weight) normalise<A>(norm, heads, num * l.head_dim / norm.size);
    };
    if (!l.norms_rotated) normalised();
    clip<A>(l, heads, num);
    rotate<A>(l, b, position, heads, num);
    if (l.norms_rotated) normalised();
}

// Where a token's K/V are stored: after `number` K/V, and at which position.
struct Entry {
    int64_t sequence, number, position;
};

// Stores the keys, rotated, and values of a token in the cache.
template <class A>
void leave(const Layer& l, const Batch& b, void* cache, const Entry& entry, float* keys, float* values) {
    const int size = l.head_dim;
    place<A>(l, b, l.key_norm, entry.position, keys, l.kv_heads);
    clip<A>(l, values, l.kv_heads);
    const int64_t head = b.capacity * size;
    A* slot = static_cast<A*>(cache) + entry.sequence * 2 * l.kv_heads * head;
    for (int h = 0; h < l.kv_heads; ++h)
        for (int i = 0; i < size; ++i) {
            store(keys[h * size + i], slot + h * head + entry.number * size + i);
            store(values[h * size + i], slot + (l.kv_heads + h) * head + entry.number * size + i);
        }
}

inline int row_of(const Batch& b, int64_t token) {
    int row = 0;
    while (token >= b.starts[row + 1]) ++row;
    return row;
}

inline int64_t position_of(const Batch& b, int64_t token) {
    const int row = row_of(b, token);
    return b.counts[row] + token - b.starts[row];
}

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
            const int64_t start = b.starts[row], end = b.starts[row + 1], slot = b.sequences[row];
            for (; i < kept.num && kept[i] < end; ++i)
                seen.push_back(counts[row] + 1 + (omit ? i - first[row] : kept[i] - start));
            if (i == first[row]) continue;
            const int64_t deferred = task.deferred ? task.num_deferred[slot] : 0;
            const A* state = static_cast<const A*>(task.deferred) + slot * task.deferred_capacity * hidden;
            for (int64_t k = -deferred; k < 0; ++k, state += hidden) {
                writers.push_back(state);
                entries.push_back({slot, counts[row] + k, b.counts[row] + k});
            }
            for (int64_t k = 0; k < (omit ? i - first[row] : end - start); ++k) {
                const int64_t token = omit ? kept[int(first[row] + k)] : start + k;
                writers.push_back(from + token * hidden);
                entries.push_back({slot, counts[row] + k, position_of(b, token)});
            }
        }
        first.push_back(i);
        alone = int(writers.size()) == kept.num;
    }
};

// Runs the mixer for the tokens `kept`. Every thread of the team calls it, with the same arguments; states are complete when it
// returns.
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
            splits = std::max(splits, Parts(mixing.seen[first], mixing.seen[end - 1], l.window).num);
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
            place<A>(l, b, l.query_norm, position_of(b, kept[item]), queries + int64_t(item) * width, l.heads);
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
        const Parts own_parts(seen[0], seen[tokens - 1], l.window);
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
        const int64_t row = row_of(b, kept[i]), own = mixing.first[row], tokens = mixing.first[row + 1] - own;
        const int64_t query = own * l.heads + head / group * tokens * group + (i - own) * group + head % group;
        join(parts + query * splits, splits, size, l.sinks ? l.sinks + head : nullptr,
             [&](int k, float value) { mixed[int64_t(i) * width + head * size + k] = rounded<A>(value); });
    }
    add_product<A>(l.output, l.mixer_out_norm, l.factor, mixed, from, to, queries, kept, next);
#pragma omp barrier
    if (task.deferred)
#pragma omp master
        for (int row = 0; row < b.rows; ++row)
            if (mixing.first[row + 1] > mixing.first[row]) task.num_deferred[b.sequences[row]] = 0;
}

// Stores the K/V of tokens that do not run the mixer.
template <class A>
void fill(const Layer& l, const Batch& b, void* cache, const A* from) {
    const int num = int(b.starts[b.rows]), kv_width = l.kv_heads * l.head_dim;
    float* keys = b.workspace;
    float* values = keys + int64_t(num) * kv_width;
    const Packed* x = &prepared<A>(l.keys, l.mixer_norm, from, Tokens{nullptr, num});
    product<A>(l.keys, *x, num, keys, &l.values);
    if (!pack_alike(l.keys.kind, l.values.kind)) x = &prepared<A>(l.values, l.mixer_norm, from, Tokens{nullptr, num});
    product<A>(l.values, *x, num, values);
#pragma omp barrier
#pragma omp for
    for (int n = 0; n < num; ++n)
        leave<A>(l, b, cache, {b.sequences[row_of(b, n)], position_of(b, n), position_of(b, n)}, keys + int64_t(n) * kv_width,
                 values + int64_t(n) * kv_width);
}

// Defers the K/V of rows that do not run the mixer: their states `now` are stored. The mixer materialises the deferred K/V
// of the other rows together with the new ones; where those are too many for one call, they are materialised here.
template <class A>
void defer_or_materialise(const Task& task, const Batch& b, const A* now, const Tokens& kept) {
    const int64_t hidden = task.layer->hidden;
    int64_t room = MAX_TOKENS - b.starts[b.rows];
    for (int row = 0, i = 0; row < b.rows; ++row) {
        const int first = i;
        const int64_t start = b.starts[row], tokens = b.starts[row + 1] - start;
        while (i < kept.num && kept[i] < start + tokens) ++i;
        A* states = static_cast<A*>(task.deferred) + b.sequences[row] * task.deferred_capacity * hidden;
        int64_t& count = task.num_deferred[b.sequences[row]];
        if (i == first) {
#pragma omp master
            std::memcpy(states + count * hidden, now + start * hidden, tokens * hidden * sizeof(A)), count += tokens;
            continue;
        }
        const int64_t num = count;
        room -= num;
        if (room >= 0) continue;
        room += num;
        for (int64_t done = 0; done < num; done += MAX_TOKENS) {
            const int64_t seen = b.counts[row] - num + done;
            Batch before = b;
            const int64_t starts[] = {0, std::min<int64_t>(MAX_TOKENS, num - done)};
            before.rows = 1, before.starts = starts;
            before.sequences = b.sequences + row, before.counts = &seen;
            fill<A>(*task.layer, before, task.cache, states + done * hidden);
        }
#pragma omp barrier
#pragma omp master
        count = 0;
#pragma omp barrier
    }
}

}  // namespace
