"""The frozen base, the adapter on it, and the forward to a summed loss."""
