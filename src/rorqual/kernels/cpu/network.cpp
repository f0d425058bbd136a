#include "network.h"

#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "entries.h"

namespace rorqual {

namespace {

// Tokens that go through all layers together. Results do not depend on it; temporaries of a wave
// stay in the caches, and its weights are read once for so many tokens.
constexpr int64_t kWave = 512;

}  // namespace

// ---- loading ----------------------------------------------------------------------------------

Network::Network(const Shape& shape, const CacheLayout& layout, const Weights& weights,
                 Embedding embedding, std::vector<float> plain_frequencies,
                 std::vector<float> compressing_frequencies, int num_threads)
    : shape_(shape),
      layout_(layout),
      slabs_(layout_),
      pool_(num_threads),
      workers_(static_cast<size_t>(num_threads)),
      embedding_(std::move(embedding)),
      plain_frequencies_(std::move(plain_frequencies)),
      compressing_frequencies_(std::move(compressing_frequencies)) {
    for (const LayerLayout& layer : layout_.layers)
        if (layer.block_keys >= 0 && !key_dims_ok(layout_.key_format, shape_.index_dim))
            throw std::invalid_argument("index_head_dim does not fit the key format");
    for (int64_t i = 0; i < shape_.layers; ++i)
        blocks_.push_back(
            load_block(weights, "layers." + std::to_string(i), i, i < shape_.hash_layers));
    merge_ = load_merge(weights, "hc_head", shape_);
    norm_ = weights.array("norm.weight", shape_.hidden);
    head_ = weights.matrix("head", shape_.vocab, shape_.hidden);
    if (shape_.mtp_layers == 0) return;
    const int64_t width = shape_.hidden;
    mtp_.push_back({load_block(weights, "mtp.0", shape_.layers, false),
                    weights.linear("mtp.0.e_proj", width, width),
                    weights.linear("mtp.0.h_proj", width, width),
                    weights.array("mtp.0.enorm.weight", width),
                    weights.array("mtp.0.hnorm.weight", width),
                    weights.array("mtp.0.norm.weight", width),
                    load_merge(weights, "mtp.0.hc_head", shape_)});
}

BlockWeights Network::load_block(const Weights& weights, const std::string& prefix, int64_t index,
                                 bool hashed) const {
    const LayerLayout& layout = layout_.layers.at(static_cast<size_t>(index));
    return {layout,
            load_hyper(weights, prefix + ".hc_attn", shape_),
            load_hyper(weights, prefix + ".hc_ffn", shape_),
            weights.array(prefix + ".attn_norm.weight", shape_.hidden),
            weights.array(prefix + ".ffn_norm.weight", shape_.hidden),
            load_attention(weights, prefix + ".attn", shape_, layout.ratio),
            load_moe(weights, prefix + ".ffn", shape_, hashed)};
}

// ---- parts of a step --------------------------------------------------------------------------

void Network::embed(const int32_t* tokens, int64_t rows, float* out) const {
    const int64_t width = shape_.hidden;
    for (int64_t r = 0; r < rows; ++r, out += width) {
        const int64_t at = tokens[r] * width;
        if (embedding_.wide.empty())
            ISA_CALL(expand_bf16)(embedding_.narrow.data() + at, width, out);
        else
            std::memcpy(out, embedding_.wide.data() + at, sizeof(float) * width);
    }
}

// Positions and rotations of every row. What it takes from the scratch belongs to the caller's
// frame.
Segments Network::locate(const Segment* segments, int64_t count, int64_t rows) {
    const int64_t pairs = shape_.rope_dim / 2;
    int64_t* positions = scratch_.take<int64_t>(rows);
    for (int64_t s = 0; s < count; ++s)
        for (int64_t i = 0; i < segments[s].tokens; ++i)
            positions[segments[s].first_row + i] = segments[s].start + i;
    const auto table = [&](const std::vector<float>& frequencies) {
        float* cos = scratch_.floats(rows * pairs);
        float* sin = scratch_.floats(rows * pairs);
        for (int64_t r = 0; r < rows; ++r)
            rotation_at(positions[r], frequencies.data(), pairs, cos + r * pairs, sin + r * pairs);
        return Rotation{cos, sin, frequencies.data()};
    };
    return {segments, count, rows, positions, table(plain_frequencies_),
            table(compressing_frequencies_)};
}

void Network::run_block(const BlockWeights& block, const int32_t* tokens, const Segments& segments,
                        float* streams) {
    Scratch::Frame frame(scratch_);
    Context context = this->context();
    const int64_t rows = segments.rows;
    float* x = scratch_.floats(rows * shape_.hidden);
    float* out = scratch_.floats(rows * shape_.hidden);
    float* mixing = scratch_.floats(rows * mixing_columns(shape_));
    enter_streams(context, block.attn_mixing, block.attn_norm.data(), streams, rows, x, mixing);
    attention_layer(context, block.attn, block.layout, x, segments, out);
    leave_streams(context, out, mixing, rows, streams);
    enter_streams(context, block.ffn_mixing, block.ffn_norm.data(), streams, rows, x, mixing);
    mixture(context, block.ffn, x, tokens, rows, out);
    leave_streams(context, out, mixing, rows, streams);
}

// The MTP block's input: its view of the next token's embedding, on every stream.
void Network::combine(const int32_t* next_tokens, const float* before, int64_t rows,
                      float* streams) {
    Scratch::Frame frame(scratch_);
    Context context = this->context();
    const MtpWeights& mtp = mtp_[0];
    const int64_t m = shape_.streams, width = shape_.hidden;
    float* next = scratch_.floats(rows * width);
    float* shared = scratch_.floats(rows * width);
    float* normed = scratch_.floats(rows * m * width);
    embed(next_tokens, rows, next);
    ISA_CALL(rms_norm)
    (next, rows, width, width, mtp.enorm.data(), shape_.norm_eps, shape_.official, next, width);
    apply(context, mtp.e_proj, next, rows, width, shared, width);
    ISA_CALL(rms_norm)
    (before, rows * m, width, width, mtp.hnorm.data(), shape_.norm_eps, shape_.official, normed,
     width);
    apply(context, mtp.h_proj, normed, rows * m, width, streams, width);
    for (int64_t r = 0; r < rows * m; ++r) {
        const float* add = shared + r / m * width;
        float* to = streams + r * width;
        for (int64_t i = 0; i < width; ++i) to[i] += add[i];
    }
    if (shape_.official) ISA_CALL(round_to_bf16)(streams, rows * m * width);
}

// Feeds the MTP block every position whose next token is known by now, and leaves the last token's
// streams in the state for when its own is. Only the block's memory is wanted, so neither queries
// nor experts are computed.
void Network::advance_mtp(const int32_t* tokens, const Segment* segments, int64_t count,
                          const float* streams) {
    Scratch::Frame frame(scratch_);
    const int64_t size = shape_.streams * shape_.hidden;
    Segment* behind = scratch_.take<Segment>(count);
    int64_t rows = 0, used = 0;
    for (int64_t s = 0; s < count; ++s) {
        const Segment& segment = segments[s];
        const int64_t first = segment.start == 0 ? 1 : 0;  // nothing precedes position 0
        if (!(segment.flags & kMtp) || segment.tokens == first) continue;
        behind[used++] = {segment.tokens - first, segment.start + first - 1, segment.flags,
                          segment.state, segment.blocks, rows};
        rows += segment.tokens - first;
    }
    int32_t* next = scratch_.take<int32_t>(rows);
    float* before = scratch_.floats(rows * size);
    int64_t row = 0;
    for (int64_t s = 0; s < count; ++s) {
        const Segment& segment = segments[s];
        if (!(segment.flags & kMtp)) continue;
        for (int64_t i = segment.start == 0 ? 1 : 0; i < segment.tokens; ++i, ++row) {
            const float* from = i ? streams + (segment.first_row + i - 1) * size
                                  : pending(segment, segment.start - 1);
            std::memcpy(before + row * size, from, sizeof(float) * size);
            next[row] = tokens[segment.first_row + i];
        }
        // Of as many tokens as can be taken back: the next step may begin after any of them.
        for (int64_t i = std::max<int64_t>(0, segment.tokens - layout_.pending_slots);
             i < segment.tokens; ++i)
            std::memcpy(pending(segment, segment.start + i),
                        streams + (segment.first_row + i) * size, sizeof(float) * size);
    }
    if (rows == 0) return;
    Context context = this->context();
    const BlockWeights& block = mtp_[0].block;
    const Segments located = locate(behind, used, rows);
    float* mixed = scratch_.floats(rows * size);
    float* x = scratch_.floats(rows * shape_.hidden);
    float* mixing = scratch_.floats(rows * mixing_columns(shape_));
    combine(next, before, rows, mixed);
    enter_streams(context, block.attn_mixing, block.attn_norm.data(), mixed, rows, x, mixing);
    attention_layer(context, block.attn, block.layout, x, located, nullptr);
}

void Network::wave(const int32_t* tokens, const Segment* segments, int64_t count, int64_t rows,
                   float* streams) {
    Scratch::Frame frame(scratch_);
    const int64_t m = shape_.streams, width = shape_.hidden;
    const Segments located = locate(segments, count, rows);
    float* embedded = scratch_.floats(rows * width);
    embed(tokens, rows, embedded);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < m; ++j)
            std::memcpy(streams + (r * m + j) * width, embedded + r * width, sizeof(float) * width);
    for (const BlockWeights& block : blocks_) run_block(block, tokens, located, streams);
    if (!mtp_.empty()) advance_mtp(tokens, segments, count, streams);
}

