// The whole network: one call runs every chunk and decode of a step, on memory that callers own.
//
// model/transformer.py is the truth. A Network knows no sequence: what it remembers of one lies in
// the state and the blocks that come with each call. Calls must not overlap.
#pragma once

#include <cstdint>
#include <deque>
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

// Threads and the temporaries they work in.
struct Team {
    explicit Team(int num_threads)
        : pool(num_threads), workers(static_cast<size_t>(num_threads)) {}
    ThreadPool pool;
    Scratch scratch;
    std::vector<Scratch> workers;
};

// The logits a step is to return.
struct Wanted {
    const int64_t* rows;  // numbers of the step's tokens, ascending
    int64_t count;
    float* out;  // [count, vocab]
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
    Context context(Team& team) const {
        return {shape_, layout_, slabs_, team.pool, team.scratch, team.workers};
    }
    // Calls f(context, segments, count, first_row, rows), once for all segments and the whole team,
    // or for a part of them on each thread.
    template <class F>
    void share_out(const Segment* segments, int64_t count, int64_t rows, const F& f);
    void wave(Context& context, const int32_t* tokens, const Segment* segments, int64_t count,
              int64_t rows, int64_t first_token, const Wanted& wanted) const;
    void run_block(Context& context, const BlockWeights& block, const int32_t* tokens,
                   const Segments& segments, float* streams) const;
    void advance_mtp(Context& context, const int32_t* tokens, const Segment* segments,
                     int64_t count, const float* streams) const;
    void answer(Context& context, const HyperWeights& merge, const std::vector<float>& norm,
                const float* streams, int64_t rows, float* out) const;
    Segments locate(Scratch& scratch, const Segment* segments, int64_t count, int64_t rows) const;
    void embed(const int32_t* tokens, int64_t rows, float* out) const;
    void combine(Context& context, const int32_t* next_tokens, const float* before, int64_t rows,
                 float* streams) const;
    float* pending(const Segment& segment, int64_t position) const;
    BlockWeights load_block(const Weights& weights, const std::string& prefix, int64_t index,
                            bool hashed) const;

    Shape shape_;
    CacheLayout layout_;
    Slabs slabs_;
    Team team_;
    std::deque<Team> alone_;  // every thread of the team as a team of one
    Embedding embedding_;
    std::vector<float> plain_frequencies_, compressing_frequencies_;
    std::vector<BlockWeights> blocks_;
    std::vector<MtpWeights> mtp_;  // none or one: deeper prediction is not used
    HyperWeights merge_;
    std::vector<float> norm_;
    Matrix head_;
};

}  // namespace rorqual
