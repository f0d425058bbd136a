// Mixture of experts: routing by table or by biased affinity, routed experts beside a shared one.
// model/gate.py and model/moe.py are the truth. Among equal affinities the lower expert wins.
#pragma once

#include <string>
#include <vector>

#include "linear.h"
#include "weights.h"

namespace rorqual {

struct ExpertWeights {
    Linear w1, w2, w3;
};

struct MoeWeights {
    Matrix gate;
    std::vector<float> bias;     // empty where hashed
    std::vector<int32_t> table;  // [vocab, topk] where hashed
    std::vector<ExpertWeights> experts;
    ExpertWeights shared;
};
MoeWeights load_moe(const Weights& weights, const std::string& prefix, const Shape& shape,
                    bool hashed);

// Experts [rows, topk] and their weights for normalised inputs x [rows, D].
void route(Context& context, const MoeWeights& weights, const float* x, const int32_t* tokens,
           int64_t rows, int32_t* chosen, float* share);

// out = shared expert + weighted routed experts; x and out [rows, D].
void mixture(Context& context, const MoeWeights& weights, const float* x, const int32_t* tokens,
             int64_t rows, float* out);

}  // namespace rorqual
