#pragma once

#include "ort.h"

namespace dsx {

// 登记 dsx::LightningIndexer。
void add_lightning_indexer(Ort::CustomOpDomain& domain);

}  // namespace dsx
