#include "moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.h"

namespace rorqual {

namespace {

float affinity(float logit) {
    return std::sqrt(logit > 20.0f ? logit : std::log1p(std::exp(logit)));
}

// Rows of one expert: consecutive slots of the buffers below.
struct Group {
    const ExpertWeights* expert;
    const float* x;  // [rows, D]
    int64_t rows, width;
    float* hidden;       // [rows, width]
    float* up;           // [rows, width]
    float* out;          // [rows, D]
    const float* share;  // weight per row, null for 1
};

struct Groups {
    Group* items;
    int64_t count;
    void add(const Group& group) { items[count++] = group; }
    Group* begin() const { return items; }
    Group* end() const { return items + count; }
};

struct Piece {
    const Group* group;
    int64_t row, rows, first, last;  // panels [first, last)
};

constexpr int64_t kWorthWaking = int64_t{1} << 18;
constexpr int64_t kBand = 240;

// Cuts products of `inputs` by `outputs(group)` into pieces worth a thread's waking.
template <class Outputs>
int64_t cut(const Groups& groups, int64_t inputs, int threads, const Outputs& outputs,
            Scratch& scratch, Piece** pieces) {
    int64_t count = 0;
    const auto visit = [&](bool write) {
        count = 0;
        for (const Group& group : groups) {
            const int64_t panels = (outputs(group) + kPanel - 1) / kPanel;
            for (int64_t row = 0; row < group.rows; row += kBand) {
                const int64_t rows = std::min(kBand, group.rows - row);
                const int64_t fair = kWorthWaking / std::max<int64_t>(rows * inputs * kPanel, 1);
                const int64_t run = threads == 1 ? panels : (fair + 8) / 8 * 8;
                for (int64_t first = 0; first < panels; first += run) {
                    if (write)
                        (*pieces)[count] = {&group, row, rows, first, std::min(first + run, panels)};
                    ++count;
                }
            }
        }
    };
    visit(false);
    *pieces = scratch.take<Piece>(count);
    visit(true);
    return count;
}

const float* rounded_rows(Context& context, const float* x, int64_t rows, int64_t width) {
    float* rounded = context.scratch.floats(rows * width);
    context.pool.run(
        rows,
        [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; ++r)
                ISA_CALL(simulate_fp8)(x + r * width, width, kFp8Tile, rounded + r * width);
        },
        16);
    return rounded;
}

// hidden = silu(w1 x) * w3 x * share, over the columns of the piece's panels.
void enter_expert(const Piece& piece, const Shape& shape) {
    const Group& g = *piece.group;
    const ExpertWeights& w = *g.expert;
    const float* x = g.x + piece.row * shape.hidden;
    float* hidden = g.hidden + piece.row * g.width;
    float* up = g.up + piece.row * g.width;
    matmul_panels(w.w1.weight, x, piece.rows, shape.hidden, hidden, g.width, piece.first,
                  piece.last);
    matmul_panels(w.w3.weight, x, piece.rows, shape.hidden, up, g.width, piece.first, piece.last);
    const int64_t from = piece.first * kPanel;
    const int64_t count = std::min(piece.last * kPanel, g.width) - from;
    for (int64_t r = 0; r < piece.rows; ++r) {
        float* gate_row = hidden + r * g.width + from;
        float* up_row = up + r * g.width + from;
        if (w.w1.round_output) {
            ISA_CALL(round_to_bf16)(gate_row, count);
            ISA_CALL(round_to_bf16)(up_row, count);
        }
        ISA_CALL(swiglu)
        (gate_row, up_row, count, shape.swiglu_limit, g.share ? g.share[piece.row + r] : 1.0f,
         shape.official);
    }
}

void leave_expert(const Piece& piece, const Shape& shape) {
    const Group& g = *piece.group;
    float* out = g.out + piece.row * shape.hidden;
    matmul_panels(g.expert->w2.weight, g.hidden + piece.row * g.width, piece.rows, g.width, out,
                  shape.hidden, piece.first, piece.last);
}

ExpertWeights load_expert(const Weights& weights, const std::string& prefix, const Shape& shape,
                          int64_t width) {
    return {weights.linear(prefix + ".w1", width, shape.hidden),
            weights.linear(prefix + ".w2", shape.hidden, width),
            weights.linear(prefix + ".w3", width, shape.hidden)};
}

}  // namespace

MoeWeights load_moe(const Weights& weights, const std::string& prefix, const Shape& shape,
                    bool hashed) {
    MoeWeights made;
    made.gate = weights.matrix(prefix + ".gate", shape.experts, shape.hidden);
    if (hashed) {
        made.table = weights.table(prefix + ".gate.tid2eid", shape.vocab * shape.topk);
        for (int32_t expert : made.table)
            if (expert < 0 || expert >= shape.experts)
                throw std::invalid_argument(prefix + ".gate.tid2eid: no such expert");
    } else {
        made.bias = weights.array(prefix + ".gate.bias", shape.experts);
    }
    for (int64_t e = 0; e < shape.experts; ++e)
        made.experts.push_back(load_expert(weights, prefix + ".experts." + std::to_string(e), shape,
                                           shape.expert_width));
    made.shared = load_expert(weights, prefix + ".shared_experts", shape, shape.shared_width);
    return made;
}

