"""A run directory: its recipe, its metrics, what it has trained; one reader and one writer."""
