// Decoding kernels: layers of a Llama-like decoder for a few tokens.
//
// Weights are read once for all tokens (`product.h`); sums are in float32, and results are rounded to the activations'
// type where the Hugging Face model rounds them. `native.py` compiles this file for the machine that it runs on, and calls
// it through a C interface.

#include "blocks.h"
#include "gates.h"
#include "mixer.h"

namespace {

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
                join(&partials[q], 1, size, l.sinks ? l.sinks + h * group + q % group : nullptr, [&](int i, float value) {
                    store(value, out + (place + int64_t(q / group) * l.heads + q % group) * size + i);
                });
        }
    }
}

// Replaces gates by activation(gates) · ups, or activation(gates) if there are none.
template <class A>
void combine(int kind, float* gates, const float* ups, int size) {
    for (int i = 0; i < size; i += WIDTH) {
        float some[WIDTH] = {};
        const int count = std::min(WIDTH, size - i);
        std::memcpy(some, gates + i, count * sizeof(float));
        const floats values = activated(kind, wide(some));
        for (int k = 0; k < count; ++k) gates[i + k] = rounded<A>(values[k]);
        for (int k = 0; ups && k < count; ++k) gates[i + k] = rounded<A>(gates[i + k] * ups[i + k]);
    }
}

// Adds the FFN of states `read` to the residual stream `from`.
template <class A>
void ffn(const Layer& l, const A* read, const A* from, A* to, float* workspace, const Tokens& kept, const Matrix* next) {
    const int rows = l.gate.rows, num = kept.num;
    float* inner = workspace;
    float* ups = inner + int64_t(num) * rows;
    float* scratch = ups + int64_t(num) * rows;
    const bool gated = l.up.weight;
    const Packed* x = &prepared<A>(l.gate, l.ffn_norm, read, kept);
    const Range own = product<A>(l.gate, *x, num, inner, gated ? &l.up : &l.down);
    if (gated && !pack_alike(l.gate.kind, l.up.kind)) x = &prepared<A>(l.up, l.ffn_norm, read, kept);
    if (gated) product<A>(l.up, *x, num, ups, &l.down);  // the same rows as before: no barrier needed
    for (int64_t start = own.begin; start < int64_t(num) * rows; start += rows)
        combine<A>(l.activation, inner + start, gated ? ups + start : nullptr, own.end - own.begin);
#pragma omp barrier
    add_product<A>(l.down, l.ffn_out_norm, l.factor, inner, from, to, scratch, kept, next);
#pragma omp barrier
}

// Stores what the FFN of a parallel layer reads, before the mixer changes it. Complete when the team returns.
template <class A>
void keep_input(const Layer& l, const A* from, A* to, int num) {
    static thread_local std::vector<float> state;
    state.resize(l.hidden);
#pragma omp for
    for (int n = 0; n < num; ++n) {
        read_state<A>(l.shared_norm, from + int64_t(n) * l.hidden, l.hidden, state.data());
        for (int i = 0; i < l.hidden; ++i) store(state[i], to + int64_t(n) * l.hidden + i);
    }
}

// Runs tasks one after the other on (N, hidden) states.
template <class A>
void run(const Task* tasks, int n, const Batch& b, const A* from, A* to) {
    const int num = int(b.starts[b.rows]);
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
            const A* read = nullptr;  // by the FFN of a parallel layer
            if (task->layer->parallel && task->parts & FFN && fed.num) {
                read = static_cast<const A*>(task->before);
                keep_input(*task->layer, now, static_cast<A*>(task->before), num);
            }
            if (!(task->parts & MIXER)) mixed.num = 0;
            if (task->deferred) defer_or_materialise(*task, b, now, mixed);
            if (mixed.num) {
                mixer<A>(*task, b, now, to, mixed, task->parts & FFN ? &task->layer->gate : next);
                now = to;
            }
            if (task->parts & FFN && fed.num) {
                if (!read) read = now;
                if (task->gate_of_ffn.logits)
                    fed = through(task->gate_of_ffn, fed, read, num, task->layer->hidden, b.workspace, ffn_kept, &task->layer->gate);
                if (fed.num) ffn<A>(*task->layer, read, now, to, b.workspace, fed, next);
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
                             CHUNK, PARTS, sizeof(Exit)};
    return sizes[which];
}

}  // extern "C"
