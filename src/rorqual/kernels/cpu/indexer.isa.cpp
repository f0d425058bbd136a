#include "indexer.h"

#include "codes.h"
#include "simd.h"

namespace rorqual::ISA_NAMESPACE {

namespace {

constexpr int kInt8Row = 4 * kBlockKeys;  // bytes of 4 dims of a block's keys

// Twice an FP4 value, plus 16 to be unsigned.
constexpr int kFp4Bias = 16;
alignas(16) constexpr uint8_t kFp4Codes[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                               16, 15, 14, 13, 12, 10, 8,  4};

// Sums of 16 keys, and the 4 dims of 16 keys that are added at a time. `load_int8` biases codes by
// kInt8Bias; a sum starts at what the bias makes of the query's codes.
#if defined(__AVX512VNNI__)

constexpr int kVectors = 2;  // of 16 keys at once

struct Quad {
    __m512i codes;
};

struct Ints {
    static constexpr int kInt8Bias = 128;
    __m512i v;
    static Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Quad load_int8(const uint8_t* p) {
        return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
    }
    static void load_fp4(const uint8_t* p, Quad& low, Quad& high) {
        const __m512i table = _mm512_broadcast_i32x4(
            _mm_load_si128(reinterpret_cast<const __m128i*>(kFp4Codes)));
        const __m512i bytes = _mm512_loadu_si512(p), nibble = _mm512_set1_epi8(15);
        low.codes = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, nibble));
        high.codes =
            _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble));
    }
    static Ints add_int8(Ints sum, Quad keys, int32_t query) {
        return {_mm512_dpbusd_epi32(sum.v, keys.codes, _mm512_set1_epi32(query))};
    }
    static Ints add_fp4(Ints sum, Quad keys, int32_t query) { return add_int8(sum, keys, query); }
    Vec floats() const { return {_mm512_cvtepi32_ps(v)}; }
};

#elif defined(__AVX2__)

constexpr int kVectors = 1;

struct Quad {
    __m256i a, b;            // codes
    __m256i size_a, size_b;  // their magnitudes
};

struct Ints {
    static constexpr int kInt8Bias = 0;
    __m256i a, b;
    static Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static __m256i load(const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static Quad load_int8(const uint8_t* p) {
        const __m256i a = load(p), b = load(p + 32);
        return {a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
    }
    static void load_fp4(const uint8_t* p, Quad& low, Quad& high) {
        const __m256i table = _mm256_broadcastsi128_si256(
            _mm_load_si128(reinterpret_cast<const __m128i*>(kFp4Codes)));
        const __m256i a = load(p), b = load(p + 32), nibble = _mm256_set1_epi8(15);
        low.a = _mm256_shuffle_epi8(table, _mm256_and_si256(a, nibble));
        low.b = _mm256_shuffle_epi8(table, _mm256_and_si256(b, nibble));
        high.a = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble));
        high.b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble));
    }
    // Two products of magnitudes up to 127 fit 16 bits; the key's sign moves to the query.
    static __m256i add(__m256i sum, __m256i unsigned_codes, __m256i signed_codes) {
        const __m256i pairs = _mm256_maddubs_epi16(unsigned_codes, signed_codes);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Ints add_int8(Ints sum, const Quad& keys, int32_t query) {
        const __m256i q = _mm256_set1_epi32(query);
        return {add(sum.a, keys.size_a, _mm256_sign_epi8(q, keys.a)),
                add(sum.b, keys.size_b, _mm256_sign_epi8(q, keys.b))};
    }
    static Ints add_fp4(Ints sum, const Quad& keys, int32_t query) {
        const __m256i q = _mm256_set1_epi32(query);
        return {add(sum.a, keys.a, q), add(sum.b, keys.b, q)};
    }
#if defined(__AVX512F__)
    Vec floats() const {
        return {_mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1))};
    }
#else
    Vec floats() const { return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)}; }
#endif
};

#else

constexpr int kVectors = 1;

struct Quad {
    int32_t codes[16][4];
};

struct Ints {
    static constexpr int kInt8Bias = 0;
    int32_t v[16];
    static Ints all(int32_t x) {
        Ints r;
        for (int32_t& lane : r.v) lane = x;
        return r;
    }
    static Quad load_int8(const uint8_t* p) {
        Quad r;
        for (int i = 0; i < 64; ++i) r.codes[i / 4][i % 4] = static_cast<int8_t>(p[i]);
        return r;
    }
    static void load_fp4(const uint8_t* p, Quad& low, Quad& high) {
        for (int i = 0; i < 64; ++i) {
            low.codes[i / 4][i % 4] = kFp4Codes[p[i] & 15];
            high.codes[i / 4][i % 4] = kFp4Codes[p[i] >> 4];
        }
    }
    static Ints add_int8(Ints sum, const Quad& keys, int32_t query) {
        int8_t q[4];
        memcpy(q, &query, 4);
        for (int i = 0; i < 16; ++i)
            for (int b = 0; b < 4; ++b) sum.v[i] += keys.codes[i][b] * q[b];
        return sum;
    }
    static Ints add_fp4(Ints sum, const Quad& keys, int32_t query) {
        return add_int8(sum, keys, query);
    }
    Vec floats() const {
        float out[16];
        for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(v[i]);
        return Vec::load(out);
    }
};