// ---- the calls --------------------------------------------------------------------------------

void Network::step(const int32_t* tokens, const Segment* segments, int64_t count,
                   const int64_t* logit_rows, int64_t num_logit_rows, float* out) {
    Scratch::Frame frame(scratch_);
    const int64_t size = shape_.streams * shape_.hidden;
    float* wanted = scratch_.floats(num_logit_rows * size);
    float* streams = scratch_.floats(kWave * size);
    Segment* parts = scratch_.take<Segment>(count);
    int64_t done = 0, row = 0;  // tokens behind us; logit rows behind us
    int64_t s = 0, taken = 0;   // the segment we are in, and how much of it is behind us
    while (s < count) {
        int64_t used = 0, rows = 0;
        while (s < count && rows < kWave) {
            const int64_t tokens_here = std::min(segments[s].tokens - taken, kWave - rows);
            parts[used] = segments[s];
            parts[used].tokens = tokens_here;
            parts[used].start = segments[s].start + taken;
            parts[used++].first_row = rows;
            rows += tokens_here;
            taken += tokens_here;
            if (taken == segments[s].tokens) {
                ++s;
                taken = 0;
            }
        }
        wave(tokens + done, parts, used, rows, streams);
        for (; row < num_logit_rows && logit_rows[row] < done + rows; ++row)
            std::memcpy(wanted + row * size, streams + (logit_rows[row] - done) * size,
                        sizeof(float) * size);
        done += rows;
    }
    if (num_logit_rows == 0) return;
    Context context = this->context();
    float* hidden = scratch_.floats(num_logit_rows * shape_.hidden);
    merge_streams(context, merge_, norm_.data(), wanted, num_logit_rows, hidden);
    matmul(pool_, head_, hidden, num_logit_rows, shape_.hidden, out, shape_.vocab);
}

