// What every part of a step needs beside its weights.
#pragma once

#include <vector>

#include "layout.h"
#include "scratch.h"
#include "thread_pool.h"

namespace rorqual {

// The numbers of model/config.py that kernels need.
struct Shape {
    int64_t vocab = 0, hidden = 0, layers = 0, mtp_layers = 0;
    int64_t heads = 0, head_dim = 0, rope_dim = 0, q_lora = 0, o_groups = 0, o_lora = 0;
    int64_t index_heads = 0, index_dim = 0, index_topk = 0, window = 0;
    int64_t experts = 0, topk = 0, hash_layers = 0, expert_width = 0, shared_width = 0;
    int64_t streams = 0, sinkhorn_iterations = 0;
    float hc_eps = 0, norm_eps = 0, route_scale = 0, swiglu_limit = 0;
    // Rounds where the released code does: activations to BF16, inputs of quantised linears to
    // FP8, entries and indexer keys to their stored precision (docs/design/numerics.md).
    bool official = false;
};

struct Context {
    const Shape& shape;
    const CacheLayout& layout;
    const Slabs& slabs;
    ThreadPool& pool;
    Scratch& scratch;               // of the calling thread
    std::vector<Scratch>& workers;  // [pool.size()], for use inside ThreadPool::run
};

}  // namespace rorqual
