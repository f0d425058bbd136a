#include "attention.h"

#include <algorithm>
#include <cmath>

#include "entries.h"

namespace rorqual {

namespace {

constexpr int64_t kCacheFloats = 1 << 15;  // of queries in progress, to stay in the inner caches
constexpr int64_t kMostQueries = 32;
constexpr int64_t kInlineMacs = 1 << 20;  // below this, waking threads costs more than it gains

// A segment's window and new entries in float32, as they read back from storage.
struct Recent {
    const float** rows;  // one per position from `first` on
    int64_t first;
};

// Some neighbouring queries of a segment.
struct Piece {
    const Segment* segment;
    const Recent* recent;
    int64_t first_token, num_tokens;
};

class Attender {
public:
    Attender(Context& context, const LayerLayout& layer, const float* sink,
             const Selection& selection)
        : context_(context),
          layout_(context.layout),
          layer_(layer),
          shape_{context.shape.heads, context.shape.head_dim,
                 static_cast<float>(std::pow(static_cast<double>(context.shape.head_dim), -0.5)),
                 context.shape.official},
          sink_(sink),
          selection_(selection),
          in_place_(context.layout.entry_format == EntryFormat::fp32 &&
                    shape_.dim == shape_.stride()) {}

    int64_t queries_at_once() const {
        const int64_t floats = shape_.query_floats() + shape_.state_floats();
        return std::clamp(kCacheFloats / floats, int64_t{1}, kMostQueries);
    }

    // New entries pass through the storage format too: they must be what later steps will read.
    Recent recent(const Segment& segment, const float* entries) const {
        Scratch& scratch = context_.scratch;
        const int64_t dim = shape_.dim, stride = shape_.stride();
        const int64_t past = std::min(segment.start, layout_.window - 1);
        const int64_t count = past + segment.tokens;
        const Recent made{scratch.take<const float*>(count), segment.start - past};
        const uint8_t* ring = segment.state + layer_.window;
        float* rows = scratch.floats(in_place_ ? 0 : count * stride);
        auto* passing = scratch.take<uint8_t>(layout_.entry_nbytes);
        for (int64_t i = 0; i < past; ++i)
            made.rows[i] = read(ring + (made.first + i) % layout_.window_slots *
                                           layout_.entry_nbytes,
                                rows + i * stride);
        for (int64_t i = past; i < count; ++i) {
            const float* entry = entries + (segment.first_row + i - past) * dim;
            made.rows[i] = entry;
            if (in_place_) continue;
            ISA_CALL(encode_entry)(layout_.entry_format, entry, dim, context_.shape.rope_dim,
                                   passing);
            made.rows[i] = read(passing, rows + i * stride);
        }
        return made;
    }

    void run(const Piece& piece, const float* q, float* out, Scratch& scratch) const {
        Scratch::Frame frame(scratch);
        const int64_t width = shape_.heads * shape_.dim, count = piece.num_tokens;
        Work work{piece, scratch.floats(count * shape_.query_floats()),
                  scratch.floats(count * shape_.state_floats()),
                  scratch.floats(shape_.logit_floats()),
                  scratch.floats(kTileEntries * shape_.stride())};
        const int64_t row = piece.segment->first_row + piece.first_token;
        prefetch(piece, 0);
        for (int64_t i = 0; i < count; ++i)
            ISA_CALL(begin_query)(shape_, q + (row + i) * width, sink_, query(work, i),
                                  state(work, i));
        attend_window(work);
        if (layer_.ratio && selection_.indices)
            attend_chosen(work);
        else if (layer_.ratio)
            attend_all(work);
        for (int64_t i = 0; i < count; ++i)
            ISA_CALL(end_query)(shape_, state(work, i), out + (row + i) * width);
    }

    // Rough cost of a token.
    int64_t macs(const Segment& segment) const {
        int64_t entries = layout_.window;
        if (layer_.ratio)
            entries += std::min((segment.start + segment.tokens) / layer_.ratio,
                                selection_.indices ? selection_.width : INT64_MAX);
        return segment.tokens * entries * shape_.heads * shape_.dim;
    }

private:
    struct Work {
        const Piece& piece;
        float *queries, *states, *logits, *tile;
    };

    float* query(const Work& work, int64_t i) const {
        return work.queries + i * shape_.query_floats();
    }
    float* state(const Work& work, int64_t i) const {
        return work.states + i * shape_.state_floats();
    }
    int64_t position(const Work& work, int64_t i) const {
        return work.piece.segment->start + work.piece.first_token + i;
    }

    // One stored entry, and zeros up to the stride.
    void decode(const uint8_t* stored, float* row) const {
        ISA_CALL(decode_entry)(layout_.entry_format, stored, shape_.dim, context_.shape.rope_dim,
                               row);
        std::fill(row + shape_.dim, row + shape_.stride(), 0.0f);
    }

    // A stored entry ready to use: where it lies if that will do, else decoded to `row`.
    const float* read(const uint8_t* stored, float* row) const {
        if (in_place_) return reinterpret_cast<const float*>(stored);
        decode(stored, row);
        return row;
    }

    const uint8_t* entry(const Segment& segment, int64_t index) const {
        const int64_t block = segment.blocks[index / layer_.entries_per_block];
        return context_.slabs.entries(block, layer_) +
               index % layer_.entries_per_block * layout_.entry_nbytes;
    }

    void attend_tile(const Work& work, int64_t i, const float* const* entries,
                     int64_t count) const {
        ISA_CALL(attend_tile)(shape_, query(work, i), entries, count, state(work, i), work.logits);
    }

