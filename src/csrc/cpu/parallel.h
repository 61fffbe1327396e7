// A parallel loop over independent items, on threads that are kept.
//
// Starting a thread costs as much as decoding ten thousand values, and a kept thread keeps its scratch memory warm.

#pragma once

#include <cstdint>
#include <type_traits>

namespace cachegen {

// What a worker calls with an item's index. No std::function: the body lives on the caller's stack.
using ItemFunction = void (*)(void* body, int64_t item);

// Run function(body, item) for every item below num_items on the calling thread and up to num_threads - 1 others.
void run_parallel(int64_t num_items, int num_threads, ItemFunction function, void* body);

// Run body(item) for every item below num_items on up to num_threads threads. The body must not throw. Which thread
// takes which item is not determined; what is computed must not depend on it.
template <class Body>
void parallel_for(int64_t num_items, int num_threads, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_parallel(
        num_items, num_threads, [](void* pointer, int64_t item) { (*static_cast<Plain*>(pointer))(item); }, &body);
}

}  // namespace cachegen
