#include "elementwise.h"

#include <cmath>

namespace rorqual {

void rotation_at(int64_t position, const float* frequencies, int64_t pairs, float* cos,
                 float* sin) {
    for (int64_t i = 0; i < pairs; ++i) {
        const float angle = static_cast<float>(position) * frequencies[i];
        cos[i] = std::cos(angle);
        sin[i] = std::sin(angle);
    }
}

}  // namespace rorqual
