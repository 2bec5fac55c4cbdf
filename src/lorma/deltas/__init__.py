"""Any adapter or run as its layers: W0 and what is added to it, one layer at a time."""
