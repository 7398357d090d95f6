"""Storage and eviction: where the tokens of a stream lie, and what one forward pass does to them. Knows no model."""
