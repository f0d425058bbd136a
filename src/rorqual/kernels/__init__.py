"""Numerical kernels: ``reference`` defines correct; faster paths must agree with it."""
