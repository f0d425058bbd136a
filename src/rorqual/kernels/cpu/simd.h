// A vector of 16 floats per instruction set, for *.isa.cpp only.
//
// Always 16 lanes - one AVX-512 register, two of AVX2, an array otherwise - so that lane-wise code
// and reductions take the same order, hence give the same bits, on AVX2 and AVX-512.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "codes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rorqual {
namespace ISA_NAMESPACE {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct Vec {
    __m512 v;
    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const float* p, int n) {  // lanes from n on are 0 and not read
        return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
    }
    static Vec load_bf16(const uint16_t* p) {
        __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
    static Vec load_i8(const int8_t* p) {
        __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
    }
    // e4m3 bytes, divided by kE4m3: the bits are those of a half whose exponent is 8 too small.
    // Halves below the normal range convert exactly, so subnormals need no case of their own.
    static constexpr float kE4m3 = 256.0f;
    static Vec load_e4m3(const uint8_t* p) {
        __m256i half = _mm256_slli_epi16(
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
        half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbfff)));
        return {_mm512_cvtph_ps(half)};
    }
    // 16 e2m1 codes: the low (0) or high (1) nibbles of 16 bytes.
    template <int HIGH>
    static Vec load_e2m1(const uint8_t* p) {
        __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        __m512i code = _mm512_cvtepu8_epi32(HIGH ? _mm_srli_epi16(b, 4) : b);
        const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                             -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
        return {_mm512_permutexvar_ps(code, values)};  // looks at the low four bits only
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(float* p, int n) const {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
    }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    friend Vec round(Vec a) {
        return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    // a * 2^n for whole n in the range of exponents.
    friend Vec scale_by_power(Vec a, Vec n) {
        __m512i e = _mm512_slli_epi32(
            _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
        return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(e))};
    }
    // Lanes (i ^ 1), (i ^ 2), (i ^ 4), (i ^ 8).
    friend Vec swap1(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
    friend Vec swap2(Vec a) { return {_mm512_permute_ps(a.v, 0x4e)}; }
    friend Vec swap4(Vec a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)}; }
    friend Vec swap8(Vec a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)}; }
    // To BF16, nearest even; NaN is not kept apart.
    friend void store_bf16(Vec a, uint16_t* p) {
        __m512i x = _mm512_castps_si512(a.v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
        x = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
    }
    friend Vec round_bf16(Vec a) {
        __m512i x = _mm512_castps_si512(a.v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
        x = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        return {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)))};
    }
};

#elif defined(__AVX2__)

struct Vec {
    __m256 a, b;
    static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Vec load(const float* p, int n) {
        float t[16] = {};
        memcpy(t, p, sizeof(float) * static_cast<size_t>(n));
        return load(t);
    }
    static __m256 widen(__m128i h) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    static Vec load_bf16(const uint16_t* p) {
        return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
    }
    static Vec load_i8(const int8_t* p) {
        __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
    }
    static constexpr float kE4m3 = 256.0f;  // see above
    static Vec load_e4m3(const uint8_t* p) {
        __m256i half = _mm256_slli_epi16(
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
        half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbfff)));
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
                _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
    }
    // 16 e2m1 codes: the low (0) or high (1) nibbles of 16 bytes.
    template <int HIGH>
    static Vec load_e2m1(const uint8_t* p) {
        __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        b = _mm_and_si128(HIGH ? _mm_srli_epi16(b, 4) : b, _mm_set1_epi8(15));
        const __m128i doubled =
            _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
        b = _mm_shuffle_epi8(doubled, b);
        Vec wide{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
                 _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
        return wide * all(0.5f);
    }
    void store(float* p) const {
        _mm256_storeu_ps(p, a);
        _mm256_storeu_ps(p + 8, b);
    }
    void store(float* p, int n) const {
        float t[16];
        store(t);
        memcpy(p, t, sizeof(float) * static_cast<size_t>(n));
    }
    friend Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    friend Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    friend Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    friend Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    friend Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    friend Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    friend Vec fma(Vec x, Vec y, Vec z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    friend Vec round(Vec x) {
        constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
    }
    static __m256 power(__m256 n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(
            _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
    }
    friend Vec scale_by_power(Vec x, Vec n) { return x * Vec{power(n.a), power(n.b)}; }
    friend Vec swap1(Vec x) { return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)}; }
    friend Vec swap2(Vec x) { return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)}; }
    friend Vec swap4(Vec x) {
        return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    }
    friend Vec swap8(Vec x) { return {x.b, x.a}; }
    static __m256i rounded(__m256 f) {
        __m256i x = _mm256_castps_si256(f);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    }
    friend void store_bf16(Vec x, uint16_t* p) {
        __m256i pair = _mm256_packus_epi32(_mm256_srli_epi32(rounded(x.a), 16),
                                           _mm256_srli_epi32(rounded(x.b), 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(pair, 0xd8));
    }
    friend Vec round_bf16(Vec x) {
        __m256i mask = _mm256_set1_epi32(-65536);
        return {_mm256_castsi256_ps(_mm256_and_si256(rounded(x.a), mask)),
                _mm256_castsi256_ps(_mm256_and_si256(rounded(x.b), mask))};
    }
};

#else

#define RORQUAL_LANES for (int i = 0; i < 16; ++i)

