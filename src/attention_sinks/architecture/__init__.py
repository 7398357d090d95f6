"""How a model tells positions apart, found out from its config alone."""
