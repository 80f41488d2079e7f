"""Bytes that survive the machine."""
