#include "isa.h"

#include <atomic>

namespace rorqual {

Isa best_isa() {
#if defined(RORQUAL_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return Isa::avx2;
#endif
    return Isa::scalar;
}

namespace {
std::atomic<Isa> chosen{best_isa()};
}

Isa isa() { return chosen.load(std::memory_order_relaxed); }

bool set_isa(Isa wanted) {
    if (static_cast<int>(wanted) > static_cast<int>(best_isa())) return false;
    chosen = wanted;
    return true;
}

const char* isa_name(Isa which) {
    return which == Isa::avx512 ? "avx512" : which == Isa::avx2 ? "avx2" : "scalar";
}

}  // namespace rorqual