    // Tiles begin at multiples of kTileEntries positions, whatever the chunk.
    void attend_window(const Work& work) const {
        const int64_t window = layout_.window, last = position(work, work.piece.num_tokens - 1);
        const Recent& recent = *work.piece.recent;
        const int64_t first = std::max(position(work, 0) - window + 1, recent.first);
        for (int64_t tile = first / kTileEntries * kTileEntries; tile <= last; tile += kTileEntries)
            for (int64_t i = 0; i < work.piece.num_tokens; ++i) {
                const int64_t own = position(work, i);
                const int64_t from = std::max({tile, own - window + 1, recent.first});
                const int64_t to = std::min(tile + kTileEntries, own + 1);
                if (from < to)
                    attend_tile(work, i, recent.rows + (from - recent.first), to - from);
            }
    }

    void attend_all(const Work& work) const {
        const Segment& segment = *work.piece.segment;
        const int64_t most = (position(work, work.piece.num_tokens - 1) + 1) / layer_.ratio;
        for (int64_t tile = 0; tile < most; tile += kTileEntries) {
            const int64_t count = std::min(kTileEntries, most - tile);
            const float* rows[kTileEntries];
            for (int64_t j = 0; j < count; ++j) {
                // Even what could stay in place: far back it is in no cache, and copying row by row
                // fetches it faster than products that read eight rows at once.
                float* copy = work.tile + j * shape_.stride();
                decode(entry(segment, tile + j), copy);
                rows[j] = copy;
            }
            for (int64_t i = 0; i < work.piece.num_tokens; ++i) {
                const int64_t visible = (position(work, i) + 1) / layer_.ratio - tile;
                if (visible > 0) attend_tile(work, i, rows, std::min(count, visible));
            }
        }
    }

    void attend_chosen(const Work& work) const {
        const Segment& segment = *work.piece.segment;
        for (int64_t i = 0; i < work.piece.num_tokens; ++i) {
            const int64_t row = segment.first_row + work.piece.first_token + i;
            const int32_t* chosen = selection_.indices + row * selection_.width;
            prefetch(work.piece, i + 1);
            for (int64_t tile = 0; tile < selection_.counts[row]; tile += kTileEntries) {
                const int64_t count = std::min(kTileEntries, selection_.counts[row] - tile);
                const float* rows[kTileEntries];
                for (int64_t j = 0; j < count; ++j)
                    rows[j] = read(entry(segment, chosen[tile + j]),
                                   work.tile + j * shape_.stride());
                attend_tile(work, i, rows, count);
            }
        }
    }

    // Chosen entries lie anywhere: asks for those of the piece's query i while others are computed.
    void prefetch(const Piece& piece, int64_t i) const {
        if (!selection_.indices || i >= piece.num_tokens) return;
        const int64_t row = piece.segment->first_row + piece.first_token + i;
        for (int64_t j = 0; j < selection_.counts[row]; ++j) {
            const uint8_t* at =
                entry(*piece.segment, selection_.indices[row * selection_.width + j]);
            for (int64_t byte = 0; byte < layout_.entry_nbytes; byte += 64)
                __builtin_prefetch(at + byte);
        }
    }

    Context& context_;
    const CacheLayout& layout_;
    const LayerLayout& layer_;
    const AttentionShape shape_;
    const float* sink_;
    const Selection& selection_;
    const bool in_place_;  // entries are used where they are stored
};

}  // namespace

void attend(Context& context, const LayerLayout& layer, const Segments& segments, const float* q,
            const float* entries, const float* sink, const Selection& selection, float* out) {
    Scratch& scratch = context.scratch;
    Scratch::Frame frame(scratch);
    const Attender attender(context, layer, sink, selection);
    const int64_t at_once = attender.queries_at_once();
    int64_t most = 0, macs = 0, count = 0;
    for (int64_t s = 0; s < segments.count; ++s)
        most += (segments.items[s].tokens + at_once - 1) / at_once;
    auto* recents = scratch.take<Recent>(segments.count);
    auto* pieces = scratch.take<Piece>(most);
    for (int64_t s = 0; s < segments.count; ++s) {
        const Segment& segment = segments.items[s];
        recents[s] = attender.recent(segment, entries);
        macs += attender.macs(segment);
        for (int64_t token = 0; token < segment.tokens; token += at_once)
            pieces[count++] = {&segment, recents + s, token,
                               std::min(at_once, segment.tokens - token)};
    }
    context.pool.run(
        count,
        [&](int64_t from, int64_t to, int worker) {
            for (int64_t i = from; i < to; ++i)
                attender.run(pieces[i], q, out, context.workers[worker]);
        },
        macs < kInlineMacs ? count : 1);
}

void store_window(Context& context, const LayerLayout& layer, const Segments& segments,
                  const float* entries) {
    const CacheLayout& layout = context.layout;
    const int64_t dim = context.shape.head_dim, slots = layout.window_slots;
    for (int64_t s = 0; s < segments.count; ++s) {
        const Segment& segment = segments.items[s];
        uint8_t* ring = segment.state + layer.window;
        for (int64_t i = std::max<int64_t>(0, segment.tokens - slots); i < segment.tokens; ++i)
            ISA_CALL(encode_entry)(layout.entry_format, entries + (segment.first_row + i) * dim,
                                   dim, context.shape.rope_dim,
                                   ring + (segment.start + i) % slots * layout.entry_nbytes);
    }
}

}  // namespace rorqual
