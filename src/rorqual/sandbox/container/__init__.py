"""Containers: an OCI runtime, control groups, an overlay, and the agent as first process."""
