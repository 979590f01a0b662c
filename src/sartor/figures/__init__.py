"""The figures of a Panda run: columns and arrays in, a `Figure` out; None if there is nothing to draw."""
