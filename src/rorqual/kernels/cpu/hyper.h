// Manifold-constrained hyper-connections: how sub-layers read and write the residual streams.
// kernels/reference.py (stream_mixing, read_streams, write_streams, merge_streams) is the truth.
#pragma once

#include <string>
#include <vector>

#include "linear.h"
#include "weights.h"

namespace rorqual {

// One sub-layer's connection: projection [2M + M*M, M*D], three scales, as many biases as rows.
struct HyperWeights {
    Matrix fn;
    std::vector<float> scale, base;
};
HyperWeights load_hyper(const Weights& weights, const std::string& prefix, const Shape& shape);

// The head's read of the streams: M rows, one scale.
HyperWeights load_merge(const Weights& weights, const std::string& prefix, const Shape& shape);

// Per row: M coefficients that write the output, then the M x M that carry the streams over.
inline int64_t mixing_columns(const Shape& shape) {
    return shape.streams + shape.streams * shape.streams;
}

// x = norm(what the sub-layer reads of `streams`); `mixing` receives what write_streams needs.
void enter_streams(Context& context, const HyperWeights& weights, const float* norm,
                   const float* streams, int64_t rows, float* x, float* mixing);
// streams = post f + comb^T streams, in place.
void leave_streams(Context& context, const float* output, const float* mixing, int64_t rows,
                   float* streams);
// y = norm(merged streams) [rows, D].
void merge_streams(Context& context, const HyperWeights& weights, const float* norm,
                   const float* streams, int64_t rows, float* y);

}  // namespace rorqual
