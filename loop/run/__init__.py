"""Before step 0, beside the steps, and the end."""
