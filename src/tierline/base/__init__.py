"""What three packages need and no domain owns: errors, units, names, files, random streams."""
