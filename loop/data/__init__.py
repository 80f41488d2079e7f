"""A row becomes a batch."""