#endif

// Each of the following adds kHeads heads' parts to the scores of keys [at, at + 16 kV) of a block.

int32_t four(const int8_t* codes) {
    int32_t all;
    memcpy(&all, codes, 4);
    return all;
}

template <int kHeads, int kV>
void score_int8(const IndexShape& shape, const uint8_t* block, int64_t at, const IndexQuery& query,
                int64_t head, Vec* scores) {
    const int64_t dim = shape.dim;
    const int8_t* codes = query.codes + head * dim;
    Ints sums[kHeads][kV];
    for (int h = 0; h < kHeads; ++h)
        for (Ints& sum : sums[h]) sum = Ints::all(-Ints::kInt8Bias * query.sums[head + h]);
    for (int64_t c = 0; c < dim; c += 4) {
        Quad keys[kV];
        for (int v = 0; v < kV; ++v)
            keys[v] = Ints::load_int8(block + c / 4 * kInt8Row + 4 * (at + v * kLanes));
        for (int h = 0; h < kHeads; ++h)
            for (int v = 0; v < kV; ++v)
                sums[h][v] = Ints::add_int8(sums[h][v], keys[v], four(codes + h * dim + c));
    }
    for (int h = 0; h < kHeads; ++h)
        for (int v = 0; v < kV; ++v)
            scores[v] = fma(Vec::all(query.scales[head + h]), max(sums[h][v].floats(), Vec::zero()),
                            scores[v]);
}

template <int kHeads, int kV>
void score_fp4(const IndexShape& shape, const uint8_t* block, int64_t at, const IndexQuery& query,
               int64_t head, Vec* scores) {
    const int64_t dim = shape.dim, spans = dim / kFp4ScaleDims;
    const int8_t* codes = query.codes + head * dim;
    Vec dots[kHeads][kV];
    for (auto& row : dots)
        for (Vec& dot : row) dot = Vec::zero();
    for (int64_t span = 0; span < spans; ++span) {
        Ints sums[kHeads][kV];
        for (int h = 0; h < kHeads; ++h)
            for (Ints& sum : sums[h])
                sum = Ints::all(-kFp4Bias * query.sums[(head + h) * spans + span]);
        for (int64_t c = span * kFp4ScaleDims; c < (span + 1) * kFp4ScaleDims; c += 8) {
            Quad low[kV], high[kV];
            for (int v = 0; v < kV; ++v)
                Ints::load_fp4(block + c / 8 * kInt8Row + 4 * (at + v * kLanes), low[v], high[v]);
            for (int h = 0; h < kHeads; ++h)
                for (int v = 0; v < kV; ++v) {
                    const int8_t* q = codes + h * dim + c;
                    sums[h][v] = Ints::add_fp4(sums[h][v], low[v], four(q));
                    sums[h][v] = Ints::add_fp4(sums[h][v], high[v], four(q + 4));
                }
        }
        for (int v = 0; v < kV; ++v) {
            const uint8_t* stored = block + (dim / 2 + span) * kBlockKeys + at + v * kLanes;
            float scale[kLanes];
            for (int i = 0; i < kLanes; ++i) scale[i] = scale_value(stored[i]);
            for (int h = 0; h < kHeads; ++h)
                dots[h][v] = fma(sums[h][v].floats() * Vec::load(scale),
                                 Vec::all(query.scales[(head + h) * spans + span]), dots[h][v]);
        }
    }
    for (int h = 0; h < kHeads; ++h)
        for (int v = 0; v < kV; ++v)
            scores[v] = fma(Vec::all(query.weights[head + h]), max(dots[h][v], Vec::zero()),
                            scores[v]);
}

template <int kHeads, int kV>
void score_fp32(const IndexShape& shape, const uint8_t* block, int64_t at, const IndexQuery& query,
                int64_t head, Vec* scores) {
    const auto* keys = reinterpret_cast<const float*>(block) + at;
    const float* q = query.values + head * shape.dim;
    Vec dots[kHeads][kV];
    for (auto& row : dots)
        for (Vec& dot : row) dot = Vec::zero();
    for (int64_t c = 0; c < shape.dim; ++c) {
        Vec key[kV];
        for (int v = 0; v < kV; ++v) key[v] = Vec::load(keys + c * kBlockKeys + v * kLanes);
        for (int h = 0; h < kHeads; ++h)
            for (int v = 0; v < kV; ++v)
                dots[h][v] = fma(Vec::all(q[h * shape.dim + c]), key[v], dots[h][v]);
    }
    for (int h = 0; h < kHeads; ++h)
        for (int v = 0; v < kV; ++v)
            scores[v] = fma(Vec::all(query.weights[head + h]), max(dots[h][v], Vec::zero()),
                            scores[v]);
}

