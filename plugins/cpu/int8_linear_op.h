#pragma once

#include "ort.h"

namespace dsx {

// 登记 dsx::Int8Linear。
void add_int8_linear(Ort::CustomOpDomain& domain);

}  // namespace dsx