// The residual streams of the token at `position`, one of the last fed.
float* Network::pending(const Segment& segment, int64_t position) const {
    const int64_t row = position % layout_.pending_slots * shape_.streams * shape_.hidden;
    return reinterpret_cast<float*>(segment.state + layout_.pending_streams) + row;
}

void Network::draft(const int32_t* tokens, const Segment* segments, int64_t count, float* out) {
    if (mtp_.empty()) throw std::invalid_argument("this model has no MTP block");
    Scratch::Frame frame(scratch_);
    const int64_t size = shape_.streams * shape_.hidden;
    float* before = scratch_.floats(count * size);
    float* streams = scratch_.floats(count * size);
    for (int64_t s = 0; s < count; ++s)
        std::memcpy(before + s * size, pending(segments[s], segments[s].start),
                    sizeof(float) * size);
    const Segments located = locate(segments, count, count);
    combine(tokens, before, count, streams);
    run_block(mtp_[0].block, tokens, located, streams);
    Context context = this->context();
    float* hidden = scratch_.floats(count * shape_.hidden);
    merge_streams(context, mtp_[0].merge, mtp_[0].norm.data(), streams, count, hidden);
    matmul(pool_, head_, hidden, count, shape_.hidden, out, shape_.vocab);
}

}  // namespace rorqual
