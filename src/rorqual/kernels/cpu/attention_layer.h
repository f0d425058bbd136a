// The attention sub-layer of one block, for every segment of a batch: what model/attention.py does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "compressor.h"
#include "context.h"
#include "linear.h"
#include "weights.h"

namespace rorqual {

struct AttentionWeights {
    int64_t ratio = 0;
    Linear query_down, query_up, entry;  // wq_a, wq_b, wkv
    std::vector<float> query_norm, entry_norm, sink;
    std::vector<Linear> group_down;  // wo_a, one per output group
    Linear up;                       // wo_b
    CompressorWeights compressor;    // ratio > 0
    // Overlapping layers only.
    Linear index_query, index_weight;  // indexer.wq_b, indexer.weights_proj
    CompressorWeights index_compressor;

    bool overlapping() const { return ratio == 4; }
};

// Takes the layer's weights, named "<prefix>.wq_a" and so on. Throws std::invalid_argument where
// one is missing or has the wrong shape.
AttentionWeights load_attention(const Weights& weights, const std::string& prefix,
                                const Shape& shape, int64_t ratio);

// out[rows, hidden] = attention of x [rows, hidden], the normalised input. Advances windows, raw
// rings, entries and keys of the segments' sequences; where `out` is null only that.
void attention_layer(Context& context, const AttentionWeights& weights, const LayerLayout& layer,
                     const float* x, const Segments& segments, float* out);

}  // namespace rorqual
