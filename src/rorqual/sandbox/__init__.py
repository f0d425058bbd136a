"""Sandboxes for code nobody has read: functions and containers behind one contract.

Start with `Sandbox.create` (async) or `SyncSandbox.create`. No torch, nothing of the engine.
"""
