#include "compressor.h"

#include "simd.h"

namespace rorqual::ISA_NAMESPACE {

void pool_group(const float* const* rows, int64_t slots, int64_t columns, int64_t width,
                float* out) {
    for (int64_t c = 0; c < width; c += kLanes) {
        const int n = static_cast<int>(width - c < kLanes ? width - c : kLanes);
        Vec top = Vec::load(rows[0] + columns + c, n);
        for (int64_t i = 1; i < slots; ++i) top = max(top, Vec::load(rows[i] + columns + c, n));
        Vec total = Vec::zero(), pooled = Vec::zero();
        for (int64_t i = 0; i < slots; ++i) {
            const Vec weight = exp(Vec::load(rows[i] + columns + c, n) - top);
            total = total + weight;
            pooled = fma(weight, Vec::load(rows[i] + c, n), pooled);
        }
        (pooled / total).store(out + c, n);
    }
}

void add_positional(float* scores, const float* positional, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) scores[c] += positional[c];
}

}  // namespace rorqual::ISA_NAMESPACE
