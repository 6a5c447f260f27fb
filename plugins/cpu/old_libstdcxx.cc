// 让库也能装进 libstdc++ 旧的系统：wheel 因此能标成 manylinux_2_28，与 ONNX Runtime 自己的相同。
//
// GCC 11 起，标准容器的分配器在个数溢出时调用这个函数，而它只在 GCC 11 以上的 libstdc++ 里有（GLIBCXX_3.4.29）。
// 自己带一份，名字直接写成修饰之后的：标准库的声明定了默认可见，按 C++ 写会把它也导出去。
#if defined(__linux__)
#include <new>

extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void _ZSt28__throw_bad_array_new_lengthv() {
    throw std::bad_array_new_length();
}
#endif
