"""Pure functions on columns: what a save or a load has to do, and nothing that does it."""
