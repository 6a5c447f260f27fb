#pragma once

#include "ort.h"

namespace dsx {

// 登记 dsx::Int8Experts。
void add_int8_experts(Ort::CustomOpDomain& domain);

}  // namespace dsx
