"""From a recipe to a run directory: assembling models, methods and data for transformers' Trainer."""
