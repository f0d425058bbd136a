"""The trajectory log: what was asked of a sandbox and what came of it, so that it can go on."""
