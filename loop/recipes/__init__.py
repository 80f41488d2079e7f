"""Run configs by name, for --config."""
