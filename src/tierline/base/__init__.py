"""What three packages need and no domain owns: errors, units, names, files, hashes, random streams."""
