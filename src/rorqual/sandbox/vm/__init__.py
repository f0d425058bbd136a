"""Full virtual machines: any guest disk on a standard PC under QEMU."""
