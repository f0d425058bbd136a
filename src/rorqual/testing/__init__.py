"""Stand-ins for the expensive parts, shipped so that everything above them can be tested."""
