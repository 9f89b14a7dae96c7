"""Triton kernels: one file per op, kernels then launchers. Importing a file needs no driver.

The launchers have the names and the signatures of the C++ backend's raw operators; `_launch.py`
starts, records or interprets every kernel, `_config.py` says with which block sizes.
"""
