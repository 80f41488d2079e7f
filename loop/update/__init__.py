"""The adapter moves."""
