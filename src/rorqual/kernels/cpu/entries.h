// How stored entries and indexer keys lie in memory: encoding, decoding, and the official roundings.
//
// Entry, `entry_nbytes` apart: fp32 and bf16 as they are; `record` is the plain dims in FP8, the
// rotated dims in BF16, then one power-of-two scale per 64 plain dims.
//
// Keys are stored for scanning: the 32 keys of a block lie side by side, so that a vector lane is a
// key and no sum runs across lanes. With C dims, a block of 32 * key_nbytes holds
//   fp32  [C][32] float
//   int8  [C/4][32][4] codes, [32] float scales
//   fp4   [C/8][32][4] bytes, [C/32][32] scales; byte b of group g is dim 8g+b (low nibble) and
//         8g+4+b (high nibble)
#pragma once

#include <cstdint>

#include "isa.h"
#include "layout.h"

namespace rorqual {

constexpr int64_t kBlockKeys = 32;       // keys per block of an overlapping layer
constexpr int64_t kRecordScaleDims = 64;
constexpr int64_t kFp4ScaleDims = 32;

// Smallest widths each key format can hold.
inline bool key_dims_ok(KeyFormat format, int64_t dim) {
    return dim > 0 && dim % (format == KeyFormat::fp4 ? 32 : format == KeyFormat::int8 ? 4 : 1) == 0;
}

ISA_DECLARE(
    void encode_entry(EntryFormat format, const float* x, int64_t dim, int64_t rope, uint8_t* to))
ISA_DECLARE(
    void decode_entry(EntryFormat format, const uint8_t* from, int64_t dim, int64_t rope, float* x))
ISA_DECLARE(
    void encode_key(KeyFormat format, const float* x, int64_t dim, uint8_t* block, int64_t slot))
ISA_DECLARE(
    void decode_key(KeyFormat format, const uint8_t* block, int64_t slot, int64_t dim, float* x))

// reference.round_entry and reference.round_index, in place; `bf16` as if x were BF16 tensors.
ISA_DECLARE(void round_entry(float* x, int64_t dim, int64_t rope))
ISA_DECLARE(void round_index(float* x, int64_t dim, bool bf16))

}  // namespace rorqual
