// Turns runs of tokens into stored entries or indexer keys (report 2.3.1-2.3.2, eq. 9-13, 20-23).
//
// Every token leaves a raw row, values then pooling scores, in a ring of the state. A group pools
// its rows - an overlapping group also the previous group's - whichever step they came in, so an
// entry does not depend on how the tokens were cut into chunks.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"
#include "isa.h"
#include "linear.h"
#include "weights.h"

namespace rorqual {

struct CompressorWeights {
    Matrix values, scores;  // [columns, hidden]
    std::vector<float> positional;  // [ratio, columns]
    std::vector<float> norm;        // [width]
    int64_t width = 0;
    bool overlapping = false;
    bool keys = false;  // makes indexer keys

    int64_t columns() const { return width * (overlapping ? 2 : 1); }
};

CompressorWeights compressor_weights(const Weights& weights, const std::string& prefix,
                                     const Shape& shape, int64_t ratio, bool keys);

// Feeds every segment's tokens: stores the entries of all groups they finish (not in a replay) and
// refreshes the raw rings. x: [rows, hidden], the layer's normalised input.
void compress(Context& context, const CompressorWeights& weights, const LayerLayout& layer,
              const float* x, const Segments& segments);

// One softmax per channel over `slots` rows; rows[i] are values, `columns` later their scores.
ISA_DECLARE(void pool_group(const float* const* rows, int64_t slots, int64_t columns, int64_t width,
                            float* out))
ISA_DECLARE(void add_positional(float* scores, const float* positional, int64_t columns))

}  // namespace rorqual
