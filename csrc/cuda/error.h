// Text of what a launcher returned.
#pragma once

namespace qirl::cuda {

const char* error_text(int error);

}  // namespace qirl::cuda
