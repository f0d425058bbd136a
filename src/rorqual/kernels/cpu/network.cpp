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

// Up to so many rows of several sequences every thread takes sequences of its own through all
// layers: cut inside a layer, the pieces would be worth less than waking a thread for each.
constexpr int64_t kFewRows = 64;

}  // namespace

// ---- loading ----------------------------------------------------------------------------------

Network::Network(const Shape& shape, const CacheLayout& layout, const Weights& weights,
                 Embedding embedding, std::vector<float> plain_frequencies,
                 std::vector<float> compressing_frequencies, int num_threads)
    : shape_(shape),
      layout_(layout),
      slabs_(layout_),
      team_(num_threads),
      embedding_(std::move(embedding)),
      plain_frequencies_(std::move(plain_frequencies)),
      compressing_frequencies_(std::move(compressing_frequencies)) {
    for (int i = 0; i < num_threads; ++i) alone_.emplace_back(1);
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
Segments Network::locate(Scratch& scratch, const Segment* segments, int64_t count,
                         int64_t rows) const {
    const int64_t pairs = shape_.rope_dim / 2;
    int64_t* positions = scratch.take<int64_t>(rows);
    for (int64_t s = 0; s < count; ++s)
        for (int64_t i = 0; i < segments[s].tokens; ++i)
            positions[segments[s].first_row + i] = segments[s].start + i;
    const auto table = [&](const std::vector<float>& frequencies) {
        float* cos = scratch.floats(rows * pairs);
        float* sin = scratch.floats(rows * pairs);
        for (int64_t r = 0; r < rows; ++r)
            rotation_at(positions[r], frequencies.data(), pairs, cos + r * pairs, sin + r * pairs);
        return Rotation{cos, sin, frequencies.data()};
    };
    return {segments, count, rows, positions, table(plain_frequencies_),
            table(compressing_frequencies_)};
}

void Network::run_block(Context& context, const BlockWeights& block, const int32_t* tokens,
                        const Segments& segments, float* streams) const {
    Scratch& scratch = context.scratch;
    Scratch::Frame frame(scratch);
    const int64_t rows = segments.rows;
    float* x = scratch.floats(rows * shape_.hidden);
    float* out = scratch.floats(rows * shape_.hidden);
    float* mixing = scratch.floats(rows * mixing_columns(shape_));
    enter_streams(context, block.attn_mixing, block.attn_norm.data(), streams, rows, x, mixing);
    attention_layer(context, block.attn, block.layout, x, segments, out);
    leave_streams(context, out, mixing, rows, streams);
    enter_streams(context, block.ffn_mixing, block.ffn_norm.data(), streams, rows, x, mixing);
    mixture(context, block.ffn, x, tokens, rows, out);
    leave_streams(context, out, mixing, rows, streams);
}

// Logits [rows, vocab] of what the streams have become.
void Network::answer(Context& context, const HyperWeights& merge, const std::vector<float>& norm,
                     const float* streams, int64_t rows, float* out) const {
    Scratch::Frame frame(context.scratch);
    float* hidden = context.scratch.floats(rows * shape_.hidden);
    merge_streams(context, merge, norm.data(), streams, rows, hidden);
    matmul(context.pool, head_, hidden, rows, shape_.hidden, out, shape_.vocab);
}

// The MTP block's input: its view of the next token's embedding, on every stream.
void Network::combine(Context& context, const int32_t* next_tokens, const float* before,
                      int64_t rows, float* streams) const {
    Scratch& scratch = context.scratch;
    Scratch::Frame frame(scratch);
    const MtpWeights& mtp = mtp_[0];
    const int64_t m = shape_.streams, width = shape_.hidden;
    float* next = scratch.floats(rows * width);
    float* shared = scratch.floats(rows * width);
    float* normed = scratch.floats(rows * m * width);
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
void Network::advance_mtp(Context& context, const int32_t* tokens, const Segment* segments,
                          int64_t count, const float* streams) const {
    Scratch& scratch = context.scratch;
    Scratch::Frame frame(scratch);
    const int64_t size = shape_.streams * shape_.hidden;
    Segment* behind = scratch.take<Segment>(count);
    int64_t rows = 0, used = 0;
    for (int64_t s = 0; s < count; ++s) {
        const Segment& segment = segments[s];
        const int64_t first = segment.start == 0 ? 1 : 0;  // nothing precedes position 0
        if (!(segment.flags & kMtp) || segment.tokens == first) continue;
        behind[used++] = {segment.tokens - first, segment.start + first - 1, segment.flags,
                          segment.state, segment.blocks, rows};
        rows += segment.tokens - first;
    }
    int32_t* next = scratch.take<int32_t>(rows);
    float* before = scratch.floats(rows * size);
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
    const BlockWeights& block = mtp_[0].block;
    const Segments located = locate(scratch, behind, used, rows);
    float* mixed = scratch.floats(rows * size);
    float* x = scratch.floats(rows * shape_.hidden);
    float* mixing = scratch.floats(rows * mixing_columns(shape_));
    combine(context, next, before, rows, mixed);
    enter_streams(context, block.attn_mixing, block.attn_norm.data(), mixed, rows, x, mixing);
    attention_layer(context, block.attn, block.layout, x, located, nullptr);
}

void Network::wave(Context& context, const int32_t* tokens, const Segment* segments, int64_t count,
                   int64_t rows, int64_t first_token, const Wanted& wanted) const {
    Scratch& scratch = context.scratch;
    Scratch::Frame frame(scratch);
    const int64_t m = shape_.streams, width = shape_.hidden, size = m * width;
    const Segments located = locate(scratch, segments, count, rows);
    float* streams = scratch.floats(rows * size);
    float* embedded = scratch.floats(rows * width);
    embed(tokens, rows, embedded);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < m; ++j)
            std::memcpy(streams + (r * m + j) * width, embedded + r * width, sizeof(float) * width);
    for (const BlockWeights& block : blocks_) run_block(context, block, tokens, located, streams);
    if (!mtp_.empty()) advance_mtp(context, tokens, segments, count, streams);

    const int64_t* end = wanted.rows + wanted.count;
    const int64_t* from = std::lower_bound(wanted.rows, end, first_token);
    const int64_t* to = std::lower_bound(from, end, first_token + rows);
    if (from == to) return;
    float* last = scratch.floats((to - from) * size);
    for (const int64_t* row = from; row < to; ++row)
        std::memcpy(last + (row - from) * size, streams + (*row - first_token) * size,
                    sizeof(float) * size);
    answer(context, merge_, norm_, last, to - from,
           wanted.out + (from - wanted.rows) * shape_.vocab);
}

// ---- the calls --------------------------------------------------------------------------------

template <class F>
void Network::share_out(const Segment* segments, int64_t count, int64_t rows, const F& f) {
    const int64_t threads = team_.pool.size();
    // Part of the segment's middle row, if all parts have as many rows.
    const auto part_of = [&](const Segment& segment) {
        return (2 * segment.first_row + segment.tokens) * threads / (2 * rows);
    };
    const auto is_before = [&](const Segment& segment, int64_t part) {
        return part_of(segment) < part;
    };
    const auto begin_of = [&](int64_t part) {
        return std::lower_bound(segments, segments + count, part, is_before);
    };
    const auto row_at = [&](const Segment* at) {
        return at == segments + count ? rows : at->first_row;
    };
    int64_t most = 0;
    for (int64_t part = 0; part < threads; ++part)
        most = std::max(most, row_at(begin_of(part + 1)) - row_at(begin_of(part)));
    if (rows > kFewRows || 4 * most > 3 * rows) {
        Context context = this->context(team_);
        return f(context, segments, count, 0, rows);
    }
    team_.pool.run(
        threads,
        [&](int64_t first, int64_t last, int worker) {
            for (int64_t part = first; part < last; ++part) {
                const Segment *from = begin_of(part), *to = begin_of(part + 1);
                if (from == to) continue;
                Context context = this->context(alone_[static_cast<size_t>(worker)]);
                Scratch::Frame frame(context.scratch);
                Segment* own = context.scratch.take<Segment>(to - from);
                std::copy(from, to, own);
                for (int64_t s = 0; s < to - from; ++s) own[s].first_row -= from->first_row;
                f(context, own, to - from, from->first_row, row_at(to) - from->first_row);
            }
        },
        1);
}

void Network::step(const int32_t* tokens, const Segment* segments, int64_t count,
                   const int64_t* logit_rows, int64_t num_logit_rows, float* out) {
    Scratch::Frame frame(team_.scratch);
    const Wanted wanted{logit_rows, num_logit_rows, out};
    Segment* parts = team_.scratch.take<Segment>(count);
    int64_t done = 0;          // tokens behind us
    int64_t s = 0, taken = 0;  // the segment we are in, and how much of it is behind us
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
        share_out(parts, used, rows,
                  [&](Context& context, const Segment* own, int64_t num, int64_t first_row,
                      int64_t num_rows) {
                      wave(context, tokens + done + first_row, own, num, num_rows,
                           done + first_row, wanted);
                  });
        done += rows;
    }
}

