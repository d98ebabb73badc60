// The small networks that gates decide with (`methods/gate_network.py`), in float32, for a few tokens.
#pragma once

#include <cmath>
#include <vector>

#include <omp.h>

#include "numbers.h"

extern "C" {

struct Dense {  // (rows, cols) row by row, bias (rows,) or none
    const float* weight;
    const float* bias;
    int64_t rows, cols;
};

struct Network {
    const float* norm_weight;
    const float* norm_bias;
    const Dense* mlp;  // GELU between them
    int64_t mlp_size;
    Dense direct;
    float eps;
};

}  // extern "C"

namespace {

constexpr int64_t MAX_WIDTH = 8192;  // of a layer of the MLP

// (num, size) states to (num, size) values of mean 0 and variance 1, scaled and shifted. Every thread makes its own.
template <class A>
const float* standardised(const Network& net, const A* from, int num) {
    static thread_local std::vector<float> x;
    const int64_t size = net.direct.cols;
    x.resize(num * size);
    for (int n = 0; n < num; ++n) {
        float* own = &x[n * size];
        double mean = 0, square = 0;
        for (int64_t i = 0; i < size; ++i) own[i] = one(from[n * size + i]), mean += own[i];
        mean /= size;
        for (int64_t i = 0; i < size; ++i) square += (own[i] - mean) * (own[i] - mean);
        const float factor = float(1.0 / std::sqrt(square / size + net.eps));
        for (int64_t i = 0; i < size; ++i)
            own[i] = (own[i] - float(mean)) * factor * net.norm_weight[i] + net.norm_bias[i];
    }
    return x.data();
}

// (num, rows) products of (num, cols) inputs, onto what `out` holds if `add`. The team shares the rows; no barrier.
inline void dense(const Dense& map, const float* x, int num, float* out, bool add, bool gelu) {
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t row = map.rows * me / threads; row < map.rows * (me + 1) / threads; ++row)
        for (int n = 0; n < num; ++n) {
            float value = dot(map.weight + row * map.cols, x + n * map.cols, int(map.cols));
            if (map.bias) value += map.bias[row];
            if (gelu) value *= 0.5f * (1.0f + std::erf(value * 0.70710678f));
            float& to = out[n * map.rows + row];
            to = add ? to + value : value;
        }
}

// (num, G) logits, whole when the team returns. `workspace`: 2 · num · MAX_WIDTH floats.
template <class A>
void logits_of(const Network& net, const A* from, int num, float* logits, float* workspace) {
    const float* x = standardised(net, from, num);
    dense(net.direct, x, num, logits, false, false);
    for (int64_t i = 0; i < net.mlp_size; ++i) {
        const bool last = i + 1 == net.mlp_size;
        float* to = last ? logits : workspace + (i % 2) * num * MAX_WIDTH;
        dense(net.mlp[i], x, num, to, last, !last);
        x = to;
#pragma omp barrier
    }
#pragma omp barrier
}

}  // namespace
