"""What may be believed of a run that is over."""
