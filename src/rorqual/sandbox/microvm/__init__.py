"""Guest machines under QEMU: kernels, templates, and the microvm substrate."""
