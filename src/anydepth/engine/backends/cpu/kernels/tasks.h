// What `native.py` asks for: layers, batches of tokens and the tasks of a pass. The structs on both sides must match.
#pragma once

#include "confidence.h"
#include "network.h"
#include "product.h"

extern "C" {

struct Norm {  // x / rms(x) · weight + bias, over `size` values; none if weight is null
    const float* weight;
    const float* bias;  // null for none
    float eps;
    int32_t size;
    int32_t stride;   // between the weights of neighbouring vectors, 0 if they have the same
    int32_t centred;  // x less its mean (LayerNorm)
};

struct Layer {
    Matrix queries, keys, values, output, gate, up, down;  // `up` without weights: an FFN without a gate
    Norm mixer_norm, mixer_out_norm, ffn_norm, ffn_out_norm, query_norm, key_norm, shared_norm;
    const float* sinks;  // (heads,) scores of a key without a value that every query sees; null for none
    int32_t hidden, heads, kv_heads, head_dim, window, activation, in_bf16;
    int32_t rotation;       // index into the batch's rotary embeddings, -1 for none
    int32_t interleaved;    // neighbours are rotated, not halves
    int32_t norms_rotated;  // queries and keys are normalised after they are rotated
    int32_t parallel;       // the FFN reads the layer's input, by the shared norm if there is one
    float scale, softcap;
    float factor;  // of what a branch adds
    float clip;    // bound on the values of queries, keys and values, 0 for none
};

struct Rotation {  // (positions, size) each, in the activations' type
    const void* cos;
    const void* sin;
    int64_t size;
};

struct Batch {  // new tokens of R rows, one row after the other
    int32_t rows, unused;
    const int64_t* starts;     // (R + 1,) the first token of each row, and the number N of all
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
    const void* compared;    // or this: minus the cosine of the state and of that in (N, hidden) is the logit
    float* logits;           // (N, stride), stored for the caller
    int64_t column;          // -1: the network is evaluated for later layers, and every token passes
    int64_t stride;
    const float* thresholds;  // (N,) one for each token; null: `threshold` is for all
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
    void* captured;        // (N, hidden), where the layer's input is stored for the caller; null: nowhere
    const Network* scale;  // r = 2·σ(logit) multiplies what the layer adds to tokens that pass its gate; null: r = 1
    float* scales;         // (N,) its logits, stored for the caller
    void* before;          // (N, hidden) workspace of a scaled layer, or for what the FFN of a parallel layer reads
    Gate gate, gate_of_ffn;   // of the layer, if `mixed` and `fed` are null; and of the FFN
};

}  // extern "C"
