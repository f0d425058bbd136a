"""The control plane: many sandboxes of one machine behind HTTP."""
