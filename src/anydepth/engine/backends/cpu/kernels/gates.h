// Gates: their logits, the tokens that pass them, and the scale of what a layer adds.
#pragma once

#include "states.h"

namespace {

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

}  // namespace
