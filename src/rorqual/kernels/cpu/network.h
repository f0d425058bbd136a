// The whole network: one call runs every chunk and decode of a step, on memory that callers own.
//
// model/transformer.py is the truth. A Network knows no sequence: what it remembers of one lies in
// the state and the blocks that come with each call. Calls must not overlap.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention_layer.h"
#include "hyper.h"
#include "moe.h"

namespace rorqual {

struct BlockWeights {
    LayerLayout layout;
    HyperWeights attn_mixing, ffn_mixing;
    std::vector<float> attn_norm, ffn_norm;
    AttentionWeights attn;
    MoeWeights ffn;
};

struct MtpWeights {
    BlockWeights block;
    Linear e_proj, h_proj;
    std::vector<float> enorm, hnorm, norm;
    HyperWeights merge;
};

// Rows by token id, in the precision they came in.
struct Embedding {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
};

class Network {
public:
    Network(const Shape& shape, const CacheLayout& layout, const Weights& weights,
            Embedding embedding, std::vector<float> plain_frequencies,
            std::vector<float> compressing_frequencies, int num_threads);

    const Shape& shape() const { return shape_; }
    const CacheLayout& layout() const { return layout_; }
    const Slabs& slabs() const { return slabs_; }
    void add_slab(uint8_t* slab) { slabs_.add(slab); }

    // tokens: of all segments, one after another. logit_rows: ascending flat token numbers; out
    // [num_logit_rows, vocab].
    void step(const int32_t* tokens, const Segment* segments, int64_t count,
              const int64_t* logit_rows, int64_t num_logit_rows, float* out);
    // tokens: per segment the token after its pending one (Segment::start, one token). out
    // [count, vocab]: logits of the token after that.
    void draft(const int32_t* tokens, const Segment* segments, int64_t count, float* out);

private:
    Context context() { return {shape_, layout_, slabs_, pool_, scratch_, workers_}; }
    void wave(const int32_t* tokens, const Segment* segments, int64_t count, int64_t rows,
              float* streams);
    void run_block(const BlockWeights& block, const int32_t* tokens, const Segments& segments,
                   float* streams);
    void advance_mtp(const int32_t* tokens, const Segment* segments, int64_t count,
                     const float* streams);
    Segments locate(const Segment* segments, int64_t count, int64_t rows);
    void embed(const int32_t* tokens, int64_t rows, float* out) const;
    void combine(const int32_t* next_tokens, const float* before, int64_t rows, float* streams);
    float* pending(const Segment& segment, int64_t position) const;
    BlockWeights load_block(const Weights& weights, const std::string& prefix, int64_t index,
                            bool hashed) const;

    Shape shape_;
    CacheLayout layout_;
    Slabs slabs_;
    ThreadPool pool_;
    Scratch scratch_;
    std::vector<Scratch> workers_;
    Embedding embedding_;
    std::vector<float> plain_frequencies_, compressing_frequencies_;
    std::vector<BlockWeights> blocks_;
    std::vector<MtpWeights> mtp_;  // none or one: deeper prediction is not used
    HyperWeights merge_;
    std::vector<float> norm_;
    Matrix head_;
};

}  // namespace rorqual
