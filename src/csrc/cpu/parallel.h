// A parallel loop over independent items.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace cachegen {

// Run body(item, worker) for every item below num_items on up to num_threads threads. The body must not throw. Which
// worker takes which item is not determined; what is computed must not depend on it.
template <class Body>
void parallel_for(int64_t num_items, int num_threads, Body&& body) {
    const int num_workers = static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_items, 1)));
    std::atomic<int64_t> next{0};
    const auto work = [&](int worker) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < num_items;) body(item, worker);
    };
    std::vector<std::thread> threads;
    threads.reserve(num_workers - 1);
    for (int worker = 1; worker < num_workers; ++worker) threads.emplace_back(work, worker);
    work(0);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace cachegen
