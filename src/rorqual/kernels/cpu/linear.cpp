#include "linear.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#include "codes.h"
#include "elementwise.h"
#include "linear_kernel.h"

namespace rorqual {

namespace {

constexpr size_t kLargePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{16} << 20;

// Memory for many matrices. A step visits hundreds of small ones all over it: in pages of 4 KiB it
// waits for the page table as well as for the bytes.
class Chunk {
  public:
    explicit Chunk(size_t size)
        : size_((size + kLargePage - 1) / kLargePage * kLargePage),
          data_(static_cast<uint8_t*>(std::aligned_alloc(kLargePage, size_))) {
        if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(data_, size_, MADV_HUGEPAGE);  // a wish: without it all is right and a bit slower
#endif
    }
    ~Chunk() { std::free(data_); }
    Chunk(const Chunk&) = delete;
    Chunk& operator=(const Chunk&) = delete;

    bool fits(size_t size) const { return size <= size_ - used_; }
    uint8_t* take(size_t size) {
        uint8_t* taken = data_ + used_;
        used_ += size;
        return static_cast<uint8_t*>(std::memset(taken, 0, size));
    }

  private:
    size_t size_;
    uint8_t* data_;
    size_t used_ = 0;
};

// Zeroed, at a multiple of 64 bytes; a chunk is freed with the last of what lies in it.
template <class T>
std::shared_ptr<T> aligned(int64_t count) {
    static std::mutex mutex;
    static std::weak_ptr<Chunk> last;
    const size_t size = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Chunk> chunk = last.lock();
    if (!chunk || !chunk->fits(size)) {
        chunk = std::make_shared<Chunk>(std::max(size, kChunk));
        last = chunk;
    }
    T* data = reinterpret_cast<T*>(chunk->take(size));
    return std::shared_ptr<T>(std::move(chunk), data);
}

// An empty matrix of `step` bytes per output for every `group` inputs.
Matrix empty(WeightFormat format, int64_t outputs, int64_t inputs, int64_t step, int64_t group) {
    Matrix made;
    made.format = format;
    made.outputs = outputs;
    made.inputs = inputs;
    made.panel_nbytes = (inputs + group - 1) / group * kPanel * step;
    made.data = aligned<uint8_t>(made.panels() * made.panel_nbytes);
    return made;
}

// Puts element (o, k) where kernels look for it: panel, input, lane.
template <class T, class Value>
Matrix packed(WeightFormat format, int64_t outputs, int64_t inputs, const Value& value) {
    Matrix made = empty(format, outputs, inputs, sizeof(T), 1);
    for (int64_t o = 0; o < outputs; ++o) {
        T* to = reinterpret_cast<T*>(made.data.get() + o / kPanel * made.panel_nbytes) + o % kPanel;
        for (int64_t k = 0; k < inputs; ++k) to[k * kPanel] = value(o, k);
    }
    return made;
}

}  // namespace

Matrix Matrix::from_fp32(const float* weight, int64_t outputs, int64_t inputs) {
    return packed<float>(WeightFormat::fp32, outputs, inputs,
                         [=](int64_t o, int64_t k) { return weight[o * inputs + k]; });
}

Matrix Matrix::from_bf16(const uint16_t* weight, int64_t outputs, int64_t inputs) {
    return packed<uint16_t>(WeightFormat::bf16, outputs, inputs,
                            [=](int64_t o, int64_t k) { return weight[o * inputs + k]; });
}

Matrix Matrix::to_bf16(const float* weight, int64_t outputs, int64_t inputs) {
    return packed<uint16_t>(WeightFormat::bf16, outputs, inputs, [=](int64_t o, int64_t k) {
        return rorqual::to_bf16(weight[o * inputs + k]);
    });
}

Matrix Matrix::to_int8(const float* weight, int64_t outputs, int64_t inputs) {
    auto scales = aligned<float>((outputs + kPanel - 1) / kPanel * kPanel);
    for (int64_t o = 0; o < outputs; ++o)
        scales.get()[o] = std::max(largest(weight + o * inputs, inputs), 1e-30f) / 127.0f;
    const float* scale = scales.get();
    Matrix made =
        packed<int8_t>(WeightFormat::int8, outputs, inputs, [=](int64_t o, int64_t k) {
            return static_cast<int8_t>(std::lrintf(weight[o * inputs + k] / scale[o]));
        });
    made.scales = scales;
    return made;
}

Matrix Matrix::from_fp8(const uint8_t* weight, const uint8_t* scale, int64_t outputs,
                        int64_t inputs) {
    Matrix made = packed<uint8_t>(WeightFormat::fp8, outputs, inputs,
                                  [=](int64_t o, int64_t k) { return weight[o * inputs + k]; });
    const int64_t tiles = (inputs + kFp8Tile - 1) / kFp8Tile;
    made.scales = aligned<float>(made.panels() * tiles);
    for (int64_t panel = 0; panel < made.panels(); ++panel)
        for (int64_t t = 0; t < tiles; ++t)
            made.scales.get()[panel * tiles + t] =
                scale_value(scale[panel * kPanel / kFp8Tile * tiles + t]);
    return made;
}

Matrix Matrix::from_fp4(const uint8_t* weight, const uint8_t* scale, int64_t outputs,
                        int64_t inputs) {
    Matrix made = empty(WeightFormat::fp4, outputs, inputs, 1, 2);
    const int64_t blocks = (inputs + kFp4Block - 1) / kFp4Block, bytes = inputs / 2;
    made.scales = aligned<float>(made.panels() * blocks * kPanel);
    for (int64_t o = 0; o < outputs; ++o) {
        const int64_t panel = o / kPanel, lane = o % kPanel;
        uint8_t* to = made.data.get() + panel * made.panel_nbytes + lane;
        for (int64_t i = 0; i < bytes; ++i) to[i * kPanel] = weight[o * bytes + i];
        for (int64_t b = 0; b < blocks; ++b)
            made.scales.get()[(panel * blocks + b) * kPanel + lane] =
                scale_value(scale[o * blocks + b]);
    }
    return made;
}

int64_t Matrix::nbytes() const {
    const int64_t count = format == WeightFormat::int8  ? panels() * kPanel
                          : format == WeightFormat::fp8 ? panels() * ((inputs + 127) / kFp8Tile)
                          : format == WeightFormat::fp4 ? panels() * ((inputs + 31) / kFp4Block) * 16
                                                        : 0;
    return panels() * panel_nbytes + 4 * count;
}

void matmul_panels(const Matrix& w, const float* x, int64_t rows, int64_t ldx, float* y,
                   int64_t ldy, int64_t first, int64_t last) {
    const Panels view{static_cast<int>(w.format), w.outputs,      w.inputs,
                      w.panel_nbytes,             w.data.get(), w.scales.get()};
    ISA_CALL(multiply)(view, x, rows, ldx, y, ldy, first, last);
}

namespace {

// Multiply-adds that are worth waking another thread for.
constexpr int64_t kWorthWaking = int64_t{1} << 18;
constexpr int64_t kRowBand = 240;

}  // namespace

void matmul(ThreadPool& pool, const Matrix& w, const float* x, int64_t rows, int64_t ldx, float* y,
            int64_t ldy) {
    const int64_t panels = w.panels();
    if (pool.size() == 1 || rows * panels * kPanel * w.inputs < 2 * kWorthWaking) {
        matmul_panels(w, x, rows, ldx, y, ldy, 0, panels);
        return;
    }
    // Pieces are bands of rows by runs of panels, an even number of panels each.
    const int64_t bands = (rows + kRowBand - 1) / kRowBand;
    const int64_t band_work = std::min(rows, kRowBand) * kPanel * w.inputs;
    int64_t run = std::max<int64_t>(kWorthWaking / band_work, 1);
    run = std::max(run, panels * bands / (4 * pool.size()));
    run = std::min((run + 7) / 8 * 8, panels);
    const int64_t runs = (panels + run - 1) / run;
    pool.run(
        bands * runs,
        [&](int64_t begin, int64_t end, int) {
            for (int64_t piece = begin; piece < end; ++piece) {
                const int64_t row = piece / runs * kRowBand, first = piece % runs * run;
                matmul_panels(w, x + row * ldx, std::min(kRowBand, rows - row), ldx, y + row * ldy,
                              ldy, first, std::min(first + run, panels));
            }
        },
        1);
}

void apply(Context& context, const Linear& linear, const float* x, int64_t rows, int64_t ldx,
           float* y, int64_t ldy) {
    Scratch::Frame frame(context.scratch);
    const int64_t inputs = linear.weight.inputs, outputs = linear.weight.outputs;
    if (linear.quantize_input) {
        float* rounded = context.scratch.floats(rows * inputs);
        for (int64_t r = 0; r < rows; ++r)
            ISA_CALL(simulate_fp8)(x + r * ldx, inputs, kFp8Tile, rounded + r * inputs);
        x = rounded;
        ldx = inputs;
    }
    matmul(context.pool, linear.weight, x, rows, ldx, y, ldy);
    if (linear.round_output)
        for (int64_t r = 0; r < rows; ++r) ISA_CALL(round_to_bf16)(y + r * ldy, outputs);
}

}  // namespace rorqual
