"""Processes, signals, memory and the environment they run in."""
