// Temporaries of one step: a stack of chunks that is kept between steps.
//
// Pointers stay valid until the Frame that was open when they were taken closes. Nothing is
// initialised. After the first steps no memory is requested from the system any more.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace rorqual {

class Scratch {
public:
    Scratch() = default;
    ~Scratch() {
        for (auto& chunk : chunks_) std::free(chunk.data);
    }
    Scratch(Scratch&& other) noexcept
        : chunks_(std::move(other.chunks_)), current_(other.current_), used_(other.used_) {
        other.chunks_.clear();
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Room for `count` values, aligned to 64 bytes and followed by at least 64 bytes of slack, so
    // that full vectors may be read past the end.
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
    }
    float* floats(int64_t count) { return take<float>(count); }

    // Gives back, when it goes, what was taken since it was made.
    class Frame {
    public:
        explicit Frame(Scratch& scratch)
            : scratch_(scratch), current_(scratch.current_), used_(scratch.used_) {}
        ~Frame() {
            scratch_.current_ = current_;
            scratch_.used_ = used_;
        }
        Frame(const Frame&) = delete;
        Frame& operator=(const Frame&) = delete;

    private:
        Scratch& scratch_;
        size_t current_, used_;
    };

    size_t nbytes() const {
        size_t total = 0;
        for (auto& chunk : chunks_) total += chunk.size;
        return total;
    }

private:
    struct Chunk {
        char* data;
        size_t size;
    };
    static constexpr size_t kChunk = size_t{1} << 20;

    void* bytes(size_t wanted) {
        wanted = (wanted + 64 + 63) / 64 * 64;
        while (current_ < chunks_.size() && used_ + wanted > chunks_[current_].size) {
            ++current_;
            used_ = 0;
        }
        if (current_ == chunks_.size()) {
            const size_t size = std::max(kChunk, wanted);
            void* data = std::aligned_alloc(64, size);
            if (!data) throw std::bad_alloc();
            chunks_.push_back({static_cast<char*>(data), size});
        }
        void* at = chunks_[current_].data + used_;
        used_ += wanted;
        return at;
    }

    std::vector<Chunk> chunks_;
    size_t current_ = 0, used_ = 0;
};

}  // namespace rorqual
