#include "elementwise.h"

#include "codes.h"
#include "simd.h"

namespace rorqual {
namespace ISA_NAMESPACE {

namespace {

// Calls f(offset, lanes) for whole vectors, then for the rest of `count`.
template <class F>
inline void by_vectors(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
    if (i < count) f(i, static_cast<int>(count - i));
}

}  // namespace

void rms_norm(const float* x, int64_t rows, int64_t ldx, int64_t width, const float* weight,
              float eps, bool bf16, float* y, int64_t ldy) {
    for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy) {
        Vec squares = Vec::zero();
        by_vectors(width, [&](int64_t i, int lanes) {
            const Vec v = load_some(x + i, lanes);
            squares = fma(v, v, squares);
        });
        const float scale = 1.0f / sqrtf(sum(squares) / static_cast<float>(width) + eps);
        by_vectors(width, [&](int64_t i, int lanes) {
            Vec v = load_some(x + i, lanes) * Vec::all(scale);
            if (weight) v = v * load_some(weight + i, lanes);
            store_some(bf16 ? round_bf16(v) : v, y + i, lanes);
        });
    }
}

void rotate(float* x, int64_t rows, int64_t ldx, int64_t heads, int64_t head_dim,
            const float* cos, const float* sin, int64_t pairs, bool inverse, bool bf16) {
    const float sign = inverse ? -1.0f : 1.0f;
    for (int64_t r = 0; r < rows; ++r, x += ldx, cos += pairs, sin += pairs) {
        for (int64_t h = 0; h < heads; ++h) {
            float* turned = x + (h + 1) * head_dim - 2 * pairs;
            for (int64_t i = 0; i < pairs; ++i) {
                const float c = cos[i], s = sign * sin[i];
                const float even = turned[2 * i], odd = turned[2 * i + 1];
                const float a = even * c - odd * s, b = even * s + odd * c;
                turned[2 * i] = bf16 ? from_bf16(to_bf16(a)) : a;
                turned[2 * i + 1] = bf16 ? from_bf16(to_bf16(b)) : b;
            }
        }
    }
}

void swiglu(float* gate, const float* up, int64_t count, float limit, float weight,
            bool bf16) {
    const Vec high = Vec::all(limit), low = Vec::all(-limit), one = Vec::all(1.0f);
    by_vectors(count, [&](int64_t i, int lanes) {
        const Vec g = min(load_some(gate + i, lanes), high);
        const Vec u = max(min(load_some(up + i, lanes), high), low);
        const Vec v = g / (one + exp(Vec::zero() - g)) * u * Vec::all(weight);
        store_some(bf16 ? round_bf16(v) : v, gate + i, lanes);
    });
}

void round_to_bf16(float* x, int64_t count) {
    by_vectors(count, [&](int64_t i, int lanes) {
        store_some(round_bf16(load_some(x + i, lanes)), x + i, lanes);
    });
}

void simulate_fp8(const float* x, int64_t width, int64_t block, float* y) {
    for (int64_t first = 0; first < width; first += block) {
        const int64_t count = width - first < block ? width - first : block;
        const float scale = scale_value(fp8_scale(x + first, count));
        for (int64_t i = first; i < first + count; ++i)
            y[i] = from_fp8(to_fp8(x[i] / scale)) * scale;
    }
}

void add_rows(const float* x, const int64_t* index, int64_t count, int64_t width, bool bf16,
              float* y) {
    by_vectors(width, [&](int64_t i, int lanes) {
        Vec total = load_some(x + index[0] * width + i, lanes);
        for (int64_t n = 1; n < count; ++n)
            total = total + load_some(x + index[n] * width + i, lanes);
        total = total + load_some(y + i, lanes);
        store_some(bf16 ? round_bf16(total) : total, y + i, lanes);
    });
}

void expand_bf16(const uint16_t* x, int64_t count, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Vec::load_bf16(x + i).store(y + i);
    for (; i < count; ++i) y[i] = from_bf16(x[i]);
}

}  // namespace ISA_NAMESPACE
}  // namespace rorqual
