"""Measurements that print their own conditions; run each module with ``python -m``."""
