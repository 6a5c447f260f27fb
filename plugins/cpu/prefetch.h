// 预取的提示：取不取、地址在不在缓存里，都不影响结果。
#pragma once

namespace {

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
