#include "compressor.h"

#include <algorithm>

#include "elementwise.h"
#include "entries.h"

namespace rorqual {

namespace {

constexpr int64_t kGroupGrain = 16;  // groups per piece of work

// Normalises, rotates and rounds one pooled vector, then stores it.
void finish_group(Context& context, const CompressorWeights& weights, const LayerLayout& layer,
                  const Segments& segments, const Segment& segment, int64_t group, float* pooled,
                  Scratch& scratch) {
    const Shape& shape = context.shape;
    const CacheLayout& layout = context.layout;
    const bool official = shape.official;
    const int64_t width = weights.width, pairs = shape.rope_dim / 2;
    float *cos = scratch.floats(pairs), *sin = scratch.floats(pairs);
    rotation_at(group * layer.ratio, segments.compressing.frequencies, pairs, cos, sin);
    ISA_CALL(rms_norm)(pooled, 1, width, width, weights.norm.data(), shape.norm_eps, official,
                       pooled, width);
    ISA_CALL(rotate)(pooled, 1, width, 1, width, cos, sin, pairs, false, official);
    const int64_t block = segment.blocks[group / layer.entries_per_block];
    const int64_t slot = group % layer.entries_per_block;
    if (weights.keys) {
        if (official) ISA_CALL(round_index)(pooled, width, official);
        ISA_CALL(encode_key)(layout.key_format, pooled, width, context.slabs.keys(block, layer),
                             slot);
    } else {
        if (official) ISA_CALL(round_entry)(pooled, width, shape.rope_dim);
        ISA_CALL(encode_entry)(layout.entry_format, pooled, width, shape.rope_dim,
                               context.slabs.entries(block, layer) + slot * layout.entry_nbytes);
    }
}

}  // namespace

CompressorWeights compressor_weights(const Weights& weights, const std::string& prefix,
                                     const Shape& shape, int64_t ratio, bool keys) {
    CompressorWeights made;
    made.width = keys ? shape.index_dim : shape.head_dim;
    made.overlapping = ratio == 4;
    made.keys = keys;
    made.values = weights.matrix(prefix + ".wkv", made.columns(), shape.hidden);
    made.scores = weights.matrix(prefix + ".wgate", made.columns(), shape.hidden);
    made.positional = weights.array(prefix + ".ape", ratio * made.columns());
    made.norm = weights.array(prefix + ".norm.weight", made.width);
    return made;
}

void compress(Context& context, const CompressorWeights& weights, const LayerLayout& layer,
              const float* x, const Segments& segments) {
    Scratch::Frame frame(context.scratch);
    const int64_t columns = weights.columns(), row_floats = 2 * columns, ratio = layer.ratio;
    const int64_t hidden = context.shape.hidden, slots = layer.raw_slots;
    float* raw = context.scratch.floats(segments.rows * row_floats);
    matmul(context.pool, weights.values, x, segments.rows, hidden, raw, row_floats);
    matmul(context.pool, weights.scores, x, segments.rows, hidden, raw + columns, row_floats);
    for (int64_t r = 0; r < segments.rows; ++r)
        ISA_CALL(add_positional)(
            raw + r * row_floats + columns,
            weights.positional.data() + segments.positions[r] % ratio * columns, columns);

    for (int64_t s = 0; s < segments.count; ++s) {
        const Segment& segment = segments.items[s];
        const float* chunk = raw + segment.first_row * row_floats;
        auto* ring = reinterpret_cast<float*>(segment.state +
                                              (weights.keys ? layer.raw_index : layer.raw));
        const int64_t end = segment.start + segment.tokens;
        const auto row_at = [&](int64_t position) -> const float* {
            return position >= segment.start ? chunk + (position - segment.start) * row_floats
                                             : ring + position % slots * row_floats;
        };
        const int64_t first = segment.start / ratio;
        const int64_t groups = segment.flags & kReplay ? 0 : end / ratio - first;
        context.pool.run(
            groups,
            [&](int64_t from, int64_t to, int worker) {
                Scratch& scratch = context.workers[worker];
                Scratch::Frame inner(scratch);
                auto** rows = scratch.take<const float*>(2 * ratio);
                float* pooled = scratch.floats(weights.width);
                for (int64_t group = first + from; group < first + to; ++group) {
                    Scratch::Frame each(scratch);
                    int64_t count = 0;
                    // The very first group has no previous one.
                    if (weights.overlapping && group > 0)
                        for (int64_t i = 0; i < ratio; ++i)
                            rows[count++] = row_at((group - 1) * ratio + i);
                    const int64_t half = weights.overlapping ? weights.width : 0;
                    for (int64_t i = 0; i < ratio; ++i)
                        rows[count++] = row_at(group * ratio + i) + half;
                    ISA_CALL(pool_group)(rows, count, columns, weights.width, pooled);
                    finish_group(context, weights, layer, segments, segment, group, pooled,
                                 scratch);
                }
            },
            kGroupGrain);
        for (int64_t p = std::max(segment.start, end - slots); p < end; ++p)
            std::copy_n(row_at(p), row_floats, ring + p % slots * row_floats);
    }
}

}  // namespace rorqual
