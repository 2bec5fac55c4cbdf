"""A base model: where it comes from, loaded whole, its structure, its weights one at a time."""
