"""How a fixed mix becomes one update a module: one file a method, one module at a time."""
