// Launcher of rows.cu.
#pragma once

#include <stdint.h>

namespace qirl::cuda {

// *loss = mean of terms [rows], added in turn. A cudaError_t.
int mean_of_rows(const double* terms, int64_t rows, float* loss, void* stream);

}  // namespace qirl::cuda
