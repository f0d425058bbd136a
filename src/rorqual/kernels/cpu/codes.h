// Single values in the small number formats: BF16, FP8 e4m3, FP4 e2m1, power-of-two scales (e8m0).
//
// Branch-free, so that loops over them vectorise. Internal linkage: every instruction set gets its
// own copies. Rounding is to nearest, ties to even, as kernels/reference.py defines it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace rorqual {

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const uint32_t nan = (bits & 0x7FFFFFFF) > 0x7F800000;  // rounding up could make it an infinity
    return static_cast<uint16_t>(nan ? (bits >> 16 | 0x40) : rounded);
}

static inline float from_bf16(uint16_t code) { return float_of(static_cast<uint32_t>(code) << 16); }

// 2^ceil(log2 x) of a positive normal x as a biased exponent; 255 (NaN) for what is not finite.
static inline uint32_t scale_code(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t up = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
    return up > 255 ? 255 : up;
}

static inline float scale_value(uint32_t code) { return float_of(code << 23); }

// Largest magnitude; infinite or NaN where any value is, since it compares bits.
static inline float largest(const float* x, int64_t count) {
    uint32_t top = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        top = magnitude > top ? magnitude : top;
    }
    return float_of(top);
}

constexpr float kFp8Max = 448.0f, kFp4Max = 6.0f;

static inline uint32_t fp8_scale(const float* x, int64_t count) {
    const float top = largest(x, count);
    return scale_code((top < 1e-4f ? 1e-4f : top) / kFp8Max);
}

static inline uint32_t fp4_scale(const float* x, int64_t count) {
    const float top = largest(x, count);
    constexpr float smallest = 6.0f * 0x1p-126f;
    return scale_code((top < smallest ? smallest : top) / kFp4Max);
}

static inline uint8_t to_fp8(float x) {
    const uint32_t sign = bits_of(x) >> 24 & 0x80;
    const float magnitude = fabsf(x) < kFp8Max ? fabsf(x) : kFp8Max;
    const uint32_t bits = bits_of(magnitude);
    const uint32_t normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120u << 3);
    // Below 2^-6 codes count steps of 2^-9, which is what 2^14 has as its last bit.
    const uint32_t small = bits_of(magnitude + 0x1p14f) - bits_of(0x1p14f);
    return static_cast<uint8_t>(sign | (magnitude < 0x1p-6f ? small : normal));
}

static inline float from_fp8(uint32_t code) {
    const uint32_t magnitude = code & 0x7F;
    const float normal = float_of((magnitude << 20) + (120u << 23));
    const float small = float_of((magnitude << 20) + (121u << 23)) - 0x1p-6f;
    return float_of(bits_of(magnitude < 8 ? small : normal) | (code & 0x80) << 24);
}

static inline uint32_t to_fp4(float x) {
    const float m = fabsf(x);
    const uint32_t code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                          (m >= 3.5f) + (m > 5.0f);
    return code | (bits_of(x) >> 28 & 8);
}

// Exact: an e2m1 code is a two-bit exponent and one bit of mantissa.
static inline float from_fp4(uint32_t code) {
    const uint32_t magnitude = code & 7;
    const float value = magnitude < 2 ? 0.5f * static_cast<float>(magnitude)
                                      : float_of((magnitude << 22) + (126u << 23));
    return float_of(bits_of(value) | (code & 8) << 28);
}

}  // namespace rorqual
