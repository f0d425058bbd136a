// Shared by the files that show kernels to Python: arrays, and a context for single kernels.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "context.h"

namespace rorqual {

namespace nb = nanobind;

template <class T>
using In1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using In2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using In3 = nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out3 = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// For calling one kernel outside a network.
struct Bench {
    explicit Bench(const Shape& shape = {}, int threads = 1)
        : shape(shape), slabs(layout), pool(threads), workers(static_cast<size_t>(threads)) {}
    Context context() { return {shape, layout, slabs, pool, scratch, workers}; }

    Shape shape;
    CacheLayout layout;
    Slabs slabs;
    ThreadPool pool;
    Scratch scratch;
    std::vector<Scratch> workers;
};

void bind_kernels(nb::module_& m);
void bind_network(nb::module_& m);
void bind_attention(nb::module_& m);

}  // namespace rorqual
