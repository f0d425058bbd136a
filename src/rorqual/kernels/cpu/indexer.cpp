#include "indexer.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "codes.h"

namespace rorqual {

namespace {

// Codes of one span of a query head under one scale; returns the scale.
float quantise(const float* x, int64_t count, bool fp4, int8_t* codes, int32_t* sum) {
    const float top = largest(x, count);
    // Twice an FP4 value is whole, so with half the scale it is stored as it is.
    const float scale = fp4 ? 0.5f * scale_value(fp4_scale(x, count)) : top / 127.0f;
    *sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float code = scale > 0 ? std::nearbyint(x[i] / scale) : 0.0f;
        codes[i] = static_cast<int8_t>(code > 127 ? 127 : code >= -127 ? code : -127);
        *sum += codes[i];
    }
    return scale;
}

float score_of(uint64_t item) {
    const uint32_t ordered = static_cast<uint32_t>(item >> 32);
    return float_of(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

}  // namespace

IndexQuery prepare_query(const IndexShape& shape, const float* q, const float* weights,
                         Scratch& scratch) {
    IndexQuery made{};
    made.weights = weights;
    auto* ascending = scratch.take<int32_t>(shape.heads);
    auto* by_sign = scratch.take<int32_t>(shape.heads);
    std::iota(ascending, ascending + shape.heads, 0);
    const auto positive = [&](int32_t h) { return weights[h] > 0; };
    made.positive = std::copy_if(ascending, ascending + shape.heads, by_sign, positive) - by_sign;
    std::remove_copy_if(ascending, ascending + shape.heads, by_sign + made.positive, positive);
    made.ascending = ascending;
    made.by_sign = by_sign;
    if (shape.format == KeyFormat::fp32) {
        made.values = q;
        return made;
    }
    const bool fp4_keys = shape.format == KeyFormat::fp4;
    const int64_t span = fp4_keys ? kFp4ScaleDims : shape.dim, spans = shape.dim / span;
    auto* codes = scratch.take<int8_t>(shape.heads * shape.dim);
    auto* sums = scratch.take<int32_t>(shape.heads * spans);
    auto* scales = scratch.floats(shape.heads * spans);
    for (int64_t i = 0; i < shape.heads * spans; ++i) {
        scales[i] = quantise(q + i * span, span, fp4_keys && shape.fp4_queries, codes + i * span,
                             sums + i);
        scales[i] *= fp4_keys ? 0.5f : weights[i];  // key codes are doubled FP4 values
    }
    made.codes = codes;
    made.sums = sums;
    made.scales = scales;
    return made;
}

Candidates no_candidates(int64_t topk, Scratch& scratch) {
    const int64_t capacity = 4 * topk + kBlockKeys;
    return {scratch.take<uint64_t>(capacity), 0, capacity, topk,
            -std::numeric_limits<float>::infinity()};
}

void keep_best(Candidates& candidates) {
    if (candidates.count <= candidates.wanted) return;
    auto* last = candidates.items + candidates.wanted - 1;
    std::nth_element(candidates.items, last, candidates.items + candidates.count,
                     std::greater<uint64_t>());
    candidates.count = candidates.wanted;
    candidates.threshold = score_of(*last);
}

int64_t merge_best(const Candidates* parts, int64_t count, Scratch& scratch, int32_t* chosen) {
    Scratch::Frame frame(scratch);
    Candidates all = parts[0];
    if (count > 1) {
        int64_t total = 0;
        for (int64_t i = 0; i < count; ++i) total += parts[i].count;
        all.items = scratch.take<uint64_t>(total);
        all.count = 0;
        for (int64_t i = 0; i < count; ++i) {
            std::copy_n(parts[i].items, parts[i].count, all.items + all.count);
            all.count += parts[i].count;
        }
    }
    keep_best(all);
    for (int64_t i = 0; i < all.count; ++i)
        chosen[i] = static_cast<int32_t>(~static_cast<uint32_t>(all.items[i]));
    std::sort(chosen, chosen + all.count);
    return all.count;
}

namespace {

constexpr int64_t kScanQueries = 16;    // queries that share one pass over the keys
constexpr int64_t kPieceBlocks = 256;   // fewest blocks worth another piece of a pass
constexpr int64_t kPointers = 512;      // blocks looked up at a time
constexpr int64_t kInlineMacs = 1 << 21;  // below this, waking threads costs more than it gains

// Queries of one segment over blocks [first_block, last_block) of its keys.
struct Scan {
    const Segment* segment;
    int64_t first_token, num_tokens;
    int64_t first_block, last_block;
    Candidates* candidates;  // one per query, where the keys are split in pieces
};

class Selector {
public:
    Selector(Context& context, const IndexShape& shape, const LayerLayout& layer, const float* q,
             const float* weights, int32_t* indices, int64_t* counts)
        : context_(context),
          shape_(shape),
          layer_(layer),
          q_(q),
          weights_(weights),
          indices_(indices),
          counts_(counts) {}

    int64_t visible(const Segment& segment, int64_t token) const {
        return (segment.start + token + 1) / layer_.ratio;
    }

    // Chooses everything for the tokens that see no more than topk; returns how many those are.
    int64_t choose_all(const Segment& segment) const {
        int64_t token = 0;
        for (; token < segment.tokens && visible(segment, token) <= shape_.topk; ++token) {
            const int64_t row = segment.first_row + token;
            counts_[row] = visible(segment, token);
            std::iota(indices_ + row * shape_.topk, indices_ + row * shape_.topk + counts_[row], 0);
        }
        return token;
    }

    // Offers the scan's keys to `candidates`, one per query.
    void offer(const Scan& scan, Candidates* candidates, Scratch& scratch) const {
        auto* queries = scratch.take<IndexQuery>(scan.num_tokens);
        auto* limits = scratch.take<int64_t>(scan.num_tokens);
        for (int64_t i = 0; i < scan.num_tokens; ++i) {
            const int64_t token = scan.first_token + i, row = scan.segment->first_row + token;
            queries[i] = prepare_query(shape_, q_ + row * shape_.heads * shape_.dim,
                                       weights_ + row * shape_.heads, scratch);
            limits[i] = visible(*scan.segment, token);
        }
        const uint8_t* blocks[kPointers];
        for (int64_t from = scan.first_block; from < scan.last_block; from += kPointers) {
            const int64_t count = std::min(kPointers, scan.last_block - from);
            for (int64_t b = 0; b < count; ++b)
                blocks[b] = context_.slabs.keys(scan.segment->blocks[from + b], layer_);
            ISA_CALL(scan_keys)(shape_, blocks, count, from * kBlockKeys, queries, limits,
                                candidates, scan.num_tokens);
        }
    }

    void run(const Scan& scan, Scratch& scratch) const {
        Scratch::Frame frame(scratch);
        if (scan.candidates) return offer(scan, scan.candidates, scratch);
        auto* candidates = scratch.take<Candidates>(scan.num_tokens);
        for (int64_t i = 0; i < scan.num_tokens; ++i)
            candidates[i] = no_candidates(shape_.topk, scratch);
        offer(scan, candidates, scratch);
        for (int64_t i = 0; i < scan.num_tokens; ++i)
            merge(scan, i, candidates + i, 1, scratch);
    }

    // The choice of the scan's query i out of `count` sets of candidates.
    void merge(const Scan& scan, int64_t i, const Candidates* parts, int64_t count,
               Scratch& scratch) const {
        const int64_t row = scan.segment->first_row + scan.first_token + i;
        counts_[row] = merge_best(parts, count, scratch, indices_ + row * shape_.topk);
    }

private:
    Context& context_;
    const IndexShape& shape_;
    const LayerLayout& layer_;
    const float *q_, *weights_;
    int32_t* indices_;
    int64_t* counts_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Selection select_entries(Context& context, const IndexShape& shape, const LayerLayout& layer,
                         const Segments& segments, const float* q, const float* weights) {
    Scratch& scratch = context.scratch;
    const int64_t topk = shape.topk, threads = context.pool.size();
    auto* indices = scratch.take<int32_t>(segments.rows * topk);
    auto* counts = scratch.take<int64_t>(segments.rows);
    const Selector selector(context, shape, layer, q, weights, indices, counts);
    if (topk == 0) {
        std::fill_n(counts, segments.rows, int64_t{0});
        return {indices, counts, topk};
    }

    auto* first_token = scratch.take<int64_t>(segments.count);
    int64_t tiles = 0;
    for (int64_t s = 0; s < segments.count; ++s) {
        first_token[s] = selector.choose_all(segments.items[s]);
        tiles += ceil_div(segments.items[s].tokens - first_token[s], kScanQueries);
    }
    // Too few queries to keep every thread busy: split the keys, merge afterwards.
    const int64_t most_pieces = tiles >= 2 * threads ? 1 : threads;
    auto* scans = scratch.take<Scan>(tiles * most_pieces);
    int64_t num_scans = 0, macs = 0;
    for (int64_t s = 0; s < segments.count; ++s) {
        const Segment& segment = segments.items[s];
        for (int64_t token = first_token[s]; token < segment.tokens; token += kScanQueries) {
            const int64_t num_tokens = std::min(kScanQueries, segment.tokens - token);
            const int64_t blocks =
                ceil_div(selector.visible(segment, token + num_tokens - 1), kBlockKeys);
            const int64_t pieces = std::min(most_pieces, ceil_div(blocks, kPieceBlocks));
            macs += num_tokens * blocks * kBlockKeys * shape.heads * shape.dim;
            for (int64_t p = 0; p < pieces; ++p) {
                Candidates* candidates = nullptr;
                if (pieces > 1) {
                    candidates = scratch.take<Candidates>(num_tokens);
                    for (int64_t i = 0; i < num_tokens; ++i)
                        candidates[i] = no_candidates(topk, scratch);
                }
                scans[num_scans++] = {&segment, token, num_tokens, blocks * p / pieces,
                                      blocks * (p + 1) / pieces, candidates};
            }
        }
    }
    context.pool.run(
        num_scans,
        [&](int64_t from, int64_t to, int worker) {
            for (int64_t i = from; i < to; ++i) selector.run(scans[i], context.workers[worker]);
        },
        macs < kInlineMacs ? num_scans : 1);

    for (int64_t first = 0, last; first < num_scans; first = last) {
        last = first + 1;
        if (!scans[first].candidates) continue;
        while (last < num_scans && scans[last].first_block) ++last;  // the pieces of one pass
        for (int64_t i = 0; i < scans[first].num_tokens; ++i) {
            Scratch::Frame frame(scratch);
            auto* parts = scratch.take<Candidates>(last - first);
            for (int64_t p = first; p < last; ++p) parts[p - first] = scans[p].candidates[i];
            selector.merge(scans[first], i, parts, last - first, scratch);
        }
    }
    return {indices, counts, topk};
}

}  // namespace rorqual
