// Attention of one query over tiles of entries that all its heads share; keys and values are the
// same vectors (report 2.3, eq. 26-27), and a sink per head takes weight without adding anything.
//
// Softmax runs online over the tiles. Every number of a query is one fixed chain of operations - a
// logit over the dims, a total and an output over the entries, in ascending order - so a result
// depends on the query's own tiles alone, not on what is computed beside it.
#pragma once

#include <cstdint>

#include "context.h"
#include "indexer.h"
#include "isa.h"

namespace rorqual {

constexpr int64_t kTileEntries = 32;  // entries per tile
constexpr int64_t kTileSlack = 8;     // rows of logits behind a tile

// Sizes of one attention layer. Entries and outputs have rows of `stride` floats.
struct AttentionShape {
    int64_t heads;
    int64_t dim;
    float scale;        // of logits
    bool bf16_weights;  // round probabilities to BF16 before they meet the values

    int64_t stride() const { return (dim + 15) / 16 * 16; }
    int64_t padded_heads() const { return (heads + 7) / 8 * 8; }
    // Floats a query in progress takes.
    int64_t query_floats() const { return dim * padded_heads() + 16; }
    int64_t state_floats() const { return 2 * padded_heads() + 16 + heads * stride(); }
    int64_t logit_floats() const { return (kTileEntries + kTileSlack) * padded_heads() + 16; }
};

// q [heads, dim] to the order the tiles are multiplied in, and a state that has seen the sinks only.
ISA_DECLARE(void begin_query(const AttentionShape& shape, const float* q, const float* sink,
                             float* query, float* state))
// Takes in `count` <= kTileEntries entries, wherever they lie; `logits` is scratch.
ISA_DECLARE(void attend_tile(const AttentionShape& shape, const float* query,
                             const float* const* entries, int64_t count, float* state,
                             float* logits))
// The result [heads, dim].
ISA_DECLARE(void end_query(const AttentionShape& shape, const float* state, float* out))

// out[rows, heads, head_dim] = attention of every query over its window - the last `layout.window`
// entries, its own included - and the compressed entries it selected; may be q itself. entries:
// [rows, head_dim], of the batch itself, not yet in the windows.
void attend(Context& context, const LayerLayout& layer, const Segments& segments, const float* q,
            const float* entries, const float* sink, const Selection& selection, float* out);
// Puts the batch's entries into the windows.
void store_window(Context& context, const LayerLayout& layer, const Segments& segments,
                  const float* entries);

}  // namespace rorqual
