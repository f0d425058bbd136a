// The products behind linear.h, per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace rorqual {

// What a kernel sees of a Matrix (linear.h): plain pointers.
struct Panels {
    int format;  // WeightFormat
    int64_t outputs, inputs, panel_nbytes;
    const uint8_t* data;
    const float* scales;
};

ISA_DECLARE(void multiply(const Panels& w, const float* x, int64_t rows, int64_t ldx, float* y,
                          int64_t ldy, int64_t first, int64_t last);)

}  // namespace rorqual
