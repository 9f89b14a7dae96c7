"""Triton kernels, one file per op: kernels, then launcher. Installed as llmops.kernels.triton; the
folder above has no __init__.py, since `kernels` is another project's package name."""
