"""The V4 network: config, modules, per-sequence state, checkpoints and cost formulas."""
