// A few threads that sleep until there is work, and the caller working beside them.
//
// Workers wait on a condition variable and never spin: on a shared machine a spinning thread takes
// the very core its partner needs. Waking costs some microseconds, so callers pass a grain that
// makes a piece worth more than that; work of one piece runs inline.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace rorqual {

class ThreadPool {
public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // Threads that may work at once, the caller included. Worker numbers are below it.
    int size() const { return static_cast<int>(threads_.size()) + 1; }

    // Calls f(begin, end, worker) over pieces of [0, n) of at most `grain`, in any order, on any
    // worker; returns when all are done. Rethrows the first exception. Not reentrant: f must not
    // call run.
    template <class F>
    void run(int64_t n, const F& f, int64_t grain) {
        if (n <= 0) return;
        if (threads_.empty() || n <= grain) {
            f(int64_t{0}, n, 0);
            return;
        }
        start(n, grain, &f, [](const void* self, int64_t begin, int64_t end, int worker) {
            (*static_cast<const F*>(self))(begin, end, worker);
        });
    }

private:
    ThreadPool() = default;

    using Call = void (*)(const void*, int64_t, int64_t, int);
    void start(int64_t n, int64_t grain, const void* self, Call call);
    void work(int worker);
    void loop(int worker);

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    int tickets_ = 0;  // helpers the current job still has room for
    int running_ = 0;  // helpers at work
    bool stop_ = false;
    // One job at a time.
    int64_t n_ = 0, grain_ = 1;
    const void* self_ = nullptr;
    Call call_ = nullptr;
    std::atomic<int64_t> next_{0};
    std::exception_ptr error_;
};

}  // namespace rorqual
