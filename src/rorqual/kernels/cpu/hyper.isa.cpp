#include "hyper_kernel.h"

#include "simd.h"

namespace rorqual {
namespace ISA_NAMESPACE {

namespace {

constexpr int64_t kMostStreams = 16;

inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// ---- Sinkhorn over 4 x 4: one matrix is one vector, row-major --------------------------------

inline Vec over_rows(Vec a) {
    a = a + swap1(a);
    return a + swap2(a);
}

inline Vec over_columns(Vec a) {
    a = a + swap8(a);
    return a + swap4(a);
}

// `count` independent matrices side by side: one alone would wait for its own divisions.
template <int COUNT>
void sinkhorn4(float* matrices, int64_t apart, int64_t iterations, float eps) {
    const Vec small = Vec::all(eps);
    Vec a[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        const Vec logit = Vec::load(matrices + i * apart);
        Vec top = max(logit, swap1(logit));
        top = max(top, swap2(top));
        const Vec e = exp(logit - top);
        a[i] = e / over_rows(e) + small;
    }
    for (int i = 0; i < COUNT; ++i) a[i] = a[i] / (over_columns(a[i]) + small);
    for (int64_t n = 1; n < iterations; ++n) {
        for (int i = 0; i < COUNT; ++i) a[i] = a[i] / (over_rows(a[i]) + small);
        for (int i = 0; i < COUNT; ++i) a[i] = a[i] / (over_columns(a[i]) + small);
    }
    for (int i = 0; i < COUNT; ++i) a[i].store(matrices + i * apart);
}

void divide_rows(float* a, int64_t m, float eps) {
    for (int64_t i = 0; i < m; ++i) {
        float total = 0;
        for (int64_t j = 0; j < m; ++j) total += a[i * m + j];
        for (int64_t j = 0; j < m; ++j) a[i * m + j] /= total + eps;
    }
}

void divide_columns(float* a, int64_t m, float eps) {
    for (int64_t j = 0; j < m; ++j) {
        float total = 0;
        for (int64_t i = 0; i < m; ++i) total += a[i * m + j];
        for (int64_t i = 0; i < m; ++i) a[i * m + j] /= total + eps;
    }
}

// Any number of streams.
void sinkhorn(float* a, int64_t m, int64_t iterations, float eps) {
    for (int64_t i = 0; i < m; ++i) {
        float* row = a + i * m;
        float top = row[0], total = 0;
        for (int64_t j = 1; j < m; ++j) top = row[j] > top ? row[j] : top;
        for (int64_t j = 0; j < m; ++j) total += row[j] = expf(row[j] - top);
        for (int64_t j = 0; j < m; ++j) row[j] = row[j] / total + eps;
    }
    divide_columns(a, m, eps);
    for (int64_t n = 1; n < iterations; ++n) {
        divide_rows(a, m, eps);
        divide_columns(a, m, eps);
    }
}

template <int M>
void write_row(const float* f, const float* post, const float* comb, int64_t m, int64_t width,
               bool bf16, float* streams) {
    const int64_t count = M ? M : m;
    for (int64_t i = 0; i < width; i += kLanes) {
        const int lanes = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
        const Vec out = load_some(f + i, lanes);
        Vec before[M ? M : kMostStreams];
        for (int64_t j = 0; j < count; ++j) before[j] = load_some(streams + j * width + i, lanes);
        for (int64_t k = 0; k < count; ++k) {
            Vec v = Vec::all(post[k]) * out;
            for (int64_t j = 0; j < count; ++j) v = fma(Vec::all(comb[j * count + k]), before[j], v);
            store_some(bf16 ? round_bf16(v) : v, streams + k * width + i, lanes);
        }
    }
}

}  // namespace

void inverse_rms(const float* x, int64_t rows, int64_t width, float eps, float* out) {
    for (int64_t r = 0; r < rows; ++r, x += width) {
        Vec squares[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
        int64_t i = 0;
        for (; i + 4 * kLanes <= width; i += 4 * kLanes)
            for (int part = 0; part < 4; ++part) {
                const Vec v = Vec::load(x + i + part * kLanes);
                squares[part] = fma(v, v, squares[part]);
            }
        for (; i < width; i += kLanes) {
            const Vec v = load_some(x + i, width - i < kLanes ? static_cast<int>(width - i) : kLanes);
            squares[0] = fma(v, v, squares[0]);
        }
        const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
        out[r] = 1.0f / sqrtf(total / static_cast<float>(width) + eps);
    }
}

void mix(const HyperShape& shape, const float* logits, int64_t stride, const float* rms,
         const float* scale, const float* base, int64_t rows, float* pre, float* mixing) {
    const int64_t m = shape.streams, columns = m + m * m;
    for (int64_t r = 0; r < rows; ++r) {
        const float* in = logits + r * stride;
        float* post = mixing + r * columns;
        for (int64_t j = 0; j < m; ++j) {
            pre[r * m + j] = sigmoid(in[j] * rms[r] * scale[0] + base[j]) + shape.eps;
            post[j] = 2.0f * sigmoid(in[m + j] * rms[r] * scale[1] + base[m + j]);
        }
        for (int64_t j = 2 * m; j < 2 * m + m * m; ++j)
            post[j - m] = in[j] * rms[r] * scale[2] + base[j];
    }
    int64_t r = 0;
    if (m == 4) {
        for (; r + 4 <= rows; r += 4)
            sinkhorn4<4>(mixing + r * columns + m, columns, shape.iterations, shape.eps);
        for (; r < rows; ++r)
            sinkhorn4<1>(mixing + r * columns + m, columns, shape.iterations, shape.eps);
    }
    for (; r < rows; ++r)
        sinkhorn(mixing + r * columns + m, m, shape.iterations, shape.eps);
}

void merge_coefficients(const HyperShape& shape, const float* logits, int64_t stride,
                        const float* rms, float scale, const float* base, int64_t rows,
                        float* pre) {
    const int64_t m = shape.streams;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < m; ++j)
            pre[r * m + j] =
                sigmoid(logits[r * stride + j] * rms[r] * scale + base[j]) + shape.eps;
}

void read(const HyperShape& shape, const float* streams, const float* pre, int64_t rows,
          float* u) {
    const int64_t m = shape.streams, width = shape.hidden;
    for (int64_t r = 0; r < rows; ++r, streams += m * width, pre += m, u += width) {
        for (int64_t i = 0; i < width; i += kLanes) {
            const int lanes = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
            Vec v = Vec::zero();
            for (int64_t j = 0; j < m; ++j)
                v = fma(Vec::all(pre[j]), load_some(streams + j * width + i, lanes), v);
            store_some(shape.bf16 ? round_bf16(v) : v, u + i, lanes);
        }
    }
}

void write(const HyperShape& shape, const float* output, const float* mixing, int64_t rows,
           float* streams) {
    const int64_t m = shape.streams, width = shape.hidden;
    for (int64_t r = 0; r < rows; ++r) {
        const float* post = mixing + r * (m + m * m);
        const auto row = m == 4 ? write_row<4> : write_row<0>;
        row(output + r * width, post, post + m, m, width, shape.bf16, streams + r * m * width);
    }
}

}  // namespace ISA_NAMESPACE
}  // namespace rorqual
