"""One claim per module: a frozen `Config`, and `run(config, out)` that writes what `report` reads."""
