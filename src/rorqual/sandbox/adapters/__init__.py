"""Sandboxes in the shapes other projects expect; each file needs that project's package."""
