// Single kernels for tests and measurements.
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "config_bindings.h"
#include "elementwise.h"
#include "hyper.h"
#include "moe.h"

namespace rorqual {

namespace {

void bind_matrix(nb::module_& m) {
    nb::class_<Matrix>(m, "Matrix")
        .def_static("from_fp32", [](In2<float> w) {
            return Matrix::from_fp32(w.data(), w.shape(0), w.shape(1));
        })
        .def_static("from_bf16", [](In2<uint16_t> w) {
            return Matrix::from_bf16(w.data(), w.shape(0), w.shape(1));
        })
        .def_static("to_bf16", [](In2<float> w) {
            return Matrix::to_bf16(w.data(), w.shape(0), w.shape(1));
        })
        .def_static("to_int8", [](In2<float> w) {
            return Matrix::to_int8(w.data(), w.shape(0), w.shape(1));
        })
        .def_static("from_fp8", [](In2<uint8_t> w, In2<uint8_t> scale) {
            const size_t tiles[] = {(w.shape(0) + 127) / 128, (w.shape(1) + 127) / 128};
            if (scale.shape(0) != tiles[0] || scale.shape(1) != tiles[1])
                throw nb::value_error("FP8 scales must be one per 128 x 128 tile");
            return Matrix::from_fp8(w.data(), scale.data(), w.shape(0), w.shape(1));
        })
        .def_static("from_fp4", [](In2<uint8_t> w, In2<uint8_t> scale) {
            if (scale.shape(0) != w.shape(0) || scale.shape(1) != (2 * w.shape(1) + 31) / 32)
                throw nb::value_error("FP4 scales must be one per 32 inputs of a row");
            return Matrix::from_fp4(w.data(), scale.data(), w.shape(0), 2 * w.shape(1));
        })
        .def_ro("outputs", &Matrix::outputs)
        .def_ro("inputs", &Matrix::inputs)
        .def_prop_ro("nbytes", &Matrix::nbytes);

    m.def("matmul", [](const Matrix& w, In2<float> x, Out2<float> y, int threads, int64_t repeat) {
        if (static_cast<int64_t>(x.shape(1)) != w.inputs || y.shape(0) != x.shape(0) ||
            static_cast<int64_t>(y.shape(1)) != w.outputs)
            throw nb::value_error("shapes do not match");
        nb::gil_scoped_release unlocked;
        ThreadPool pool(threads);
        for (int64_t i = 0; i < repeat; ++i)
            matmul(pool, w, x.data(), x.shape(0), w.inputs, y.data(), w.outputs);
    }, nb::arg("weight"), nb::arg("x"), nb::arg("y"), nb::arg("threads") = 1,
       nb::arg("repeat") = 1);
}

Shape hyper_shape(const Matrix& fn, int64_t streams, int64_t hidden, int64_t iterations, float eps,
                  float norm_eps) {
    if (fn.inputs != streams * hidden) throw nb::value_error("shapes do not match");
    Shape shape;
    shape.streams = streams;
    shape.hidden = hidden;
    shape.sinkhorn_iterations = iterations;
    shape.hc_eps = eps;
    shape.norm_eps = norm_eps;
    return shape;
}

HyperWeights hyper_weights(const Matrix& fn, In1<float> scale, In1<float> base) {
    return {fn, {scale.data(), scale.data() + scale.size()},
            {base.data(), base.data() + base.size()}};
}

void bind_hyper(nb::module_& m) {
    m.def("enter_streams",
          [](const Matrix& fn, In1<float> scale, In1<float> base, In1<float> norm,
             In3<float> streams, int64_t iterations, float eps, float norm_eps, Out2<float> x,
             Out2<float> mixing, int threads, int64_t repeat) {
              Bench bench(hyper_shape(fn, streams.shape(1), streams.shape(2), iterations, eps,
                                      norm_eps),
                          threads);
              Context context = bench.context();
              const HyperWeights weights = hyper_weights(fn, scale, base);
              for (int64_t i = 0; i < repeat; ++i)
                  enter_streams(context, weights, norm.data(), streams.data(), streams.shape(0),
                                x.data(), mixing.data());
          });
    m.def("leave_streams", [](In2<float> output, In2<float> mixing, Out3<float> streams) {
        Shape shape;
        shape.streams = streams.shape(1);
        shape.hidden = streams.shape(2);
        Bench bench(shape);
        Context context = bench.context();
        leave_streams(context, output.data(), mixing.data(), streams.shape(0), streams.data());
    });
    m.def("merge_streams",
          [](const Matrix& fn, In1<float> scale, In1<float> base, In1<float> norm,
             In3<float> streams, float eps, float norm_eps, Out2<float> y) {
              Bench bench(hyper_shape(fn, streams.shape(1), streams.shape(2), 0, eps, norm_eps));
              Context context = bench.context();
              merge_streams(context, hyper_weights(fn, scale, base), norm.data(), streams.data(),
                            streams.shape(0), y.data());
          });
}

// A mixture of experts by itself; weights under the names of layer "ffn".
class MoeBench {
public:
    MoeBench(const nb::dict& shape, const std::map<std::string, Matrix>& matrices,
             const std::map<std::string, In1<float>>& arrays,
             const std::map<std::string, In1<int32_t>>& tables, int threads)
        : bench_(shape_from(shape), threads) {
        Weights weights;
        weights.matrices = matrices;
        weights.official = bench_.shape.official;
        for (const auto& [name, a] : arrays) weights.arrays[name] = {a.data(), a.data() + a.size()};
        for (const auto& [name, t] : tables) weights.tables[name] = {t.data(), t.data() + t.size()};
        weights_ = load_moe(weights, "ffn", bench_.shape, !tables.empty());
    }

