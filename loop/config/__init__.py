"""What is asked: every knob, and how a command line sets it."""
