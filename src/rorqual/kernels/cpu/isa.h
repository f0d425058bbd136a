// Which instruction set the hot code runs on, chosen once at run time.
//
// Every *.isa.cpp is compiled once per instruction set, with ISA_NAMESPACE set to scalar, avx2 or
// avx512 and the matching -m flags. Its functions are declared with ISA_DECLARE in a plain header
// and called through ISA_CALL.
//
// An *.isa.cpp must not instantiate inline templates of the standard library: the linker may keep
// the copy that needs AVX-512 for everybody. Use simd.h, raw pointers and <cmath>'s C functions.
#pragma once

namespace rorqual {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

// The best of this machine, unless overridden. avx2 also needs FMA and F16C.
Isa isa();
Isa best_isa();
// For tests and measurements. False where the machine cannot run it.
bool set_isa(Isa wanted);
const char* isa_name(Isa which);

}  // namespace rorqual

#if defined(RORQUAL_X86)
#define ISA_DECLARE(...)               \
    namespace scalar { __VA_ARGS__; }  \
    namespace avx2 { __VA_ARGS__; }    \
    namespace avx512 { __VA_ARGS__; }
#define ISA_CALL(name)                                        \
    (::rorqual::isa() == ::rorqual::Isa::avx512 ? avx512::name \
     : ::rorqual::isa() == ::rorqual::Isa::avx2 ? avx2::name   \
                                                : scalar::name)
#else
#define ISA_DECLARE(...) \
    namespace scalar { __VA_ARGS__; }
#define ISA_CALL(name) (scalar::name)
#endif
