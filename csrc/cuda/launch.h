// What the status of a launcher means, for the bindings, which see no CUDA header.
#pragma once

namespace llmops::cuda {

// CUDA's own words: "invalid configuration argument".
const char* launch_error(int status);

}  // namespace llmops::cuda
