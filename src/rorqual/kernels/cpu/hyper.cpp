#include "hyper.h"

#include <algorithm>

#include "elementwise.h"
#include "hyper_kernel.h"

namespace rorqual {

namespace {

constexpr int64_t kRows = 16;  // per piece of work

HyperShape shape_of(const Shape& shape) {
    return {shape.streams, shape.hidden, shape.sinkhorn_iterations, shape.hc_eps, shape.norm_eps,
            shape.official};
}

HyperWeights load(const Weights& weights, const std::string& prefix, int64_t rows, int64_t scales,
                  const Shape& shape) {
    if (shape.streams > 16) throw std::invalid_argument("more than 16 residual streams");
    return {weights.matrix(prefix + "_fn", rows, shape.streams * shape.hidden),
            weights.array(prefix + "_scale", scales), weights.array(prefix + "_base", rows)};
}

}  // namespace

HyperWeights load_hyper(const Weights& weights, const std::string& prefix, const Shape& shape) {
    return load(weights, prefix, shape.streams * (2 + shape.streams), 3, shape);
}

HyperWeights load_merge(const Weights& weights, const std::string& prefix, const Shape& shape) {
    return load(weights, prefix, shape.streams, 1, shape);
}

void enter_streams(Context& context, const HyperWeights& weights, const float* norm,
                   const float* streams, int64_t rows, float* x, float* mixing) {
    Scratch::Frame frame(context.scratch);
    const HyperShape shape = shape_of(context.shape);
    const int64_t m = shape.streams, width = m * shape.hidden, out = weights.fn.outputs;
    float* logits = context.scratch.floats(rows * out);
    matmul(context.pool, weights.fn, streams, rows, width, logits, out);
    float* rms = context.scratch.floats(rows);
    float* pre = context.scratch.floats(rows * m);
    context.pool.run(
        rows,
        [&](int64_t begin, int64_t end, int) {
            const int64_t count = end - begin;
            ISA_CALL(inverse_rms)
            (streams + begin * width, count, width, shape.norm_eps, rms + begin);
            ISA_CALL(mix)
            (shape, logits + begin * out, out, rms + begin, weights.scale.data(),
             weights.base.data(), count, pre + begin * m, mixing + begin * (m + m * m));
            float* u = x + begin * shape.hidden;
            ISA_CALL(read)(shape, streams + begin * width, pre + begin * m, count, u);
            ISA_CALL(rms_norm)
            (u, count, shape.hidden, shape.hidden, norm, shape.norm_eps, shape.bf16, u,
             shape.hidden);
        },
        kRows);
}

void leave_streams(Context& context, const float* output, const float* mixing, int64_t rows,
                   float* streams) {
    const HyperShape shape = shape_of(context.shape);
    const int64_t m = shape.streams;
    context.pool.run(
        rows,
        [&](int64_t begin, int64_t end, int) {
            ISA_CALL(write)
            (shape, output + begin * shape.hidden, mixing + begin * (m + m * m), end - begin,
             streams + begin * m * shape.hidden);
        },
        4 * kRows);
}

void merge_streams(Context& context, const HyperWeights& weights, const float* norm,
                   const float* streams, int64_t rows, float* y) {
    Scratch::Frame frame(context.scratch);
    const HyperShape shape = shape_of(context.shape);
    const int64_t m = shape.streams, width = m * shape.hidden;
    float* logits = context.scratch.floats(rows * m);
    float* rms = context.scratch.floats(rows);
    float* pre = context.scratch.floats(rows * m);
    matmul(context.pool, weights.fn, streams, rows, width, logits, m);
    ISA_CALL(inverse_rms)(streams, rows, width, shape.norm_eps, rms);
    ISA_CALL(merge_coefficients)
    (shape, logits, m, rms, weights.scale[0], weights.base.data(), rows, pre);
    ISA_CALL(read)(shape, streams, pre, rows, y);
    ISA_CALL(rms_norm)
    (y, rows, shape.hidden, shape.hidden, norm, shape.norm_eps, shape.bf16, y, shape.hidden);
}

}  // namespace rorqual
