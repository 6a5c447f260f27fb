// 预取的提示：取不取、地址在不在缓存里，都不影响结果。
#pragma once

#include <cstdint>

namespace {

// 往后 bytes 字节的地址；可以在那块内存之外，所以按整数算。
inline const void* ahead(const void* from, int64_t bytes) {
    return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes));
}

// Locality：2 是取进 L2，3 是取进 L1。
template <int Locality = 2>
inline void prefetch(const void* line) {
#if defined(__GNUC__)
    __builtin_prefetch(line, 0, Locality);
#else
    (void)line;
#endif
}

}  // namespace
