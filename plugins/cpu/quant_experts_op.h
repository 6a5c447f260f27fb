#pragma once

#include "ort.h"

namespace dsx {

// 登记 dsx::Int8Experts、dsx::Int4Experts。
void add_quant_experts(Ort::CustomOpDomain& domain);

}  // namespace dsx
