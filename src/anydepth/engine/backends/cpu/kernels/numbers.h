// Vectors of floats, bfloat16 and float16, and rounding between them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Where the processor's vectors are shorter, the compiler uses several.
constexpr int WIDTH = 16;
typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uints __attribute__((vector_size(4 * WIDTH)));

inline floats all(float value) {
#if defined(__AVX512F__)
    return floats(_mm512_set1_ps(value));
#else
    return floats{} + value;
#endif
}

inline float one(float value) { return value; }
inline float one(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    return load<float>(&bits);
}

inline float one(f16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    if (!exponent) return (sign ? -1.0f : 1.0f) * std::ldexp(float(fraction), -24);  // zero, or below the normal numbers
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    return load<float>(&bits);
}

// WIDTH values as floats. Compilers turn plain conversion loops into far worse code than the processor can run.
inline floats wide(const float* from) { return load<floats>(from); }
inline floats wide(const bf16* from) {
#if defined(__AVX512BW__)
    return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16));
#else
    floats values;
    for (int i = 0; i < WIDTH; ++i) values[i] = one(from[i]);
    return values;
#endif
}

inline floats wide(const f16* from) {
#if defined(__AVX512F__)
    return floats(_mm512_cvtph_ps(load<__m256i>(from)));
#else
    floats values;
    for (int i = 0; i < WIDTH; ++i) values[i] = one(from[i]);
    return values;
#endif
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, bf16* to) {
    uint32_t bits = load<uint32_t>(&value);
    bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    to->bits = uint16_t(bits >> 16);
}
inline void store(float value, f16* to) {
    const float size = std::fabs(value);
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (!(size < 65520.0f)) {  // infinity, or no number
        to->bits = sign | (size != size ? 0x7e00 : 0x7c00);
    } else if (size < 6.103515625e-05f) {  // below the normal numbers: in steps of 2^-24, ties to even
        to->bits = sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
    } else {
        uint32_t bits = load<uint32_t>(&size);
        bits += 0xfff + ((bits >> 13) & 1);  // to the nearest, ties to even
        to->bits = sign | uint16_t((bits >> 13) - (112 << 10));
    }
}
template <class A>
inline float rounded(float value) {
    A kept;
    store(value, &kept);
    return one(kept);
}

// The same of WIDTH values, and up to WIDTH values from memory and back.
template <class A>
inline floats rounded(const floats& values);
template <>
inline floats rounded<float>(const floats& values) {
    return values;
}
template <>
inline floats rounded<bf16>(const floats& values) {
    const uints bits = uints(values);
    return floats((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

template <class A>
inline floats some(const A* from, int num) {
    if (num >= WIDTH) return wide(from);
    A padded[WIDTH] = {};
    std::memcpy(padded, from, num * sizeof(A));
    return wide(padded);
}

inline void store_some(const floats& values, int num, float* to) {
    if (num == WIDTH)
        std::memcpy(to, &values, sizeof values);
    else
        std::memcpy(to, &values, num * sizeof(float));
}
inline void store_some(const floats& values, int num, bf16* to) {
    typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
    const halves narrow = __builtin_convertvector(uints(rounded<bf16>(values)) >> 16, halves);
    if (num == WIDTH)
        std::memcpy(to, &narrow, sizeof narrow);
    else
        std::memcpy(to, &narrow, num * sizeof(bf16));
}

inline float sum(const floats& values) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(__m512(values));
#else
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += values[i];
    return total;
#endif
}

inline float largest(const floats& values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(__m512(values));
#else
    float most = values[0];
    for (int i = 1; i < WIDTH; ++i) most = values[i] > most ? values[i] : most;
    return most;
#endif
}

// a · b + c, rounded once. Where a token's bits must not depend on how many others there are, products and sums are these: a
// compiler is free to fuse the same expression in one loop and not in another.
inline floats multiply_add(const floats& a, const floats& b, const floats& c) {
#if defined(__AVX512F__)
    return floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
    floats sums;
    for (int half = 0; half < 2; ++half) {
        const auto part = [half](const floats& x) { return load<__m256>(reinterpret_cast<const char*>(&x) + 32 * half); };
        const __m256 sum = _mm256_fmadd_ps(part(a), part(b), part(c));
        std::memcpy(reinterpret_cast<char*>(&sums) + 32 * half, &sum, 32);
    }
    return sums;
#else
    floats sums;
    for (int i = 0; i < WIDTH; ++i) sums[i] = std::fma(a[i], b[i], c[i]);
    return sums;
#endif
}

inline float dot(const float* a, const float* b, int size) {
    floats acc = {};
    int i = 0;
    for (; i + WIDTH <= size; i += WIDTH) acc += wide(a + i) * wide(b + i);
    float total = sum(acc);
    for (; i < size; ++i) total += a[i] * b[i];
    return total;
}

// e^x for x <= 0, to 2 units in the last place of float32 (Cephes' polynomial).
inline floats exponential(floats x) {
    x = x < -87.0f ? floats{} - 87.0f : x;
    const ints k = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);  // truncation rounds to the nearest here
    const floats whole = __builtin_convertvector(k, floats);
    const floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints scale = (k + 127) << 23;
    return p * load<floats>(&scale);
}

inline floats sigmoid(floats x) {
    const floats e = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : floats{} + 1.0f) / (1.0f + e);
}

enum Activation : int32_t { SILU, GELU_TANH, GELU, RELU2 };

inline floats activated(int kind, floats x) {
    if (kind == RELU2) return x > 0.0f ? x * x : floats{};
    if (kind == GELU) {
        for (int k = 0; k < WIDTH; ++k) x[k] *= 0.5f + 0.5f * std::erf(x[k] * 0.70710678f);
        return x;
    }
    return x * sigmoid(kind == SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x));
}

}  // namespace