struct Vec {
    float v[16];
    static Vec zero() { return {}; }
    static Vec all(float x) {
        Vec r;
        RORQUAL_LANES r.v[i] = x;
        return r;
    }
    static Vec load(const float* p) {
        Vec r;
        memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static Vec load(const float* p, int n) {
        Vec r{};
        memcpy(r.v, p, sizeof(float) * static_cast<size_t>(n));
        return r;
    }
    static Vec load_bf16(const uint16_t* p) {
        Vec r;
        RORQUAL_LANES r.v[i] = from_bf16(p[i]);
        return r;
    }
    static Vec load_i8(const int8_t* p) {
        Vec r;
        RORQUAL_LANES r.v[i] = p[i];
        return r;
    }
    static constexpr float kE4m3 = 1.0f;
    static Vec load_e4m3(const uint8_t* p) {
        Vec r;
        RORQUAL_LANES r.v[i] = from_fp8(p[i]);
        return r;
    }
    template <int HIGH>
    static Vec load_e2m1(const uint8_t* p) {
        Vec r;
        RORQUAL_LANES r.v[i] = from_fp4(HIGH ? p[i] >> 4 : p[i]);
        return r;
    }
    void store(float* p) const { memcpy(p, v, sizeof v); }
    void store(float* p, int n) const { memcpy(p, v, sizeof(float) * static_cast<size_t>(n)); }
#define RORQUAL_LANEWISE(expression)  \
    Vec r;                            \
    RORQUAL_LANES r.v[i] = expression; \
    return r
    friend Vec operator+(Vec a, Vec b) { RORQUAL_LANEWISE(a.v[i] + b.v[i]); }
    friend Vec operator-(Vec a, Vec b) { RORQUAL_LANEWISE(a.v[i] - b.v[i]); }
    friend Vec operator*(Vec a, Vec b) { RORQUAL_LANEWISE(a.v[i] * b.v[i]); }
    friend Vec operator/(Vec a, Vec b) { RORQUAL_LANEWISE(a.v[i] / b.v[i]); }
    friend Vec min(Vec a, Vec b) { RORQUAL_LANEWISE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
    friend Vec max(Vec a, Vec b) { RORQUAL_LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
    friend Vec fma(Vec a, Vec b, Vec c) { RORQUAL_LANEWISE(a.v[i] * b.v[i] + c.v[i]); }
    friend Vec round(Vec a) { RORQUAL_LANEWISE(nearbyintf(a.v[i])); }
    friend Vec scale_by_power(Vec a, Vec n) {
        RORQUAL_LANEWISE(a.v[i] *
                         float_of(static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23));
    }
    friend Vec swap1(Vec a) { RORQUAL_LANEWISE(a.v[i ^ 1]); }
    friend Vec swap2(Vec a) { RORQUAL_LANEWISE(a.v[i ^ 2]); }
    friend Vec swap4(Vec a) { RORQUAL_LANEWISE(a.v[i ^ 4]); }
    friend Vec swap8(Vec a) { RORQUAL_LANEWISE(a.v[i ^ 8]); }
    friend void store_bf16(Vec a, uint16_t* p) {
        RORQUAL_LANES p[i] = to_bf16(a.v[i]);
    }
    friend Vec round_bf16(Vec a) { RORQUAL_LANEWISE(from_bf16(to_bf16(a.v[i]))); }
#undef RORQUAL_LANEWISE
};
#undef RORQUAL_LANES

#endif

// The first `lanes` of 16; whole vectors without the cost of a mask.
inline Vec load_some(const float* p, int lanes) {
    return lanes == kLanes ? Vec::load(p) : Vec::load(p, lanes);
}

inline void store_some(Vec v, float* p, int lanes) {
    if (lanes == kLanes)
        v.store(p);
    else
        v.store(p, lanes);
}

// Sum of the 16 lanes, always in the same tree.
inline float sum(Vec a) {
    a = a + swap8(a);
    a = a + swap4(a);
    a = a + swap2(a);
    a = a + swap1(a);
    float out[16];
    a.store(out);
    return out[0];
}

inline float max_of(Vec a) {
    a = max(a, swap8(a));
    a = max(a, swap4(a));
    a = max(a, swap2(a));
    a = max(a, swap1(a));
    float out[16];
    a.store(out);
    return out[0];
}

// e^x to about 1 ulp; 0 below -87, no larger than e^88 above. NaN is not kept.
inline Vec exp(Vec x) {
    const Vec low = Vec::all(-87.33654f);
    const Vec clamped = min(max(x, low), Vec::all(88.0f));
    const Vec n = round(clamped * Vec::all(1.44269504f));
    Vec r = fma(n, Vec::all(-0.693359375f), clamped);
    r = fma(n, Vec::all(2.12194440e-4f), r);
    Vec p = fma(Vec::all(1.9875691500e-4f), r, Vec::all(1.3981999507e-3f));
    p = fma(p, r, Vec::all(8.3334519073e-3f));
    p = fma(p, r, Vec::all(4.1665795894e-2f));
    p = fma(p, r, Vec::all(1.6666665459e-1f));
    p = fma(p, r, Vec::all(5.0000001201e-1f));
    p = fma(p, r * r, r + Vec::all(1.0f));
    return scale_by_power(p, n);
}

}  // namespace ISA_NAMESPACE
}  // namespace rorqual
