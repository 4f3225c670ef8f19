"""The commands, a file each, and the bundled model."""
