"""What a compression run will read, need and write, from metadata alone."""
