// y = x W^T for weights in five formats, always computed from the packed bytes.
//
// Weights are repacked once into panels of 16 outputs: for every input k the 16 weights lie side by
// side. Each output element is one chain of fused multiply-adds over k in ascending order, in one
// vector lane, whatever the number of rows, threads or the vector width: results do not depend on
// the batch, bit for bit. (Scalar code without FMA rounds differently.)
#pragma once

#include <cstdint>
#include <memory>

#include "context.h"
#include "isa.h"

namespace rorqual {

enum class WeightFormat { fp32, bf16, int8, fp8, fp4 };

constexpr int64_t kPanel = 16;      // outputs per panel
constexpr int64_t kFp8Tile = 128;   // rows and columns per FP8 scale
constexpr int64_t kFp4Block = 32;   // inputs per FP4 scale

// A packed [outputs, inputs] matrix. Cheap to copy: the bytes are shared.
struct Matrix {
    WeightFormat format = WeightFormat::fp32;
    int64_t outputs = 0, inputs = 0;
    std::shared_ptr<uint8_t> data;
    int64_t panel_nbytes = 0;
    // int8: one per output, padded to whole panels. fp8: [panels, tiles of inputs]. fp4:
    // [panels, blocks of inputs, 16].
    std::shared_ptr<float> scales;

    int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
    explicit operator bool() const { return data != nullptr; }

    static Matrix from_fp32(const float* weight, int64_t outputs, int64_t inputs);
    static Matrix from_bf16(const uint16_t* weight, int64_t outputs, int64_t inputs);
    // Rounds to BF16, or to int8 with one scale per output.
    static Matrix to_bf16(const float* weight, int64_t outputs, int64_t inputs);
    static Matrix to_int8(const float* weight, int64_t outputs, int64_t inputs);
    // e4m3 bytes [outputs, inputs], e8m0 scales [ceil(outputs/128), ceil(inputs/128)].
    static Matrix from_fp8(const uint8_t* weight, const uint8_t* scale, int64_t outputs,
                           int64_t inputs);
    // Packed e2m1 [outputs, inputs/2], low nibble first; e8m0 scales [outputs, ceil(inputs/32)].
    static Matrix from_fp4(const uint8_t* weight, const uint8_t* scale, int64_t outputs,
                           int64_t inputs);
    int64_t nbytes() const;
};

// y[r, o] = sum_k x[r, k] w[o, k]; rows ldx and ldy floats apart. y must not overlap x.
void matmul(ThreadPool& pool, const Matrix& w, const float* x, int64_t rows, int64_t ldx, float* y,
            int64_t ldy);

// The same for panels [first, last) on the calling thread: for callers that split work themselves.
void matmul_panels(const Matrix& w, const float* x, int64_t rows, int64_t ldx, float* y,
                   int64_t ldy, int64_t first, int64_t last);

// A matrix with the roundings the official numerics put around it.
struct Linear {
    Matrix weight;
    bool quantize_input = false;  // to FP8 per 128 inputs, before
    bool round_output = false;    // to BF16, after
};
void apply(Context& context, const Linear& linear, const float* x, int64_t rows, int64_t ldx,
           float* y, int64_t ldy);

}  // namespace rorqual
