// The Network class for model/native.py. Checks everything that could make C++ read or write out of
// bounds, then lets go of the GIL.
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bindings.h"
#include "config_bindings.h"
#include "network.h"

namespace rorqual {

namespace {

using State = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
std::vector<T> copied(const In1<T>& from) {
    return {from.data(), from.data() + from.size()};
}

void make(Network* at, const nb::dict& shape, nb::handle layout,
          const std::map<std::string, Matrix>& matrices,
          const std::map<std::string, In1<float>>& arrays,
          const std::map<std::string, In1<int32_t>>& tables, nb::handle embedding,
          In1<float> plain_frequencies, In1<float> compressing_frequencies, int num_threads) {
    if (num_threads < 1) throw nb::value_error("num_threads must be >= 1");
    Weights weights;
    weights.matrices = matrices;
    for (const auto& [name, array] : arrays) weights.arrays[name] = copied(array);
    for (const auto& [name, array] : tables) weights.tables[name] = copied(array);
    const Shape read_shape = shape_from(shape);
    weights.official = read_shape.official;
    Embedding rows;
    In1<float> wide;
    if (nb::try_cast(embedding, wide, false))  // without converting BF16 bits to numbers
        rows.wide = copied(wide);
    else
        rows.narrow = copied(nb::cast<In1<uint16_t>>(embedding));
    const size_t size = static_cast<size_t>(read_shape.vocab * read_shape.hidden);
    if (std::max(rows.wide.size(), rows.narrow.size()) != size)
        throw nb::value_error("embed.weight: wrong size");
    new (at) Network(read_shape, layout_from(layout), weights, std::move(rows),
                     copied(plain_frequencies), copied(compressing_frequencies), num_threads);
}

// The segments of a call, checked. `blocks` is all block tables, one after another.
std::vector<Segment> segments_from(const Network& network, size_t num_tokens,
                                   const In1<int32_t>& tokens, const In2<int64_t>& segments,
                                   const std::vector<State>& states, const In1<int32_t>& blocks) {
    const auto fail = [](const char* what) { throw nb::value_error(what); };
    if (segments.shape(1) != 4 || segments.shape(0) != states.size())
        fail("one row of four numbers and one state per segment");
    for (size_t i = 0; i < tokens.size(); ++i)
        if (tokens.data()[i] < 0 || tokens.data()[i] >= network.shape().vocab)
            fail("a token id is outside the vocabulary");
    for (size_t i = 0; i < blocks.size(); ++i)
        if (blocks.data()[i] < 0 || blocks.data()[i] >= network.slabs().num_blocks())
            fail("a block id is outside the slabs");
    const auto num_blocks = static_cast<int64_t>(blocks.size());
    std::vector<Segment> made;
    int64_t row = 0;
    for (size_t s = 0; s < states.size(); ++s) {
        const int64_t* n = segments.data() + 4 * s;
        const int64_t count = n[0], start = n[1], first_block = n[3];
        if (count < 1 || start < 0 || count > static_cast<int64_t>(num_tokens))
            fail("a segment needs one token or more and a start position >= 0");
        // No sum with `start`: it may be near the end of its type.
        if (first_block < 0 || first_block > num_blocks ||
            start > (num_blocks - first_block) * kBlockTokens - count)
            fail("a block table is too short for its segment");
        if (static_cast<int64_t>(states[s].size()) < network.layout().state_nbytes)
            fail("a state is too small");
        for (size_t before = 0; before < s; ++before)
            if (states[before].data() == states[s].data()) fail("a state appears twice");
        made.push_back({count, start, static_cast<int>(n[2]), states[s].data(),
                        blocks.data() + first_block, row});
        row += count;
    }
    if (row != static_cast<int64_t>(num_tokens)) fail("tokens do not match the segments");
    return made;
}

void check_out(const Network& network, size_t rows, const Out2<float>& out) {
    if (out.shape(0) != rows || static_cast<int64_t>(out.shape(1)) != network.shape().vocab)
        throw nb::value_error("out must be [logit rows, vocab]");
}

void step(Network& network, In1<int32_t> tokens, In2<int64_t> segments,
          const std::vector<State>& states, In1<int32_t> blocks, In1<int64_t> logit_rows,
          Out2<float> out) {
    const auto made =
        segments_from(network, tokens.size(), tokens, segments, states, blocks);
    check_out(network, logit_rows.size(), out);
    for (size_t i = 0; i < logit_rows.size(); ++i) {
        const int64_t row = logit_rows.data()[i];
        if (row < (i ? logit_rows.data()[i - 1] : 0) || row >= static_cast<int64_t>(tokens.size()))
            throw nb::value_error("logit rows must be ascending token numbers");
    }
    nb::gil_scoped_release unlocked;
    network.step(tokens.data(), made.data(), static_cast<int64_t>(made.size()), logit_rows.data(),
                 static_cast<int64_t>(logit_rows.size()), out.data());
}

void draft(Network& network, In1<int32_t> tokens, In2<int64_t> segments,
           const std::vector<State>& states, In1<int32_t> blocks, Out2<float> out) {
    const auto made =
        segments_from(network, tokens.size(), tokens, segments, states, blocks);
    if (made.size() != tokens.size()) throw nb::value_error("a draft is one token per segment");
    check_out(network, made.size(), out);
    nb::gil_scoped_release unlocked;
    network.draft(tokens.data(), made.data(), static_cast<int64_t>(made.size()), out.data());
}

// An array as it is: a converted copy would be written to in vain, or be gone after the call.
auto kept(const char* name) { return nb::arg(name).noconvert(); }

}  // namespace

void bind_network(nb::module_& m) {
    nb::class_<Network>(m, "Network")
        .def("__init__", &make)
        .def(
            "add_slab",
            [](Network& network, State slab) {
                if (static_cast<int64_t>(slab.size()) < network.layout().slab_nbytes)
                    throw nb::value_error("a slab is too small");
                network.add_slab(slab.data());
            },
            kept("slab"), nb::keep_alive<1, 2>())
        .def("step", &step, kept("tokens"), kept("segments"), kept("states"), kept("blocks"),
             kept("logit_rows"), kept("out"))
        .def("draft", &draft, kept("tokens"), kept("segments"), kept("states"), kept("blocks"),
             kept("out"));
}

}  // namespace rorqual
