#include "attention_layer.h"

#include <cmath>

#include "attention.h"
#include "elementwise.h"
#include "entries.h"
#include "indexer.h"

namespace rorqual {

namespace {

// The entries each query chose; ascending. Null `indices` means all that are visible.
Selection choose(Context& context, const AttentionWeights& weights, const LayerLayout& layer,
                 const float* x, const float* latent, const Segments& segments) {
    const Shape& shape = context.shape;
    const int64_t rows = segments.rows, heads = shape.index_heads, dim = shape.index_dim;
    const bool official = shape.official;
    float* q = context.scratch.floats(rows * heads * dim);
    float* head_weights = context.scratch.floats(rows * heads);
    apply(context, weights.index_query, latent, rows, shape.q_lora, q, heads * dim);
    ISA_CALL(rotate)(q, rows, heads * dim, heads, dim, segments.compressing.cos,
                     segments.compressing.sin, shape.rope_dim / 2, false, official);
    if (official)
        for (int64_t i = 0; i < rows * heads; ++i) ISA_CALL(round_index)(q + i * dim, dim, true);
    apply(context, weights.index_weight, x, rows, shape.hidden, head_weights, heads);
    const float scale = static_cast<float>(std::pow(static_cast<double>(dim), -0.5) *
                                           std::pow(static_cast<double>(heads), -0.5));
    for (int64_t i = 0; i < rows * heads; ++i) head_weights[i] *= scale;
    if (official) ISA_CALL(round_to_bf16)(head_weights, rows * heads);
    const IndexShape index{context.layout.key_format, heads, dim, shape.index_topk, official};
    return select_entries(context, index, layer, segments, q, head_weights);
}

// The rows' own entries, [rows, head_dim].
float* make_entries(Context& context, const AttentionWeights& weights, const Rotation& rotation,
                    const float* x, int64_t rows) {
    const Shape& shape = context.shape;
    const int64_t dim = shape.head_dim;
    float* entries = context.scratch.floats(rows * dim);
    apply(context, weights.entry, x, rows, shape.hidden, entries, dim);
    ISA_CALL(rms_norm)(entries, rows, dim, dim, weights.entry_norm.data(), shape.norm_eps,
                       shape.official, entries, dim);
    ISA_CALL(rotate)(entries, rows, dim, 1, dim, rotation.cos, rotation.sin, shape.rope_dim / 2,
                     false, shape.official);
    if (shape.official)
        for (int64_t r = 0; r < rows; ++r)
            ISA_CALL(round_entry)(entries + r * dim, dim, shape.rope_dim);
    return entries;
}

// Rotated queries [rows, heads, head_dim] from the query latent.
float* make_queries(Context& context, const AttentionWeights& weights, const Rotation& rotation,
                    const float* latent, int64_t rows) {
    const Shape& shape = context.shape;
    const int64_t dim = shape.head_dim, width = shape.heads * dim;
    float* q = context.scratch.floats(rows * width);
    apply(context, weights.query_up, latent, rows, shape.q_lora, q, width);
    ISA_CALL(rms_norm)(q, rows * shape.heads, dim, dim, nullptr, shape.norm_eps, shape.official, q,
                       dim);
    ISA_CALL(rotate)(q, rows, width, shape.heads, dim, rotation.cos, rotation.sin,
                     shape.rope_dim / 2, false, shape.official);
    return q;
}

// Rotates attention's results back, in place, projects each group, mixes the groups.
void project_output(Context& context, const AttentionWeights& weights, const Rotation& rotation,
                    float* o, int64_t rows, float* out) {
    const Shape& shape = context.shape;
    const int64_t width = shape.heads * shape.head_dim, group_width = width / shape.o_groups;
    const int64_t latents = shape.o_groups * shape.o_lora;
    if (shape.official) ISA_CALL(round_to_bf16)(o, rows * width);
    ISA_CALL(rotate)(o, rows, width, shape.heads, shape.head_dim, rotation.cos, rotation.sin,
                     shape.rope_dim / 2, true, shape.official);
    float* grouped = context.scratch.floats(rows * latents);
    for (int64_t g = 0; g < shape.o_groups; ++g)
        apply(context, weights.group_down[g], o + g * group_width, rows, width,
              grouped + g * shape.o_lora, latents);
    apply(context, weights.up, grouped, rows, latents, out, shape.hidden);
}

}  // namespace

AttentionWeights load_attention(const Weights& weights, const std::string& prefix,
                                const Shape& shape, int64_t ratio) {
    AttentionWeights made;
    const int64_t width = shape.heads * shape.head_dim;
    const auto name = [&](const char* part) { return prefix + "." + part; };
    made.ratio = ratio;
    made.query_down = weights.linear(name("wq_a"), shape.q_lora, shape.hidden);
    made.query_up = weights.linear(name("wq_b"), width, shape.q_lora);
    made.entry = weights.linear(name("wkv"), shape.head_dim, shape.hidden);
    made.query_norm = weights.array(name("q_norm.weight"), shape.q_lora);
    made.entry_norm = weights.array(name("kv_norm.weight"), shape.head_dim);
    made.sink = weights.array(name("attn_sink"), shape.heads);
    for (int64_t g = 0; g < shape.o_groups; ++g)
        made.group_down.push_back(weights.linear(name("wo_a.") + std::to_string(g), shape.o_lora,
                                                 width / shape.o_groups, false));
    made.up = weights.linear(name("wo_b"), shape.hidden, shape.o_groups * shape.o_lora);
    if (ratio) made.compressor = compressor_weights(weights, name("compressor"), shape, ratio, false);
    if (made.overlapping()) {
        made.index_query = weights.linear(name("indexer.wq_b"),
                                          shape.index_heads * shape.index_dim, shape.q_lora);
        made.index_weight =
            weights.linear(name("indexer.weights_proj"), shape.index_heads, shape.hidden, false);
        made.index_compressor =
            compressor_weights(weights, name("indexer.compressor"), shape, ratio, true);
    }
    return made;
}

void attention_layer(Context& context, const AttentionWeights& weights, const LayerLayout& layer,
                     const float* x, const Segments& segments, float* out) {
    Scratch::Frame frame(context.scratch);
    const Shape& shape = context.shape;
    const int64_t rows = segments.rows;
    const Rotation& rotation = weights.ratio ? segments.compressing : segments.plain;
    if (weights.ratio) compress(context, weights.compressor, layer, x, segments);
    if (weights.overlapping()) compress(context, weights.index_compressor, layer, x, segments);
    const float* entries = make_entries(context, weights, rotation, x, rows);
    if (!out) return store_window(context, layer, segments, entries);

    float* latent = context.scratch.floats(rows * shape.q_lora);
    apply(context, weights.query_down, x, rows, shape.hidden, latent, shape.q_lora);
    ISA_CALL(rms_norm)(latent, rows, shape.q_lora, shape.q_lora, weights.query_norm.data(),
                       shape.norm_eps, shape.official, latent, shape.q_lora);
    float* q = make_queries(context, weights, rotation, latent, rows);
    Selection selection;
    if (weights.overlapping()) selection = choose(context, weights, layer, x, latent, segments);
    // Results may take the place of the queries: each is read before its result is written.
    attend(context, layer, segments, q, entries, weights.sink.data(), selection, q);
    store_window(context, layer, segments, entries);
    project_output(context, weights, rotation, q, rows, out);
}

}  // namespace rorqual
