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

#define RORQUAL_INLINE inline __attribute__((always_inline))  // keeps scores in registers

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

// How each format meets queries: `add` adds the parts of kHeads heads to the scores of keys
// [at, at + 16 kVectors) of a block, `finish` does what all heads share.

int32_t four(const int8_t* codes) {
    int32_t all;
    memcpy(&all, codes, 4);
    return all;
}

template <int kHeads>
RORQUAL_INLINE void add_heads(const float* weights, const int32_t* heads, const Vec (&dots)[kHeads][kVectors],
               Vec* scores) {
    for (int h = 0; h < kHeads; ++h)
        for (int v = 0; v < kVectors; ++v)
            scores[v] = fma(Vec::all(weights[heads[h]]), max(dots[h][v], Vec::zero()), scores[v]);
}

struct Int8Keys {
    static int64_t nbytes(int64_t dim) { return kBlockKeys * (dim + 4); }

    template <int kHeads>
    static RORQUAL_INLINE void add(const IndexShape& shape, const uint8_t* block, int64_t at,
                    const IndexQuery& query, const int32_t* heads, Vec* scores) {
        const int8_t* codes[kHeads];
        Ints sums[kHeads][kVectors];
        for (int h = 0; h < kHeads; ++h) {
            codes[h] = query.codes + heads[h] * shape.dim;
            for (Ints& sum : sums[h]) sum = Ints::all(-Ints::kInt8Bias * query.sums[heads[h]]);
        }
        for (int64_t c = 0; c < shape.dim; c += 4) {
            Quad keys[kVectors];
            for (int v = 0; v < kVectors; ++v)
                keys[v] = Ints::load_int8(block + c / 4 * kInt8Row + 4 * (at + v * kLanes));
            for (int h = 0; h < kHeads; ++h)
                for (int v = 0; v < kVectors; ++v)
                    sums[h][v] = Ints::add_int8(sums[h][v], keys[v], four(codes[h] + c));
        }
        Vec dots[kHeads][kVectors];
        for (int h = 0; h < kHeads; ++h)
            for (int v = 0; v < kVectors; ++v) dots[h][v] = sums[h][v].floats();
        add_heads(query.scales, heads, dots, scores);
    }

    static Vec finish(const IndexShape& shape, const uint8_t* block, int64_t at, Vec score) {
        const uint8_t* scales = block + shape.dim * kBlockKeys;
        return score * Vec::load(reinterpret_cast<const float*>(scales) + at);
    }
};

struct Fp4Keys {
    static int64_t nbytes(int64_t dim) { return kBlockKeys * (dim / 2 + dim / kFp4ScaleDims); }

    template <int kHeads>
    static RORQUAL_INLINE void add(const IndexShape& shape, const uint8_t* block, int64_t at,
                    const IndexQuery& query, const int32_t* heads, Vec* scores) {
        const int64_t dim = shape.dim, spans = dim / kFp4ScaleDims;
        Vec dots[kHeads][kVectors];
        for (auto& row : dots)
            for (Vec& dot : row) dot = Vec::zero();
        for (int64_t span = 0; span < spans; ++span) {
            Ints sums[kHeads][kVectors];
            for (int h = 0; h < kHeads; ++h)
                for (Ints& sum : sums[h])
                    sum = Ints::all(-kFp4Bias * query.sums[heads[h] * spans + span]);
            for (int64_t c = span * kFp4ScaleDims; c < (span + 1) * kFp4ScaleDims; c += 8) {
                Quad low[kVectors], high[kVectors];
                for (int v = 0; v < kVectors; ++v)
                    Ints::load_fp4(block + c / 8 * kInt8Row + 4 * (at + v * kLanes), low[v],
                                   high[v]);
                for (int h = 0; h < kHeads; ++h)
                    for (int v = 0; v < kVectors; ++v) {
                        const int8_t* q = query.codes + heads[h] * dim + c;
                        sums[h][v] = Ints::add_fp4(sums[h][v], low[v], four(q));
                        sums[h][v] = Ints::add_fp4(sums[h][v], high[v], four(q + 4));
                    }
            }
            for (int v = 0; v < kVectors; ++v) {
                const uint8_t* stored = block + (dim / 2 + span) * kBlockKeys + at + v * kLanes;
                float scale[kLanes];
                for (int i = 0; i < kLanes; ++i) scale[i] = scale_value(stored[i]);
                for (int h = 0; h < kHeads; ++h)
                    dots[h][v] = fma(sums[h][v].floats() * Vec::load(scale),
                                     Vec::all(query.scales[heads[h] * spans + span]), dots[h][v]);
            }
        }
        add_heads(query.weights, heads, dots, scores);
    }

