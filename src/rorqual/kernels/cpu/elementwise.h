// Row-wise operations around the matrices. Rows are independent and each has one fixed order.
#pragma once

#include <cstdint>

#include "context.h"
#include "isa.h"

namespace rorqual {

// clang-format off
ISA_DECLARE(
    // y = x / sqrt(mean(x^2) + eps) * weight (1 where null) for rows of `width`, ld* floats apart.
    // Rounded to BF16 where `bf16`. In place is fine.
    void rms_norm(const float* x, int64_t rows, int64_t ldx, int64_t width, const float* weight,
                  float eps, bool bf16, float* y, int64_t ldy);
    // Rotates the last 2 * pairs of each of `heads` vectors of `head_dim` per row, in place;
    // cos and sin are [rows, pairs].
    void rotate(float* x, int64_t rows, int64_t ldx, int64_t heads, int64_t head_dim,
                const float* cos, const float* sin, int64_t pairs, bool inverse, bool bf16);
    // gate = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight, in place.
    void swiglu(float* gate, const float* up, int64_t count, float limit, float weight,
                bool bf16);
    void round_to_bf16(float* x, int64_t count);
    // Rounds to e4m3 with a power-of-two scale per `block` of a row; in place is fine.
    void simulate_fp8(const float* x, int64_t width, int64_t block, float* y);
    // y = (sum of rows x[index[0]], x[index[1]], ...) + y.
    void add_rows(const float* x, const int64_t* index, int64_t count, int64_t width, bool bf16,
                  float* y);
    void expand_bf16(const uint16_t* x, int64_t count, float* y);
)
// clang-format on

// cos and sin of `position` for `pairs` frequencies (radians per token, float32 product).
void rotation_at(int64_t position, const float* frequencies, int64_t pairs, float* cos,
                 float* sin);

}  // namespace rorqual
