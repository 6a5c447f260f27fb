#pragma once

#include <cstdint>
#include <functional>

namespace dsx {

// parallel(n, task)：把 task(0) … task(n-1) 分给各线程，全部做完才返回。
using Parallel = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

}  // namespace dsx
