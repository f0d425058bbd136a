#include "attention.h"

#include "simd.h"

namespace rorqual::ISA_NAMESPACE {

namespace {

// Eight lanes: a full vector of heads in models with few of them.
struct Half {
#if defined(__AVX2__)
    __m256 v;
    static Half zero() { return {_mm256_setzero_ps()}; }
    static Half all(float x) { return {_mm256_set1_ps(x)}; }
    static Half load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    friend Half operator+(Half a, Half b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Half operator-(Half a, Half b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Half operator*(Half a, Half b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Half max(Half a, Half b) { return {_mm256_max_ps(a.v, b.v)}; }
    friend Half fma(Half a, Half b, Half c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
#else
    float v[8];
    static Half zero() { return {}; }
    static Half all(float x) {
        Half r;
        for (float& lane : r.v) lane = x;
        return r;
    }
    static Half load(const float* p) {
        Half r;
        memcpy(r.v, p, sizeof r.v);
        return r;
    }
    void store(float* p) const { memcpy(p, v, sizeof v); }
#define RORQUAL_HALF(expression) \
    Half r;                      \
    for (int i = 0; i < 8; ++i) r.v[i] = expression; \
    return r
    friend Half operator+(Half a, Half b) { RORQUAL_HALF(a.v[i] + b.v[i]); }
    friend Half operator-(Half a, Half b) { RORQUAL_HALF(a.v[i] - b.v[i]); }
    friend Half operator*(Half a, Half b) { RORQUAL_HALF(a.v[i] * b.v[i]); }
    friend Half max(Half a, Half b) { RORQUAL_HALF(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
    friend Half fma(Half a, Half b, Half c) { RORQUAL_HALF(a.v[i] * b.v[i] + c.v[i]); }
#undef RORQUAL_HALF
#endif
};

// Registers: as many independent sums as hide the latency of an FMA, and no more than fit.
#if defined(__AVX512F__)
constexpr int kWideEntries = 8, kHeadRows = 4, kDimVectors = 4;
#else
constexpr int kWideEntries = 4, kHeadRows = 4, kDimVectors = 1;
#endif
constexpr int kHalfEntries = 8;

// logits[j][h] = scale * sum_c entries[j][c] query[c][h]; a lane is a head. Works on whole groups of
// kEntries: the last entry fills the last group.
template <class V, int kEntries>
void dot_products(const AttentionShape& shape, const float* query, const float* const* entries,
                  int64_t count, float* logits) {
    const int64_t padded = shape.padded_heads();
    const V scale = V::all(shape.scale);
    for (int64_t h = 0; h < padded; h += static_cast<int64_t>(sizeof(V) / sizeof(float)))
        for (int64_t j = 0; j < count; j += kEntries) {
            V dot[kEntries];
            const float* from[kEntries];
            for (int i = 0; i < kEntries; ++i) {
                dot[i] = V::zero();
                from[i] = entries[j + i < count ? j + i : count - 1];
            }
            for (int64_t c = 0; c < shape.dim; ++c) {
                const V q = V::load(query + c * padded + h);
                for (int i = 0; i < kEntries; ++i) dot[i] = fma(V::all(from[i][c]), q, dot[i]);
            }
            for (int i = 0; i < kEntries; ++i)
                (dot[i] * scale).store(logits + (j + i) * padded + h);
        }
}

// From logits to weights relative to the largest logit so far: updates it and the total in `state`,
// writes what earlier sums are to be multiplied by to `factor`.
template <class V>
void online_softmax(int64_t padded, int64_t count, float* logits, float* factor, float* state) {
    constexpr int kChains = 4;  // independent, to hide latency; a fixed order all the same
    constexpr int kStep = static_cast<int>(sizeof(V) / sizeof(float));
    for (int64_t h = 0; h < padded; h += kStep) {
        const V before = V::load(state + h);
        V best[kChains] = {before, before, before, before};
        for (int64_t j = 0; j < count; ++j)
            best[j % kChains] = max(best[j % kChains], V::load(logits + j * padded + h));
        const V top = max(max(best[0], best[1]), max(best[2], best[3]));
        (before - top).store(factor + h);
        top.store(state + h);
        for (int64_t j = 0; j < count; ++j) {
            float* logit = logits + j * padded + h;
            (V::load(logit) - top).store(logit);
        }
    }
    for (int64_t h = 0; h < padded; h += kLanes) exp(Vec::load(factor + h)).store(factor + h);
    for (int64_t i = 0; i < count * padded; i += kLanes)
        exp(Vec::load(logits + i)).store(logits + i);
    for (int64_t h = 0; h < padded; h += kStep) {
        float* total = state + padded + h;
        V sums[kChains] = {V::load(total) * V::load(factor + h), V::zero(), V::zero(), V::zero()};
        for (int64_t j = 0; j < count; ++j)
            sums[j % kChains] = sums[j % kChains] + V::load(logits + j * padded + h);
        ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(total);
    }
}

// out[h] = out[h] * factor[h] + sum_j weights[j][h] entries[j] for kHeads heads, kVectors * 16 dims
// from `first` on.
template <int kHeads, int kVectors>
void add_values(const float* const* entries, int64_t first, int64_t stride, int64_t count,
                const float* weights, int64_t padded, const float* factor, float* out) {
    Vec sums[kHeads][kVectors];
    for (int h = 0; h < kHeads; ++h)
        for (int v = 0; v < kVectors; ++v)
            sums[h][v] = Vec::load(out + h * stride + v * kLanes) * Vec::all(factor[h]);
    for (int64_t j = 0; j < count; ++j) {
        Vec values[kVectors];
        for (int v = 0; v < kVectors; ++v)
            values[v] = Vec::load(entries[j] + first + v * kLanes);
        for (int h = 0; h < kHeads; ++h) {
            const Vec weight = Vec::all(weights[j * padded + h]);
            for (int v = 0; v < kVectors; ++v) sums[h][v] = fma(weight, values[v], sums[h][v]);
        }
    }
    for (int h = 0; h < kHeads; ++h)
        for (int v = 0; v < kVectors; ++v) sums[h][v].store(out + h * stride + v * kLanes);
}

template <int kHeads>
void add_values_of(const AttentionShape& shape, int64_t head, const float* const* entries,
                   int64_t count, const float* weights, const float* factor, float* out) {
    const int64_t stride = shape.stride(), padded = shape.padded_heads();
    int64_t c = 0;
    for (; c + kDimVectors * kLanes <= stride; c += kDimVectors * kLanes)
        add_values<kHeads, kDimVectors>(entries, c, stride, count, weights + head, padded,
                                        factor + head, out + head * stride + c);
    for (; c < stride; c += kLanes)
        add_values<kHeads, 1>(entries, c, stride, count, weights + head, padded, factor + head,
                              out + head * stride + c);
}

}  // namespace

// A state is the largest logit so far and the total weight, [padded] each, then [heads, stride].
void begin_query(const AttentionShape& shape, const float* q, const float* sink, float* query,
                 float* state) {
    const int64_t padded = shape.padded_heads();
    float *top = state, *total = state + padded, *out = state + 2 * padded + 16;
    for (int64_t c = 0; c < shape.dim; ++c) {
        for (int64_t h = 0; h < shape.heads; ++h) query[c * padded + h] = q[h * shape.dim + c];
        for (int64_t h = shape.heads; h < padded; ++h) query[c * padded + h] = 0;
    }
    for (int64_t h = 0; h < padded; ++h) {
        top[h] = h < shape.heads ? sink[h] : 0;
        total[h] = 1;
    }
    memset(out, 0, sizeof(float) * static_cast<size_t>(shape.heads * shape.stride()));
}

void attend_tile(const AttentionShape& shape, const float* query, const float* const* entries,
                 int64_t count, float* state, float* logits) {
    const int64_t heads = shape.heads, padded = shape.padded_heads();
    float* out = state + 2 * padded + 16;
    float* factor = logits + (kTileEntries + kTileSlack - 1) * padded;  // behind the last group
    if (padded % kLanes == 0) {
        dot_products<Vec, kWideEntries>(shape, query, entries, count, logits);
        online_softmax<Vec>(padded, count, logits, factor, state);
    } else {
        dot_products<Half, kHalfEntries>(shape, query, entries, count, logits);
        online_softmax<Half>(padded, count, logits, factor, state);
    }
    if (shape.bf16_weights)
        for (int64_t i = 0; i < count * padded; i += kLanes)
            round_bf16(Vec::load(logits + i)).store(logits + i);

    int64_t h = 0;
    for (; h + kHeadRows <= heads; h += kHeadRows)
        add_values_of<kHeadRows>(shape, h, entries, count, logits, factor, out);
    for (; h < heads; ++h) add_values_of<1>(shape, h, entries, count, logits, factor, out);
}

void end_query(const AttentionShape& shape, const float* state, float* out) {
    const int64_t padded = shape.padded_heads(), stride = shape.stride();
    const float *total = state + padded, *sums = state + 2 * padded + 16;
    for (int64_t h = 0; h < shape.heads; ++h)
        for (int64_t c = 0; c < shape.dim; ++c)
            out[h * shape.dim + c] = sums[h * stride + c] / total[h];
}

}  // namespace rorqual::ISA_NAMESPACE
