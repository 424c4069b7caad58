"""The mathematics of a search for bit allocations: the exact choice within budgets, and the surrogate that proposes."""
