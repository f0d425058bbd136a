// The lightning indexer over stored keys: scores, and the best entries of each query.
//
//   score(q, s) = sum_h w_h relu(q_h . k_s)                          (report 2.3.1, eq. 16)
//
// Keys are read once, block by block; what a query remembers is a threshold and a few times topk
// candidates, however long the context. Ranked by the float32 score, the earlier of equals first, so
// that the choice is one well-defined set: it does not depend on how keys are split over threads.
//
// Where keys are int8 or FP4, queries become int8 (one scale per head, or per head and 32 dims) and
// the dot products are exact integers. Queries that hold FP4 values already stay exact.
#pragma once

#include <cstdint>

#include "context.h"
#include "entries.h"
#include "isa.h"
#include "layout.h"
#include "scratch.h"

namespace rorqual {

// Which compressed entries each query of a batch attends to.
struct Selection {
    const int32_t* indices = nullptr;  // [rows, width], ascending; null: all that are visible
    const int64_t* counts = nullptr;   // [rows]
    int64_t width = 0;
};

struct IndexShape {
    KeyFormat format;
    int64_t heads;
    int64_t dim;
    int64_t topk;
    bool fp4_queries;  // values are FP4 times a power of two per 32 dims (official numerics)
};

// A query ready to meet keys. Which parts are set depends on the format.
struct IndexQuery {
    const float* values;   // fp32: [heads, dim]
    const int8_t* codes;   // int8, fp4: [heads, dim]
    const int32_t* sums;   // of the codes each scale covers
    const float* scales;   // int8: [heads], times the head's weight; fp4: [heads, dim / 32]
    const float* weights;  // [heads]
    const int32_t* ascending;  // [heads]: 0, 1, ...
    const int32_t* by_sign;    // [heads]: first those of positive weight, ascending; then the others
    int64_t positive;          // how many of positive weight
};

// Entries that may be among the best: ordered score in the high half, inverted index in the low.
struct Candidates {
    uint64_t* items;
    int64_t count;
    int64_t capacity;  // at least a block more than wanted
    int64_t wanted;
    float threshold;  // a later entry must score more than this
};

// Room for candidates is taken from `scratch` too.
IndexQuery prepare_query(const IndexShape& shape, const float* q, const float* weights,
                         Scratch& scratch);
Candidates no_candidates(int64_t topk, Scratch& scratch);
// Drops all but the best `wanted` and raises the threshold.
void keep_best(Candidates& candidates);
// The best of several scans over different keys: ascending indices to `chosen`, how many returned.
// Reorders the items of `parts`.
int64_t merge_best(const Candidates* parts, int64_t count, Scratch& scratch, int32_t* chosen);

// The best topk visible entries of every query: q [rows, heads, dim], weights [rows, heads]. The
// selection lives in the caller's scratch.
Selection select_entries(Context& context, const IndexShape& shape, const LayerLayout& layer,
                         const Segments& segments, const float* q, const float* weights);

// Offers keys [first_key, first_key + 32 * num_blocks) to the queries; query i sees those below
// visible[i] only. first_key must not be below what was offered before.
ISA_DECLARE(void scan_keys(const IndexShape& shape, const uint8_t* const* blocks,
                           int64_t num_blocks, int64_t first_key, const IndexQuery* queries,
                           const int64_t* visible, Candidates* candidates, int64_t num_queries))

}  // namespace rorqual