    void run(In2<float> x, In1<int32_t> tokens, Out2<float> out, int64_t repeat) {
        const auto hidden = static_cast<size_t>(bench_.shape.hidden);
        if (x.shape(1) != hidden || out.shape(1) != hidden || out.shape(0) != x.shape(0) ||
            tokens.size() != x.shape(0))
            throw nb::value_error("shapes do not match");
        nb::gil_scoped_release unlocked;
        Context context = bench_.context();
        for (int64_t i = 0; i < repeat; ++i)
            mixture(context, weights_, x.data(), tokens.data(), x.shape(0), out.data());
    }

private:
    Bench bench_;
    MoeWeights weights_;
};

void bind_moe(nb::module_& m) {
    nb::class_<MoeBench>(m, "MoeBench")
        .def(nb::init<const nb::dict&, const std::map<std::string, Matrix>&,
                      const std::map<std::string, In1<float>>&,
                      const std::map<std::string, In1<int32_t>>&, int>())
        .def("run", &MoeBench::run, nb::arg("x"), nb::arg("tokens"), nb::arg("out"),
             nb::arg("repeat") = 1);
}

void bind_elementwise(nb::module_& m) {
    m.def("rms_norm", [](In2<float> x, In1<float> weight, float eps, bool bf16, Out2<float> y) {
        ISA_CALL(rms_norm)
        (x.data(), x.shape(0), x.shape(1), x.shape(1), weight.data(), eps, bf16, y.data(),
         x.shape(1));
    });
    m.def("rotate", [](Out3<float> x, In2<float> cos, In2<float> sin, bool inverse) {
        ISA_CALL(rotate)
        (x.data(), x.shape(0), x.shape(1) * x.shape(2), x.shape(1), x.shape(2), cos.data(),
         sin.data(), cos.shape(1), inverse, false);
    });
    m.def("swiglu", [](Out2<float> gate, In2<float> up, float limit, float weight) {
        ISA_CALL(swiglu)(gate.data(), up.data(), gate.size(), limit, weight, false);
    });
    m.def("simulate_fp8", [](In2<float> x, int64_t block, Out2<float> y) {
        for (size_t r = 0; r < x.shape(0); ++r)
            ISA_CALL(simulate_fp8)
        (x.data() + r * x.shape(1), x.shape(1), block, y.data() + r * x.shape(1));
    });
}

}  // namespace

void bind_kernels(nb::module_& m) {
    m.def("isa", [] { return std::string(isa_name(isa())); });
    m.def("set_isa", [](const std::string& name) {
        for (Isa which : {Isa::scalar, Isa::avx2, Isa::avx512})
            if (name == isa_name(which)) return set_isa(which);
        throw nb::value_error("an instruction set is scalar, avx2 or avx512");
    });
    bind_matrix(m);
    bind_elementwise(m);
    bind_hyper(m);
    bind_moe(m);
}

}  // namespace rorqual
