// The attention sub-layer and its kernels for tests and measurements.
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attention_layer.h"
#include "bindings.h"
#include "config_bindings.h"
#include "elementwise.h"
#include "entries.h"
#include "indexer.h"

namespace rorqual {

namespace {

using State = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void need(bool ok, const char* what) {
    if (!ok) throw nb::value_error(what);
}

// One attention layer with memory of its own choosing.
class LayerBench {
public:
    LayerBench(const nb::dict& shape, nb::handle layout, int64_t index,
               const std::map<std::string, Matrix>& matrices,
               const std::map<std::string, In1<float>>& arrays, In1<float> plain,
               In1<float> compressing, int threads)
        : bench_(shape_from(shape), threads),
          plain_(plain.data(), plain.data() + plain.size()),
          compressing_(compressing.data(), compressing.data() + compressing.size()) {
        bench_.layout = layout_from(layout);
        layer_ = bench_.layout.layers.at(static_cast<size_t>(index));
        Weights weights;
        weights.official = bench_.shape.official;
        weights.matrices = matrices;
        for (const auto& [name, array] : arrays)
            weights.arrays[name] = {array.data(), array.data() + array.size()};
        weights_ = load_attention(weights, "attn", bench_.shape, layer_.ratio);
    }

    void add_slab(State slab) {
        need(static_cast<int64_t>(slab.size()) >= bench_.layout.slab_nbytes, "a slab is too small");
        bench_.slabs.add(slab.data());
    }

