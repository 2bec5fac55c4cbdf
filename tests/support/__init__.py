"""What works on which kind of layer: feature × inflation × side × kind, observed and written to docs/support.md."""
