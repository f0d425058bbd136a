// The network's parameters by state-dict name, as handed over by model/native.py.
//
// Matrices are Linear weights ("layers.0.attn.wq_a"; without ".weight"); a grouped projection
// arrives as one matrix per group ("layers.0.attn.wo_a.0", ".1", ...). Arrays are float32
// parameters with their full name ("layers.0.attn.q_norm.weight", "layers.0.attn.attn_sink").
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"

namespace rorqual {

class Weights {
public:
    std::map<std::string, Matrix> matrices;
    std::map<std::string, std::vector<float>> arrays;
    std::map<std::string, std::vector<int32_t>> tables;
    bool official = false;

    bool has(const std::string& name) const { return matrices.count(name) != 0; }
    const Matrix& matrix(const std::string& name, int64_t outputs, int64_t inputs) const {
        const Matrix& found = find(matrices, name);
        if (found.outputs != outputs || found.inputs != inputs)
            throw std::invalid_argument(name + ": wrong shape");
        return found;
    }
    // Where activations are BF16: the output is rounded, and a quantised weight's input too.
    Linear linear(const std::string& name, int64_t outputs, int64_t inputs,
                  bool quantize_input = true) const {
        Linear made;
        made.weight = matrix(name, outputs, inputs);
        made.quantize_input = official && quantize_input &&
                              (made.weight.format == WeightFormat::fp8 ||
                               made.weight.format == WeightFormat::fp4);
        made.round_output = official;
        return made;
    }
    const std::vector<float>& array(const std::string& name, int64_t size) const {
        return sized(find(arrays, name), name, size);
    }
    const std::vector<int32_t>& table(const std::string& name, int64_t size) const {
        return sized(find(tables, name), name, size);
    }

private:
    template <class T>
    static const T& find(const std::map<std::string, T>& all, const std::string& name) {
        auto at = all.find(name);
        if (at == all.end()) throw std::invalid_argument(name + ": missing");
        return at->second;
    }
    template <class T>
    static const T& sized(const T& found, const std::string& name, int64_t size) {
        if (static_cast<int64_t>(found.size()) != size)
            throw std::invalid_argument(name + ": wrong size");
        return found;
    }
};

}  // namespace rorqual
