"""Parts of the networks."""
