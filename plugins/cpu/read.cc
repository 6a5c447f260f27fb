// 读内存的探针：dsx bench 用它量这台机器每秒读得动多少。只有普通的循环：编译器用基线指令集展开，已经受限于内存。
#include <cstddef>
#include <cstdint>

#include "prefetch.h"

#if defined(_WIN32)
#define DSX_EXPORT __declspec(dllexport)
#else
#define DSX_EXPORT __attribute__((visibility("default")))
#endif

namespace {

// 一次读几个字：四条 cache line，累加器之间互不等待；提前这么多个字取。
constexpr size_t kLineWords = 8, kWords = 4 * kLineWords, kAhead = 512;

}  // namespace

extern "C" {

// 把 bytes 字节（256 的倍数之外的尾巴不读）顺着读一遍；返回值只为编译器不把它省掉。
DSX_EXPORT uint64_t dsx_cpu_read(const void* data, size_t bytes) {
    const auto* words = static_cast<const uint64_t*>(data);
    uint64_t sums[kWords] = {};
    for (size_t i = 0; i + kWords <= bytes / sizeof(uint64_t); i += kWords) {
        for (size_t line = 0; line < kWords; line += kLineWords) {
            prefetch(words + i + line + kAhead);
        }
        for (size_t j = 0; j < kWords; ++j) {
            sums[j] ^= words[i + j];
        }
    }
    uint64_t total = 0;
    for (const uint64_t sum : sums) {
        total ^= sum;
    }
    return total;
}

}  // extern "C"