void route(Context& context, const MoeWeights& weights, const float* x, const int32_t* tokens,
           int64_t rows, int32_t* chosen, float* share) {
    Scratch::Frame frame(context.scratch);
    const Shape& shape = context.shape;
    const int64_t experts = shape.experts, topk = shape.topk;
    float* logits = context.scratch.floats(rows * experts);
    matmul(context.pool, weights.gate, x, rows, shape.hidden, logits, experts);
    float* biased = context.scratch.floats(experts);
    for (int64_t r = 0; r < rows; ++r) {
        float* scores = logits + r * experts;
        int32_t* picked = chosen + r * topk;
        if (!weights.table.empty()) {
            std::memcpy(picked, weights.table.data() + tokens[r] * topk, 4 * topk);
            for (int64_t k = 0; k < topk; ++k) share[r * topk + k] = affinity(scores[picked[k]]);
        } else {
            for (int64_t e = 0; e < experts; ++e) {
                scores[e] = affinity(scores[e]);
                biased[e] = scores[e] + weights.bias[e];
            }
            for (int64_t k = 0; k < topk; ++k) {
                const auto best = std::max_element(biased, biased + experts) - biased;
                picked[k] = static_cast<int32_t>(best);
                share[r * topk + k] = scores[best];
                biased[best] = -INFINITY;
            }
        }
        float total = 0;
        for (int64_t k = 0; k < topk; ++k) total += share[r * topk + k];
        for (int64_t k = 0; k < topk; ++k)
            share[r * topk + k] = share[r * topk + k] / total * shape.route_scale;
    }
}

void mixture(Context& context, const MoeWeights& weights, const float* x, const int32_t* tokens,
             int64_t rows, float* out) {
    Scratch::Frame frame(context.scratch);
    const Shape& shape = context.shape;
    Scratch& scratch = context.scratch;
    const int64_t topk = shape.topk, slots = rows * topk, hidden = shape.hidden;
    int32_t* chosen = scratch.take<int32_t>(slots);
    float* share = scratch.floats(slots);
    route(context, weights, x, tokens, rows, chosen, share);

    // Slots in the order of experts, so that each expert's rows lie together.
    int64_t* first = scratch.take<int64_t>(shape.experts + 1);
    std::fill(first, first + shape.experts + 1, 0);
    for (int64_t i = 0; i < slots; ++i) ++first[chosen[i] + 1];
    for (int64_t e = 0; e < shape.experts; ++e) first[e + 1] += first[e];
    int64_t* slot_of = scratch.take<int64_t>(slots);
    for (int64_t i = 0; i < slots; ++i) slot_of[i] = first[chosen[i]]++;
    for (int64_t e = shape.experts; e > 0; --e) first[e] = first[e - 1];
    first[0] = 0;

    const Linear& routed = weights.experts[0].w1;
    const float* shared_x =
        weights.shared.w1.quantize_input ? rounded_rows(context, x, rows, hidden) : x;
    const float* routed_x = routed.quantize_input == weights.shared.w1.quantize_input ? shared_x
                            : routed.quantize_input ? rounded_rows(context, x, rows, hidden)
                                                    : x;
    float* gathered = scratch.floats(slots * hidden);
    float* gathered_share = scratch.floats(slots);
    for (int64_t i = 0; i < slots; ++i) {
        std::memcpy(gathered + slot_of[i] * hidden, routed_x + i / topk * hidden, 4 * hidden);
        gathered_share[slot_of[i]] = share[i];
    }

    const int64_t width = shape.expert_width;
    float* inner = scratch.floats(slots * width);
    float* up = scratch.floats(slots * width);
    float* results = scratch.floats(slots * hidden);
    float* shared_inner = scratch.floats(rows * shape.shared_width);
    float* shared_up = scratch.floats(rows * shape.shared_width);
    Groups groups{scratch.take<Group>(shape.experts + 1), 0};
    groups.add({&weights.shared, shared_x, rows, shape.shared_width, shared_inner, shared_up, out,
                nullptr});
    for (int64_t e = 0; e < shape.experts; ++e) {
        const int64_t at = first[e], count = first[e + 1] - at;
        if (count)
            groups.add({&weights.experts[static_cast<size_t>(e)], gathered + at * hidden, count,
                        width, inner + at * width, up + at * width, results + at * hidden,
                        gathered_share + at});
    }

    Piece* pieces;
    int64_t count = cut(groups, 2 * hidden, context.pool.size(),
                        [](const Group& g) { return g.width; }, scratch, &pieces);
    context.pool.run(
        count,
        [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) enter_expert(pieces[i], shape);
        },
        1);
    for (Group& g : groups)
        if (g.expert->w2.quantize_input)
            g.hidden = const_cast<float*>(rounded_rows(context, g.hidden, g.rows, g.width));
    count = cut(groups, width, context.pool.size(), [&](const Group&) { return hidden; }, scratch,
                &pieces);
    context.pool.run(
        count,
        [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) leave_expert(pieces[i], shape);
        },
        1);
    if (routed.round_output) ISA_CALL(round_to_bf16)(results, slots * hidden);
    if (weights.shared.w2.round_output) ISA_CALL(round_to_bf16)(out, rows * hidden);

    context.pool.run(
        rows,
        [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; ++r)
                ISA_CALL(add_rows)
            (results, slot_of + r * topk, topk, hidden, shape.official, out + r * hidden);
        },
        64);
}

}  // namespace rorqual
