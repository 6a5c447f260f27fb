#pragma once

#include "ort.h"

namespace dsx {

// 登记 dsx::Int8Linear、dsx::Int4Linear。
void add_quant_linear(Ort::CustomOpDomain& domain);

}  // namespace dsx