// The residual streams of the token at `position`, one of the last fed.
float* Network::pending(const Segment& segment, int64_t position) const {
    const int64_t row = position % layout_.pending_slots * shape_.streams * shape_.hidden;
    return reinterpret_cast<float*>(segment.state + layout_.pending_streams) + row;
}

void Network::draft(const int32_t* tokens, const Segment* segments, int64_t count, float* out) {
    if (mtp_.empty()) throw std::invalid_argument("this model has no MTP block");
    const MtpWeights& mtp = mtp_[0];
    const int64_t size = shape_.streams * shape_.hidden;
    share_out(segments, count, count,
              [&](Context& context, const Segment* own, int64_t num, int64_t first, int64_t rows) {
                  Scratch& scratch = context.scratch;
                  Scratch::Frame frame(scratch);
                  float* before = scratch.floats(rows * size);
                  float* streams = scratch.floats(rows * size);
                  for (int64_t s = 0; s < num; ++s)
                      std::memcpy(before + s * size, pending(own[s], own[s].start),
                                  sizeof(float) * size);
                  const Segments located = locate(scratch, own, num, rows);
                  combine(context, tokens + first, before, rows, streams);
                  run_block(context, mtp.block, tokens + first, located, streams);
                  answer(context, mtp.merge, mtp.norm, streams, rows,
                         out + first * shape_.vocab);
              });
}

}  // namespace rorqual
