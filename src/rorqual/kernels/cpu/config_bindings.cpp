#include "config_bindings.h"

#include <nanobind/stl/string.h>

namespace rorqual {

namespace {

template <class T>
void read(const nb::dict& from, const char* name, T& to) {
    to = nb::cast<T>(from[name]);
}

}  // namespace

EntryFormat entry_format_from(const std::string& name) {
    if (name == "fp32") return EntryFormat::fp32;
    if (name == "bf16") return EntryFormat::bf16;
    if (name == "record") return EntryFormat::record;
    throw nb::value_error("an entry format is fp32, bf16 or record");
}

KeyFormat key_format_from(const std::string& name) {
    if (name == "fp32") return KeyFormat::fp32;
    if (name == "int8") return KeyFormat::int8;
    if (name == "fp4") return KeyFormat::fp4;
    throw nb::value_error("a key format is fp32, int8 or fp4");
}

Shape shape_from(const nb::dict& d) {
    Shape s;
    read(d, "vocab", s.vocab);
    read(d, "hidden", s.hidden);
    read(d, "layers", s.layers);
    read(d, "mtp_layers", s.mtp_layers);
    read(d, "heads", s.heads);
    read(d, "head_dim", s.head_dim);
    read(d, "rope_dim", s.rope_dim);
    read(d, "q_lora", s.q_lora);
    read(d, "o_groups", s.o_groups);
    read(d, "o_lora", s.o_lora);
    read(d, "index_heads", s.index_heads);
    read(d, "index_dim", s.index_dim);
    read(d, "index_topk", s.index_topk);
    read(d, "window", s.window);
    read(d, "experts", s.experts);
    read(d, "topk", s.topk);
    read(d, "hash_layers", s.hash_layers);
    read(d, "expert_width", s.expert_width);
    read(d, "shared_width", s.shared_width);
    read(d, "streams", s.streams);
    read(d, "sinkhorn_iterations", s.sinkhorn_iterations);
    read(d, "hc_eps", s.hc_eps);
    read(d, "norm_eps", s.norm_eps);
    read(d, "route_scale", s.route_scale);
    read(d, "swiglu_limit", s.swiglu_limit);
    read(d, "official", s.official);
    return s;
}

CacheLayout layout_from(nb::handle o) {
    CacheLayout made;
    const auto number = [](nb::handle from, const char* name) {
        return nb::cast<int64_t>(from.attr(name));
    };
    made.entry_format = entry_format_from(nb::cast<std::string>(o.attr("entry_format")));
    made.key_format = key_format_from(nb::cast<std::string>(o.attr("key_format")));
    made.entry_nbytes = number(o, "entry_nbytes");
    made.key_nbytes = number(o, "key_nbytes");
    made.window = number(o, "window");
    made.window_slots = number(o, "window_slots");
    made.slab_blocks = number(o, "slab_blocks");
    made.slab_nbytes = number(o, "slab_nbytes");
    made.state_nbytes = number(o, "state_nbytes");
    made.pending_streams = number(o, "pending_streams");
    made.pending_slots = number(o, "pending_slots");
    for (nb::handle layer : o.attr("layers")) {
        LayerLayout l;
        l.ratio = number(layer, "ratio");
        l.entries_per_block = number(layer, "entries_per_block");
        l.block_entries = number(layer, "block_entries");
        l.block_keys = number(layer, "block_keys");
        l.window = number(layer, "window");
        l.raw = number(layer, "raw");
        l.raw_index = number(layer, "raw_index");
        l.raw_slots = number(layer, "raw_slots");
        l.raw_columns = number(layer, "raw_columns");
        l.raw_index_columns = number(layer, "raw_index_columns");
        made.layers.push_back(l);
    }
    return made;
}

}  // namespace rorqual
