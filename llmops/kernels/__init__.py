"""The Triton kernels, from kernels/triton in the source tree, as llmops.kernels.triton."""
