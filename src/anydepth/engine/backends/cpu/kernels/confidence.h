// A head's confidence in a token, from its logits (`methods/early_exit.py`).
#pragma once

#include <algorithm>
#include <cmath>

#include "numbers.h"

extern "C" {

enum Confidence : int32_t { MAX_PROBABILITY, MARGIN, ENTROPY };

}  // extern "C"

namespace {

// The two largest of some logits.
struct Largest {
    float first = -INFINITY, second = -INFINITY;
    void add(float logit) {
        second = std::max(second, std::min(first, logit));
        first = std::max(first, logit);
    }
};

inline Largest largest_of(const float* logits, int size) {
    floats firsts = floats{} - INFINITY, seconds = firsts;
    int i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        const floats some = wide(logits + i), less = firsts < some ? firsts : some;
        seconds = seconds > less ? seconds : less;
        firsts = firsts > some ? firsts : some;
    }
    Largest largest;
    for (int k = 0; k < WIDTH; ++k) largest.add(firsts[k]), largest.add(seconds[k]);
    for (; i < size; ++i) largest.add(logits[i]);
    return largest;
}

inline float confidence(Confidence kind, const float* logits, int size) {
    const Largest largest = largest_of(logits, size);
    floats sums = {}, weighed = {};  // of e^x, and of x e^x
    int i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        const floats x = wide(logits + i) - largest.first, e = exponential(x);
        sums += e;
        if (kind == ENTROPY) weighed += x * e;
    }
    float total = sum(sums), weight = sum(weighed);
    for (; i < size; ++i) {
        const float x = logits[i] - largest.first, e = std::exp(x);
        total += e, weight += x * e;
    }
    if (kind == MAX_PROBABILITY) return 1.0f / total;
    if (kind == MARGIN) return (1.0f - std::exp(largest.second - largest.first)) / total;
    return 1.0f + (weight / total - std::log(total)) / std::log(float(size));
}

}  // namespace
