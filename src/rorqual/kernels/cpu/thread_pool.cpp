#include "thread_pool.h"

#include <algorithm>

namespace rorqual {

// Delegates, so that the destructor joins those that run when the system has no more threads.
ThreadPool::ThreadPool(int num_threads) : ThreadPool() {
    for (int worker = 1; worker < num_threads; ++worker)
        threads_.emplace_back([this, worker] { loop(worker); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::start(int64_t n, int64_t grain, const void* self, Call call) {
    const int64_t pieces = (n + grain - 1) / grain;
    const int helpers = static_cast<int>(std::min<int64_t>(pieces - 1, threads_.size()));
    {
        std::lock_guard lock(mutex_);
        n_ = n;
        grain_ = grain;
        self_ = self;
        call_ = call;
        next_ = 0;
        error_ = nullptr;
        tickets_ = helpers;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    work(0);
    std::unique_lock lock(mutex_);
    tickets_ = 0;  // nothing is left for those that have not woken yet
    done_.wait(lock, [this] { return running_ == 0; });
    if (error_) std::rethrow_exception(error_);
}

void ThreadPool::work(int worker) {
    try {
        for (;;) {
            const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (begin >= n_) return;
            call_(self_, begin, std::min(begin + grain_, n_), worker);
        }
    } catch (...) {
        next_ = n_;
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
    }
}

void ThreadPool::loop(int worker) {
    std::unique_lock lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return stop_ || tickets_ > 0; });
        if (stop_) return;
        --tickets_;
        ++running_;
        lock.unlock();
        work(worker);
        lock.lock();
        if (--running_ == 0) done_.notify_one();
    }
}

}  // namespace rorqual