    static Vec finish(const IndexShape&, const uint8_t*, int64_t, Vec score) { return score; }
};

struct Fp32Keys {
    static int64_t nbytes(int64_t dim) { return kBlockKeys * 4 * dim; }

    template <int kHeads>
    static RORQUAL_INLINE void add(const IndexShape& shape, const uint8_t* block, int64_t at,
                    const IndexQuery& query, const int32_t* heads, Vec* scores) {
        const auto* keys = reinterpret_cast<const float*>(block) + at;
        Vec dots[kHeads][kVectors];
        for (auto& row : dots)
            for (Vec& dot : row) dot = Vec::zero();
        for (int64_t c = 0; c < shape.dim; ++c) {
            Vec key[kVectors];
            for (int v = 0; v < kVectors; ++v)
                key[v] = Vec::load(keys + c * kBlockKeys + v * kLanes);
            for (int h = 0; h < kHeads; ++h)
                for (int v = 0; v < kVectors; ++v)
                    dots[h][v] = fma(Vec::all(query.values[heads[h] * shape.dim + c]), key[v],
                                     dots[h][v]);
        }
        add_heads(query.weights, heads, dots, scores);
    }

    static Vec finish(const IndexShape&, const uint8_t*, int64_t, Vec score) { return score; }
};

// Scores of keys [at, at + 16 kVectors) by these heads, in the order given.
template <class Keys>
RORQUAL_INLINE void score(const IndexShape& shape, const uint8_t* block, int64_t at,
                          const IndexQuery& query, const int32_t* heads, int64_t count,
                          Vec* scores) {
    for (int v = 0; v < kVectors; ++v) scores[v] = Vec::zero();
    for (; count >= 4; heads += 4, count -= 4)
        Keys::template add<4>(shape, block, at, query, heads, scores);
    if (count == 3)
        Keys::template add<3>(shape, block, at, query, heads, scores);
    else if (count == 2)
        Keys::template add<2>(shape, block, at, query, heads, scores);
    else if (count == 1)
        Keys::template add<1>(shape, block, at, query, heads, scores);
    for (int v = 0; v < kVectors; ++v)
        scores[v] = Keys::finish(shape, block, at + v * kLanes, scores[v]);
}

// Bit i is set where lane i exceeds the threshold.
uint32_t above(Vec scores, float threshold) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(scores.v, _mm512_set1_ps(threshold), _CMP_GT_OQ);
#elif defined(__AVX2__)
    const __m256 least = _mm256_set1_ps(threshold);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(scores.a, least, _CMP_GT_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(scores.b, least, _CMP_GT_OQ));
    return static_cast<uint32_t>(low | high << 8);
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(scores.v[i] > threshold) << i;
    return mask;
#endif
}

// The same for kVectors.
uint32_t all_above(const Vec* scores, float threshold) {
    uint32_t mask = 0;
    for (int v = 0; v < kVectors; ++v) mask |= above(scores[v], threshold) << v * kLanes;
    return mask;
}

