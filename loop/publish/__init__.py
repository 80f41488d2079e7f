"""An adapter to the Hub: `python -m loop.publish`."""
