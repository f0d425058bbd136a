// The row-wise parts of hyper.h, per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace rorqual {

struct HyperShape {
    int64_t streams, hidden, iterations;
    float eps, norm_eps;
    bool bf16;
};

// clang-format off
ISA_DECLARE(
    // 1 / rms of each row of all streams.
    void inverse_rms(const float* x, int64_t rows, int64_t width, float eps, float* out);
    // logits [rows, 2M + M*M] (of `stride`) to pre [rows, M] and mixing [rows, M + M*M].
    void mix(const HyperShape& shape, const float* logits, int64_t stride, const float* rms,
             const float* scale, const float* base, int64_t rows, float* pre, float* mixing);
    // logits [rows, M] to pre.
    void merge_coefficients(const HyperShape& shape, const float* logits, int64_t stride,
                            const float* rms, float scale, const float* base, int64_t rows,
                            float* pre);
    void read(const HyperShape& shape, const float* streams, const float* pre, int64_t rows,
              float* u);
    void write(const HyperShape& shape, const float* output, const float* mixing, int64_t rows,
               float* streams);
)
// clang-format on

}  // namespace rorqual
