// The numbers of a model and of its cache layout, read from Python.
#pragma once

#include "bindings.h"

namespace rorqual {

// A dict with Shape's field names.
Shape shape_from(const nb::dict& fields);
// kernels/layout.py's CacheLayout.
CacheLayout layout_from(nb::handle layout);
// "fp32", "bf16", "record"; "fp32", "int8", "fp4". ValueError for anything else.
EntryFormat entry_format_from(const std::string& name);
KeyFormat key_format_from(const std::string& name);

}  // namespace rorqual