void offer(const Vec* scores, uint32_t mask, int64_t first_key, Candidates& candidates) {
    alignas(64) float values[kVectors * kLanes];
    for (int v = 0; v < kVectors; ++v) scores[v].store(values + v * kLanes);
    while (mask) {
        const int lane = __builtin_ctz(mask);
        mask &= mask - 1;
        const uint32_t bits = bits_of(values[lane] + 0.0f);  // + 0 makes -0 equal 0
        const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        const uint32_t index = static_cast<uint32_t>(first_key + lane);
        candidates.items[candidates.count++] = static_cast<uint64_t>(ordered) << 32 | ~index;
    }
    if (candidates.count > candidates.capacity - kBlockKeys) keep_best(candidates);
}

// Offers keys [at, at + 16 kVectors) of a block.
//
// Only heads of positive weight can raise a score, so their sum is a bound. It is exact in floating
// point too: a term that is not positive never makes a rounded sum larger, and the other
// terms keep their order. Where the threshold is high few keys need the other heads.
template <class Keys>
RORQUAL_INLINE void scan_keys_at(const IndexShape& shape, const uint8_t* block, int64_t at, int64_t first_key,
                  int64_t visible, const IndexQuery& query, bool bounded,
                  Candidates& candidates) {
    if (visible <= first_key + at) return;
    const int64_t count = visible - first_key - at;
    const uint32_t seen = count < kBlockKeys ? (uint32_t{1} << count) - 1 : ~uint32_t{0};
    Vec scores[kVectors];
    if (bounded) {
        score<Keys>(shape, block, at, query, query.by_sign, query.positive, scores);
        if (!(all_above(scores, candidates.threshold) & seen)) return;
    }
    score<Keys>(shape, block, at, query, query.ascending, shape.heads, scores);
    const uint32_t mask = all_above(scores, candidates.threshold) & seen;
    if (mask) offer(scores, mask, first_key + at, candidates);
}

// From this many keys per wanted one on, the bound saves more than it costs.
constexpr int64_t kBoundedKeys = 64;

// Blocks need not be neighbours in memory, and the hardware only sees a sequence too late: asks for
// what is this many bytes ahead.
constexpr int64_t kPrefetchBytes = 8192;

template <class Keys>
void scan(const IndexShape& shape, const uint8_t* const* blocks, int64_t num_blocks,
          int64_t first_key, const IndexQuery* queries, const int64_t* visible,
          Candidates* candidates, int64_t num_queries) {
    const int64_t nbytes = Keys::nbytes(shape.dim), ahead = 1 + kPrefetchBytes / nbytes;
    for (int64_t b = 0; b < num_blocks; ++b) {
        if (b + ahead < num_blocks)
            for (int64_t at = 0; at < nbytes; at += 64)
                __builtin_prefetch(blocks[b + ahead] + at, 0, 2);
        const int64_t key = first_key + b * kBlockKeys;
        for (int64_t i = 0; i < num_queries; ++i) {
            const bool bounded = queries[i].positive < shape.heads &&
                                 key > kBoundedKeys * candidates[i].wanted;
            for (int64_t at = 0; at < kBlockKeys; at += kVectors * kLanes)
                scan_keys_at<Keys>(shape, blocks[b], at, key, visible[i], queries[i], bounded,
                                   candidates[i]);
        }
    }
}

}  // namespace

void scan_keys(const IndexShape& shape, const uint8_t* const* blocks, int64_t num_blocks,
               int64_t first_key, const IndexQuery* queries, const int64_t* visible,
               Candidates* candidates, int64_t num_queries) {
    const auto run = [&](auto scan_as) {
        scan_as(shape, blocks, num_blocks, first_key, queries, visible, candidates, num_queries);
    };
    switch (shape.format) {
        case KeyFormat::fp32: return run(&scan<Fp32Keys>);
        case KeyFormat::int8: return run(&scan<Int8Keys>);
        case KeyFormat::fp4: return run(&scan<Fp4Keys>);
    }
}

}  // namespace rorqual::ISA_NAMESPACE
