// The small networks that gates decide with (`gating/gate_network.py`), in float32, for a few tokens.
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

constexpr int64_t MAX_WIDTH = 8192;  // outputs of a layer of the MLP

// Returns (num, size) states with mean 0 and variance 1, scaled and shifted. Every thread computes its own copy.
template <class A>
const float* standardised(const Network& net, const A* from, int num) {
    static thread_local std::vector<float> x;
    const int64_t size = net.direct.cols;
    x.resize(num * size);
    for (int n = 0; n < num; ++n) {
        float* own = &x[n * size];
        const A* row = from + n * size;
        floats sums[4] = {};  // separate sums, which the processor adds in parallel
        int64_t i = 0;
        for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
            for (int k = 0; k < 4; ++k) {
                const floats some = wide(row + i + k * WIDTH);
                std::memcpy(own + i + k * WIDTH, &some, sizeof some);
                sums[k] += some;
            }
        float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; i < size; ++i) own[i] = one(row[i]), mean += own[i];
        mean /= size;
        for (int64_t k = 0; k < size; ++k) own[k] -= mean;
        const float factor = 1.0f / std::sqrt(dot(own, own, int(size)) / size + net.eps);
        for (int64_t k = 0; k < size; ++k) own[k] = own[k] * factor * net.norm_weight[k] + net.norm_bias[k];
    }
    return x.data();
}

// Writes (num, rows) products of (num, cols) inputs to `out`, or adds them. The team shares the rows; no barrier.
inline void dense(const Dense& layer, const float* x, int num, float* out, bool add, bool gelu) {
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t row = layer.rows * me / threads; row < layer.rows * (me + 1) / threads; ++row)
        for (int n = 0; n < num; ++n) {
            float value = dot(layer.weight + row * layer.cols, x + n * layer.cols, int(layer.cols));
            if (layer.bias) value += layer.bias[row];
            if (gelu) value *= 0.5f * (1.0f + std::erf(value * 0.70710678f));
            float& to = out[n * layer.rows + row];
            to = add ? to + value : value;
        }
}

// Computes (num, G) logits; complete when the team returns. `workspace`: 2 · num · MAX_WIDTH floats.
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