    void run(In2<float> x, In2<int64_t> segments, const std::vector<State>& states,
             In1<int32_t> blocks, Out2<float> out, bool memory_only) {
        need(segments.shape(0) == states.size() && segments.shape(1) == 4, "segments: [n, 4]");
        std::vector<Segment> made;
        int64_t row = 0;
        for (size_t s = 0; s < states.size(); ++s) {
            const int64_t* n = segments.data() + 4 * s;
            need(static_cast<int64_t>(states[s].size()) >= bench_.layout.state_nbytes,
                 "a state is too small");
            need(n[3] + (n[0] + n[1] + kBlockTokens - 1) / kBlockTokens <=
                     static_cast<int64_t>(blocks.size()),
                 "a block table is too short");
            made.push_back({n[0], n[1], static_cast<int>(n[2]), states[s].data(),
                            blocks.data() + n[3], row});
            row += n[0];
        }
        need(row == static_cast<int64_t>(x.shape(0)) && x.shape(0) == out.shape(0), "rows differ");
        Scratch::Frame frame(bench_.scratch);
        Context context = bench_.context();
        auto* positions = bench_.scratch.take<int64_t>(row);
        for (const Segment& segment : made)
            for (int64_t i = 0; i < segment.tokens; ++i)
                positions[segment.first_row + i] = segment.start + i;
        const auto table = [&](const std::vector<float>& frequencies) {
            const int64_t pairs = bench_.shape.rope_dim / 2;
            float *cos = bench_.scratch.floats(row * pairs), *sin = bench_.scratch.floats(row * pairs);
            for (int64_t r = 0; r < row; ++r)
                rotation_at(positions[r], frequencies.data(), pairs, cos + r * pairs,
                            sin + r * pairs);
            return Rotation{cos, sin, frequencies.data()};
        };
        const Segments all{made.data(), static_cast<int64_t>(made.size()), row, positions,
                           table(plain_), table(compressing_)};
        attention_layer(context, weights_, layer_, x.data(), all, memory_only ? nullptr : out.data());
    }

private:
    Bench bench_;
    LayerLayout layer_;
    AttentionWeights weights_;
    std::vector<float> plain_, compressing_;
};

// Chooses for queries at positions start, start + 1, ... of a layer of ratio 4 whose keys are
// `slab`, [blocks, 32 keys].
void select(const std::string& format, In3<float> q, In2<float> weights, In2<uint8_t> slab,
            int64_t start, int64_t topk, bool fp4_queries, int threads, Out2<int32_t> indices,
            nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> counts) {
    const int64_t rows = q.shape(0), blocks = slab.shape(0);
    const IndexShape shape{key_format_from(format), static_cast<int64_t>(q.shape(1)),
                           static_cast<int64_t>(q.shape(2)), topk, fp4_queries};
    need(key_dims_ok(shape.format, shape.dim), "the key format does not fit this width");
    need(start + rows <= blocks * kBlockTokens, "too few blocks");
    need(static_cast<int64_t>(indices.shape(1)) == topk, "indices: [rows, topk]");
    Bench bench({}, threads);
    LayerLayout layer;
    layer.ratio = 4;
    layer.entries_per_block = kBlockKeys;
    layer.block_keys = 0;
    bench.layout.slab_blocks = blocks;
    bench.layout.key_nbytes = slab.shape(1) / kBlockKeys;
    bench.slabs.add(const_cast<uint8_t*>(slab.data()));
    std::vector<int32_t> table(static_cast<size_t>(blocks));
    for (size_t b = 0; b < table.size(); ++b) table[b] = static_cast<int32_t>(b);
    const Segment segment{rows, start, 0, nullptr, table.data(), 0};
    const Segments segments{&segment, 1, rows, nullptr, {}, {}};
    Context context = bench.context();
    const Selection made =
        select_entries(context, shape, layer, segments, q.data(), weights.data());
    for (int64_t r = 0; r < rows; ++r) {
        counts.data()[r] = made.counts[r];
        for (int64_t i = 0; i < made.counts[r]; ++i)
            indices.data()[r * topk + i] = made.indices[r * topk + i];
    }
}

void bind_entries(nb::module_& m) {
    m.def("encode_entries",
          [](const std::string& format, In2<float> x, int64_t rope, Out2<uint8_t> out) {
              need(x.shape(0) == out.shape(0), "rows differ");
              for (size_t i = 0; i < x.shape(0); ++i)
                  ISA_CALL(encode_entry)
              (entry_format_from(format), x.data() + i * x.shape(1), x.shape(1), rope,
               out.data() + i * out.shape(1));
          });
    m.def("decode_entries",
          [](const std::string& format, In2<uint8_t> stored, int64_t rope, Out2<float> out) {
              need(stored.shape(0) == out.shape(0), "rows differ");
              for (size_t i = 0; i < out.shape(0); ++i)
                  ISA_CALL(decode_entry)
              (entry_format_from(format), stored.data() + i * stored.shape(1), out.shape(1), rope,
               out.data() + i * out.shape(1));
          });
    // Blocks of 32 keys, [blocks, 32 * key_nbytes].
    m.def("encode_keys", [](const std::string& format, In2<float> x, Out2<uint8_t> blocks) {
        need(x.shape(0) <= blocks.shape(0) * kBlockKeys, "too few blocks");
        for (size_t i = 0; i < x.shape(0); ++i)
            ISA_CALL(encode_key)
        (key_format_from(format), x.data() + i * x.shape(1), x.shape(1),
         blocks.data() + i / kBlockKeys * blocks.shape(1), i % kBlockKeys);
    });
    m.def("decode_keys", [](const std::string& format, In2<uint8_t> blocks, Out2<float> out) {
        need(out.shape(0) <= blocks.shape(0) * kBlockKeys, "too few blocks");
        for (size_t i = 0; i < out.shape(0); ++i)
            ISA_CALL(decode_key)
        (key_format_from(format), blocks.data() + i / kBlockKeys * blocks.shape(1), i % kBlockKeys,
         out.shape(1), out.data() + i * out.shape(1));
    });
    m.def("round_entry", [](Out2<float> x, int64_t rope) {
        for (size_t i = 0; i < x.shape(0); ++i)
            ISA_CALL(round_entry)(x.data() + i * x.shape(1), x.shape(1), rope);
    });
    m.def("round_index", [](Out2<float> x, bool bf16) {
        for (size_t i = 0; i < x.shape(0); ++i)
            ISA_CALL(round_index)(x.data() + i * x.shape(1), x.shape(1), bf16);
    });
}

}  // namespace

void bind_attention(nb::module_& m) {
    bind_entries(m);
    m.def("select_entries", &select);
    nb::class_<LayerBench>(m, "AttentionLayer")
        .def(nb::init<const nb::dict&, nb::handle, int64_t, const std::map<std::string, Matrix>&,
                      const std::map<std::string, In1<float>>&, In1<float>, In1<float>, int>())
        .def("add_slab", &LayerBench::add_slab, nb::keep_alive<1, 2>())
        .def("run", &LayerBench::run, nb::arg("x"), nb::arg("segments"), nb::arg("states"),
             nb::arg("blocks"), nb::arg("out"), nb::arg("memory_only") = false);
}

}  // namespace rorqual
