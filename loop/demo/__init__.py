"""The embedded default: a small pretrained BLOOM and 563 aphorisms."""
