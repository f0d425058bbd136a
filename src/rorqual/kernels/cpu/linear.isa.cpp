// Matrix products over panels of 16 outputs (linear.h says what order is promised).
//
// Few rows: weights are decoded in registers, and enough panels run side by side to hide the
// latency of the chains. Many rows: a block of panels is decoded once into a small buffer and swept
// by tiles of rows; accumulators wait in y between blocks of inputs, which changes no bit.
#include "linear.h"
#include "linear_kernel.h"
#include "simd.h"

namespace rorqual {
namespace ISA_NAMESPACE {

namespace {

#if defined(__AVX512F__)
constexpr int kChains = 8;      // panels in flight for one row
constexpr int kSums = 16;       // rows x panels in flight for several
constexpr int kTileRows = 12;   // rows x panels of accumulators that fit the registers
constexpr int kTilePanels = 2;
#elif defined(__AVX2__)
constexpr int kChains = 4;
constexpr int kSums = 4;
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;
#else
constexpr int kChains = 4;
constexpr int kSums = 4;
constexpr int kTileRows = 4;
constexpr int kTilePanels = 1;
#endif
constexpr int64_t kDirectRows = 4;   // at most so many rows are worked without a buffer
constexpr int64_t kInputs = 256;     // inputs per block: the buffer stays in the first cache
constexpr int64_t kBand = 240;       // rows per sweep: their inputs stay in the second cache

// ---- formats: kSpan inputs share scales; load<k & 1>(k) is one panel's weights of input k -------

struct Fp32 {
    static constexpr int64_t kSpan = kInputs;
    const float* at;
    Fp32(const Panels& w, int64_t panel, int64_t first)
        : at(reinterpret_cast<const float*>(w.data + panel * w.panel_nbytes) + first * kPanel) {}
    template <int ODD>
    Vec load(int64_t k) const { return Vec::load(at + k * kPanel); }
};

struct Bf16 {
    static constexpr int64_t kSpan = kInputs;
    const uint16_t* at;
    Bf16(const Panels& w, int64_t panel, int64_t first)
        : at(reinterpret_cast<const uint16_t*>(w.data + panel * w.panel_nbytes) + first * kPanel) {
    }
    template <int ODD>
    Vec load(int64_t k) const { return Vec::load_bf16(at + k * kPanel); }
};

// Scaled after the sum, in multiply().
struct Int8 {
    static constexpr int64_t kSpan = kInputs;
    const int8_t* at;
    Int8(const Panels& w, int64_t panel, int64_t first)
        : at(reinterpret_cast<const int8_t*>(w.data + panel * w.panel_nbytes) + first * kPanel) {}
    template <int ODD>
    Vec load(int64_t k) const { return Vec::load_i8(at + k * kPanel); }
};

struct Fp8 {
    static constexpr int64_t kSpan = kFp8Tile;
    const uint8_t* at;
    Vec scale;
    Fp8(const Panels& w, int64_t panel, int64_t first)
        : at(w.data + panel * w.panel_nbytes + first * kPanel),
          scale(Vec::all(Vec::kE4m3 * w.scales[panel * ((w.inputs + kFp8Tile - 1) / kFp8Tile) +
                                               first / kFp8Tile])) {}
    template <int ODD>
    Vec load(int64_t k) const { return Vec::load_e4m3(at + k * kPanel) * scale; }
};

// A byte holds one output's weights of two inputs, the even one low.
struct Fp4 {
    static constexpr int64_t kSpan = kFp4Block;
    const uint8_t* at;
    Vec scale;
    Fp4(const Panels& w, int64_t panel, int64_t first)
        : at(w.data + panel * w.panel_nbytes + first / 2 * kPanel),
          scale(Vec::load(w.scales + (panel * ((w.inputs + kFp4Block - 1) / kFp4Block) +
                                      first / kFp4Block) *
                                         kPanel)) {}
    template <int ODD>
    Vec load(int64_t k) const {
        return Vec::load_e2m1<ODD>(at + k / 2 * kPanel) * scale;
    }
};

template <class Format>
struct IsFp32 {
    static constexpr bool value = false;
};
template <>
struct IsFp32<Fp32> {
    static constexpr bool value = true;
};
template <int N>
struct Number {
    static constexpr int value = N;
};

// ---- tiles ------------------------------------------------------------------------------------

inline int lanes_of(const Panels& w, int64_t panel) {
    const int64_t left = w.outputs - panel * kPanel;
    return left < kPanel ? static_cast<int>(left) : kLanes;
}

inline Vec resume(const float* y, int lanes, bool fresh) {
    return fresh ? Vec::zero() : load_some(y, lanes);
}

// ROWS x PANELS accumulators over inputs [0, inputs) of x, scales included.
template <class Format, int ROWS, int PANELS>
void direct(const Panels& w, const float* x, int64_t ldx, float* y, int64_t ldy, int64_t panel) {
    Vec sums[ROWS][PANELS];
    for (auto& row : sums)
        for (auto& s : row) s = Vec::zero();
    for (int64_t first = 0; first < w.inputs; first += Format::kSpan) {
        const int64_t count =
            w.inputs - first < Format::kSpan ? w.inputs - first : Format::kSpan;
        const float* from = x + first;
        const auto add = [&](int64_t k, const Vec(&loaded)[PANELS]) {
            for (int r = 0; r < ROWS; ++r) {
                const Vec value = Vec::all(from[r * ldx + k]);
                for (int p = 0; p < PANELS; ++p) sums[r][p] = fma(value, loaded[p], sums[r][p]);
            }
        };
        const auto step = [&](const auto&... parts) {
            int64_t k = 0;
            for (; k + 1 < count; k += 2) {
                add(k, {parts.template load<0>(k)...});
                add(k + 1, {parts.template load<1>(k + 1)...});
            }
            if (k < count) add(k, {parts.template load<0>(k)...});
        };
        if constexpr (PANELS == 1) {
            step(Format(w, panel, first));
        } else if constexpr (PANELS == 2) {
            step(Format(w, panel, first), Format(w, panel + 1, first));
        } else if constexpr (PANELS == 4) {
            step(Format(w, panel, first), Format(w, panel + 1, first),
                 Format(w, panel + 2, first), Format(w, panel + 3, first));
        } else {
            static_assert(PANELS == 8);
            step(Format(w, panel, first), Format(w, panel + 1, first),
                 Format(w, panel + 2, first), Format(w, panel + 3, first),
                 Format(w, panel + 4, first), Format(w, panel + 5, first),
                 Format(w, panel + 6, first), Format(w, panel + 7, first));
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            store_some(sums[r][p], y + r * ldy + (panel + p) * kPanel, lanes_of(w, panel + p));
}

template <class Format, int ROWS>
void direct_rows(const Panels& w, const float* x, int64_t ldx, float* y, int64_t ldy,
                 int64_t first, int64_t last) {
    constexpr int fits = ROWS == 1 ? kChains : kSums / ROWS;
    constexpr int wide = fits > kChains ? kChains : fits > 1 ? fits : 1;
    int64_t panel = first;
    for (; panel + wide <= last; panel += wide) direct<Format, ROWS, wide>(w, x, ldx, y, ldy, panel);
    if constexpr (wide > 4)
        for (; panel + 4 <= last; panel += 4) direct<Format, ROWS, 4>(w, x, ldx, y, ldy, panel);
    if constexpr (wide > 2)
        for (; panel + 2 <= last; panel += 2) direct<Format, ROWS, 2>(w, x, ldx, y, ldy, panel);
    for (; panel < last; ++panel) direct<Format, ROWS, 1>(w, x, ldx, y, ldy, panel);
}

// ROWS x PANELS over `count` decoded inputs; panels lie count * 16 floats apart in `decoded`.
template <int ROWS, int PANELS>
void tile(const float* decoded, int64_t apart, const float* x, int64_t ldx, int64_t count, float* y,
          int64_t ldy, bool fresh, int lanes) {
    Vec sums[ROWS][PANELS];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            sums[r][p] =
                resume(y + r * ldy + p * kPanel, p + 1 == PANELS ? lanes : kLanes, fresh);
    for (int64_t k = 0; k < count; ++k) {
        Vec loaded[PANELS];
        for (int p = 0; p < PANELS; ++p) loaded[p] = Vec::load(decoded + p * apart + k * kPanel);
        for (int r = 0; r < ROWS; ++r) {
            const Vec value = Vec::all(x[r * ldx + k]);
            for (int p = 0; p < PANELS; ++p) sums[r][p] = fma(value, loaded[p], sums[r][p]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            store_some(sums[r][p], y + r * ldy + p * kPanel, p + 1 == PANELS ? lanes : kLanes);
}

template <int PANELS>
void sweep(const float* decoded, int64_t apart, const float* x, int64_t rows, int64_t ldx,
           int64_t count, float* y, int64_t ldy, bool fresh, int lanes) {
    int64_t r = 0;
    const auto go = [&](auto number) {
        constexpr int n = decltype(number)::value;
        for (; r + n <= rows; r += n)
            tile<n, PANELS>(decoded, apart, x + r * ldx, ldx, count, y + r * ldy, ldy, fresh,
                            lanes);
    };
    go(Number<kTileRows>());
    go(Number<4>());
    go(Number<1>());
}

template <class Format>
void many_rows(const Panels& w, const float* x, int64_t rows, int64_t ldx, float* y, int64_t ldy,
               int64_t first, int64_t last) {
    alignas(64) float buffer[kTilePanels * kInputs * kPanel];
    for (int64_t panel = first; panel < last; panel += kTilePanels) {
        const int panels = static_cast<int>(last - panel < kTilePanels ? last - panel : kTilePanels);
        const int lanes = lanes_of(w, panel + panels - 1);
        for (int64_t k = 0; k < w.inputs; k += kInputs) {
            const int64_t count = w.inputs - k < kInputs ? w.inputs - k : kInputs;
            const float* decoded = buffer;
            int64_t apart = kInputs * kPanel;
            if constexpr (IsFp32<Format>::value) {
                decoded = Format(w, panel, k).at;
                apart = w.panel_nbytes / 4;
            } else {
                for (int p = 0; p < panels; ++p)
                    for (int64_t begin = 0; begin < count; begin += Format::kSpan) {
                        const Format from(w, panel + p, k + begin);
                        const int64_t end =
                            count - begin < Format::kSpan ? count - begin : Format::kSpan;
                        float* to = buffer + p * apart + begin * kPanel;
                        for (int64_t i = 0; i < end; i += 2) {
                            from.template load<0>(i).store(to + i * kPanel);
                            if (i + 1 < end) from.template load<1>(i + 1).store(to + (i + 1) * kPanel);
                        }
                    }
            }
            float* out = y + panel * kPanel;
            if (panels == 1)
                sweep<1>(decoded, apart, x + k, rows, ldx, count, out, ldy, k == 0, lanes);
            else
                sweep<kTilePanels>(decoded, apart, x + k, rows, ldx, count, out, ldy, k == 0,
                                   lanes);
        }
    }
}

template <class Format>
void multiply_as(const Panels& w, const float* x, int64_t rows, int64_t ldx, float* y, int64_t ldy,
                 int64_t first, int64_t last) {
    if (rows <= 2 * kDirectRows) {
        int64_t r = 0;
        if constexpr (kSums >= 16)
            for (; r + 8 <= rows; r += 8)
                direct_rows<Format, 8>(w, x + r * ldx, ldx, y + r * ldy, ldy, first, last);
        for (; r + 4 <= rows; r += 4)
            direct_rows<Format, 4>(w, x + r * ldx, ldx, y + r * ldy, ldy, first, last);
        for (; r + 2 <= rows; r += 2)
            direct_rows<Format, 2>(w, x + r * ldx, ldx, y + r * ldy, ldy, first, last);
        for (; r < rows; ++r)
            direct_rows<Format, 1>(w, x + r * ldx, ldx, y + r * ldy, ldy, first, last);
        return;
    }
    for (int64_t r = 0; r < rows; r += kBand)
        many_rows<Format>(w, x + r * ldx, rows - r < kBand ? rows - r : kBand, ldx, y + r * ldy,
                          ldy, first, last);
}

}  // namespace

void multiply(const Panels& w, const float* x, int64_t rows, int64_t ldx, float* y, int64_t ldy,
              int64_t first, int64_t last) {
    switch (static_cast<WeightFormat>(w.format)) {
        case WeightFormat::fp32: return multiply_as<Fp32>(w, x, rows, ldx, y, ldy, first, last);
        case WeightFormat::bf16: return multiply_as<Bf16>(w, x, rows, ldx, y, ldy, first, last);
        case WeightFormat::fp8: return multiply_as<Fp8>(w, x, rows, ldx, y, ldy, first, last);
        case WeightFormat::fp4: return multiply_as<Fp4>(w, x, rows, ldx, y, ldy, first, last);
        case WeightFormat::int8: break;
    }
    multiply_as<Int8>(w, x, rows, ldx, y, ldy, first, last);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t panel = first; panel < last; ++panel) {
            float* at = y + r * ldy + panel * kPanel;
            const int lanes = lanes_of(w, panel);
            store_some(load_some(at, lanes) * Vec::load(w.scales + panel * kPanel), at, lanes);
        }
}

}  // namespace ISA_NAMESPACE
}  // namespace rorqual
