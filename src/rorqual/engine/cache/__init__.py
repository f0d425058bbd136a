"""What sequences leave behind, kept so that nobody computes it twice: in memory and on disk."""
