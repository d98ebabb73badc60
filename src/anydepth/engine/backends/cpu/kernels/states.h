// States of a few tokens: normalised, packed as inputs of linear layers, and added to.
#pragma once

#include <cmath>
#include <cstring>

#include "tasks.h"

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
        const float* weight = norm.weight + int64_t(n) * norm.stride;
        if (norm.centred) {
            double total = 0;
            for (int i = 0; i < norm.size; ++i) total += x[i];
            for (int i = 0; i < norm.size; ++i) x[i] -= float(total / norm.size);
        }
        const float factor = 1.0f / std::sqrt(dot(x, x, norm.size) / norm.size + norm.eps);
        for (int i = 0; i < norm.size; i += WIDTH) {
            const int count = std::min(WIDTH, norm.size - i);
            floats scaled = some(x + i, count) * factor;
            if (!norm.centred) scaled = rounded<A>(scaled);  // as the model does
            scaled *= some(weight + i, count);
            if (norm.bias) scaled += some(norm.bias + i, count);
            store_some(rounded<A>(scaled), count, x + i);
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

// Adds x Wᵀ + b of some tokens, normalised if there is a norm and times a factor, to the residual stream.
// `scratch`: (tokens, rows).
template <class A>
void add_product(const Matrix& w, const Norm& out_norm, float factor, const float* x, const A* residual, A* to, float* scratch,
                 const Tokens& tokens, const Matrix* next) {
    const auto add = [&](int n, int begin, int end) {
        const int64_t start = tokens[n] * w.rows, own = int64_t(n) * w.rows;
        for (int i = begin; i < end; ++i)
            store(one(residual[start + i]) + rounded<A>(factor * scratch[own + i]), to + start + i);
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

}  // namespace
