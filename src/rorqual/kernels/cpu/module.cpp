// The extension module; see __init__.py beside it for what Python code uses.
#include "bindings.h"

NB_MODULE(_native, m) {
    rorqual::bind_kernels(m);
    rorqual::bind_network(m);
    rorqual::bind_attention(m);
}