using ScoreHeads = void (*)(const IndexShape&, const uint8_t*, int64_t, const IndexQuery&, int64_t,
                            Vec*);

template <ScoreHeads score_four, ScoreHeads score_one>
void score_block(const IndexShape& shape, const uint8_t* block, const IndexQuery& query,
                 float* scores) {
    for (int64_t at = 0; at < kBlockKeys; at += kVectors * kLanes) {
        Vec sums[kVectors];
        for (Vec& sum : sums) sum = Vec::zero();
        int64_t head = 0;
        for (; head + 4 <= shape.heads; head += 4)
            score_four(shape, block, at, query, head, sums);
        for (; head < shape.heads; ++head) score_one(shape, block, at, query, head, sums);
        if (shape.format == KeyFormat::int8) {
            const uint8_t* scales = block + shape.dim * kBlockKeys + 4 * at;
            for (int v = 0; v < kVectors; ++v)
                sums[v] = sums[v] *
                          Vec::load(reinterpret_cast<const float*>(scales) + v * kLanes);
        }
        for (int v = 0; v < kVectors; ++v) sums[v].store(scores + at + v * kLanes);
    }
}

// Bit i is set where scores[i] > threshold, for 32 scores.
uint32_t above(const float* scores, float threshold) {
#if defined(__AVX512F__)
    const __m512 least = _mm512_set1_ps(threshold);
    return static_cast<uint32_t>(
               _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), least, _CMP_GT_OQ)) |
           static_cast<uint32_t>(
               _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + 16), least, _CMP_GT_OQ))
               << 16;
#elif defined(__AVX2__)
    const __m256 least = _mm256_set1_ps(threshold);
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i) {
        const __m256 more = _mm256_cmp_ps(_mm256_loadu_ps(scores + 8 * i), least, _CMP_GT_OQ);
        mask |= static_cast<uint32_t>(_mm256_movemask_ps(more)) << 8 * i;
    }
    return mask;
#else
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(scores[i] > threshold) << i;
    return mask;
#endif
}

void offer(const float* scores, int64_t first_key, int64_t count, Candidates& candidates) {
    uint32_t mask = above(scores, candidates.threshold);
    if (count < kBlockKeys) mask &= (uint32_t{1} << count) - 1;
    while (mask) {
        const int lane = __builtin_ctz(mask);
        mask &= mask - 1;
        const uint32_t bits = bits_of(scores[lane] + 0.0f);  // + 0 makes -0 equal 0
        const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        const uint32_t index = static_cast<uint32_t>(first_key + lane);
        candidates.items[candidates.count++] = static_cast<uint64_t>(ordered) << 32 | ~index;
    }
    // A block never has more than the room behind `wanted`.
    if (candidates.count > candidates.capacity - kBlockKeys) keep_best(candidates);
}

template <ScoreHeads score_four, ScoreHeads score_one>
void scan(const IndexShape& shape, const uint8_t* const* blocks, int64_t num_blocks,
          int64_t first_key, const IndexQuery* queries, const int64_t* visible,
          Candidates* candidates, int64_t num_queries, int64_t block_nbytes) {
    alignas(64) float scores[kBlockKeys];
    for (int64_t b = 0; b < num_blocks; ++b) {
        // Blocks need not be neighbours in memory, and the hardware only sees a sequence too late.
        if (b + 1 < num_blocks)
            for (int64_t at = 0; at < block_nbytes; at += 64) __builtin_prefetch(blocks[b + 1] + at);
        const int64_t key = first_key + b * kBlockKeys;
        for (int64_t i = 0; i < num_queries; ++i) {
            const int64_t count = visible[i] - key;
            if (count <= 0) continue;
            score_block<score_four, score_one>(shape, blocks[b], queries[i], scores);
            offer(scores, key, count, candidates[i]);
        }
    }
}

}  // namespace

void scan_keys(const IndexShape& shape, const uint8_t* const* blocks, int64_t num_blocks,
               int64_t first_key, const IndexQuery* queries, const int64_t* visible,
               Candidates* candidates, int64_t num_queries) {
    constexpr int kV = kVectors;
    const int64_t dim = shape.dim;
    switch (shape.format) {
        case KeyFormat::fp32:
            return scan<score_fp32<4, kV>, score_fp32<1, kV>>(shape, blocks, num_blocks, first_key,
                                                              queries, visible, candidates,
                                                              num_queries, kBlockKeys * 4 * dim);
        case KeyFormat::int8:
            return scan<score_int8<4, kV>, score_int8<1, kV>>(shape, blocks, num_blocks, first_key,
                                                              queries, visible, candidates,
                                                              num_queries, kBlockKeys * (dim + 4));
        case KeyFormat::fp4:
            return scan<score_fp4<4, kV>, score_fp4<1, kV>>(
                shape, blocks, num_blocks, first_key, queries, visible, candidates, num_queries,
                kBlockKeys * (dim / 2 + dim / kFp4ScaleDims));
    }
}

}  // namespace rorqual::ISA_NAMESPACE
