#include "cpu/parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

namespace cachegen {
namespace {

struct Job {
    int64_t num_items;
    ItemFunction function;
    void* body;
    int free_places;  // workers that may still join; the fields from here on belong to the pool's mutex
    int num_working = 0;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < num_items;) function(body, item);
    }
};

// Threads wait for jobs; several callers may have jobs at once. The pool is never destroyed: its threads sleep when the
// process ends.
class ThreadPool {
  public:
    void run(Job& job) {
        std::unique_lock<std::mutex> lock(mutex_);
        try {
            for (; num_threads_ < job.free_places; ++num_threads_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // The system has no more threads: those that are there do the work.
        }
        const auto entry = jobs_.insert(jobs_.end(), &job);
        lock.unlock();
        has_job_.notify_all();
        job.work();
        lock.lock();
        jobs_.erase(entry);
        is_done_.wait(lock, [&] { return job.num_working == 0; });
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            const auto entry = std::find_if(jobs_.begin(), jobs_.end(), [](Job* job) { return job->free_places > 0; });
            if (entry == jobs_.end()) {
                has_job_.wait(lock);
                continue;
            }
            Job& job = **entry;
            --job.free_places;
            ++job.num_working;
            lock.unlock();
            job.work();
            lock.lock();
            // The caller may end the job as soon as the lock is released: nothing touches it afterwards.
            if (--job.num_working == 0) is_done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable has_job_, is_done_;
    std::list<Job*> jobs_;
    int num_threads_ = 0;
};

ThreadPool& pool() {
    // A forked child has none of its parent's threads: it gets a pool of its own.
    static std::atomic<ThreadPool*> current{nullptr};
    static std::atomic<pid_t> owner{0};
    static std::mutex creation;
    if (owner.load() != getpid()) {
        std::lock_guard<std::mutex> guard(creation);
        if (owner.load() != getpid()) {
            current.store(new ThreadPool);
            owner.store(getpid());
        }
    }
    return *current.load();
}

}  // namespace

void run_parallel(int64_t num_items, int num_threads, ItemFunction function, void* body) {
    const int64_t num_workers = std::min<int64_t>(num_items, num_threads);
    if (num_workers <= 1) {
        for (int64_t item = 0; item < num_items; ++item) function(body, item);
        return;
    }
    Job job{num_items, function, body, static_cast<int>(num_workers - 1)};
    pool().run(job);
}

}  // namespace cachegen
