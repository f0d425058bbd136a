// The byte layout of kernels/layout.py as C++ sees it: numbers from Python, pointers from callers.
#pragma once

#include <cstdint>
#include <vector>

namespace rorqual {

constexpr int64_t kBlockTokens = 128;

enum class EntryFormat { fp32, bf16, record };
enum class KeyFormat { fp32, int8, fp4 };

struct LayerLayout {
    int64_t ratio = 0;  // 0: window only; 4: overlapping, with indexer
    int64_t entries_per_block = 0;
    int64_t block_entries = -1, block_keys = -1;  // offsets in a slab
    int64_t window = -1, raw = -1, raw_index = -1;  // offsets in a state
    int64_t raw_slots = 0, raw_columns = 0, raw_index_columns = 0;
};

struct CacheLayout {
    EntryFormat entry_format = EntryFormat::fp32;
    KeyFormat key_format = KeyFormat::int8;
    int64_t entry_nbytes = 0, key_nbytes = 0;
    int64_t window = 0, window_slots = 0;
    int64_t slab_blocks = 0, slab_nbytes = 0, state_nbytes = 0;
    int64_t pending_streams = 0, pending_slots = 0;
    std::vector<LayerLayout> layers;  // MTP blocks last
};

// Where blocks lie. Global block b is number b % slab_blocks of slab b / slab_blocks.
class Slabs {
public:
    explicit Slabs(const CacheLayout& layout) : layout_(layout) {}
    void add(uint8_t* slab) { slabs_.push_back(slab); }
    int64_t num_blocks() const {
        return static_cast<int64_t>(slabs_.size()) * layout_.slab_blocks;
    }
    // First of the layer's entries_per_block entries of global block `block`.
    uint8_t* entries(int64_t block, const LayerLayout& layer) const {
        return slabs_[block / layout_.slab_blocks] + layer.block_entries +
               block % layout_.slab_blocks * layer.entries_per_block * layout_.entry_nbytes;
    }
    uint8_t* keys(int64_t block, const LayerLayout& layer) const {
        return slabs_[block / layout_.slab_blocks] + layer.block_keys +
               block % layout_.slab_blocks * layer.entries_per_block * layout_.key_nbytes;
    }

private:
    const CacheLayout& layout_;
    std::vector<uint8_t*> slabs_;
};

enum SegmentFlags : int {
    kReplay = 1,  // refresh windows and raw rings, write no compressed entry and no key
    kMtp = 2,     // also advance the MTP block
};

// Consecutive tokens of one sequence inside a ragged batch.
struct Segment {
    int64_t tokens;         // >= 1
    int64_t start;          // position of the first
    int flags;              // SegmentFlags
    uint8_t* state;         // CacheLayout::state_nbytes
    const int32_t* blocks;  // the sequence's block table, by number; covers start + tokens
    int64_t first_row;      // row of the first token in the flat batch
};

// cos and sin of every row of the batch, [rows, rope_dim / 2].
struct Rotation {
    const float* cos;
    const float* sin;
    const float* frequencies;  // [rope_dim / 2], for positions that are not rows (group starts)
};

struct Segments {
    const Segment* items;
    int64_t count;
    int64_t rows;            // of the whole batch
    const int64_t* positions;  // [rows]
    Rotation plain;        // layers of ratio 0
    Rotation compressing;  // all other layers
};

}  // namespace rorqual
