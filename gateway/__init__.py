"""HTTP in, HTTP out. To the broker it is a caller like any other."""
